//! Options that say whose source address is rewritten, and how: `snat`, `masqAll`, `markMasqBit`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use portmap::demo::matrix::{Expect, Place, Source};
use portmap::demo::snapshot::pins;
use portmap::demo::topology::{Options, Shape};
use portmap::demo::traffic::{Call, Failure, Transport};
use portmap::model::Family;
use serde_json::json;

use crate::rig::{
    Container, INSIDE, PORT, Stage, TIMEOUT, all, assert_calls, assert_unmapped, bound, client,
    every_path, mapped, own_address_towards, reaches,
};
use crate::support::{IPTABLES, Node, Variant};

/// A call of pod-a to its own hostPort by a socket that takes answers from anywhere.
fn to_itself(stage: &Stage) -> Result<IpAddr, Failure> {
    let target = stage.lab.node_socket(Family::V4, PORT);
    let call = Call::new(Transport::UdpUnconnected, target, TIMEOUT);
    all(&[(&stage.lab.pods[0].netns, call)]).remove(0).map(|reply| reply.seen.ip())
}

on_each_variant_with_rules! {
    /// `snat: false` leaves every source as it is, also where the answer is then lost.
    fn without_snat_nothing_is_rewritten(variant: Variant) {
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let pod = &lab.pods[0];
        // The kernel refuses a packet that comes in with the pod's own address as its source. With
        // this the pod takes it, and by its answer shows what it saw.
        pod.netns.set_sysctl("ipv4/conf/eth0/accept_local", "1").unwrap();
        let own = pod.address(Family::V4).unwrap();
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();

        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        container.add();
        let seen = to_itself(&stage).unwrap();
        assert!(lab.is_node_address(seen), "by default the pod sees {seen} of the node");
        container.del();

        let container = container.with("snat", json!(false));
        container.add();
        assert_eq!(
            to_itself(&stage),
            Err(Failure::WrongSource(SocketAddr::new(own, INSIDE))),
            "the pod answered its own address directly"
        );
        let mut cases = Vec::new();
        for family in Family::ALL {
            let neighbour = Source::Kept(lab.pods[1].address(family).unwrap());
            let ip = lab.node_address(family);
            cases.extend(reaches(Place::Client, ip, PORT, "pod-a", client(lab, family)));
            cases.extend(reaches(Place::Pod(1), ip, PORT, "pod-a", neighbour));
            cases.extend(reaches(Place::Node, ip, PORT, "pod-a", Source::Node));
        }
        assert_calls("snat: false", lab, cases.clone());
        let localnet = format!("ipv4/conf/{}/route_localnet", pod.host_link);
        assert_eq!(lab.node.sysctl(&localnet).unwrap(), "0", "127.0.0.1 cannot work without snat");
        container.check();
        container.del();
        assert_unmapped("after DEL", lab, &cases);
        node.assert_clean(&before);
    }

    /// The node needs no masquerading of its own calls: the pod sees the address that was called, as
    /// the kernel chooses it, or the one that the caller has chosen. Neighbours need it.
    fn the_node_is_not_taken_for_a_neighbour(variant: Variant) {
        let stage = Stage::bypassing();
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        for (key, value) in [("snat", json!(true)), ("markMasqBit", json!(5))] {
            let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE)).with(key, value);
            container.add();
            for family in Family::ALL {
                let target = lab.node_socket(family, PORT);
                let second = lab.second_node_address(family);
                for transport in [Transport::Tcp, Transport::Udp] {
                    let calls = [
                        (&lab.node, Call::new(transport, target, TIMEOUT)),
                        (&lab.node, bound(transport, second, target, TIMEOUT)),
                    ];
                    let seen: Vec<_> =
                        all(&calls).into_iter().map(|reply| reply.unwrap().seen.ip()).collect();
                    assert_eq!(seen, [target.ip(), second], "{key}, {transport}");
                }
            }
            assert_calls(key, lab, every_path(variant, lab, 0, PORT));
            container.check();
            container.del();
        }
    }

    /// The bit of the packet mark can be chosen; two attachments may choose differently.
    fn mark_bits_of_one_s_own(variant: Variant) {
        let stage = Stage::bypassing();
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let containers = [(0, 5), (1, 27)].map(|(pod, bit)| {
            let port = PORT + u16::try_from(pod).unwrap();
            let mut container = Container::new(&node, lab, pod, mapped(port, INSIDE));
            container = container.with("markMasqBit", json!(bit));
            container.config["name"] = json!(format!("network-{bit}"));
            container
        });
        containers[0].add();
        containers[1].add();
        let listing = node.shell(match variant {
            Variant::Nftables => "nft list ruleset",
            _ => "iptables -t nat -S",
        });
        for bit in [5, 27] {
            let mark = 1_u32 << bit;
            let spellings = [format!("{mark:#x}/{mark:#x}"), format!("{mark:#010x}")];
            assert!(
                spellings.iter().any(|spelling| listing.contains(spelling)),
                "no mark {mark:#x} in:\n{listing}"
            );
        }
        let paths = [every_path(variant, lab, 0, PORT), every_path(variant, lab, 1, PORT + 1)];
        assert_calls("markMasqBit", lab, paths.concat());
        containers.iter().for_each(Container::check);
        containers[0].del();
        assert_unmapped("after DEL", lab, &paths[0]);
        assert_calls("after the other's DEL", lab, paths[1].clone());
        containers[1].check();
        containers[1].del();
        node.assert_clean(&before);
    }
}

