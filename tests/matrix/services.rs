//! hostPorts take nothing that is not theirs: neither a Service's port on the node (CVE-2019-9946),
//! nor packets that only pass through (CVE-2025-67499).

use std::net::{IpAddr, SocketAddr};

use portmap::demo::matrix::{Case, Place, Source};
use portmap::demo::server::Servers;
use portmap::demo::topology::Shape;
use portmap::model::Family;
use serde_json::json;

use crate::rig::{Container, INSIDE, PORT, Stage, assert_calls, client, mapped, reaches, shell};
use crate::support::{Node, Variant};

/// How a Service is made, and how it goes.
struct Proxy {
    make: String,
    remove: String,
}

/// kube-proxy's way since nftables: base chains of its own at the priority of dstnat.
fn nftables_proxy(stage: &Stage) -> Proxy {
    let make = Family::ALL.map(|family| {
        let (ip, address, target) = service(stage, family);
        let rules = ["tcp", "udp"].map(|protocol| {
            format!("{ip} daddr {address} {protocol} dport {PORT} dnat to {target};")
        });
        let chain = |hook| {
            format!("chain {hook} {{ type nat hook {hook} priority -100; {} }}", rules.join(" "))
        };
        format!("table {ip} kube-proxy {{ {}\n{}\n}}", chain("prerouting"), chain("output"))
    });
    Proxy {
        make: format!("nft '{}'", make.join("\n")),
        remove: "nft delete table ip kube-proxy; nft delete table ip6 kube-proxy".into(),
    }
}

/// kube-proxy's way with iptables: a chain that is jumped to first. `how` is `-A` or `-I`.
fn iptables_proxy(stage: &Stage, how: &str) -> Proxy {
    let (mut make, mut remove) = (Vec::new(), Vec::new());
    for family in Family::ALL {
        let (_, address, target) = service(stage, family);
        let nat = match family {
            Family::V4 => "iptables -w -t nat",
            Family::V6 => "ip6tables -w -t nat",
        };
        make.push(format!("{nat} -N KUBE-SERVICES"));
        for protocol in ["tcp", "udp"] {
            make.push(format!(
                "{nat} -A KUBE-SERVICES -d {address} -p {protocol} --dport {PORT} -j DNAT --to-destination {target}"
            ));
        }
        for chain in ["PREROUTING", "OUTPUT"] {
            make.push(format!("{nat} {how} {chain} -j KUBE-SERVICES"));
            remove.push(format!("{nat} -D {chain} -j KUBE-SERVICES"));
        }
        remove.push(format!("{nat} -F KUBE-SERVICES; {nat} -X KUBE-SERVICES"));
    }
    Proxy { make: make.join("; "), remove: remove.join("; ") }
}

/// The Service is on the node's address and the hostPort's number, and leads to pod-b.
fn service(stage: &Stage, family: Family) -> (&'static str, IpAddr, SocketAddr) {
    let name = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    let target = SocketAddr::new(stage.lab.pods[1].address(family).unwrap(), INSIDE);
    (name, stage.lab.node_address(family), target)
}

/// Calls from outside (PREROUTING) and from the node (OUTPUT) to the Service's address and to the
/// node's other one.
fn calls(stage: &Stage, at_service: &str) -> Vec<Case> {
    let lab = &stage.lab;
    let mut cases = Vec::new();
    for family in Family::ALL {
        let (own, second) = (lab.node_address(family), lab.second_node_address(family));
        cases.extend(reaches(Place::Client, own, PORT, at_service, client(lab, family)));
        cases.extend(reaches(Place::Node, own, PORT, at_service, Source::Node));
        cases.extend(reaches(Place::Client, second, PORT, "pod-a", client(lab, family)));
    }
    cases
}

/// The Service is there before or comes after; either way it has its port until it goes.
fn service_wins(variant: Variant, proxy: impl Fn(&Stage, bool) -> Proxy) {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, variant);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let before = node.snapshot();
    for service_first in [true, false] {
        let proxy = proxy(&stage, service_first);
        if service_first {
            node.shell(&proxy.make);
            container.add();
        } else {
            container.add();
            assert_calls("the hostPort alone", lab, calls(&stage, "pod-a"));
            node.shell(&proxy.make);
        }
        let what = format!("Service first: {service_first}");
        assert_calls(&what, lab, calls(&stage, "pod-b"));
        container.check();
        node.shell(&proxy.remove);
        assert_calls("without the Service", lab, calls(&stage, "pod-a"));
        container.del();
        node.assert_clean(&before);
    }
}

/// Rules of two tools at one priority would be a matter of chance: the pair is only proved where
/// this plugin uses nft itself.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_service_of_nftables_wins_over_nftables() {
    service_wins(Variant::Nftables, |stage, _| nftables_proxy(stage));
}

