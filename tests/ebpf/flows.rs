//! What programs remember of connections: too many of them, ports that are used again, and connections
//! of the node itself.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use portmap::backend::ebpf::layout::{Addr, ClaimKey, Traffic, config_flags};
use portmap::demo::netns::Netns;
use portmap::demo::topology::Lab;
use portmap::demo::traffic::{Call, Failure, Session, Transport, reach};
use portmap::model::Family;
use serde_json::json;
use zerocopy::{FromBytes, IntoBytes};

use super::support::{ebpf, prev_result};
use super::talks::Talks;
use super::{Scene, TIMEOUT, lab};

/// Flows that the small map has room for.
const ROOM: u32 = 2048;

impl Scene<'_> {
    fn flows(&self) -> BTreeSet<Vec<u8>> {
        let keys = || ebpf::map("pm_flows").entries().unwrap().into_iter().map(|(key, _)| key);
        self.lab.node.run(|| keys().collect()).unwrap()
    }

    /// Connections to hostPort 8080 that programs have seen begin.
    fn begun(&self) -> u64 {
        self.counted(0, |traffic| traffic.connections)
    }

    /// What programs have counted of a pod's hostPort.
    pub fn counted(&self, pod: usize, what: impl Fn(Traffic) -> u64 + Sync) -> u64 {
        let read = || {
            let entries = ebpf::map("pm_traffic").entries().unwrap();
            let of_port = entries.iter().filter(|(key, _)| {
                ClaimKey::read_from_bytes(key).unwrap().port() == Scene::port(pod)
            });
            let per_cpu = of_port.flat_map(|(_, values)| values.chunks_exact(size_of::<Traffic>()));
            per_cpu.map(|value| what(Traffic::read_from_bytes(value).unwrap())).sum()
        };
        self.lab.node.run(read).unwrap()
    }
}

/// A socket of the client's with this source port.
fn udp_from(lab: &Lab, port: u16) -> UdpSocket {
    let local = SocketAddr::new(lab.client_address(Family::V4), port);
    lab.client.run(|| UdpSocket::bind(local).unwrap()).unwrap()
}

/// A flood of flows evicts those that nobody uses, which are its own at first: the kernel prefers what has
/// been used again since it was made. A connection that is used is not forgotten, and one that was goes on
/// when its client speaks.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_flood_of_flows_does_not_break_connections() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.with_room("pm_flows", ROOM);
    scene.ok("ADD", 0);
    let sink = json!([{"hostPort": 9000, "containerPort": 9, "protocol": "udp"}]);
    let sink = scene.node.config(sink, prev_result(&lab, 1, "1.1.0"));
    scene.node.ok("ADD", &sink, &scene.key(1));
    // It takes everything and reads nothing.
    let _sink = lab.pods[1].netns.run(|| UdpSocket::bind("0.0.0.0:9").unwrap()).unwrap();
    let mut active = Talks::open(&lab);
    let used = scene.flows();
    assert!(used.len() > 10, "{}", used.len());
    let mut idle = Talks::open(&lab);
    let begun = scene.begun();
    let target = lab.node_socket(Family::V4, 9000);
    for port in 1024..32_768 {
        udp_from(&lab, port).send_to(b"flood", target).unwrap();
        if port % 512 == 0 {
            active.go_on();
        }
    }
    let left = scene.flows();
    assert!(left.len() <= ROOM as usize, "{}", left.len());
    assert!(left.len() > ROOM as usize / 2, "{}: the flood was none", left.len());
    assert!(used.is_subset(&left), "{} are forgotten", used.difference(&left).count());
    // None of those that are used was forgotten meanwhile, and begun anew by its client.
    assert_eq!(scene.begun(), begun);
    active.go_on();
    idle.go_on();
}

