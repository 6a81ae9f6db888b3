//! Associations of SCTP with a hostPort. Where its number is not the pod's, programs correct the CRC32c of
//! every packet, unless that is left to a device.
#![allow(unsafe_code, reason = "SIOCETHTOOL has no safe call")]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, setsockopt,
    sockopt,
};
use nix::sys::time::TimeVal;
use portmap::demo::netns::Netns;
use portmap::demo::topology::{Shape, UPLINK};
use portmap::model::Family;
use serde_json::{Value, json};

use crate::rig::{Container, Stage, itself};
use crate::support::{Node, Variant};

const TIMEOUT: Duration = Duration::from_secs(20);
/// Ports of the pod, and the hostPorts that lead to them.
const PORTS: [(u16, u16); 2] = [(3868, 3868), (3869, 9000)];

fn mapped((inside, outside): (u16, u16)) -> Value {
    json!({"hostPort": outside, "containerPort": inside, "protocol": "sctp"})
}

/// An SCTP socket of the kind that is used like TCP's.
fn sctp(address: SocketAddr) -> OwnedFd {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    // SAFETY: no addresses; the descriptor belongs to nobody else.
    let fd = unsafe {
        use std::os::fd::FromRawFd;
        let flags = SockType::Stream as i32 | SockFlag::SOCK_CLOEXEC.bits();
        let fd = libc::socket(family as i32, flags, libc::IPPROTO_SCTP);
        assert!(fd >= 0, "socket(SCTP): {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let timeout = TimeVal::new(TIMEOUT.as_secs() as i64, 0);
    setsockopt(&fd, sockopt::SendTimeout, &timeout).unwrap();
    setsockopt(&fd, sockopt::ReceiveTimeout, &timeout).unwrap();
    fd
}

/// Answers every association at an address with its own and the caller's.
fn serve(inside: &Netns, address: SocketAddr) {
    let make = || {
        let fd = sctp(address);
        bind(fd.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
        listen(&fd, Backlog::new(8).unwrap()).unwrap();
        TcpListener::from(fd)
    };
    let listener = inside.run(make).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            let mut line = String::new();
            if BufReader::new(&stream).read_line(&mut line).is_ok() {
                writeln!(stream, "{} {address} {peer}", line.trim_end()).ok();
            }
        }
    });
}

/// Who answers, and whom it sees, at an association that carries data both ways.
fn ask(
    from: &Netns,
    source: IpAddr,
    target: SocketAddr,
) -> Result<[SocketAddr; 2], std::io::Error> {
    ask_from(from, SocketAddr::new(source, 0), target)
}

fn ask_from(
    from: &Netns,
    source: SocketAddr,
    target: SocketAddr,
) -> Result<[SocketAddr; 2], std::io::Error> {
    let call = || -> std::io::Result<TcpStream> {
        let fd = sctp(target);
        bind(fd.as_raw_fd(), &SockaddrStorage::from(source))?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(target))?;
        Ok(TcpStream::from(fd))
    };
    let mut stream = from.run(call).unwrap()?;
    // More than one packet has room for.
    let text = "who am I? ".repeat(500);
    writeln!(stream, "{text}")?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    let ends = answer.trim_end().strip_prefix(text.trim_end()).unwrap_or_default();
    let ends: Vec<SocketAddr> = ends.split_whitespace().map(|end| end.parse().unwrap()).collect();
    Ok(ends.try_into().unwrap())
}

/// Whether checksums of what a device sends are left to it.
fn offload(netns: &Netns, device: &str, on: bool) {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const ETHTOOL_STXCSUM: u32 = 0x17;
    netns
        .run(|| {
            let mut value = Value { command: ETHTOOL_STXCSUM, data: on.into() };
            // SAFETY: the kernel reads `value`, whose address is in the request, and nothing else.
            unsafe {
                let mut request: libc::ifreq = std::mem::zeroed();
                for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
                    *to = from as libc::c_char;
                }
                request.ifr_ifru.ifru_data = (&raw mut value).cast();
                let fd = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                // linux/sockios.h
                let result = libc::ioctl(fd.as_raw_fd(), 0x8946, &raw mut request);
                assert_eq!(result, 0, "SIOCETHTOOL: {}", std::io::Error::last_os_error());
            }
        })
        .unwrap();
}

