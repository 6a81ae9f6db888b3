//! Damage to the rules: CHECK names it, and the next ADD repairs it, or `portmap restore`.
//!
//! Damage to what all attachments share is repaired by whichever ADD comes next; damage to an
//! attachment's own rules by its own. Run as root: `cargo test --test heal -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "heal/ebpf.rs"]
mod ebpf;
mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use portmap::demo::plugin::Attachment;
use portmap::demo::server::Servers;
use portmap::demo::snapshot::Snapshot;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use portmap::record::chain_name;
use serde_json::{Value, json};
use support::bare::{attachment, mapping};
use support::{IPTABLES, Node, VARIANTS, Variant, bare, prev_result};

const TIMEOUT: Duration = Duration::from_millis(900);

/// Whose ADD repairs it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// Any attachment's.
    Any,
    /// Its own.
    Own,
}

struct Damage {
    /// Commands that do it. `CHAIN` is pod-a's chain, `LINK` its link, `POD` its address.
    script: &'static str,
    /// What CHECK's message must contain.
    named: &'static str,
    by: By,
    /// Commands that take away what is foreign, and not ours to remove.
    after: &'static str,
}

const fn damage(by: By, named: &'static str, script: &'static str) -> Damage {
    Damage { script, named, by, after: "" }
}

const IPTABLES_DAMAGES: [Damage; 25] = [
    damage(By::Any, "PREROUTING", "iptables -t nat -F"),
    damage(By::Any, "PREROUTING", "ip6tables -t nat -F"),
    damage(
        By::Any,
        "CHAIN",
        "for t in iptables ip6tables; do for n in nat raw; do $t -t $n -F; $t -t $n -X; done; done",
    ),
    damage(
        By::Any,
        "PREROUTING",
        "iptables -t nat -D PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
    ),
    damage(
        By::Any,
        "OUTPUT",
        "iptables -t nat -D OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
    ),
    damage(
        By::Any,
        "OUTPUT",
        "ip6tables -t nat -D OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
    ),
    damage(
        By::Any,
        "POSTROUTING",
        "iptables -t nat -D POSTROUTING -m comment --comment 'CNI portfwd requiring masquerade' -j CNI-HOSTPORT-MASQ",
    ),
    damage(By::Any, "CNI-HOSTPORT-MASQ", "iptables -t nat -F CNI-HOSTPORT-MASQ"),
    damage(By::Any, "CNI-HOSTPORT-SETMARK", "iptables -t nat -F CNI-HOSTPORT-SETMARK"),
    damage(By::Any, "CNI-HOSTPORT-SETMARK", "ip6tables -t nat -F CNI-HOSTPORT-SETMARK"),
    damage(
        By::Any,
        "PORTMAP-NEIGHBOURS",
        "iptables -t nat -D PREROUTING -m addrtype --dst-type LOCAL -j PORTMAP-NEIGHBOURS",
    ),
    damage(By::Any, "PORTMAP-LOOPBACK", "ip6tables -t nat -D OUTPUT -d ::1 -j PORTMAP-LOOPBACK"),
    damage(By::Any, "PORTMAP-LOOPBACK", "ip6tables -t nat -F PORTMAP-LOOPBACK"),
    damage(By::Any, "PORTMAP-GUARD", "iptables -t raw -F PREROUTING"),
    damage(By::Any, "PORTMAP-GUARD", "iptables -t raw -F PORTMAP-GUARD"),
    damage(By::Own, "PORTMAP-NEIGHBOURS", "iptables -t nat -F PORTMAP-NEIGHBOURS"),
    damage(
        By::Own,
        "tcp 0.0.0.0:8080 -> POD:80 expected, found nothing",
        "iptables -t nat -F CHAIN",
    ),
    damage(
        By::Own,
        "udp 0.0.0.0:8080 -> POD:53 expected, found nothing",
        "iptables -t nat -D CHAIN -p udp -m udp --dport 8080 -j DNAT --to-destination POD:53",
    ),
    damage(
        By::Own,
        "CNI-HOSTPORT-SETMARK",
        "iptables -t nat -D CHAIN -s 127.0.0.1/32 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK",
    ),
    damage(
        By::Own,
        "expected, found 10.9.9.9:80",
        "iptables -t nat -R CHAIN 3 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.9.9.9:80",
    ),
    damage(
        By::Own,
        "10.9.9.9",
        "iptables -t nat -I CHAIN -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.9.9.9:80",
    ),
    damage(
        By::Own,
        "CNI-HOSTPORT-DNAT of table nat has no rule",
        "iptables -t nat -F CNI-HOSTPORT-DNAT",
    ),
    Damage {
        after: "iptables -t nat -D CNI-HOSTPORT-DNAT -j RETURN",
        ..damage(By::Own, "`-j RETURN`", "iptables -t nat -I CNI-HOSTPORT-DNAT -j RETURN")
    },
    Damage {
        after: "iptables -t nat -D CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.9.9.9:80",
        ..damage(
            By::Own,
            "10.9.9.9",
            "iptables -t nat -I CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.9.9.9:80",
        )
    },
    ROUTE_LOCALNET,
];

