//! What is taken for a hostPort and what is not, under the settings of the stack around it.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use portmap::demo::matrix::{Place, Source};
use portmap::demo::netns::Netns;
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Shape, UPLINK};
use portmap::demo::traffic::{Call, Failure, Session, Transport};
use portmap::model::Family;
use serde_json::json;

use crate::frames;
use crate::once_free;
use crate::rig::{
    Container, INSIDE, PORT, SILENCE, Stage, TIMEOUT, all, assert_calls, client, every_path,
    mapped, reaches, refused, shell,
};
use crate::standins::link;
use crate::support::entries::maps;
use crate::support::{Node, Variant};

const SHAPES: [Shape; 3] = [Shape::Cilium, Shape::Ptp, Shape::Bridge];

/// Sets `net.ipv4.conf.*.<key>` of all devices, and of those to come.
fn set_all(node: &Netns, key: &str, value: &str) {
    let set = || {
        for entry in fs::read_dir("/proc/sys/net/ipv4/conf").unwrap() {
            fs::write(entry.unwrap().path().join(key), value).unwrap();
        }
    };
    node.run(set).unwrap();
}

/// Packets come in and leave by the devices that routes say, and sources are never of the node itself.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn reverse_path_filters_find_nothing_wrong() {
    for shape in SHAPES {
        let stage = Stage::new(shape);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, Variant::Ebpf);
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        container.add();
        for value in ["1", "2", "0"] {
            set_all(&lab.node, "rp_filter", value);
            let paths = every_path(Variant::Ebpf, lab, 0, PORT);
            assert_calls(&format!("rp_filter {value}"), lab, paths);
        }
    }
}

/// No port of the bridge is in hairpin mode, which iptables would need for a pod that calls itself.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn frames_of_a_bridge_may_meet_netfilter_or_not() {
    let stage = Stage::new(Shape::Bridge);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    Container::new(&node, lab, 0, mapped(PORT, INSIDE)).add();
    for value in ["0", "1"] {
        for tool in ["iptables", "ip6tables"] {
            let key = format!("bridge/bridge-nf-call-{tool}");
            lab.node.set_sysctl(&key, value).expect("modprobe br_netfilter");
        }
        let paths = every_path(Variant::Ebpf, lab, 0, PORT);
        assert_calls(&format!("bridge-nf-call {value}"), lab, paths);
    }
}

fn failures(calls: &[(&Netns, Call)]) -> Vec<Failure> {
    all(calls).into_iter().map(Result::unwrap_err).collect()
}

fn calls(from: &Netns, target: SocketAddr) -> [(&Netns, Call); 2] {
    [Transport::Tcp, Transport::Udp].map(|by| (from, Call::new(by, target, SILENCE)))
}