/// Packets meet eBPF's hooks before netfilter's, and the node's own sockets call the pod before there is
/// a packet: of a Service and a hostPort of one number on one address the hostPort is reached, until it
/// goes. On an address that is not the node's the Service has its port.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_host_port_of_ebpf_goes_before_a_service() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let before = node.snapshot();
    for proxy in [nftables_proxy(&stage), iptables_proxy(&stage, "-I")] {
        node.shell(&proxy.make);
        container.add();
        assert_calls("both", lab, calls(&stage, "pod-a"));
        container.check();
        container.del();
        let mut cases = calls(&stage, "pod-b");
        cases.retain(|case| case.server == "pod-b");
        assert_calls("the Service alone", lab, cases);
        node.shell(&proxy.remove);
        node.assert_clean(&before);
    }
}

on_each_variant_with_rules! {
    fn a_service_of_iptables_wins(variant: Variant) {
        // A proxy that starts later puts itself first; one that was there is not overtaken.
        service_wins(variant, |stage, first| {
            iptables_proxy(stage, if first { "-A" } else { "-I" })
        });
    }
}

on_each_variant! {
    fn passing_traffic_is_left_alone(variant: Variant) {
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let _servers = [
            lab.pods[1].serve(&[PORT], &[PORT]).unwrap(),
            Servers::start(&lab.client, "client", &[PORT], &[PORT]).unwrap(),
        ];
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        container.add();
        let mut cases = Vec::new();
        for family in Family::ALL {
            let [a, b] = [0, 1].map(|pod| lab.pods[pod].address(family).unwrap());
            let outside = lab.client_address(family);
            // To another pod, out of the node, and from the node: only the number is the hostPort's.
            cases.extend(reaches(Place::Client, b, PORT, "pod-b", client(lab, family)));
            cases.extend(reaches(Place::Pod(0), b, PORT, "pod-b", Source::Kept(a)));
            cases.extend(reaches(Place::Pod(0), outside, PORT, "client", Source::Kept(a)));
            cases.extend(reaches(Place::Node, b, PORT, "pod-b", Source::Node));
            cases.extend(reaches(Place::Node, outside, PORT, "client", Source::Node));
            let own = lab.node_address(family);
            cases.extend(reaches(Place::Client, own, PORT, "pod-a", client(lab, family)));
        }
        assert_calls("passing traffic", lab, cases);
        container.check();
        container.del();
        node.assert_clean(&before);
    }

    /// A Service may lead to the very port that a hostPort leads to. Its connections are not the
    /// hostPort's: they keep their source, whatever `masqAll` says.
    fn a_service_of_the_same_pod_keeps_its_sources(variant: Variant) {
        const VIRTUAL: u16 = 443;
        const NODE_PORT: u16 = 30080;
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        for (family, cluster_ip) in [(Family::V4, "10.96.0.10"), (Family::V6, "fd00:96::10")] {
            let (ip, address, _) = service(&stage, family);
            let target = SocketAddr::new(lab.pods[0].address(family).unwrap(), INSIDE);
            let rules = ["tcp", "udp"].map(|protocol| {
                format!(
                    "{ip} daddr {cluster_ip} {protocol} dport {VIRTUAL} dnat to {target}\n\
                     {ip} daddr {address} {protocol} dport {NODE_PORT} dnat to {target}"
                )
            });
            node.shell(&format!(
                "nft 'table {ip} kube-proxy {{\nchain services {{\n\
                 type nat hook prerouting priority -110;\n{}\n}}\n}}'",
                rules.join("\n")
            ));
            shell(&lab.client, &format!("ip route add {cluster_ip} via {address}"));
        }
        let before = node.snapshot();
        for masq_all in [false, true] {
            let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE))
                .with("masqAll", json!(masq_all));
            container.add();
            let mut cases = Vec::new();
            for (family, cluster_ip) in [(Family::V4, "10.96.0.10"), (Family::V6, "fd00:96::10")] {
                let cluster_ip: IpAddr = cluster_ip.parse().unwrap();
                let neighbour = Source::Kept(lab.pods[1].address(family).unwrap());
                let own = lab.node_address(family);
                let outside = client(lab, family);
                cases.extend(reaches(Place::Client, cluster_ip, VIRTUAL, "pod-a", outside));
                cases.extend(reaches(Place::Pod(1), cluster_ip, VIRTUAL, "pod-a", neighbour));
                cases.extend(reaches(Place::Client, own, NODE_PORT, "pod-a", outside));
            }
            assert_calls(&format!("masqAll: {masq_all}"), lab, cases);
            container.del();
            node.assert_clean(&before);
        }
    }
}
