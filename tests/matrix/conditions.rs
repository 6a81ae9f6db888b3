//! `conditionsV4` and `conditionsV6`: further matches, in the syntax of the backend, which bind to
//! their attachment alone.

use std::net::{IpAddr, SocketAddr};

use portmap::demo::matrix::{Expect, Place, Source};
use portmap::demo::topology::Shape;
use portmap::demo::traffic::{Call, Failure, Transport};
use portmap::model::Family;
use serde_json::{Value, json};

use crate::rig::{
    Container, INSIDE, PORT, Stage, TIMEOUT, TRANSPORTS, all, assert_calls, bound, every_path,
    mapped, shell,
};
use crate::support::{Node, Variant};

/// The client's addresses: that of the laboratory, and one more.
fn sources(stage: &Stage, family: Family) -> [IpAddr; 2] {
    let own = stage.lab.client_address(family);
    let second = match own {
        IpAddr::V4(ip) => IpAddr::from((ip.to_bits() + 1).to_be_bytes()),
        IpAddr::V6(ip) => IpAddr::from((ip.to_bits() + 1).to_be_bytes()),
    };
    [own, second]
}

fn add_second_address(stage: &Stage) {
    for family in Family::ALL {
        let [_, second] = sources(stage, family);
        let address = format!("{second}/{}", family.max_prefix());
        shell(&stage.lab.client, &format!("ip address add {address} dev eth0"));
    }
}

/// Matches one source, or all others, in the variant's syntax.
fn from(variant: Variant, source: IpAddr, negated: bool) -> Value {
    let family = if source.is_ipv4() { "ip" } else { "ip6" };
    let source = source.to_string();
    match (variant, negated) {
        (Variant::Nftables, false) => json!([family, "saddr", source]),
        (Variant::Nftables, true) => json!([family, "saddr", "!=", source]),
        (_, false) => json!(["-s", source]),
        (_, true) => json!(["!", "-s", source]),
    }
}

/// Who answers each of the client's addresses; `None` is a refusal.
fn assert_answers(what: &str, stage: &Stage, family: Family, expected: [Option<&str>; 2]) {
    let target: SocketAddr = stage.lab.node_socket(family, PORT);
    for (source, expected) in sources(stage, family).into_iter().zip(expected) {
        // Only connected sockets hear of a refusal.
        let transports = if expected.is_some() { &TRANSPORTS[..] } else { &TRANSPORTS[..2] };
        let calls: Vec<(_, Call)> = transports
            .iter()
            .map(|transport| (&stage.lab.client, bound(*transport, source, target, TIMEOUT)))
            .collect();
        for (result, transport) in all(&calls).into_iter().zip(transports) {
            let who = format!("{what}: {source} by {transport} to {target}");
            match (expected, result) {
                (Some(server), Ok(reply)) => {
                    assert_eq!((reply.server.as_str(), reply.seen.ip()), (server, source), "{who}");
                }
                (None, Err(Failure::Refused)) => {}
                (_, result) => panic!("{who}: {expected:?} expected, was {result:?}"),
            }
        }
    }
}

