//! A way out of the node whose packets begin with the IP header, as those of WireGuard and of IP tunnels
//! do: a tun device, whose other end is the client's.
#![allow(unsafe_code, reason = "no crate makes the file that a tun device's packets go through")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use portmap::demo::matrix::{Case, Place, Source};
use portmap::demo::netns::Netns;
use portmap::demo::topology::{Lab, Shape};
use portmap::model::Family;

use crate::rig::{
    Container, INSIDE, PORT, Stage, TIMEOUT, assert_calls, mapped, pod_seen, reaches, refused,
    shell,
};
use crate::support::{Node, Variant, ebpf};

const DEVICE: &str = "tunnel0";
/// Addresses at the node's end and at the client's.
const NODE: [&str; 2] = ["203.0.113.2", "2001:db8:51::2"];
const CLIENT: [&str; 2] = ["203.0.113.1", "2001:db8:51::1"];
/// Less than a datagram that has to be fragmented.
const MTU: usize = 1400;

/// Carries packets between the two devices, which live as long as this.
struct Tunnel {
    ended: Arc<AtomicBool>,
    carriers: Vec<JoinHandle<()>>,
}

impl Tunnel {
    fn between(lab: &Lab) -> Self {
        let ends = Arc::new([end(&lab.node, NODE), end(&lab.client, CLIENT)]);
        // Without a default route it would be a virtual machine's.
        shell(
            &lab.node,
            &format!(
                "ip route add default dev {DEVICE} metric 9000
                 ip -6 route add default dev {DEVICE} metric 9000"
            ),
        );
        let ended = Arc::new(AtomicBool::new(false));
        let carriers = [(0, 1), (1, 0)].map(|(from, to)| {
            let (ends, ended) = (Arc::clone(&ends), Arc::clone(&ended));
            std::thread::spawn(move || carry(&ends[from], &ends[to], &ended))
        });
        Tunnel { ended, carriers: carriers.into() }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        for carrier in self.carriers.drain(..) {
            let carried = carrier.join();
            // A test that fails has its own say, and others' programs to be cleared away after it.
            if !std::thread::panicking() {
                carried.unwrap();
            }
        }
    }
}

/// A device, up and with its addresses, and the file that its packets go through.
fn end(netns: &Netns, addresses: [&str; 2]) -> File {
    let open = || {
        let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: all of its fields may be zero.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, byte) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
            *to = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the request is an ifreq, which lives until the call is over.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        file
    };
    let file = netns.run(open).unwrap();
    let [v4, v6] = addresses;
    shell(
        netns,
        &format!(
            "ip address add {v4}/24 dev {DEVICE}
             ip address add {v6}/64 dev {DEVICE} nodad
             ip link set {DEVICE} mtu {MTU} up"
        ),
    );
    file
}

fn carry(mut from: &File, mut to: &File, ended: &AtomicBool) {
    let mut packet = [0; 65536];
    while !ended.load(Ordering::SeqCst) {
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, 20_u8).unwrap() > 0 {
            let length = from.read(&mut packet).unwrap();
            to.write_all(&packet[..length]).unwrap();
        }
    }
}

/// Everybody calls the node's address at the tunnel.
fn calls(lab: &Lab) -> Vec<Case> {
    let mut cases = Vec::new();
    for (family, (node, client)) in Family::ALL.into_iter().zip(NODE.into_iter().zip(CLIENT)) {
        let ip: IpAddr = node.parse().unwrap();
        let to = |from, source| reaches(from, ip, PORT, "pod-a", source);
        cases.extend(to(Place::Client, Source::Kept(client.parse().unwrap())));
        cases.extend(to(Place::Node, Source::Node));
        for pod in [0, 1] {
            cases.extend(to(Place::Pod(pod), pod_seen(Variant::Ebpf, lab, pod, 0, family)));
        }
    }
    cases
}

/// A datagram of several fragments: only the first one has the port.
fn assert_fragments_arrive(lab: &Lab) {
    for (node, client) in NODE.into_iter().zip(CLIENT) {
        let target = SocketAddr::new(node.parse().unwrap(), PORT);
        let call = || {
            let client: IpAddr = client.parse().unwrap();
            let socket = UdpSocket::bind((client, 0))?;
            socket.set_read_timeout(Some(TIMEOUT))?;
            socket.send_to(&[b'?'; 3 * MTU], target)?;
            let mut answer = [0; 512];
            let (length, from) = socket.recv_from(&mut answer)?;
            Ok::<_, std::io::Error>((String::from_utf8_lossy(&answer[..length]).into_owned(), from))
        };
        let (answer, from) = lab.client.run(call).unwrap().unwrap();
        assert!(answer.starts_with("pod-a ") && from == target, "{answer} from {from}");
    }
}

fn served_by_a_tunnel(tcx: bool) {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let _tunnel = Tunnel::between(lab);
    let node = Node::new(&lab.node, Variant::Ebpf);
    if !tcx {
        node.pretend(|kernel| kernel.tcx = false);
    }
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    let hooks = ebpf::hooks(&lab.node);
    let mechanism = if tcx { "tcx" } else { "bpf" };
    for place in ["Ingress", "Egress"] {
        let program = if place == "Ingress" { "pm_uplink_in_l3" } else { "pm_out_l3" };
        let hook = format!("{DEVICE} {place} {mechanism} {program}");
        assert!(hooks.contains(&hook), "{hook}: {hooks:#?}");
    }
    assert_calls("by the tunnel", lab, calls(lab));
    assert_fragments_arrive(lab);
    container.check();
    container.del();
    let addresses = NODE.map(|ip| ip.parse().unwrap());
    let gone = addresses.map(|ip| refused(Place::Client, ip, PORT)).concat();
    assert_calls("after DEL", lab, gone);
    assert!(node.flush().success());
    assert_eq!(ebpf::hooks(&lab.node), Vec::<String>::new());
}

#[test]
#[ignore = "privileged: makes network namespaces and tun devices"]
fn hostports_are_reached_by_a_tunnel() {
    served_by_a_tunnel(true);
}

/// Before Linux 6.6.
#[test]
#[ignore = "privileged: makes network namespaces and tun devices"]
fn hostports_are_reached_by_a_tunnel_without_tcx() {
    served_by_a_tunnel(false);
}
