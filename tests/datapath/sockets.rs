//! Sockets of the node's own processes: they call the pod itself, and see what they called.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use portmap::backend::ebpf::layout::{
    Addr, ClaimKey, ClaimValue, Config, SocketKey, claim_flags, config_flags,
};
use portmap::backend::ebpf::loaded::OWN;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::model::{Family, Protocol};
use portmap::sys::bpf::cgroup::Cgroup;
use portmap::sys::bpf::cookie;
use portmap::sys::bpf::program::{Hook, SocketHook};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use crate::object::Object;

/// What a process in the cgroup has to know.
#[derive(Serialize, Deserialize)]
struct Inside {
    group: PathBuf,
    node: [IpAddr; 2],
    second: [IpAddr; 2],
    pods: [[IpAddr; 2]; 2],
}

/// The variable that has it.
const INSIDE: &str = "PORTMAP_DATAPATH_INSIDE";

/// For a call that is not answered; the answers are not waited for as long.
const PATIENCE: Duration = Duration::from_secs(5);

/// A cgroup, which takes what is attached to it along.
struct Group(PathBuf);

impl Group {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let places = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = places.into_iter().find(|dir| dir.join("cgroup.controllers").exists()).unwrap();
        let path = root.join(format!("portmap-datapath-{}-{number}", std::process::id()));
        // One below: where a plugin may not use the root, it attaches its programs to the root's
        // children, and another test's plugin would take ours for its own.
        std::fs::create_dir_all(path.join("inside")).unwrap();
        Group(path)
    }

    fn inside(&self) -> PathBuf {
        self.0.join("inside")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for dir in [&self.inside(), &self.0] {
            // A process that has ended may leave it in a while.
            let started = std::time::Instant::now();
            while let Err(error) = std::fs::remove_dir(dir) {
                let busy = error.raw_os_error() == Some(libc::EBUSY);
                if !busy || started.elapsed() > PATIENCE {
                    assert!(std::thread::panicking(), "{}: {error}", dir.display());
                    return;
                }
                std::thread::yield_now();
            }
        }
    }
}

/// Runs `test` of this file in a process of a cgroup of its own, in the network namespace of a node
/// with two pods that answer with their names.
fn in_a_process(test: &str, run: impl Fn(&Inside, Object)) {
    if let Some(inside) = std::env::var_os(INSIDE) {
        let inside = serde_json::from_slice(inside.as_encoded_bytes()).unwrap();
        return run(&inside, Object::load(OWN.object, |_, hook| hook != Hook::Classifier));
    }
    let lab = Lab::build(Options::new(Shape::Ptp)).expect("root is needed");
    let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[80]).unwrap()).collect();
    let group = Group::new();
    let of = |address: &dyn Fn(Family) -> IpAddr| Family::ALL.map(address);
    let inside = Inside {
        group: group.inside(),
        node: of(&|family| lab.node_address(family)),
        second: of(&|family| lab.second_node_address(family)),
        pods: [0, 1].map(|pod: usize| of(&|family| lab.pods[pod].address(family).unwrap())),
    };
    let enter =
        format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.inside().display());
    let output = lab
        .node
        .run(|| {
            Command::new("sh")
                .args(["-c", &enter])
                .arg(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", &format!("sockets::{test}")])
                .env(INSIDE, serde_json::to_string(&inside).unwrap())
                .output()
                .unwrap()
        })
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
}

impl Inside {
    /// Attaches the programs; `suffix` is that of a variant for connect and sendmsg.
    fn attach(&self, object: &Object, suffix: &str) {
        let cgroup = Cgroup::open(&self.group).unwrap();
        for hook in SocketHook::ALL {
            let name = match hook {
                SocketHook::Connect4 => format!("pm_connect4{suffix}"),
                SocketHook::Connect6 => format!("pm_connect6{suffix}"),
                SocketHook::Sendmsg4 => format!("pm_sendmsg4{suffix}"),
                SocketHook::Sendmsg6 => format!("pm_sendmsg6{suffix}"),
                SocketHook::Recvmsg4 => "pm_recvmsg4".to_owned(),
                SocketHook::Recvmsg6 => "pm_recvmsg6".to_owned(),
                SocketHook::Getpeername4 => "pm_peername4".to_owned(),
                SocketHook::Getpeername6 => "pm_peername6".to_owned(),
            };
            cgroup.attach(hook, &object.programs[&name]).unwrap();
        }
    }

    /// hostPort to the first pod's port 80, or the second's, for TCP and UDP.
    fn claim(&self, object: &Object, family: Family, addr: Addr, port: u16, pod: usize) {
        self.claim_at(object, addr, port, SocketAddr::new(self.pods[pod][family as usize], 80));
    }

