//! eBPF on the sockets of the node itself: whatever address of the node they call, they reach the pod,
//! and are told that it is the address they called.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};

use portmap::demo::matrix::{Place, Source};
use portmap::demo::netns::Netns;
use portmap::demo::topology::{Lab, Shape};
use portmap::demo::traffic::{Call, Failure, Session, Transport, reach};
use portmap::model::Family;

use crate::rig::{
    Container, INSIDE, PORT, Stage, TIMEOUT, TRANSPORTS, assert_calls, bound, mapped, mapped_at,
    own_address_towards, reaches, refused,
};
use crate::support::{Node, Variant};

/// Every address by which a process of the node can mean the node, of one family. Sockets of IPv6 call
/// IPv4 by mapped addresses (RFC 4291, section 2.5.5.2), and connect to :: as to ::1.
fn own_addresses(lab: &Lab, family: Family) -> Vec<IpAddr> {
    let mut all =
        [lab.node_address(family), lab.second_node_address(family), lab.gateway(family)].to_vec();
    let v4 = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 1, 2, 3), Ipv4Addr::UNSPECIFIED];
    match family {
        Family::V4 => all.extend(v4.map(IpAddr::V4)),
        Family::V6 => all.extend([Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED].map(IpAddr::V6)),
    }
    let mapped: Vec<IpAddr> = all
        .iter()
        .filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(ip.to_ipv6_mapped().into()),
            IpAddr::V6(_) => None,
        })
        .collect();
    [all, mapped].concat()
}

fn is_loopback(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    ip.is_loopback() || ip.is_unspecified()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn every_address_of_the_node_is_called() {
    for shape in [Shape::Ptp, Shape::Bridge] {
        let stage = Stage::new(shape);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, Variant::Ebpf);
        let before = node.snapshot();
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        container.add();
        let addresses = Family::ALL.map(|family| own_addresses(lab, family)).concat();
        let cases = addresses
            .iter()
            .flat_map(|ip| {
                let pod = lab.pods[0].address(Family::of(&ip.to_canonical())).unwrap();
                reaches(Place::Node, *ip, PORT, "pod-a", own_address_towards(&node, pod))
            })
            .collect();
        // Whichever address is called, the pod sees the one that the node would call it from.
        assert_calls("from the node", lab, cases);
        // A pod's loopback addresses are its own, also where its processes are in the same cgroup.
        let cases = addresses
            .iter()
            .filter(|ip| is_loopback(**ip))
            .flat_map(|ip| [0, 1].map(|pod| refused(Place::Pod(pod), *ip, PORT)).concat())
            .collect();
        assert_calls("from pods", lab, cases);
        container.check();
        container.del();
        node.assert_clean(&before);
    }
}

/// Of two claims that of the address is called, by mapped addresses as well.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_claim_of_the_address_goes_first() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    for (family, specific) in Family::ALL.into_iter().flat_map(|family| {
        let loopback = match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        [(family, lab.node_address(family)), (family, loopback)]
    }) {
        let any = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        let one = Container::new(&node, lab, 1, mapped_at(&specific.to_string(), PORT, INSIDE));
        any.add();
        one.add();
        let cases = own_addresses(lab, family).into_iter().flat_map(|ip| {
            let server = if ip.to_canonical() == specific { "pod-b" } else { "pod-a" };
            reaches(Place::Node, ip, PORT, server, Source::Node)
        });
        assert_calls(&format!("hostIP {specific}"), lab, cases.collect());
        one.del();
        any.del();
    }
}

/// Whom a connected socket says it is connected to.
fn peer(from: &Netns, transport: Transport, target: SocketAddr) -> io::Result<SocketAddr> {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    from.run(|| match transport {
        Transport::Tcp => TcpStream::connect(target)?.peer_addr(),
        Transport::Udp | Transport::UdpUnconnected => {
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(target)?;
            socket.peer_addr()
        }
    })?
}