on_each_variant_with_rules! {
    fn only_packets_that_meet_them_are_forwarded(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        add_second_address(&stage);
        let node = Node::new(&stage.lab.node, variant);
        let before = node.snapshot();
        for (family, key) in [(Family::V4, "conditionsV4"), (Family::V6, "conditionsV6")] {
            let other = Family::ALL.into_iter().find(|other| *other != family).unwrap();
            let [_, second] = sources(&stage, family);
            for (negated, expected) in
                [(false, [None, Some("pod-a")]), (true, [Some("pod-a"), None])]
            {
                let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE))
                    .with(key, from(variant, second, negated));
                let what = container.config[key].to_string();
                container.add();
                assert_answers(&what, &stage, family, expected);
                assert_answers(&what, &stage, other, [Some("pod-a"); 2]);
                container.check();
                container.del();
                node.assert_clean(&before);
            }
        }
    }

    /// Two networks share a port, each for its own callers.
    fn two_networks_on_one_port(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        add_second_address(&stage);
        let node = Node::new(&stage.lab.node, variant);
        let before = node.snapshot();
        let networks = || {
            [0, 1].map(|pod| {
                let mut container = Container::new(&node, &stage.lab, pod, mapped(PORT, INSIDE));
                for (family, key) in [(Family::V4, "conditionsV4"), (Family::V6, "conditionsV6")] {
                    let source = sources(&stage, family)[pod];
                    container = container.with(key, from(variant, source, false));
                }
                container.config["name"] = json!(format!("network-{pod}"));
                container
            })
        };
        let assert_both = |what: &str, expected| {
            for family in Family::ALL {
                assert_answers(what, &stage, family, expected);
            }
        };
        for first in [0, 1] {
            let containers = networks();
            let last = 1 - first;
            containers[first].add();
            containers[last].add();
            assert_both("both", [Some("pod-a"), Some("pod-b")]);
            containers.iter().for_each(Container::check);
            containers[first].del();
            let left = if last == 0 { [Some("pod-a"), None] } else { [None, Some("pod-b")] };
            assert_both("one", left);
            containers[last].check();
            containers[last].del();
            assert_both("none", [None, None]);
            node.assert_clean(&before);
        }
    }

    /// An attachment without conditions takes what the others leave.
    fn the_rest_goes_to_whoever_has_none(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        add_second_address(&stage);
        let node = Node::new(&stage.lab.node, variant);
        let before = node.snapshot();
        let [_, second] = sources(&stage, Family::V4);
        let all_callers = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
        let one_caller = Container::new(&node, &stage.lab, 1, mapped(PORT, INSIDE))
            .with("name", json!("picky"))
            .with("conditionsV4", from(variant, second, false));
        all_callers.add();
        one_caller.add();
        assert_answers("both", &stage, Family::V4, [Some("pod-a"), Some("pod-b")]);
        one_caller.check();
        one_caller.del();
        assert_answers("one", &stage, Family::V4, [Some("pod-a"); 2]);
        // The newest goes first, and this one leaves nothing over.
        one_caller.add();
        all_callers.del();
        all_callers.add();
        assert_answers("newest", &stage, Family::V4, [Some("pod-a"); 2]);
        all_callers.check();
        all_callers.del();
        assert_answers("one caller", &stage, Family::V4, [None, Some("pod-b")]);
        one_caller.check();
        one_caller.del();
        node.assert_clean(&before);
    }

    /// Upstream's own example spares an address of the node. Beside it the options about sources
    /// mean what they mean alone, on every path.
    fn the_other_options_hold_beside_them(variant: Variant) {
        let stage = Stage::bypassing();
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let spare = |family| {
            let address = lab.second_node_address(family).to_string();
            match (variant, family) {
                (Variant::Nftables, Family::V4) => json!(["ip", "daddr", "!=", address]),
                (Variant::Nftables, Family::V6) => json!(["ip6", "daddr", "!=", address]),
                _ => json!(["!", "-d", address]),
            }
        };
        let option_sets = [json!({}), json!({"masqAll": true}), json!({"markMasqBit": 9}),
            json!({"masqAll": true, "markMasqBit": 9})];
        for options in option_sets {
            let mut container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
            for (key, value) in options.as_object().unwrap() {
                container = container.with(key, value.clone());
            }
            for (family, key) in [(Family::V4, "conditionsV4"), (Family::V6, "conditionsV6")] {
                container = container.with(key, spare(family));
            }
            container.add();
            let mut cases = every_path(variant, lab, 0, PORT);
            let spared = Family::ALL.map(|family| lab.second_node_address(family));
            for case in cases.iter_mut().filter(|case| case.from == Place::Client) {
                if spared.contains(&case.target.ip()) {
                    case.expect = Expect::LeftAlone;
                } else if options["masqAll"] == true {
                    case.expect = Expect::Reached(Source::Node);
                }
            }
            cases.retain(|case| {
                case.expect != Expect::LeftAlone || case.transport != Transport::UdpUnconnected
            });
            assert_calls(&options.to_string(), lab, cases);
            container.check();
            container.del();
            node.assert_clean(&before);
        }
    }
}

/// Conditions in another backend's syntax are refused before anything is changed. eBPF has none.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_other_syntax_is_an_error() {
    let stage = Stage::new(Shape::Cilium);
    let caller = stage.lab.client_address(Family::V4);
    for (variant, syntax) in [
        (Variant::Nftables, Variant::IptablesNft),
        (Variant::IptablesNft, Variant::Nftables),
        (Variant::Ebpf, Variant::IptablesNft),
        (Variant::Ebpf, Variant::Nftables),
    ] {
        let node = Node::new(&stage.lab.node, variant);
        let before = node.snapshot();
        let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE))
            .with("conditionsV4", from(syntax, caller, false));
        let (code, text) = node.fails("ADD", &container.config, &container.attachment);
        assert_eq!(code, 7, "{text}");
        assert!(text.contains("conditionsV4"), "{text}");
        node.assert_clean(&before);
        let call = Call::new(Transport::Tcp, stage.lab.node_socket(Family::V4, PORT), TIMEOUT);
        assert_eq!(all(&[(&stage.lab.client, call)]), [Err(Failure::Refused)]);
    }
}
