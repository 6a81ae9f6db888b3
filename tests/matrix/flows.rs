//! What eBPF remembers of connections when claims come and go under them: what leads where it led is
//! kept, and everything else forgotten.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use portmap::backend::ebpf::layout::{FlowKey, FlowValue};
use portmap::demo::topology::{Lab, Shape};
use portmap::demo::traffic::{Call, Session, Transport};
use portmap::model::Family;
use serde_json::{Value, json};
use zerocopy::FromBytes;

use crate::rig::{Container, INSIDE, PORT, Stage, TIMEOUT, mapped, mapped_at};
use crate::support::entries::maps;
use crate::support::{Node, Variant};

/// Where remembered connections from outside lead, by protocol and what was called.
fn flows(lab: &Lab) -> BTreeMap<(u8, SocketAddr), SocketAddr> {
    let (_, flows) = maps(&lab.node).unwrap();
    let entries = flows.flows.entries().unwrap();
    entries
        .iter()
        .map(|(key, value)| {
            (FlowKey::read_from_bytes(key).unwrap(), FlowValue::read_from_bytes(value).unwrap())
        })
        .filter(|(_, value)| value.owner != 0)
        .map(|(key, value)| {
            let called = value.called(&key);
            let called = SocketAddr::new(called.addr.ip(), called.port());
            ((key.protocol, called), key.target())
        })
        .collect()
}

fn open(lab: &Lab, transport: Transport, target: SocketAddr, server: &str) -> Session {
    let mut session = Session::open(&lab.client, Call::new(transport, target, TIMEOUT)).unwrap();
    assert_eq!(session.ask().unwrap().server, server);
    session
}

const TCP: u8 = 6;
const UDP: u8 = 17;

#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_attachment_that_gives_up_a_port_keeps_the_others() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    let [first, second] = [PORT, PORT + 1];
    let both = [mapped(first, INSIDE), mapped(second, INSIDE)].concat();
    let mut container = Container::new(&node, lab, 0, both);
    container.add();
    let mut sessions = Vec::new();
    let mut expected = BTreeMap::new();
    for family in Family::ALL {
        let pod = SocketAddr::new(lab.pods[0].address(family).unwrap(), INSIDE);
        for (transport, number) in [(Transport::Tcp, TCP), (Transport::Udp, UDP)] {
            for port in [first, second] {
                let target = lab.node_socket(family, port);
                sessions.push((port, number, open(lab, transport, target, "pod-a")));
                expected.insert((number, target), pod);
            }
        }
    }
    assert_eq!(flows(lab), expected);
    // The first port goes by TCP, and stays by UDP.
    let left: Vec<Value> = [mapped(second, INSIDE), mapped(first, INSIDE)[1..].to_vec()].concat();
    container.config["runtimeConfig"]["portMappings"] = json!(left);
    container.add();
    let stays = |protocol: u8, port: u16| protocol == UDP || port == second;
    expected.retain(|(protocol, called), _| stays(*protocol, called.port()));
    assert_eq!(flows(lab), expected);
    for (port, protocol, session) in &mut sessions {
        if stays(*protocol, *port) {
            assert_eq!(session.ask().unwrap().server, "pod-a");
        }
    }
    container.del();
    assert_eq!(flows(lab), BTreeMap::new());
    node.assert_clean(&before);
}

/// Two attachments lead to one port of one pod: that the newer one goes ends nothing of the older one.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn two_attachments_of_one_pod_have_their_own() {
    let stage = Stage::new(Shape::Bridge);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    let older = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let newer =
        Container::new(&node, lab, 0, mapped(PORT + 1, INSIDE)).with("name", json!("newer"));
    older.add();
    let target = lab.node_socket(Family::V4, PORT);
    let pod = SocketAddr::new(lab.pods[0].address(Family::V4).unwrap(), INSIDE);
    let mut session = open(lab, Transport::Tcp, target, "pod-a");
    let one = BTreeMap::from([((TCP, target), pod)]);
    newer.add();
    assert_eq!(flows(lab), one);
    let other = lab.node_socket(Family::V4, PORT + 1);
    drop(open(lab, Transport::Tcp, other, "pod-a"));
    newer.del();
    assert_eq!(flows(lab), one);
    assert_eq!(session.ask().unwrap().server, "pod-a");
    older.check();
    older.del();
    node.assert_clean(&before);
}

/// The claim of an address takes over what called it, and leaves connections to other addresses alone.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_claim_of_an_address_takes_its_own() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    for family in Family::ALL {
        let any = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        let specific = lab.node_address(family);
        let one = Container::new(&node, lab, 1, mapped_at(&specific.to_string(), PORT, INSIDE));
        let pod = SocketAddr::new(lab.pods[0].address(family).unwrap(), INSIDE);
        let [first, second] =
            [specific, lab.second_node_address(family)].map(|ip| SocketAddr::new(ip, PORT));
        // The pod gives up on what the other family's turn has left without a hostPort, and its peer answers that.
        let flows_of_family = || {
            let mut flows = flows(lab);
            flows.retain(|(_, called), _| Family::of(&called.ip()) == family);
            flows
        };
        any.add();
        let mut taken = open(lab, Transport::Udp, first, "pod-a");
        let mut kept = open(lab, Transport::Tcp, second, "pod-a");
        assert_eq!(flows_of_family(), BTreeMap::from([((UDP, first), pod), ((TCP, second), pod)]));
        one.add();
        assert_eq!(flows_of_family(), BTreeMap::from([((TCP, second), pod)]));
        assert_eq!(taken.ask().unwrap().server, "pod-b");
        assert_eq!(kept.ask().unwrap().server, "pod-a");
        one.del();
        assert_eq!(flows_of_family(), BTreeMap::from([((TCP, second), pod)]));
        assert_eq!(taken.ask().unwrap().server, "pod-a");
        any.del();
        node.assert_clean(&before);
    }
}
