//! SCTP: many kernels cannot open such sockets (no module), and forward such packets all the same.
//! So rules are read instead of called, and programs get packets by sockets that take any.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use portmap::demo::netns::Netns;
use portmap::demo::topology::Shape;
use portmap::model::Family;
use portmap::sys::netlink::route::RouteReader;
use serde_json::json;

use crate::packet::{Kind, Packet, SCTP_INIT};
use crate::rig::{Container, Stage, TIMEOUT, shell};
use crate::support::{Node, Variant};

on_each_variant_with_rules! {
    fn rules_are_there_and_go(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let own = lab.node_address(Family::V4);
        let mappings = vec![
            json!({"hostPort": 9000, "containerPort": 3868, "protocol": "sctp"}),
            json!({"hostPort": 9001, "containerPort": 3869, "protocol": "SCTP", "hostIP": own}),
        ];
        let container = Container::new(&node, lab, 0, mappings);
        container.add();
        let [v4, v6] = Family::ALL.map(|family| lab.pods[0].address(family).unwrap());
        let expected = match variant {
            Variant::Nftables => [
                ("nft list map inet portmap any4_addr", format!("sctp . 9000 {OWNER} : {v4}")),
                ("nft list map inet portmap any4_port", format!("sctp . 9000 {OWNER} : 3868")),
                ("nft list map inet portmap any6_addr", format!("sctp . 9000 {OWNER} : {v6}")),
                ("nft list map inet portmap ip4_port", format!("{own} . sctp . 9001 {OWNER} : 3869")),
                ("nft list set inet portmap flows4", format!("{v4} . sctp . 3868")),
                ("nft list chain inet portmap prerouting", "sctp".into()),
            ],
            _ => [
                ("iptables -t nat -S", "-p sctp -m sctp --dport 9000 -j DNAT".into()),
                ("iptables -t nat -S", format!("--to-destination {v4}:3868")),
                ("iptables -t nat -S", format!("-d {own}/32 -p sctp -m sctp --dport 9001 -j DNAT")),
                ("iptables -t nat -S", format!("--to-destination {v4}:3869")),
                ("ip6tables -t nat -S", "-p sctp -m sctp --dport 9000 -j DNAT".into()),
                ("ip6tables -t nat -S", format!("--to-destination [{v6}]:3868")),
            ],
        };
        for (command, words) in expected {
            let listing = node.shell(command);
            assert!(listing.contains(&words), "{command} has no {words:?}:\n{listing}");
        }
        container.check();
        container.del();
        node.assert_clean(&before);
    }
}

/// Comment of the map elements that belong to the container.
const OWNER: &str = "comment \"container-of-pod-a eth0 portmap\"";

const SCTP: u8 = 132;

/// Bytes of data for which a packet has all the bits of its length that a link with jumbo frames allows.
const LARGE: usize = 8150;

/// Everything that passes the devices of a namespace from now on, beginning with the IP header.
fn listen(inside: &Netns) -> OwnedFd {
    let make = || {
        let kind = (AddressFamily::Packet, SockType::Datagram, SockProtocol::EthAll);
        socket(kind.0, kind.1, SockFlag::SOCK_CLOEXEC, kind.2)
    };
    let fd = inside.run(make).unwrap().unwrap();
    let timeout = TimeVal::new(1, TIMEOUT.subsec_micros().into());
    setsockopt(&fd, sockopt::ReceiveTimeout, &timeout).unwrap();
    fd
}

/// Sends a whole IP packet.
fn send(from: &Netns, packet: &Packet) {
    let family = if packet.is_v4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let make = || socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
    let fd = from.run(make).unwrap().unwrap();
    let to = SockaddrStorage::from(SocketAddr::new(packet.destination.ip(), 0));
    sendto(fd.as_raw_fd(), &packet.ip(), &to, MsgFlags::empty()).unwrap();
}

/// Waits for an SCTP packet to this address, and takes it apart: who it is from, and all behind the IP
/// header.
fn receive(at: &OwnedFd, to: SocketAddr) -> (SocketAddr, Vec<u8>) {
    let mut buffer = [0; 2 * LARGE];
    loop {
        let length = recv(at.as_raw_fd(), &mut buffer, MsgFlags::empty())
            .unwrap_or_else(|error| panic!("no SCTP packet for {to}: {error}"));
        let bytes = &buffer[..length];
        let address = |range: std::ops::Range<usize>| -> std::net::IpAddr {
            match <[u8; 4]>::try_from(&bytes[range.clone()]) {
                Ok(v4) => v4.into(),
                Err(_) => <[u8; 16]>::try_from(&bytes[range]).unwrap().into(),
            }
        };
        let (protocol, source, destination, header) = match bytes[0] >> 4 {
            4 => (bytes[9], address(12..16), address(16..20), 20),
            6 => (bytes[6], address(8..24), address(24..40), 40),
            _ => continue,
        };
        if protocol == SCTP && destination == to.ip() {
            let port = u16::from_be_bytes([bytes[header], bytes[header + 1]]);
            return (SocketAddr::new(source, port), bytes[header..].to_vec());
        }
    }
}

/// Both ways, with the same port on both sides and with another one, from outside and from a pod. What
/// arrives is byte for byte what a sender with those addresses and ports would have sent, and so is its
/// CRC32c, also of packets that are larger than what a test run of a program takes.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn packets_are_forwarded_by_ebpf() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    let mappings = vec![
        json!({"hostPort": 9000, "containerPort": 3868, "protocol": "sctp"}),
        json!({"hostPort": 3869, "containerPort": 3869, "protocol": "SCTP"}),
    ];
    let container = Container::new(&node, lab, 0, mappings);
    container.add();
    container.check();
    let pod = &lab.pods[0];
    for netns in [&lab.node, &lab.client, &pod.netns, &lab.pods[1].netns] {
        let links = netns.run(|| RouteReader::open().unwrap().links().unwrap()).unwrap();
        for link in links {
            shell(netns, &format!("ip link set {} mtu 9000", link.name));
        }
    }
    for family in Family::ALL {
        let callers = [
            (&lab.client, lab.client_address(family)),
            (&lab.pods[1].netns, lab.pods[1].address(family).unwrap()),
        ];
        for (caller, address) in callers {
            for (host_port, port) in [(9000, 3868), (3869, 3869)] {
                let [called, caller_socket, inside] = [
                    lab.node_socket(family, host_port),
                    SocketAddr::new(address, 40_000),
                    SocketAddr::new(pod.address(family).unwrap(), port),
                ];
                let (at_pod, at_caller) = (listen(&pod.netns), listen(caller));
                for size in [0, 4096, LARGE] {
                    let what = format!("{called} from {}, {size} bytes", caller.name());
                    let init = Packet::new(Kind::Sctp(SCTP_INIT), caller_socket, called);
                    let init = init.sized(size);
                    send(caller, &init);
                    let (source, bytes) = receive(&at_pod, inside);
                    assert_eq!(source, caller_socket);
                    assert!(bytes == init.to(inside).transport(), "{what}");
                    let answer = Packet::new(Kind::Sctp(SCTP_INIT), inside, caller_socket);
                    let answer = answer.sized(size);
                    send(&pod.netns, &answer);
                    let (source, bytes) = receive(&at_caller, caller_socket);
                    assert_eq!(source, called);
                    assert!(bytes == answer.from(called).transport(), "{what}: the answer");
                }
            }
        }
    }
    container.del();
    node.assert_clean(&before);
}
