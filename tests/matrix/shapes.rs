//! The whole life of two pods with hostPorts, on every wiring that common networks use.

use portmap::demo::matrix::Place;
use portmap::demo::topology::{Options, Shape};
use portmap::model::Family;

use crate::rig::{
    Container, INSIDE, PORT, Stage, assert_calls, assert_unmapped, every_path, mapped, pod_seen,
    reaches, shell,
};
use crate::support::{Node, Variant};

/// Two pods with hostPorts of their own are added, called on every path, checked and deleted; the
/// other's hostPort goes on.
fn whole_life(variant: Variant, stage: &Stage) {
    let lab = &stage.lab;
    let node = Node::new(&lab.node, variant);
    let before = node.snapshot();
    let ports = [PORT, PORT + 1];
    let containers = [0, 1].map(|pod| Container::new(&node, lab, pod, mapped(ports[pod], INSIDE)));
    let paths = [0, 1].map(|pod| every_path(variant, lab, pod, ports[pod]));
    containers.iter().for_each(Container::add);
    assert_calls("after ADD", lab, paths.concat());
    containers.iter().for_each(Container::check);
    containers[0].del();
    assert_unmapped("after DEL", lab, &paths[0]);
    assert_calls("after another's DEL", lab, paths[1].clone());
    containers[1].check();
    containers[1].del();
    assert_unmapped("after the last DEL", lab, &paths[1]);
    node.assert_clean(&before);
}

fn one_family(variant: Variant, shape: Shape, family: Family) {
    let bypass = shape == Shape::Cilium;
    let stage = Stage::with(Options { shape, families: vec![family], pods: 2, bypass });
    hairpin(&stage);
    whole_life(variant, &stage);
}

/// Whether frames of a bridge meet iptables. Kernels without br_netfilter have one behaviour only, that
/// of no.
fn bridge_calls_iptables(stage: &Stage, calls: bool) {
    for tool in ["iptables", "ip6tables"] {
        let key = format!("bridge/bridge-nf-call-{tool}");
        if calls || stage.lab.node.sysctl(&key).is_ok() {
            let value = if calls { "1" } else { "0" };
            stage.lab.node.set_sysctl(&key, value).expect("modprobe br_netfilter");
        }
    }
}

/// With br_netfilter a pod's call to itself is turned round inside the bridge, which drops it unless
/// the port may send back what it received (`hairpinMode` of CNI's bridge plugin).
fn hairpin(stage: &Stage) {
    if stage.lab.options.shape == Shape::Bridge {
        for pod in &stage.lab.pods {
            let link = &pod.host_link;
            shell(&stage.lab.node, &format!("ip link set dev {link} type bridge_slave hairpin on"));
        }
    }
}

on_each_variant! {
    /// cilium#9784: /32 and /128 addresses, and replies between pods that go past the host's stack.
    fn cilium_with_bypass(variant: Variant) {
        whole_life(variant, &Stage::bypassing());
    }

    fn ptp(variant: Variant) {
        whole_life(variant, &Stage::new(Shape::Ptp));
    }

    fn bridge(variant: Variant) {
        let stage = Stage::new(Shape::Bridge);
        bridge_calls_iptables(&stage, false);
        whole_life(variant, &stage);
    }

    fn bridge_with_br_netfilter(variant: Variant) {
        let stage = Stage::new(Shape::Bridge);
        bridge_calls_iptables(&stage, true);
        hairpin(&stage);
        whole_life(variant, &stage);
    }

    /// Pods of both kinds on one node, and every way between them.
    fn ptp_and_bridge(variant: Variant) {
        let mut options = Options::new(Shape::Mixed);
        options.pods = 4;
        let stage = Stage::with(options);
        bridge_calls_iptables(&stage, false);
        whole_life(variant, &stage);
    }

    fn ipv4_only(variant: Variant) {
        one_family(variant, Shape::Cilium, Family::V4);
    }

    fn ipv6_only(variant: Variant) {
        one_family(variant, Shape::Cilium, Family::V6);
    }
}

/// Whichever address of the node they call, pods of both kinds are seen as themselves, and so they see
/// each other in their answers.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn every_pod_calls_every_address() {
    let mut options = Options::new(Shape::Mixed);
    options.pods = 4;
    let stage = Stage::with(options);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    let ports = [PORT, PORT + 1];
    let containers = [0, 1].map(|pod| Container::new(&node, lab, pod, mapped(ports[pod], INSIDE)));
    containers.iter().for_each(Container::add);
    // The bridge's gateway and that of the others.
    let bridge = ["10.0.3.254", "fd00:30::fe"].map(|ip| ip.parse().unwrap());
    let mut cases = Vec::new();
    for (family, bridge) in Family::ALL.into_iter().zip(bridge) {
        let own = [lab.node_address(family), lab.second_node_address(family), lab.gateway(family)];
        for ip in own.into_iter().chain([bridge]) {
            assert!(lab.is_node_address(ip));
            for (called, port) in ports.iter().enumerate() {
                let server = &lab.pods[called].name;
                for caller in 0..lab.pods.len() {
                    let seen = pod_seen(Variant::Ebpf, lab, caller, called, family);
                    cases.extend(reaches(Place::Pod(caller), ip, *port, server, seen));
                }
            }
        }
    }
    assert_calls("every address", lab, cases);
    containers.iter().for_each(Container::del);
    node.assert_clean(&before);
}

/// The tools differ in families no more than shown above: here it is the wiring that differs.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn rules_for_one_family_on_the_other_shapes() {
    for family in Family::ALL {
        one_family(Variant::IptablesNft, Shape::Ptp, family);
        one_family(Variant::Nftables, Shape::Bridge, family);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_for_one_family_on_the_other_shapes() {
    for family in Family::ALL {
        one_family(Variant::Ebpf, Shape::Ptp, family);
        one_family(Variant::Ebpf, Shape::Bridge, family);
    }
}