const ROUTE_LOCALNET: Damage =
    damage(By::Own, "route_localnet", "echo 0 > /proc/sys/net/ipv4/conf/LINK/route_localnet");

const NFT_DAMAGES: [Damage; 18] = [
    damage(By::Any, "table inet portmap", "nft flush ruleset"),
    damage(By::Any, "table inet portmap", "nft delete table inet portmap"),
    damage(By::Any, "chain", "nft flush table inet portmap"),
    damage(By::Any, "hostports", "nft flush chain inet portmap hostports"),
    damage(By::Any, "prerouting", "nft flush chain inet portmap prerouting"),
    damage(By::Any, "output", "nft flush chain inet portmap output"),
    damage(By::Any, "postrouting", "nft flush chain inet portmap postrouting"),
    damage(By::Any, "masq4", "nft flush chain inet portmap masq4"),
    damage(By::Any, "guard", "nft flush chain inet portmap guard"),
    damage(
        By::Any,
        "guard",
        "nft flush chain inet portmap guard; nft delete chain inet portmap guard",
    ),
    damage(By::Any, "foreign", "nft insert rule inet portmap hostports return"),
    damage(
        By::Own,
        "tcp . 8080 in any4_addr of table inet portmap: expected POD, found nothing",
        "nft delete element inet portmap any4_addr { tcp . 8080 }",
    ),
    damage(
        By::Own,
        "udp . 8080 in any4_port of table inet portmap: expected port 53, found nothing",
        "nft delete element inet portmap any4_port { udp . 8080 }",
    ),
    damage(
        By::Own,
        "tcp . 8080 in any6_addr",
        "nft delete element inet portmap any6_addr { tcp . 8080 }",
    ),
    damage(
        By::Own,
        "tcp . 8080 in any4_addr",
        "nft delete element inet portmap any4_addr { tcp . 8080 }; nft add element inet portmap any4_addr { tcp . 8080 : 10.9.9.9 }",
    ),
    damage(By::Own, "neighbours4", "nft flush set inet portmap neighbours4"),
    damage(By::Own, "in any4_addr", "nft flush map inet portmap any4_addr"),
    ROUTE_LOCALNET,
];