/// Resolvers ask with a new socket each time. What the node's sockets called is forgotten of those that
/// have not been used for long.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_flood_of_sockets_does_not_break_exchanges() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    scene.with_room("pm_sockets", ROOM);
    scene.ok("ADD", 0);
    for family in Family::ALL {
        let target = lab.node_socket(family, Scene::port(0));
        let open = |transport| Session::open(&lab.node, Call::new(transport, target, TIMEOUT));
        let mut active =
            [Transport::Udp, Transport::UdpUnconnected].map(|transport| open(transport).unwrap());
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        for number in 0..8 * ROOM {
            let socket = lab.node.run(|| UdpSocket::bind(any).unwrap()).unwrap();
            socket.send_to(b"flood", target).unwrap();
            if number % 128 == 0 {
                for session in &mut active {
                    assert_eq!(session.ask().unwrap().server, "pod-a");
                }
            }
        }
        let mut newest = open(Transport::UdpUnconnected).unwrap();
        assert_eq!(newest.ask().unwrap().server, "pod-a");
        let known = || ebpf::map("pm_sockets").entries().unwrap().len();
        let known = lab.node.run(known).unwrap();
        assert!((ROOM / 2..=ROOM).contains(&u32::try_from(known).unwrap()), "{known}");
    }
}

/// Calls from one and the same port of the client's.
fn call_from(lab: &Lab, transport: Transport, family: Family, port: u16, to: u16) -> Session {
    let mut call = Call::new(transport, lab.node_socket(family, to), TIMEOUT);
    call.bind = Some(SocketAddr::new(lab.client_address(family), port));
    Session::open(&lab.client, call).unwrap_or_else(|failure| panic!("{port} to {to}: {failure}"))
}

/// A connected socket inside a namespace, from a certain address and port.
fn open_from(
    inside: &Netns,
    kind: SockType,
    local: SocketAddr,
    to: SocketAddr,
) -> std::io::Result<OwnedFd> {
    let open = || {
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(local))?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(fd)
    };
    inside.run(open).unwrap()
}

/// Who answers on a TCP connection from the client's port 5000.
fn tcp_from_5000(lab: &Lab, family: Family, to: u16) -> std::io::Result<(TcpStream, String)> {
    let local = SocketAddr::new(lab.client_address(family), 5000);
    let to = lab.node_socket(family, to);
    let mut stream = TcpStream::from(open_from(&lab.client, SockType::Stream, local, to)?);
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"who am I?\n")?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    assert!(line.trim_end().ends_with(":5000"), "{line}");
    Ok((stream, line.split(' ').next().unwrap_or_default().to_owned()))
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_client_s_port_is_used_again_at_once() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    for family in [Family::V4, Family::V6] {
        for round in 0..20 {
            for pod in [0, 1] {
                let what = format!("{family} round {round}");
                let (stream, server) = tcp_from_5000(&lab, family, Scene::port(pod)).expect(&what);
                assert_eq!(server, lab.pods[pod].name, "{what}");
                // Ends with a reset, so that the client's kernel does not keep the port.
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                setsockopt(&stream, sockopt::Linger, &linger).unwrap();
                drop(stream);
                let mut session = call_from(&lab, Transport::Udp, family, 5000, Scene::port(pod));
                assert_eq!(session.ask().unwrap().server, lab.pods[pod].name, "{what}");
            }
        }
        // After an orderly end, as soon as the client's kernel lets it (RFC 6191: a second).
        lab.client.set_sysctl("ipv4/tcp_tw_reuse", "1").unwrap();
        for pod in [0, 1, 1, 0] {
            let server = loop {
                match tcp_from_5000(&lab, family, Scene::port(pod)) {
                    Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                    }
                    other => break other.unwrap().1,
                }
            };
            assert_eq!(server, lab.pods[pod].name, "{family}");
        }
    }
}

/// Two hostPorts of one containerPort, both called from one port of a client, and the pod itself from
/// that port as well.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn two_hostports_of_one_pod_s_port_are_told_apart() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let mut mappings = Vec::new();
    for port in [8080, 9080] {
        mappings.push(json!({"hostPort": port, "containerPort": 80, "protocol": "tcp"}));
        mappings.push(json!({"hostPort": port, "containerPort": 53, "protocol": "udp"}));
    }
    let config = scene.node.config(json!(mappings), prev_result(&lab, 0, "1.1.0"));
    scene.node.ok("ADD", &config, &scene.key(0));
    for family in [Family::V4, Family::V6] {
        for (transport, inside) in [(Transport::Tcp, 80), (Transport::Udp, 53)] {
            let mut sessions: Vec<Session> = [8080, 9080]
                .map(|to| call_from(&lab, transport, family, 5000, to))
                .into_iter()
                .collect();
            let pod = SocketAddr::new(lab.pods[0].address(family).unwrap(), inside);
            let mut direct = Call::new(transport, pod, TIMEOUT);
            direct.bind = Some(SocketAddr::new(lab.client_address(family), 5000));
            sessions.push(Session::open(&lab.client, direct).unwrap());
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..3 {
                for session in &mut sessions {
                    let reply = session.ask().unwrap();
                    assert_eq!(reply.local.port(), 5000);
                    seen.insert(reply.seen);
                }
            }
            // The pod has to tell them apart as well.
            assert_eq!(seen.len(), 3, "{seen:?}");
        }
    }
}

