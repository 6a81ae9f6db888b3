//! Path MTU discovery through a hostPort: whoever sends too much must be told by a router, about the
//! packet that it has sent.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use portmap::demo::netns::Netns;
use portmap::demo::topology::{Lab, Shape};
use portmap::model::Family;
use serde_json::json;

use crate::rig::{Container, Stage, shell};
use crate::support::{Node, Variant};

/// What the narrow link carries.
const MTU: &str = "1300";
const BYTES: usize = 3 << 20;
/// Ports of the pod that take everything, and that give all of it.
const SINK: u16 = 81;
const SOURCE: u16 = 82;
/// Addresses of the far caller: towards the node's first address, and its second. Each end tells the
/// other how much it can take, which by then is what it has learnt.
const FAR: [[&str; 2]; 2] = [["203.0.113.2", "203.0.113.3"], ["fd00:203::2", "fd00:203::3"]];
const TIMEOUT: Duration = Duration::from_secs(10);

/// A caller behind two routers and the narrow link between them. The lab's client is the first.
struct Far {
    caller: Netns,
    _router: Netns,
}

impl Far {
    fn new(lab: &Lab) -> Self {
        let [caller, router] = ["far", "router"].map(|name| Netns::new(name).unwrap());
        let [far, near] = [&caller, &router].map(|netns| netns.path().display().to_string());
        shell(
            &lab.client,
            &format!(
                "ip link add narrow type veth peer name narrow netns {near}
                 ip link set narrow mtu {MTU} up
                 ip address add 192.168.9.1/24 dev narrow; ip address add fd00:9::1/64 dev narrow nodad
                 sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
            ),
        );
        shell(
            &router,
            &format!(
                "ip link set narrow mtu {MTU} up
                 ip address add 192.168.9.2/24 dev narrow; ip address add fd00:9::2/64 dev narrow nodad
                 sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
                 ip link add far type veth peer name eth0 netns {far}
                 ip link set far up
                 ip address add 203.0.113.1/24 dev far; ip address add fd00:203::1/64 dev far nodad
                 ip route add default via 192.168.9.1; ip route add default via fd00:9::1"
            ),
        );
        shell(&caller, "ip link set eth0 up");
        for (family, prefix, router) in
            [(Family::V4, 24, "203.0.113.1"), (Family::V6, 64, "fd00:203::1")]
        {
            let [first, second] = FAR[family as usize];
            let other = lab.second_node_address(family);
            shell(
                &caller,
                &format!(
                    "ip address add {first}/{prefix} dev eth0 nodad
                     ip address add {second}/{prefix} dev eth0 nodad
                     ip route add default via {router} src {first}
                     ip route add {other} via {router} src {second}"
                ),
            );
        }
        // The node's default route leads to the client.
        shell(
            &lab.client,
            "ip route add 203.0.113.0/24 via 192.168.9.2; ip route add fd00:203::/64 via fd00:9::2",
        );
        Far { caller, _router: router }
    }
}

/// Serves one connection at each of the two ports, of both families.
fn serve(pod: &Netns) {
    let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    for ip in any {
        for port in [SINK, SOURCE] {
            let listener = pod.run(|| listen(SocketAddr::new(ip, port))).unwrap();
            std::thread::spawn(move || -> std::io::Result<()> {
                let (mut stream, _) = listener.accept()?;
                stream.set_read_timeout(Some(TIMEOUT))?;
                stream.set_write_timeout(Some(TIMEOUT))?;
                if port == SOURCE {
                    return stream.write_all(&vec![7; BYTES]);
                }
                let count = std::io::copy(&mut stream, &mut std::io::sink())?;
                stream.write_all(&count.to_be_bytes())
            });
        }
    }
}

/// A socket of the one family alone.
fn listen(address: SocketAddr) -> TcpListener {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt,
        socket, sockopt,
    };
    use std::os::fd::AsRawFd;
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true).unwrap();
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
    listen(&fd, Backlog::new(1).unwrap()).unwrap();
    fd.into()
}

fn connect(from: &Netns, to: SocketAddr) -> TcpStream {
    let stream = from.run(|| TcpStream::connect_timeout(&to, TIMEOUT)).unwrap().unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    stream
}

/// All bytes arrive at the pod.
fn upload(from: &Netns, to: SocketAddr) {
    let mut stream = connect(from, to);
    stream.write_all(&vec![7; BYTES]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut count = [0; 8];
    stream.read_exact(&mut count).unwrap();
    assert_eq!(u64::from_be_bytes(count), BYTES as u64);
}

/// All bytes arrive from the pod.
fn download(from: &Netns, to: SocketAddr) {
    let mut all = Vec::new();
    connect(from, to).read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), BYTES);
}

/// What the kernel has learnt of the path to an address.
fn learnt(netns: &Netns, to: &str) -> String {
    shell(netns, &format!("ip route get {to}"))
}

fn mappings() -> Vec<serde_json::Value> {
    [SINK, SOURCE]
        .map(|port| json!({"hostPort": port + 8000, "containerPort": port, "protocol": "tcp"}))
        .into()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_narrow_link_behind_a_router_is_found_out() {
    for shape in [Shape::Ptp, Shape::Bridge] {
        let stage = Stage::new(shape);
        let lab = &stage.lab;
        let far = Far::new(lab);
        let node = Node::new(&lab.node, Variant::Ebpf);
        Container::new(&node, lab, 0, mappings()).add();
        let pod = &lab.pods[0].netns;
        serve(pod);
        for family in Family::ALL {
            let [own, second] = [lab.node_address(family), lab.second_node_address(family)];
            let narrow = format!("mtu {MTU}");
            assert!(!learnt(&far.caller, &own.to_string()).contains(&narrow));
            upload(&far.caller, SocketAddr::new(own, SINK + 8000));
            assert!(learnt(&far.caller, &own.to_string()).contains(&narrow));

            let [_, far_second] = FAR[family as usize];
            assert!(!learnt(pod, far_second).contains(&narrow));
            download(&far.caller, SocketAddr::new(second, SOURCE + 8000));
            // To the router it was a packet of the node's that was too big.
            assert!(learnt(pod, far_second).contains(&narrow), "{}", learnt(pod, far_second));
        }
    }
}

/// The node itself is the router that cannot pass a packet on, and tells the caller of one to the pod.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_narrow_link_of_the_pod_is_found_out() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    Container::new(&node, lab, 0, mappings()).add();
    let pod = &lab.pods[0];
    // The pod's end stays wide, so that the caller does not hear of it when they connect.
    shell(&lab.node, &format!("ip link set {} mtu {MTU}", pod.host_link));
    serve(&pod.netns);
    for family in Family::ALL {
        let own = lab.node_address(family).to_string();
        assert!(!learnt(&lab.client, &own).contains(&format!("mtu {MTU}")));
        upload(&lab.client, lab.node_socket(family, SINK + 8000));
        assert!(learnt(&lab.client, &own).contains(&format!("mtu {MTU}")));
    }
}
