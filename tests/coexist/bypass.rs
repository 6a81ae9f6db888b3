//! Packets that Cilium's programs send on past the node's stack: with BPF host routing a pod's answers
//! go from its link's ingress straight to the uplink, and packets for it from the uplink into the pod.
//! Netfilter never sees the answers, so that its rules cannot translate them back.

use std::net::{IpAddr, SocketAddr};

use portmap::demo::matrix::{Place, Source};
use portmap::demo::topology::{Lab, Shape, UPLINK};
use portmap::demo::traffic::{Call, Failure, Transport};
use portmap::model::Family;

use crate::rig::{
    Container, INSIDE, PORT, SILENCE, Stage, TIMEOUT, TRANSPORTS, all, assert_calls, client,
    mapped, reaches,
};
use crate::standins::{Cilium, Way, link};
use crate::support::{Node, RULES, Variant};

/// Pod-a's answers to the outside client leave by the uplink at once; with `peer`, packets for pod-a
/// that come in by the uplink get to it as well.
fn bypass(cilium: &Cilium, lab: &Lab, peer: bool) {
    let pod = &lab.pods[0];
    let mac: [u8; 6] = link(&pod.netns, "eth0").mac.try_into().unwrap();
    for family in &lab.options.families {
        let client = lab.client_address(*family);
        cilium.send_on(&lab.node, &pod.host_link, client, &Way::Neighbour(UPLINK));
        if peer {
            let own = pod.address(*family).unwrap();
            cilium.send_on(&lab.node, UPLINK, own, &Way::Peer(&pod.host_link, mac));
        }
    }
    cilium.take_pod(&lab.node, &pod.host_link);
    cilium.take_uplink(&lab.node, UPLINK);
}

/// Calls from outside, to the pod itself and to its hostPort.
fn calls(lab: &Lab) -> [Vec<portmap::demo::matrix::Case>; 2] {
    let to = |address: &dyn Fn(Family) -> IpAddr, port| {
        let families = lab.options.families.iter();
        let one = |family: &Family| {
            reaches(Place::Client, address(*family), port, "pod-a", client(lab, *family))
        };
        families.flat_map(one).collect()
    };
    let pod = |family| lab.pods[0].address(family).unwrap();
    [to(&pod, INSIDE), to(&|family| lab.node_address(family), PORT)]
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn host_ports_work_where_answers_never_meet_netfilter() {
    for peer in [false, true] {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, Variant::Ebpf);
        let cilium = Cilium::load();
        bypass(&cilium, lab, peer);
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        container.add();
        let [direct, forwarded] = calls(lab);
        assert_calls("direct", lab, direct);
        let before = cilium.runs("cil_from_container");
        assert_calls("forwarded", lab, forwarded);
        assert!(cilium.runs("cil_from_container") > before);
        let from_pod = lab.options.families.iter().flat_map(|family| {
            reaches(Place::Pod(1), lab.node_address(*family), PORT, "pod-a", Source::Any)
        });
        assert_calls("from the other pod", lab, from_pod.collect());
        container.check();
    }
}

/// What the test above shows would be nothing if rules could do it too.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn rules_cannot_translate_answers_that_they_never_see() {
    for variant in RULES {
        for peer in [false, true] {
            let stage = Stage::new(Shape::Cilium);
            let lab = &stage.lab;
            let node = Node::new(&lab.node, variant);
            let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
            container.add();
            let [direct, forwarded] = calls(lab);
            assert_calls("without Cilium's programs", lab, forwarded);
            bypass(&Cilium::load(), lab, peer);
            assert_calls("direct", lab, direct);
            for family in &lab.options.families {
                let target = SocketAddr::new(lab.node_address(*family), PORT);
                let pod = SocketAddr::new(lab.pods[0].address(*family).unwrap(), INSIDE);
                let calls = TRANSPORTS.map(|transport| {
                    let answered = transport == Transport::UdpUnconnected;
                    let patience = if answered { TIMEOUT } else { SILENCE };
                    (&lab.client, Call::new(transport, target, patience))
                });
                for (result, (_, call)) in all(&calls).into_iter().zip(calls) {
                    let expected = match call.transport {
                        Transport::UdpUnconnected => Failure::WrongSource(pod),
                        _ => Failure::TimedOut,
                    };
                    assert_eq!(result.unwrap_err(), expected, "{variant:?} {call:?}");
                }
            }
            container.del();
        }
    }
}

/// A limit: the hook that would translate the answer is that of the calling pod's link, which is left
/// out. Cilium does so only where it replaces kube-proxy, and then has hostPorts of its own.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn answers_that_are_put_into_a_calling_pod_are_not_translated() {
    let stage = Stage::new(Shape::Cilium);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    let cilium = Cilium::load();
    let [called, calling] = [&lab.pods[0], &lab.pods[1]];
    let mac: [u8; 6] = link(&calling.netns, "eth0").mac.try_into().unwrap();
    for family in &lab.options.families {
        let ip = calling.address(*family).unwrap();
        let way = Way::Peer(&calling.host_link, mac);
        cilium.send_on(&lab.node, &called.host_link, ip, &way);
    }
    let calls = |patience| -> Vec<_> {
        let families = lab.options.families.iter();
        let targets = families.map(|family| SocketAddr::new(lab.node_address(*family), PORT));
        let call = |target| {
            [Transport::Tcp, Transport::Udp]
                .map(|by| (&calling.netns, Call::new(by, target, patience)))
        };
        targets.flat_map(call).collect()
    };
    assert!(all(&calls(TIMEOUT)).into_iter().all(|result| result.unwrap().server == "pod-a"));
    cilium.take_pod(&lab.node, &called.host_link);
    // With filters, and then with tcx, which takes their place now.
    for _ in 0..2 {
        for result in all(&calls(SILENCE)) {
            assert_eq!(result.unwrap_err(), Failure::TimedOut);
        }
        container.add();
    }
    container.check();
}