/// Both ends of connections between the node's `port` and the client, by TCP and by UDP.
pub struct Ends {
    tcp: (TcpStream, TcpStream),
    udp: (UdpSocket, UdpSocket),
}

impl Ends {
    pub fn open(lab: &Lab, port: u16) -> Self {
        Self::open_by(lab, Family::V4, port)
    }

    fn open_by(lab: &Lab, family: Family, port: u16) -> Self {
        let any = SocketAddr::new(lab.client_address(family), 0);
        let listener = lab.client.run(|| TcpListener::bind(any).unwrap()).unwrap();
        let outer = lab.client.run(|| UdpSocket::bind(any).unwrap()).unwrap();
        let local = SocketAddr::new(lab.node_address(family), port);
        let open = |kind, to| open_from(&lab.node, kind, local, to).unwrap();
        let tcp = TcpStream::from(open(SockType::Stream, listener.local_addr().unwrap()));
        let udp = UdpSocket::from(open(SockType::Datagram, outer.local_addr().unwrap()));
        outer.connect(local).unwrap();
        let ends = Ends { tcp: (tcp, listener.accept().unwrap().0), udp: (udp, outer) };
        for stream in [&ends.tcp.0, &ends.tcp.1] {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        }
        for socket in [&ends.udp.0, &ends.udp.1] {
            socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        }
        ends
    }

    /// The client's end speaks, and the node's hears it.
    pub fn client_speaks(&mut self) {
        let mut buffer = [0; 5];
        self.tcp.1.write_all(b"hello").unwrap();
        self.tcp.0.read_exact(&mut buffer).expect("by TCP");
        assert_eq!(&buffer, b"hello");
        self.udp.1.send(b"world").unwrap();
        self.udp.0.recv(&mut buffer).expect("by UDP");
        assert_eq!(&buffer, b"world");
    }