    fn claim_at(&self, object: &Object, addr: Addr, port: u16, pod: SocketAddr) {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut value = ClaimValue::new(pod, 1);
            let key = ClaimKey::new(addr, protocol, port);
            object.put("pm_claims", key.as_bytes(), value.as_bytes());
            let zero = vec![0; object.maps["pm_traffic"].value_bytes().unwrap()];
            object.put("pm_traffic", key.as_bytes(), &zero);
            value.flags |= claim_flags::SELF;
            let key = ClaimKey::new(pod.ip().into(), protocol, pod.port());
            object.put("pm_claims", key.as_bytes(), value.as_bytes());
        }
        object.mark_port(port);
        object.mark_port(80);
    }

    fn listed(&self, object: &Object) {
        for address in self.node {
            object.put("pm_addresses", Addr::from(address).as_bytes(), 1_u32.as_bytes());
        }
    }
}

fn gate(object: &Object, cookie: u64) {
    let mut config = Config::default();
    config.netns_cookie = cookie;
    config.flags = config_flags::COOKIE;
    object.put("pm_config", &[0; 4], config.as_bytes());
}

/// How to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Tcp,
    Udp,
    UdpUnconnected,
}

const WAYS: [Way; 3] = [Way::Tcp, Way::Udp, Way::UdpUnconnected];