/// A node with two pods that have mappings and a third one to come.
struct Scene<'a> {
    lab: &'a Lab,
    node: Node<'a>,
    pods: Vec<(Value, Attachment)>,
    _servers: Vec<Servers>,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab, variant: Variant) -> Self {
        let node = Node::new(&lab.node, variant);
        let pods = (0..3)
            .map(|number: usize| {
                let port = 8080 + u16::try_from(number).unwrap();
                let mut mappings = vec![mapping(port, 80, "tcp")];
                if number == 0 {
                    mappings.push(mapping(port, 53, "udp"));
                }
                let config = node.config(json!(mappings), prev_result(lab, number, "1.0.0"));
                (config, support::attachment(&lab.pods[number], &format!("container-{number}")))
            })
            .collect();
        let servers = lab.pods.iter().map(|pod| pod.serve(&[80], &[53]).unwrap()).collect();
        Scene { lab, node, pods, _servers: servers }
    }

    fn ok(&self, verb: &str, pod: usize) {
        let (config, attachment) = &self.pods[pod];
        self.node.ok(verb, config, attachment);
    }

    /// Fills in what differs from pod to pod and from run to run.
    fn filled(&self, text: &str) -> String {
        let pod = &self.lab.pods[0];
        text.replace("CHAIN", &chain_name("portmap", "container-0"))
            .replace("LINK", &pod.host_link)
            .replace("POD", &pod.address(Family::V4).unwrap().to_string())
            .replace("NODE", &self.lab.node_address(Family::V4).to_string())
    }

    /// Fails the test unless a pod is reached on every path.
    fn assert_reached(&self, pod: usize, what: &str) {
        let port = 8080 + u16::try_from(pod).unwrap();
        let lab = self.lab;
        let mut paths = vec![(&lab.node, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))];
        for family in &lab.options.families {
            let target = lab.node_socket(*family, port);
            // From outside, from the pod itself and from its neighbour.
            let from = [&lab.client, &lab.pods[pod].netns, &lab.pods[1 - pod].netns, &lab.node];
            paths.extend(from.map(|netns| (netns, target)));
        }
        for (from, target) in paths {
            let transports = [Transport::Tcp, Transport::Udp];
            for transport in transports.into_iter().take(if pod == 0 { 2 } else { 1 }) {
                let reply = reach(from, Call::new(transport, target, TIMEOUT));
                let reply = reply.unwrap_or_else(|failure| {
                    panic!("{what}: {} to {transport} {target}: {failure}", from.name())
                });
                assert_eq!(reply.server, lab.pods[pod].name, "{what}");
                if from.name() == lab.client.name() {
                    assert_eq!(reply.seen.ip(), lab.client_address(Family::of(&target.ip())));
                }
            }
        }
    }

    fn suffer(&self, damage: &Damage) {
        let what = format!("{:?}, {}", self.node.variant, damage.script);
        self.node.shell(&self.filled(damage.script));
        let (config, attachment) = &self.pods[0];
        let (code, text) = self.node.fails("CHECK", config, attachment);
        let named = self.filled(damage.named);
        assert!(code == 102 && text.contains(&named), "{what}: no {named:?} in {code} {text}");
        match damage.by {
            By::Any => self.ok("ADD", 2),
            By::Own => self.ok("ADD", 0),
        }
        self.ok("CHECK", 0);
        if damage.by == By::Any {
            self.ok("CHECK", 1);
            self.ok("CHECK", 2);
            self.assert_reached(1, &what);
            self.ok("DEL", 2);
        }
        self.assert_reached(0, &what);
        self.node.shell(&format!(":; {}", self.filled(damage.after)));
        if damage.by == By::Own {
            // What the damage took from others comes back by their own ADD.
            self.ok("ADD", 1);
            self.ok("CHECK", 1);
        }
        self.node.shell(&self.filled(damage.script));
        self.restored(&what);
        self.node.shell(&format!(":; {}", self.filled(damage.after)));
    }

    /// No runtime calls: everybody who is alive has everything again, and a second time nothing is left
    /// to do.
    fn restored(&self, what: &str) {
        let first = self.node.restore(false).stdout;
        assert!(first.contains("repaired container container-0"), "{what}: {first}");
        self.ok("CHECK", 0);
        self.ok("CHECK", 1);
        let second = self.node.restore(false).stdout;
        assert_eq!(second.lines().last(), Some("2 attachments, 0 repaired"), "{what}: {second}");
    }
}