    /// The client's end speaks without a pause, before, during and after, and the node's hears all of it.
    fn client_speaks_during(&mut self, action: impl FnOnce()) {
        let begun = Barrier::new(2);
        let over = AtomicBool::new(false);
        let Ends { tcp: (stream, sender), udp: (socket, outer) } = self;
        // Who hears may not run for a while.
        setsockopt(socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
        std::thread::scope(|scope| {
            let heard = scope.spawn(|| {
                let mut buffer = [0; 4];
                let mut next = || {
                    stream.read_exact(&mut buffer).expect("by TCP");
                    let by_tcp = u32::from_ne_bytes(buffer);
                    socket.recv(&mut buffer).expect("by UDP");
                    (by_tcp, u32::from_ne_bytes(buffer))
                };
                for number in 0.. {
                    match next() {
                        (u32::MAX, by_udp) => return assert_eq!(by_udp, u32::MAX),
                        both => assert_eq!(both, (number, number)),
                    }
                }
            });
            let speaking = scope.spawn(|| {
                let mut say = |number: u32| {
                    sender.write_all(&number.to_ne_bytes()).unwrap();
                    outer.send(&number.to_ne_bytes()).unwrap();
                    std::thread::sleep(Duration::from_micros(100));
                };
                for number in 0.. {
                    if number == 10 {
                        begun.wait();
                    }
                    if over.load(Ordering::Relaxed) && number > 10 {
                        break;
                    }
                    say(number);
                }
                say(u32::MAX);
            });
            begun.wait();
            action();
            over.store(true, Ordering::Relaxed);
            speaking.join().unwrap();
            heard.join().unwrap();
        });
    }

    pub fn node_speaks(&mut self) {
        let mut buffer = [0; 5];
        self.tcp.0.write_all(b"hello").unwrap();
        self.tcp.1.read_exact(&mut buffer).expect("by TCP");
        assert_eq!(&buffer, b"hello");
        self.udp.0.send(b"world").unwrap();
        self.udp.1.recv(&mut buffer).expect("by UDP");
        assert_eq!(&buffer, b"world");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn connections_of_the_node_from_a_hostport_s_number_stay_its_own() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    // A port that sockets get by themselves: such connections may be open already.
    const PORT: u16 = 40_000;
    for family in Family::ALL {
        let mut before = Ends::open_by(&lab, family, PORT);
        before.node_speaks();
        // The first one of all makes maps and attaches programs.
        before.client_speaks_during(|| {
            scene.node.ok("ADD", &scene.config_with(0, PORT), &scene.key(0));
        });
        before.client_speaks();
        let mut after = Ends::open_by(&lab, family, PORT);
        after.node_speaks();
        after.client_speaks();
        for transport in [Transport::Tcp, Transport::Udp] {
            let call = Call::new(transport, lab.node_socket(family, PORT), TIMEOUT);
            assert_eq!(reach(&lab.client, call).unwrap().server, "pod-a");
        }
        before.client_speaks();
        after.client_speaks();
        // Also when the claim is put there anew, by itself or with all there is, and when it goes.
        scene.node.ok("ADD", &scene.config_with(0, PORT), &scene.key(0));
        before.client_speaks();
        scene.node.damage();
        before.client_speaks_during(|| drop(scene.node.restore(false)));
        after.client_speaks();
        scene.node.ok("DEL", &scene.config_with(0, PORT), &scene.key(0));
        before.client_speaks();
        after.client_speaks();
    }
}

/// A pod's connection gets the node's address from netfilter and keeps its port, which is another pod's
/// hostPort (cilium#34041).
#[test]
#[ignore = "privileged: makes network namespaces"]
fn masqueraded_connections_from_a_hostport_s_number_go_on() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.node.shell(
        "nft -f - <<'END'
        table inet foreign {
            chain out {
                type nat hook postrouting priority srcnat
                oifname eth0 masquerade
            }
        }
END",
    );
    scene.ok("ADD", 0);
    let port = Scene::port(0);
    for family in Family::ALL {
        let seen = SocketAddr::new(lab.node_address(family), port);
        let local = SocketAddr::new(lab.pods[1].address(family).unwrap(), port);
        let any = SocketAddr::new(lab.client_address(family), 0);
        let listener = lab.client.run(|| TcpListener::bind(any).unwrap()).unwrap();
        let outer = lab.client.run(|| UdpSocket::bind(any).unwrap()).unwrap();
        outer.set_read_timeout(Some(TIMEOUT)).unwrap();
        let open = |kind, to| open_from(&lab.pods[1].netns, kind, local, to).unwrap();
        let mut stream = TcpStream::from(open(SockType::Stream, listener.local_addr().unwrap()));
        let socket = UdpSocket::from(open(SockType::Datagram, outer.local_addr().unwrap()));
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let (mut server, from) = listener.accept().unwrap();
        assert_eq!(from, seen, "by TCP");
        let mut buffer = [0; 5];
        for _ in 0..2 {
            stream.write_all(b"hello").unwrap();
            server.read_exact(&mut buffer).unwrap();
            server.write_all(b"world").unwrap();
            stream.read_exact(&mut buffer).expect("an answer by TCP");
            socket.send(b"hello").unwrap();
            let (_, from) = outer.recv_from(&mut buffer).unwrap();
            assert_eq!(from, seen, "by UDP");
            outer.send_to(b"world", from).unwrap();
            socket.recv(&mut buffer).expect("an answer by UDP");
            // Others are forwarded all the same.
            for transport in [Transport::Tcp, Transport::Udp] {
                let call = Call::new(transport, lab.node_socket(family, port), TIMEOUT);
                assert_eq!(reach(&lab.client, call).unwrap().server, "pod-a");
            }
        }
    }
    scene.ok("DEL", 0);
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

fn udp_session(from: &Netns, target: SocketAddr, server: &str) -> Session {
    let mut session = Session::open(from, Call::new(Transport::Udp, target, TIMEOUT)).unwrap();
    assert_eq!(session.ask().unwrap().server, server);
    session
}

/// An error instead of waiting for an answer that will not come.
fn assert_told(session: &mut Session) {
    let told = session.ask().unwrap_err();
    assert_ne!(told, Failure::TimedOut);
}

/// A connected socket of the node has the pod's address, which no claim can change: the kernel tells
/// its owner that the connection is gone, and the next one leads to the new pod.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn udp_that_is_open_during_a_takeover_follows_or_is_told() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let outer = lab.node_socket(Family::V4, 8080);
    let outer6 = lab.node_socket(Family::V6, 8080);
    scene.ok("ADD", 0);
    let mut connected =
        [loopback(8080), outer, outer6].map(|to| udp_session(&lab.node, to, "pod-a"));
    let unconnected = Call::new(Transport::UdpUnconnected, loopback(8080), TIMEOUT);
    let mut unconnected = Session::open(&lab.node, unconnected).unwrap();
    unconnected.ask().unwrap();
    let mut others =
        [&lab.client, &lab.pods[1].netns].map(|from| udp_session(from, outer, "pod-a"));
    // A connection of the node to the pod itself is nobody's business.
    let pod = SocketAddr::new(lab.pods[0].address(Family::V4).unwrap(), 53);
    let mut direct = udp_session(&lab.node, pod, "pod-a");

    let taking = scene.config_with(1, 8080);
    scene.node.ok("ADD", &taking, &scene.key(1));

    for session in &mut others {
        assert_eq!(session.ask().unwrap().server, "pod-b");
    }
    assert_eq!(unconnected.ask().unwrap().server, "pod-b");
    assert_eq!(direct.ask().unwrap().server, "pod-a");
    for session in &mut connected {
        assert_told(session);
    }
    let mut connected = udp_session(&lab.node, loopback(8080), "pod-b");
    scene.node.ok("DEL", &taking, &scene.key(1));
    assert_told(&mut connected);
    // The first pod has it back.
    let mut connected = udp_session(&lab.node, loopback(8080), "pod-a");
    for session in &mut others {
        assert_eq!(session.ask().unwrap().server, "pod-a");
    }
    scene.ok("DEL", 0);
    assert_told(&mut connected);
    for session in &mut others {
        session.ask().unwrap_err();
    }
    assert_eq!(direct.ask().unwrap().server, "pod-a");
    let call = Call::new(Transport::Udp, loopback(8080), TIMEOUT);
    reach(&lab.node, call).unwrap_err();
}

/// Whoever brings all in order again looks at every connection, and finds that these are right.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn connections_to_a_claim_of_an_address_go_on_when_all_is_restored() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let outer = lab.node_socket(Family::V4, 8080);
    let mapping = json!(
        {"hostPort": 8080, "containerPort": 53, "protocol": "udp", "hostIP": outer.ip()}
    );
    let config = scene.node.config(json!([mapping]), prev_result(&lab, 0, "1.1.0"));
    scene.node.ok("ADD", &config, &scene.key(0));
    let mut sessions = [&lab.client, &lab.node].map(|from| udp_session(from, outer, "pod-a"));
    let before = scene.flows();
    assert!(!before.is_empty());
    scene.node.shell(&format!("tc filter del dev {} ingress", lab.pods[0].host_link));
    scene.node.restore(false);
    assert!(before.is_subset(&scene.flows()));
    for session in &mut sessions {
        assert_eq!(session.ask().unwrap().server, "pod-a");
    }
    scene.node.ok("DEL", &config, &scene.key(0));
}