on_each_variant! {
    /// `masqAll: true` rewrites every source of a hostPort's connections, and of no other ones.
    fn masq_all_is_for_host_ports_alone(variant: Variant) {
        let stage = Stage::bypassing();
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let container =
            Container::new(&node, lab, 0, mapped(PORT, INSIDE)).with("masqAll", json!(true));
        container.add();
        let mut paths = every_path(variant, lab, 0, PORT);
        for case in &mut paths {
            if case.expect != Expect::LeftAlone {
                case.expect = Expect::Reached(Source::Node);
            }
        }
        let mut cases = paths.clone();
        for family in Family::ALL {
            let ip = lab.pods[0].address(family).unwrap();
            let neighbour = Source::Kept(lab.pods[1].address(family).unwrap());
            cases.extend(reaches(Place::Client, ip, INSIDE, "pod-a", client(lab, family)));
            cases.extend(reaches(Place::Pod(1), ip, INSIDE, "pod-a", neighbour));
        }
        assert_calls("masqAll: true", lab, cases);
        container.check();
        container.del();
        assert_unmapped("after DEL", lab, &paths);
        node.assert_clean(&before);
    }

    /// `snat: false` goes before `masqAll: true`.
    fn without_snat_nothing_is_masqueraded(variant: Variant) {
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE))
            .with("snat", json!(false))
            .with("masqAll", json!(true));
        container.add();
        let mut cases = Vec::new();
        for family in Family::ALL {
            let neighbour = Source::Kept(lab.pods[1].address(family).unwrap());
            let ip = lab.node_address(family);
            cases.extend(reaches(Place::Client, ip, PORT, "pod-a", client(lab, family)));
            cases.extend(reaches(Place::Pod(1), ip, PORT, "pod-a", neighbour));
            cases.extend(reaches(Place::Node, ip, PORT, "pod-a", Source::Node));
        }
        assert_calls("snat: false, masqAll: true", lab, cases);
        container.check();
        container.del();
    }

    /// Direct traffic between pods, and to them, is none of the plugin's business.
    fn direct_traffic_keeps_its_source(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        container.add();
        let mut cases = Vec::new();
        for family in Family::ALL {
            let ip = lab.pods[0].address(family).unwrap();
            let neighbour = Source::Kept(lab.pods[1].address(family).unwrap());
            cases.extend(reaches(Place::Client, ip, INSIDE, "pod-a", client(lab, family)));
            cases.extend(reaches(Place::Pod(1), ip, INSIDE, "pod-a", neighbour));
        }
        assert_calls("direct traffic", lab, cases);
        container.del();
    }
}

/// eBPF rewrites no source that it could leave: without `snat` every path is what it was, and
/// `markMasqBit` is the bit of a mark that no packet needs.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_does_without_marks_and_masquerading() {
    let stage = Stage::bypassing();
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    for (key, value) in [("snat", json!(false)), ("markMasqBit", json!(5))] {
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE)).with(key, value);
        container.add();
        node.snapshot().same_rules(&before).unwrap();
        let paths = every_path(Variant::Ebpf, lab, 0, PORT);
        assert_calls(key, lab, paths.clone());
        container.check();
        container.del();
        assert_unmapped(key, lab, &paths);
        node.assert_clean(&before);
    }
}

/// By eBPF the pod sees the address by which the node itself would call it, on every wiring.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_shows_the_node_s_address_towards_the_pod() {
    for shape in [Shape::Ptp, Shape::Bridge, Shape::Mixed] {
        let mut options = Options::new(shape);
        options.pods = 4;
        let stage = Stage::with(options);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, Variant::Ebpf);
        let before = node.snapshot();
        let containers = [0, 1].map(|pod| {
            Container::new(&node, lab, pod, mapped(PORT + pod as u16, INSIDE))
                .with("masqAll", json!(true))
        });
        containers.iter().for_each(Container::add);
        let mut cases = Vec::new();
        for pod in [0, 1] {
            for mut case in every_path(Variant::Ebpf, lab, pod, PORT + pod as u16) {
                let to = lab.pods[pod].address(Family::of(&case.target.ip())).unwrap();
                case.expect = Expect::Reached(own_address_towards(&node, to));
                cases.push(case);
            }
        }
        assert_calls("masqAll: true", lab, cases);
        containers.iter().for_each(Container::check);
        containers.iter().for_each(Container::del);
        node.assert_clean(&before);
    }
}

/// What only netfilter can do is refused, before anything is changed.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_has_no_chains() {
    let stage = Stage::new(Shape::Ptp);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let before = node.snapshot();
    let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE))
        .with("externalSetMarkChain", json!("KUBE-MARK-MASQ"));
    let (code, text) = node.fails("ADD", &container.config, &container.attachment);
    assert_eq!(code, 7, "{text}");
    assert!(text.contains("externalSetMarkChain"), "{text}");
    node.assert_clean(&before);
    assert_eq!(pins(&stage.lab.node).unwrap(), Vec::<PathBuf>::new());
}

/// `externalSetMarkChain`: somebody else's chain marks, and their rule masquerades.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_chain_of_others_marks() {
    for variant in IPTABLES {
        let stage = Stage::bypassing();
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        for nat in ["iptables -w -t nat", "ip6tables -w -t nat"] {
            node.shell(&format!(
                "{nat} -N KUBE-MARK-MASQ; {nat} -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000; \
                 {nat} -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE"
            ));
        }
        let before = node.snapshot();
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE))
            .with("externalSetMarkChain", json!("KUBE-MARK-MASQ"));
        container.add();
        let own = node.shell("iptables -t nat -S");
        assert!(!own.contains("CNI-HOSTPORT-SETMARK"), "no mark of its own:\n{own}");
        let paths = every_path(variant, lab, 0, PORT);
        assert_calls("externalSetMarkChain", lab, paths.clone());
        container.check();
        container.del();
        assert_unmapped("after DEL", lab, &paths);
        node.assert_clean(&before);
    }
}