/// Packets go to the pod through the node's stack, which refuses to forward what came in by a device
/// that must not. That is all that stops working.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_device_that_does_not_forward_is_the_only_one() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    Container::new(&node, lab, 0, mapped(PORT, INSIDE)).add();
    let own = lab.node_address(Family::V4);
    let works = |from, seen| reaches(from, own, PORT, "pod-a", seen);
    let forwarding = |device: &str, value: &str| {
        lab.node.set_sysctl(&format!("ipv4/conf/{device}/forwarding"), value).unwrap();
    };
    forwarding(UPLINK, "0");
    let from_outside = calls(&lab.client, SocketAddr::new(own, PORT));
    assert_eq!(failures(&from_outside), vec![Failure::TimedOut; 2]);
    let rest = [works(Place::Pod(1), Source::Any), works(Place::Node, Source::Any)];
    assert_calls("the others forward", lab, rest.concat());
    forwarding(UPLINK, "1");

    forwarding(&lab.pods[1].host_link, "0");
    let from_pod = calls(&lab.pods[1].netns, SocketAddr::new(own, PORT));
    assert_eq!(failures(&from_pod), vec![Failure::TimedOut; 2]);
    let rest = [works(Place::Client, client(lab, Family::V4)), works(Place::Pod(0), Source::Any)];
    assert_calls("the others forward", lab, rest.concat());
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_address_that_has_left_the_node_is_not_taken_any_more() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let other = Container::new(&node, lab, 1, mapped(PORT + 1, INSIDE));
    container.add();
    for family in Family::ALL {
        let ip = lab.second_node_address(family);
        let everywhere = [Place::Client, Place::Pod(1), Place::Node];
        let before = everywhere.map(|from| reaches(from, ip, PORT, "pod-a", Source::Any));
        assert_calls("while it is here", lab, before.concat());
        // One that never pauses: no packet begins a flow anew.
        let call = Call::new(Transport::Udp, SocketAddr::new(ip, PORT), TIMEOUT);
        let mut talk = Session::open(&lab.pods[1].netns, call).unwrap();
        assert_eq!(talk.ask().unwrap().server, "pod-a");
        // It moves to the client, as a virtual address moves to another node.
        shell(
            &lab.node,
            &format!(
                "ip address del {ip} dev {UPLINK}; ip route add {ip} via {} dev {UPLINK}",
                lab.client_address(family)
            ),
        );
        // Its route comes a moment after an IPv6 address.
        let script = format!(
            "ip route del {ip}; ip address add {ip} dev lo nodad
             timeout 10 sh -c 'until ip route get {ip} | grep -q ^local; do sleep 0.01; done'"
        );
        shell(&lab.client, &script);
        let mut servers = Servers::default();
        for transport in [Transport::Tcp, Transport::Udp] {
            servers.add(&lab.client, "client", transport, SocketAddr::new(ip, PORT)).unwrap();
        }
        let pod = lab.pods[1].address(family).unwrap();
        let now = reaches(Place::Pod(1), ip, PORT, "client", Source::Kept(pod));
        assert_calls("when it has moved", lab, now);
        // A limit: the node's own sockets go by the list of the last call.
        let stale = reaches(Place::Node, ip, PORT, "pod-a", Source::Any);
        assert_calls("until the next call", lab, stale);
        let (_, reason) = node.fails("CHECK", &container.config, &container.attachment);
        let expected = format!("{ip} is known as an address of the node, and is none");
        assert!(reason.contains(&expected), "{reason}");
        // One that repairs what it finds, and one that has only its own to add.
        match family {
            Family::V4 => container.add(),
            Family::V6 => other.add(),
        }
        let now = reaches(Place::Node, ip, PORT, "client", Source::Node);
        assert_calls("after the next call", lab, now);
        assert_eq!(talk.ask().unwrap().server, "client", "a flow to {ip} goes on");
    }
}

/// A limit: pods and the node's own sockets go by the list of the last call, since for them "not
/// forwarded" may as well mean that there is no route.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_address_that_is_new_is_taken_from_outside_at_once() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    let new: [IpAddr; 2] = ["192.0.2.77".parse().unwrap(), "fd00:192::77".parse().unwrap()];
    for ip in new {
        let via = lab.node_address(Family::of(&ip));
        let script = format!(
            "ip address add {ip} dev {UPLINK} nodad
             timeout 10 sh -c 'until ip route get {ip} | grep -q ^local; do sleep 0.01; done'"
        );
        shell(&lab.node, &script);
        shell(&lab.client, &format!("ip route add {ip} via {via}"));
        assert_calls("from outside", lab, reaches(Place::Client, ip, PORT, "pod-a", Source::Any));
        let inside = [Place::Pod(1), Place::Node];
        assert_calls("from inside", lab, inside.map(|from| refused(from, ip, PORT)).concat());
        let (_, text) = node.fails("CHECK", &container.config, &container.attachment);
        assert!(text.contains(&ip.to_string()), "{text}");
        container.add();
        let now = inside.map(|from| reaches(from, ip, PORT, "pod-a", Source::Any));
        assert_calls("after the next call", lab, now.concat());
        container.check();
    }
}

/// To the stack such an address is "not forwarded", as one of its own is.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_the_node_has_no_route_to_is_not_taken() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    Container::new(&node, lab, 0, mapped(PORT, INSIDE)).add();
    shell(&lab.node, "ip -4 route del default; ip -6 route del default");
    let nowhere: [IpAddr; 2] = ["203.0.113.9".parse().unwrap(), "2001:db8::9".parse().unwrap()];
    for ip in nowhere {
        for from in [&lab.pods[1].netns, &lab.pods[0].netns] {
            // The router's "unreachable" ends an attempt to connect, the second one where the first
            // came back before the kernel had let go of the socket. To UDP it is no error.
            let target = SocketAddr::new(ip, PORT);
            let tcp = (from, Call::new(Transport::Tcp, target, TIMEOUT));
            let udp = (from, Call::new(Transport::Udp, target, SILENCE));
            let [tcp, udp] = failures(&[tcp, udp]).try_into().unwrap();
            assert!(
                tcp.to_string().to_lowercase().contains("unreach"),
                "{ip} {}: {tcp}",
                from.name()
            );
            assert_eq!(udp, Failure::TimedOut);
        }
    }
    let own = Family::ALL
        .map(|family| reaches(Place::Pod(1), lab.node_address(family), PORT, "pod-a", Source::Any));
    assert_calls("its own", lab, own.concat());
}