/// TCP has its own end: connections to a pod that is gone end with it, and those to a pod that lost its
/// port go on.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn tcp_that_is_open_during_a_takeover_ends_and_begins_anew() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let outer = lab.node_socket(Family::V4, 8080);
    let call =
        |from: &Netns, to| reach(from, Call::new(Transport::Tcp, to, TIMEOUT)).unwrap().server;
    let mut inner =
        Session::open(&lab.node, Call::new(Transport::Tcp, loopback(8080), TIMEOUT)).unwrap();
    inner.ask().unwrap();
    scene.node.ok("ADD", &scene.config_with(1, 8080), &scene.key(1));
    assert_eq!(call(&lab.client, outer), "pod-b");
    assert_eq!(call(&lab.node, loopback(8080)), "pod-b");
    // The node's own packets meet no claim.
    assert_eq!(inner.ask().unwrap().server, "pod-a");
}

/// Callers from elsewhere are told at once, and do not wait for a pod that has their port no more: by whoever
/// has it now, or else by the node.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn tcp_from_elsewhere_is_reset_by_a_takeover_and_by_a_del() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    let open = |server: &str| -> Vec<Session> {
        let callers = [&lab.client, &lab.pods[2].netns];
        let calls = callers.into_iter().flat_map(|from| Family::ALL.map(|family| (from, family)));
        let sessions = calls.map(|(from, family)| {
            let target = lab.node_socket(family, 8080);
            let call = Call::new(Transport::Tcp, target, TIMEOUT);
            let mut session = Session::open(from, call).unwrap();
            assert_eq!(session.ask().unwrap().server, server);
            session
        });
        sessions.collect()
    };
    let reset = io::Error::from_raw_os_error(nix::libc::ECONNRESET).to_string();
    let assert_reset = |sessions: Vec<Session>| {
        for mut session in sessions {
            assert_eq!(session.ask(), Err(Failure::Other(reset.clone())), "{session:?}");
        }
    };
    scene.ok("ADD", 0);
    let of_the_first = open("pod-a");
    let taking = scene.config_with(1, 8080);
    scene.node.ok("ADD", &taking, &scene.key(1));
    assert_reset(of_the_first);
    let of_the_second = open("pod-b");
    scene.node.ok("DEL", &taking, &scene.key(1));
    assert_reset(of_the_second);
    let of_the_first = open("pod-a");
    scene.ok("DEL", 0);
    assert_reset(of_the_first);
}