#[test]
#[ignore = "guest: needs SCTP sockets"]
fn associations_are_made_through_host_ports() {
    for on in [true, false] {
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let [pod, other] = [&lab.pods[0], &lab.pods[1]];
        for (netns, device) in [(&lab.client, UPLINK), (&pod.netns, "eth0"), (&other.netns, "eth0")]
        {
            offload(netns, device, on);
        }
        let node = Node::new(&lab.node, Variant::Ebpf);
        let container = Container::new(&node, lab, 0, PORTS.map(mapped).into());
        container.add();
        for family in Family::ALL {
            for (inside, outside) in PORTS {
                let own = pod.address(family).unwrap();
                serve(&pod.netns, SocketAddr::new(own, inside));
                let target = lab.node_socket(family, outside);
                let callers = [
                    (&lab.client, lab.client_address(family)),
                    (&other.netns, other.address(family).unwrap()),
                ];
                for (caller, source) in callers {
                    let [_, seen] = ask(caller, source, target)
                        .unwrap_or_else(|error| panic!("{source} to {target}: {error}"));
                    assert_eq!(seen.ip(), source, "offload {on}, {target}");
                }
            }
        }
        let target = lab.node_socket(Family::V4, PORTS[0].1);
        let refused = |from: &Netns, source: IpAddr| {
            let error = ask(from, source, target).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error}");
        };
        // A limit: at the node's own sockets, TCP and UDP are translated alone.
        refused(&lab.node, lab.node_address(Family::V4));
        container.check();
        container.del();
        refused(&lab.client, lab.client_address(Family::V4));
    }
}

/// A hostIP, an address of the node that no claim names, and a pod that calls itself.
#[test]
#[ignore = "guest: needs SCTP sockets"]
fn associations_by_other_addresses_and_of_a_pod_with_itself() {
    for (shape, on) in [(Shape::Ptp, true), (Shape::Bridge, false)] {
        let stage = Stage::new(shape);
        let lab = &stage.lab;
        let [pod, other] = [&lab.pods[0], &lab.pods[1]];
        for (netns, device) in [(&lab.client, UPLINK), (&pod.netns, "eth0"), (&other.netns, "eth0")]
        {
            offload(netns, device, on);
        }
        let node = Node::new(&lab.node, Variant::Ebpf);
        let mut mappings = PORTS.map(mapped).to_vec();
        for family in Family::ALL {
            let mut specific = mapped((3869, 9100));
            specific["hostIP"] = json!(lab.second_node_address(family));
            mappings.push(specific);
        }
        let container = Container::new(&node, lab, 0, mappings);
        container.add();
        for family in Family::ALL {
            let own = pod.address(family).unwrap();
            for (inside, _) in PORTS {
                serve(&pod.netns, SocketAddr::new(own, inside));
            }
            let (first, second) = (lab.node_address(family), lab.second_node_address(family));
            let callers = [
                (&lab.client, lab.client_address(family), lab.client_address(family)),
                (&other.netns, other.address(family).unwrap(), other.address(family).unwrap()),
                (&pod.netns, own, itself(family)),
            ];
            for (caller, source, expected) in callers {
                let targets = [(first, 3868), (first, 9000), (second, 9000), (second, 9100)];
                for target in targets.map(SocketAddr::from) {
                    let context = format!("{shape:?}, offload {on}, {source} to {target}");
                    let [_, seen] = ask(caller, source, target)
                        .unwrap_or_else(|error| panic!("{context}: {error}"));
                    assert_eq!(seen.ip(), expected, "{context}");
                }
                let error = ask(caller, source, SocketAddr::new(first, 9100)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error}");
            }
        }
        container.check();
        container.del();
    }
}

/// By rules, the kernel translates. What it remembers of a former pod goes with the hostPort.
#[test]
#[ignore = "guest: needs SCTP sockets"]
fn associations_by_rules_go_to_whoever_has_the_port() {
    for variant in [Variant::Nftables, Variant::IptablesNft, Variant::IptablesLegacy] {
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let containers =
            [0, 1].map(|pod| Container::new(&node, lab, pod, PORTS.map(mapped).into()));
        for (number, container) in containers.iter().enumerate() {
            container.add();
            for family in Family::ALL {
                let own = lab.pods[number].address(family).unwrap();
                // Always from the same port: to conntrack it is the former association.
                let source = SocketAddr::new(lab.client_address(family), 45000);
                for (inside, outside) in PORTS {
                    let called = SocketAddr::new(own, inside);
                    serve(&lab.pods[number].netns, called);
                    let target = lab.node_socket(family, outside);
                    let ends = ask_from(&lab.client, source, target)
                        .unwrap_or_else(|error| panic!("{variant:?}, {target}: {error}"));
                    assert_eq!(ends, [called, source], "{variant:?}, {target}");
                }
            }
            container.check();
        }
        containers[1].del();
        containers[0].del();
        let target = lab.node_socket(Family::V4, PORTS[0].1);
        let error = ask(&lab.client, lab.client_address(Family::V4), target).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{variant:?}: {error}");
    }
}
