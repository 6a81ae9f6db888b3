//! eBPF counts connections, packets and bytes of every claim: exactly those that were sent.

use std::net::{IpAddr, SocketAddr};

use portmap::backend::ebpf::entries;
use portmap::backend::ebpf::layout::{ClaimKey, Traffic};
use portmap::demo::netns::Netns;
use portmap::demo::topology::Shape;
use portmap::demo::traffic::{Call, Reply, Session, Transport, reach};
use portmap::model::{Claim, Family, Protocol};
use serde_json::json;

use crate::rig::{Container, INSIDE, PORT, Stage, TIMEOUT, mapped, mapped_at};
use crate::support::entries::maps;
use crate::support::{Node, Variant};

/// What has been counted of a claim; `None` if the claim is not there.
fn counted(
    node: &Netns,
    protocol: Protocol,
    family: Family,
    ip: Option<IpAddr>,
) -> Option<Traffic> {
    let key = ClaimKey::of(&Claim { family, protocol, address: ip, port: PORT });
    let (maps, _) = maps(node)?;
    entries::traffic(&maps, &key).unwrap()
}

/// A call by UDP: one datagram each way.
fn datagram(from: &Netns, target: SocketAddr) -> Reply {
    reach(from, Call::new(Transport::UdpUnconnected, target, TIMEOUT)).unwrap()
}

/// What `calls` of them come to, of which the first may have been no new connection.
fn datagrams(connections: u64, replies: &[Reply], family: Family) -> Traffic {
    let headers = match family {
        Family::V4 => 20 + 8,
        Family::V6 => 40 + 8,
    };
    let length = |reply: &Reply| format!("{} {}\n", reply.server, reply.seen).len();
    let calls = replies.len() as u64;
    Traffic {
        connections,
        packets_in: calls,
        bytes_in: calls * (headers + b"who am I?".len() as u64),
        packets_out: calls,
        bytes_out: replies.iter().map(|reply| headers + length(reply) as u64).sum(),
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn datagrams_are_counted_exactly() {
    for (shape, masq_all) in [(Shape::Ptp, false), (Shape::Bridge, false), (Shape::Ptp, true)] {
        let stage = Stage::new(shape);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, Variant::Ebpf);
        let container =
            Container::new(&node, lab, 0, mapped(PORT, INSIDE)).with("masqAll", json!(masq_all));
        container.add();
        let what = format!("{shape:?}, masqAll: {masq_all}");
        for family in Family::ALL {
            let target = lab.node_socket(family, PORT);
            let direct = SocketAddr::new(lab.pods[0].address(family).unwrap(), INSIDE);
            let callers = [&lab.client, &lab.pods[0].netns, &lab.pods[1].netns];
            let mut replies = Vec::new();
            for caller in callers {
                replies.push(datagram(caller, target));
                // What goes to the pod itself is not the claim's.
                if !std::ptr::eq(caller, callers[1]) {
                    datagram(caller, direct);
                }
            }
            let expected = datagrams(replies.len() as u64, &replies, family);
            let found = counted(&lab.node, Protocol::Udp, family, None);
            assert_eq!(found, Some(expected), "{what}, {family}");
            // A second question by the same socket is the same connection.
            let open = Call::new(Transport::Udp, target, TIMEOUT);
            let mut session = Session::open(&lab.client, open).unwrap();
            replies.extend([session.ask().unwrap(), session.ask().unwrap()]);
            let expected = datagrams(replies.len() as u64 - 1, &replies, family);
            let found = counted(&lab.node, Protocol::Udp, family, None);
            assert_eq!(found, Some(expected), "{what}, {family}");
            let none = counted(&lab.node, Protocol::Tcp, family, None);
            assert_eq!(none, Some(Traffic::default()), "{what}, {family}");
        }
        container.del();
        let gone = counted(&lab.node, Protocol::Udp, Family::V4, None);
        assert_eq!(gone, None, "{what}");
    }
}

/// The end of the last connection may be on its way still.
fn settled(count: impl Fn() -> Traffic) -> Traffic {
    let mut last = count();
    loop {
        std::thread::sleep(std::time::Duration::from_millis(500));
        match count() {
            now if now == last => return now,
            now => last = now,
        }
    }
}

/// Streams differ in how many packets they take; the handshake and the end take at least three each way.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn streams_are_counted() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    for family in Family::ALL {
        let call = Call::new(Transport::Tcp, lab.node_socket(family, PORT), TIMEOUT);
        for connections in 1..=3 {
            reach(&lab.client, call).unwrap();
            let found = counted(&lab.node, Protocol::Tcp, family, None).unwrap();
            assert_eq!(found.connections, connections);
            assert!(found.packets_in >= 3 * connections, "{found:?}");
            assert!(found.packets_out >= 2 * connections, "{found:?}");
            let headers = if family == Family::V4 { 40 } else { 60 };
            assert!(found.bytes_in >= found.packets_in * headers, "{found:?}");
            assert!(found.bytes_out >= found.packets_out * headers, "{found:?}");
        }
        // Sockets of the node connect to the pod: no packet of theirs has to do with the claim.
        let before = settled(|| counted(&lab.node, Protocol::Tcp, family, None).unwrap());
        reach(&lab.node, call).unwrap();
        let after = counted(&lab.node, Protocol::Tcp, family, None).unwrap();
        assert_eq!(after, Traffic { connections: before.connections + 1, ..before });
    }
    container.del();
}

/// Each of two claims that a packet would fit counts its own; a repeated ADD goes on counting, and a new
/// owner begins anew.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn claims_are_counted_one_by_one() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let own = lab.node_address(Family::V4);
    let any = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let one = Container::new(&node, lab, 1, mapped_at(&own.to_string(), PORT, INSIDE));
    any.add();
    one.add();
    let count = |ip| counted(&lab.node, Protocol::Udp, Family::V4, ip).unwrap().packets_in;
    let call = |ip| datagram(&lab.client, SocketAddr::new(ip, PORT)).server;
    assert_eq!(call(own), "pod-b");
    assert_eq!([count(Some(own)), count(None)], [1, 0]);
    assert_eq!(call(lab.second_node_address(Family::V4)), "pod-a");
    assert_eq!(call(lab.gateway(Family::V4)), "pod-a");
    assert_eq!([count(Some(own)), count(None)], [1, 2]);
    any.add();
    one.add();
    assert_eq!([count(Some(own)), count(None)], [1, 2]);
    let mut successor = Container::new(&node, lab, 1, mapped(PORT, INSIDE));
    successor.attachment.container_id = "successor".into();
    successor.add();
    assert_eq!([count(Some(own)), count(None)], [1, 0]);
    assert_eq!(call(lab.gateway(Family::V4)), "pod-b");
    assert_eq!([count(Some(own)), count(None)], [1, 1]);
    for container in [&successor, &one, &any] {
        container.del();
    }
}