/// What is true of the node's addresses changes between calls, and a node without ADDs has DELs.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_del_looks_at_the_nodes_addresses_again() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let ip = |arguments: &str| {
        let mut command = Command::new("ip");
        let status = lab.node.spawn(command.args(arguments.split(' '))).unwrap().wait().unwrap();
        assert!(status.success(), "ip {arguments}");
    };
    let is_known = |address: &str| {
        let address = Addr::from(address.parse::<IpAddr>().unwrap());
        let known = || ebpf::map("pm_addresses").get(address.as_bytes()).unwrap();
        let listed_only = scene.told().flags & config_flags::LISTED_ONLY != 0;
        (lab.node.run(known).unwrap(), listed_only)
    };
    let own = Some(1_u32.to_ne_bytes().to_vec());
    // kube-proxy's name is all that the device has of it.
    ip("link add kube-ipvs0 type veth peer name other");
    ip("address add 10.96.0.1/32 dev kube-ipvs0");
    ip("address add 203.0.113.77/32 dev lo");
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    assert_eq!(is_known("203.0.113.77"), (own, true));
    assert_eq!(is_known("10.96.0.1"), (None, true));
    ip("address del 203.0.113.77/32 dev lo");
    ip("link del kube-ipvs0");
    scene.ok("DEL", 1);
    assert_eq!(is_known("203.0.113.77"), (None, false));
}

/// Connections of a claim outlive a configuration that gives it an address, or takes that away: with its end
/// they go.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn flows_of_a_claim_that_has_moved_go_with_its_end() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let target = lab.node_socket(Family::V4, 8080);
    let any = scene.config(0);
    let mut one = any.clone();
    for mapping in one["runtimeConfig"]["portMappings"].as_array_mut().unwrap() {
        mapping["hostIP"] = json!(target.ip());
    }
    for [before, after] in [[&any, &one], [&one, &any]] {
        scene.node.ok("ADD", before, &scene.key(0));
        reach(&lab.client, Call::new(Transport::Tcp, target, TIMEOUT)).unwrap();
        scene.node.ok("ADD", after, &scene.key(0));
        assert_eq!(scene.flows().len(), 1);
        scene.node.ok("DEL", after, &scene.key(0));
        assert_eq!(scene.flows().len(), 0, "{after}");
    }
}

/// Of calls of a pod's own address nothing is counted, and their flows go with the pod all the same.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn flows_of_direct_calls_go_with_their_pod() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let pod = SocketAddr::new(lab.pods[0].address(Family::V4).unwrap(), 80);
    reach(&lab.client, Call::new(Transport::Tcp, pod, TIMEOUT)).unwrap();
    assert_eq!(scene.flows().len(), 1);
    let counted = || ebpf::map("pm_traffic").entries().unwrap();
    assert_eq!(lab.node.run(counted).unwrap(), []);
    scene.ok("DEL", 0);
    assert_eq!(scene.flows().len(), 0);
}