/// Who answers, and whom the caller believes to have called.
fn call(way: Way, to: SocketAddr) -> io::Result<(String, SocketAddr)> {
    let any = if to.is_ipv4() {
        IpAddr::from(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    };
    let mut buffer = [0; 200];
    let (text, peer) = match way {
        Way::Tcp => {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            let peer = stream.peer_addr()?;
            stream.write_all(b"\n")?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            (line, peer)
        }
        Way::Udp | Way::UdpUnconnected => {
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            let (length, peer) = if way == Way::Udp {
                socket.connect(to)?;
                socket.send(b"\n")?;
                let length = socket.recv(&mut buffer)?;
                (length, socket.peer_addr()?)
            } else {
                socket.send_to(b"\n", to)?;
                socket.recv_from(&mut buffer)?
            };
            (String::from_utf8_lossy(&buffer[..length]).into_owned(), peer)
        }
    };
    Ok((text.split(' ').next().unwrap_or_default().to_owned(), peer))
}

#[track_caller]
fn reaches(way: Way, to: SocketAddr, pod: &str) {
    let (name, peer) = call(way, to).unwrap_or_else(|error| panic!("{way:?} to {to}: {error}"));
    assert_eq!((name.as_str(), peer), (pod, to), "{way:?}");
}

/// Nobody listens there on the node.
#[track_caller]
fn is_refused(way: Way, to: SocketAddr) {
    // To an unconnected socket, nobody tells that a port is closed.
    let way = if way == Way::UdpUnconnected { Way::Udp } else { way };
    let error = call(way, to).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{way:?} to {to}: {error}");
}

fn addresses_of_the_node(inside: &Inside, object: &Object) {
    inside.listed(object);
    for family in Family::ALL {
        inside.claim(object, family, Addr::any(family), 28080, 0);
        let (loopback, any) = match family {
            Family::V4 => (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv4Addr::UNSPECIFIED)),
            Family::V6 => (IpAddr::from(Ipv6Addr::LOCALHOST), IpAddr::from(Ipv6Addr::UNSPECIFIED)),
        };
        // For one address alone, and for the loopback address alone.
        let node = inside.node[family as usize];
        inside.claim(object, family, node.into(), 28081, 1);
        inside.claim(object, family, loopback.into(), 28082, 1);
        for way in WAYS {
            reaches(way, SocketAddr::new(loopback, 28080), "pod-a");
            reaches(way, SocketAddr::new(node, 28080), "pod-a");
            reaches(way, SocketAddr::new(node, 28081), "pod-b");
            reaches(way, SocketAddr::new(loopback, 28082), "pod-b");
            is_refused(way, SocketAddr::new(loopback, 28081));
            is_refused(way, SocketAddr::new(node, 28082));
            is_refused(way, SocketAddr::new(node, 28083));
            // Not in the list of addresses.
            is_refused(way, SocketAddr::new(inside.second[family as usize], 28080));
            // The pod itself is what it is.
            reaches(way, SocketAddr::new(inside.pods[0][family as usize], 80), "pod-a");
        }
        // What means the loopback address to connect(2).
        let (name, _) = call(Way::Tcp, SocketAddr::new(any, 28080)).unwrap();
        assert_eq!(name, "pod-a");
    }
    // IPv4 over sockets of IPv6.
    for (address, port, pod) in [(Ipv4Addr::LOCALHOST, 28080, "pod-a")] {
        let mapped = SocketAddr::new(address.to_ipv6_mapped().into(), port);
        for way in WAYS {
            reaches(way, mapped, pod);
        }
    }
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn sockets_of_the_node_reach_pods() {
    in_a_process("sockets_of_the_node_reach_pods", |inside, object| {
        inside.attach(&object, "");
        gate(&object, cookie::own().unwrap().unwrap_or_else(|| learnt(&object)));
        addresses_of_the_node(inside, &object);
        for reason in ["connect", "sendmsg", "recvmsg", "peername"] {
            assert!(object.count(reason) > 0, "{reason}");
        }
        let key = ClaimKey::new(Addr::any(Family::V4), Protocol::Tcp, 28080);
        assert_eq!(object.traffic(&key)[0], 4);
        // A node's TCP connections do not push out what is known of its UDP sockets.
        for (map, protocol) in [("pm_sockets", Protocol::Udp), ("pm_streams", Protocol::Tcp)] {
            let keys = object.maps[map].entries().unwrap();
            let keys: Vec<SocketKey> =
                keys.iter().map(|(key, _)| SocketKey::read_from_bytes(key).unwrap()).collect();
            assert!(!keys.is_empty());
            assert!(keys.iter().all(|key| key.protocol == protocol.number()), "{map}: {keys:?}");
        }
    });
}

/// A socket may call again after it was refused, and then the pod itself.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn what_a_socket_called_before_is_forgotten_with_a_direct_call() {
    in_a_process(
        "what_a_socket_called_before_is_forgotten_with_a_direct_call",
        |inside, object| {
            inside.attach(&object, "_any");
            inside.listed(&object);
            // Nobody listens there.
            let pod = SocketAddr::new(inside.pods[0][0], 81);
            inside.claim_at(&object, Addr::any(Family::V4), 28080, pod);
            object.mark_port(pod.port());
            let called = SocketAddr::new(inside.node[0], 28080);
            for (kind, map) in
                [(SockType::Stream, "pm_streams"), (SockType::Datagram, "pm_sockets")]
            {
                let fd = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
                let known = [called, pod].map(|to| {
                    let result = connect(fd.as_raw_fd(), &SockaddrStorage::from(to));
                    assert_eq!(result.is_err(), kind == SockType::Stream, "{kind:?} to {to}");
                    object.maps[map].entries().unwrap().len()
                });
                assert_eq!(known, [1, 0], "{kind:?}");
            }
        },
    );
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn programs_without_a_gate_do_the_same() {
    in_a_process("programs_without_a_gate_do_the_same", |inside, object| {
        inside.attach(&object, "_any");
        addresses_of_the_node(inside, &object);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn sockets_of_other_network_namespaces_are_left_alone() {
    in_a_process("sockets_of_other_network_namespaces_are_left_alone", |inside, object| {
        inside.attach(&object, "");
        inside.listed(&object);
        inside.claim(&object, Family::V4, Addr::any(Family::V4), 28080, 0);
        let to = SocketAddr::new(inside.node[0], 28080);
        // Before the plugin has said which one is the node's, and if it is another.
        is_refused(Way::Tcp, to);
        let own = cookie::own().unwrap().unwrap_or_else(|| learnt(&object));
        gate(&object, own + 1);
        for way in WAYS {
            is_refused(way, to);
        }
        gate(&object, own);
        for way in WAYS {
            reaches(way, to, "pod-a");
        }
    });
}

fn config(object: &Object) -> Config {
    let value = object.maps["pm_config"].get(&[0; 4]).unwrap().unwrap();
    Config::read_from_bytes(&value).unwrap()
}

fn learnt(object: &Object) -> u64 {
    cookie::teach(|address| {
        let mut config = config(object);
        config.learn(address);
        object.put("pm_config", &[0; 4], config.as_bytes());
        Ok(())
    })
    .unwrap();
    assert!(config(object).has_learnt());
    config(object).netns_cookie
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_cookie_is_learnt_once() {
    in_a_process("the_cookie_is_learnt_once", |inside, object| {
        inside.attach(&object, "");
        let cookie = learnt(&object);
        if let Some(own) = cookie::own().unwrap() {
            assert_eq!(cookie, own);
        }
        // It is the plugin that trusts it.
        assert_eq!(config(&object).flags, 0);
        // The next connection to the same address is nobody's.
        let before = config(&object);
        let address = SocketAddr::new(before.learn_address.into(), 9);
        UdpSocket::bind("0.0.0.0:0").unwrap().connect(address).unwrap();
        assert_eq!(config(&object), before);
    });
}
