//! Proxies in pods, such as Istio's: netfilter in the pod sends every connection to the proxy, which
//! asks for where it was meant to go. That must still be what the program has called.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use portmap::demo::netns::Netns;
use portmap::demo::topology::Shape;
use portmap::model::Family;

use crate::once_free;
use crate::rig::{Container, INSIDE, PORT, Stage, mapped, shell};
use crate::support::{Node, Variant};

const PROXY: u16 = 15001;
const TIMEOUT: Duration = Duration::from_secs(3);

/// A connection from inside a namespace.
fn connect(from: &Netns, to: SocketAddr) -> TcpStream {
    from.run(|| TcpStream::connect_timeout(&to, TIMEOUT)).unwrap().unwrap()
}

/// Where the next connection to the proxy was meant to go.
fn original_destination(proxy: &TcpListener) -> SocketAddr {
    let (stream, peer) = proxy.accept().unwrap();
    if peer.is_ipv4() {
        let found = getsockopt(&stream, sockopt::OriginalDst).unwrap();
        let ip = Ipv4Addr::from(u32::from_be(found.sin_addr.s_addr));
        (ip, u16::from_be(found.sin_port)).into()
    } else {
        let found = getsockopt(&stream, sockopt::Ip6tOriginalDst).unwrap();
        (Ipv6Addr::from(found.sin6_addr.s6_addr), u16::from_be(found.sin6_port)).into()
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_proxy_in_a_pod_sees_the_host_port_that_was_called() {
    let stage = Stage::new(Shape::Cilium);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    let pod = &lab.pods[1].netns;
    shell(
        pod,
        &format!(
            "nft add table inet mesh
             nft add chain inet mesh out '{{ type nat hook output priority -100; }}'
             nft add rule inet mesh out tcp dport {PORT} redirect to :{PROXY}"
        ),
    );
    for family in Family::ALL {
        let any: IpAddr = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let proxy = once_free(pod, || TcpListener::bind((any, PROXY)));
        let called = lab.node_socket(family, PORT);
        let caller = connect(pod, called);
        assert_eq!(original_destination(&proxy), called);
        assert_eq!(caller.peer_addr().unwrap(), called);
    }
}

/// Where the translation is done at the socket, it does not show.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn processes_of_the_node_are_told_that_they_reached_whom_they_called() {
    let stage = Stage::new(Shape::Cilium);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    let mapped_v4 = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
    let called: [IpAddr; 5] = [
        Ipv4Addr::LOCALHOST.into(),
        Ipv6Addr::LOCALHOST.into(),
        mapped_v4.into(),
        lab.node_address(Family::V4),
        lab.second_node_address(Family::V6),
    ];
    for ip in called {
        let called = SocketAddr::new(ip, PORT);
        assert_eq!(connect(&lab.node, called).peer_addr().unwrap(), called);
        // What is not a hostPort is let be.
        let pod = lab.pods[0].address(Family::of(&ip)).unwrap();
        let direct = SocketAddr::new(pod, INSIDE);
        assert_eq!(connect(&lab.node, direct).peer_addr().unwrap(), direct);
    }
}