fn hold(variant: Variant, damages: &[Damage]) {
    let mut options = Options::new(Shape::Cilium);
    options.pods = 3;
    let lab = Lab::build(options).unwrap();
    let scene = Scene::new(&lab, variant);
    let before = scene.node.snapshot();
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    let whole = scene.node.snapshot();
    for damage in damages {
        scene.suffer(damage);
    }
    // No repair has made anything twice.
    let sorted = |snapshot: &Snapshot| {
        let mut lines: Vec<String> = snapshot.rules.values().flatten().cloned().collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&scene.node.snapshot()), sorted(&whole), "{variant:?}");
    scene.ok("DEL", 1);
    scene.ok("DEL", 0);
    scene.node.assert_clean(&before);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn check_names_and_add_repairs_damage_to_iptables_nft() {
    hold(Variant::IptablesNft, &IPTABLES_DAMAGES);
    hold(Variant::IptablesNft, &[damage(By::Any, "CHAIN", "nft flush ruleset")]);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn check_names_and_add_repairs_damage_to_iptables_legacy() {
    hold(Variant::IptablesLegacy, &IPTABLES_DAMAGES);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn check_names_and_add_repairs_damage_to_nftables() {
    hold(Variant::Nftables, &NFT_DAMAGES);
}

/// A dual-stack pod on a node without pods.
fn bare_pod(node: &Node, last: u16) -> Value {
    let mappings = json!([mapping(8000 + last, 80, "tcp"), mapping(8000 + last, 53, "udp")]);
    let addresses = [format!("198.18.2.{last}/32"), format!("fd00:18::{last}/128")];
    node.config(mappings, bare::prev_result(&[&addresses[0], &addresses[1]]))
}

/// After a flush, attachments may also just leave.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn del_works_on_flushed_tables_and_heals_who_stays() {
    for variant in VARIANTS {
        let netns = bare::netns();
        let node = Node::new(&netns, variant);
        let before = node.snapshot();
        let flush = match variant {
            Variant::IptablesLegacy => {
                "for t in iptables ip6tables; do for n in nat raw; do $t -t $n -F; $t -t $n -X; done; done"
            }
            _ => "nft flush ruleset",
        };
        node.ok("ADD", &bare_pod(&node, 10), &attachment("one"));
        node.ok("ADD", &bare_pod(&node, 11), &attachment("two"));
        node.shell(flush);
        node.ok("DEL", &bare_pod(&node, 10), &attachment("one"));
        node.ok("CHECK", &bare_pod(&node, 11), &attachment("two"));
        node.shell(flush);
        node.ok("DEL", &bare_pod(&node, 11), &attachment("two"));
        node.assert_clean(&before);
    }
}

/// Such an attachment can come to no good, but others must come and go, and so must it.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_external_mark_chain_that_is_flushed_away_hinders_nobody_else() {
    for variant in IPTABLES {
        let netns = bare::netns();
        let node = Node::new(&netns, variant);
        let before = node.snapshot();
        let make = "iptables -t nat -N MARKER; ip6tables -t nat -N MARKER";
        let mut config = bare_pod(&node, 10);
        config["externalSetMarkChain"] = json!("MARKER");
        let (marked, other) = (attachment("marked"), attachment("other"));
        node.shell(make);
        node.ok("ADD", &config, &marked);
        node.shell("for t in iptables ip6tables; do $t -t nat -F; $t -t nat -X; done");
        node.ok("ADD", &bare_pod(&node, 11), &other);
        node.ok("CHECK", &bare_pod(&node, 11), &other);
        let (code, text) = node.fails("CHECK", &config, &marked);
        assert!(code == 102 && text.contains("CNI-DN-"), "{code} {text}");
        node.shell(make);
        node.ok("ADD", &config, &marked);
        node.ok("CHECK", &config, &marked);
        node.shell("for t in iptables ip6tables; do $t -t nat -F; $t -t nat -X; done");
        node.ok("DEL", &bare_pod(&node, 11), &other);
        node.ok("DEL", &config, &marked);
        node.assert_clean(&before);
    }
}