/// Where datagrams come from unconnected sockets are told in every case of this matrix.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn sockets_are_connected_to_whom_they_called() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    for family in Family::ALL {
        for ip in own_addresses(lab, family) {
            for transport in [Transport::Tcp, Transport::Udp] {
                let target = SocketAddr::new(ip, PORT);
                assert_eq!(peer(&lab.node, transport, target).unwrap(), target, "{transport}");
            }
        }
        // A direct connection is one to the pod.
        let pod = SocketAddr::new(lab.pods[0].address(family).unwrap(), INSIDE);
        for transport in [Transport::Tcp, Transport::Udp] {
            assert_eq!(peer(&lab.node, transport, pod).unwrap(), pod, "{transport}");
        }
    }
    container.del();
}

/// One unconnected socket calls several pods, and hears from each of them.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn one_socket_calls_many() {
    let stage = Stage::new(Shape::Bridge);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let containers =
        [0, 1].map(|pod| Container::new(&node, lab, pod, mapped(PORT + pod as u16, INSIDE)));
    containers.iter().for_each(Container::add);
    let socket = lab.node.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap().unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    for target in [
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT),
        SocketAddr::new(lab.node_address(Family::V4), PORT + 1),
        SocketAddr::new(lab.node_address(Family::V4), PORT),
        SocketAddr::new(lab.pods[1].address(Family::V4).unwrap(), INSIDE),
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT + 1),
    ] {
        lab.node.run(|| socket.send_to(b"who am I?", target)).unwrap().unwrap();
        let mut buffer = [0; 64];
        let (_, source) = lab.node.run(|| socket.recv_from(&mut buffer)).unwrap().unwrap();
        assert_eq!(source, target);
    }
    containers.iter().for_each(Container::del);
}

/// The limit of replacing destinations when a socket connects: its own address stays, and packets from
/// 127.0.0.1 do not leave by the pod's link. Without `route_localnet` they would not with rules either.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_socket_bound_to_loopback_is_refused() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
    for transport in TRANSPORTS {
        let call = bound(transport, localhost, SocketAddr::new(localhost, PORT), TIMEOUT);
        let error = reach(&lab.node, call).unwrap_err();
        let invalid = io::Error::from_raw_os_error(nix::libc::EINVAL).to_string();
        assert_eq!(error, Failure::Other(invalid), "{transport}");
        // Any other address of its own will do.
        let own = lab.node_address(Family::V4);
        let reply =
            reach(&lab.node, bound(transport, own, SocketAddr::new(localhost, PORT), TIMEOUT));
        assert_eq!(reply.unwrap().seen.ip(), own, "{transport}");
    }
    container.del();
}

/// A stream ends where it began when the hostPort goes to another pod. A UDP socket would be connected to
/// the former pod for ever: it loses its peer, which is an error to its owner, who connects again.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn connected_sockets_learn_of_a_takeover() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let containers = [0, 1].map(|pod| Container::new(&node, lab, pod, mapped(PORT, INSIDE)));
    let other =
        Container::new(&node, lab, 0, mapped(PORT + 1, INSIDE)).with("name", "other".into());
    for family in Family::ALL {
        containers[0].add();
        other.add();
        let call = |transport, port| Call::new(transport, lab.node_socket(family, port), TIMEOUT);
        let open = |transport, port| Session::open(&lab.node, call(transport, port)).unwrap();
        let mut stream = open(Transport::Tcp, PORT);
        let mut datagrams = open(Transport::Udp, PORT);
        let mut unaffected = open(Transport::Udp, PORT + 1);
        for session in [&mut stream, &mut datagrams, &mut unaffected] {
            assert_eq!(session.ask().unwrap().server, "pod-a");
        }
        containers[1].add();
        assert_eq!(stream.ask().unwrap().server, "pod-a");
        let lost = io::Error::from_raw_os_error(nix::libc::EDESTADDRREQ).to_string();
        assert_eq!(datagrams.ask().unwrap_err(), Failure::Other(lost));
        assert_eq!(unaffected.ask().unwrap().server, "pod-a");
        assert_eq!(open(Transport::Udp, PORT).ask().unwrap().server, "pod-b");
        containers.iter().for_each(Container::del);
        other.del();
    }
}