/// Whether the pod gets this, as `expected`.
fn assert_arrives(lab: &Lab, receiver: &UdpSocket, frame: &[u8], expected: bool, what: &str) {
    receiver.set_read_timeout(Some(if expected { TIMEOUT } else { SILENCE })).unwrap();
    frames::send(&lab.client, UPLINK, frame);
    let received = receiver.recv(&mut [0; 64]).map(drop).map_err(|error| error.kind());
    assert_eq!(received, if expected { Ok(()) } else { Err(ErrorKind::WouldBlock) }, "{what}");
}

/// What is counted of claims and remembered of flows, in bytes.
fn remembered(node: &Netns) -> [Vec<(Vec<u8>, Vec<u8>)>; 2] {
    let (maps, flows) = maps(node).unwrap();
    [maps.traffic.entries(), flows.flows.entries()].map(|entries| {
        let mut entries = entries.unwrap();
        entries.sort();
        entries
    })
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn loopback_addresses_on_the_wire_are_not_taken() {
    const RECEIVER: u16 = 81;
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let mac = link(&lab.node, UPLINK).mac;
    let pod = &lab.pods[0].netns;
    // The stack has no VLAN 5 and drops its frames, whatever has become of them on their way there.
    let passes_untouched = |frame: &[u8], receiver: &UdpSocket| {
        let before = remembered(&lab.node);
        assert_arrives(lab, receiver, &frames::tagged(frame, 5), false, "VLAN 5");
        assert_eq!(remembered(&lab.node), before);
    };
    // The stack would refuse some of them by itself; it is to be the programs that do.
    for setting in ["route_localnet", "accept_local"] {
        lab.node.set_sysctl(&format!("ipv4/conf/{UPLINK}/{setting}"), "1").unwrap();
    }
    for host_ip in ["", "127.0.0.1", "::1"] {
        let mapping = json!({"hostPort": PORT, "containerPort": RECEIVER, "protocol": "udp", "hostIP": host_ip});
        let container = Container::new(&node, lab, 0, vec![mapping]);
        container.add();
        {
            let receiver = once_free(pod, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, RECEIVER)));
            let from: Ipv4Addr = "198.51.100.2".parse().unwrap();
            let to = |to: Ipv4Addr| frames::udp_v4(&mac, [from, to], PORT, b"frame");
            let own = "198.51.100.1".parse().unwrap();
            assert_arrives(lab, &receiver, &to(own), host_ip.is_empty(), "the node's own address");
            // A tag of VLAN 0 is a priority and no VLAN, for the stack as well.
            let priority = frames::tagged(&to(own), 5 << 13);
            assert_arrives(lab, &receiver, &priority, host_ip.is_empty(), "VLAN 0");
            passes_untouched(&to(own), &receiver);
            for ip in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 9, 9, 9), Ipv4Addr::UNSPECIFIED] {
                let what = format!("{ip} with hostIP {host_ip:?}");
                assert_arrives(lab, &receiver, &to(ip), false, &what);
            }
        }
        {
            let receiver = once_free(pod, || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, RECEIVER)));
            let from: Ipv6Addr = "fd00:51::2".parse().unwrap();
            let to = |to: Ipv6Addr| frames::udp_v6(&mac, [from, to], PORT, b"frame");
            let own = "fd00:51::1".parse().unwrap();
            assert_arrives(lab, &receiver, &to(own), host_ip.is_empty(), "the node's own address");
            passes_untouched(&to(own), &receiver);
            let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
            for ip in [Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED, mapped] {
                let what = format!("{ip} with hostIP {host_ip:?}");
                assert_arrives(lab, &receiver, &to(ip), false, &what);
            }
        }
        container.del();
    }
    // What was sent by hand is a frame as any other.
    let call = Call::new(Transport::Udp, lab.node_socket(Family::V4, PORT), TIMEOUT);
    let refused = all(&[(&lab.client, call)]);
    assert_eq!(refused[0], Err(Failure::Refused));
}
