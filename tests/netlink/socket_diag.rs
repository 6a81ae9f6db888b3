#![allow(clippy::disallowed_methods, reason = "these tests make the sockets that are found")]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, bind,
    listen, setsockopt, socket, sockopt,
};
use portmap::model::{Claim, Family, Protocol};
use portmap::sys::netlink::socket_diag;

use crate::{in_namespace, run};

/// What `served` says of IPv4 and IPv6: any local address, one of `ADDRESSES`, the other one.
type Answers = ([bool; 3], [bool; 3]);

const NOBODY: Answers = ([false; 3], [false; 3]);
const ADDRESSES: [&str; 4] = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"];

fn add_addresses() {
    for address in ADDRESSES {
        let options = if address.contains(':') { "/128 nodad" } else { "/32" };
        run(&format!("ip addr add {address}{options} dev lo"));
    }
    // An IPv6 address gets its route from a work queue (addrconf_dad_work), even without a search for others
    // that have it.
    let deadline = Instant::now() + Duration::from_secs(10);
    for address in ADDRESSES {
        while let Err(error) =
            UdpSocket::bind((address, 0)).and_then(|socket| socket.connect((address, 9)))
        {
            assert!(Instant::now() < deadline, "{address}: {error}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn own() -> BTreeSet<IpAddr> {
    ADDRESSES.map(|address| address.parse().unwrap()).into()
}

/// Of many claims sockets are listed, of few they are looked up; a claim's answer is the same.
fn ask(protocol: Protocol, port: u16) -> Answers {
    let one = |family, address: Option<&str>| {
        let address: Option<IpAddr> = address.map(|text| text.parse().unwrap());
        let claim = Claim { family, protocol, address, port };
        let alone = socket_diag::served(&BTreeSet::from([claim]), &own()).unwrap();
        // Below and above, where nobody listens.
        let others = (1000..1020).chain(65500..65520).map(|port| Claim { port, ..claim });
        let among_others = others.chain([claim]).collect();
        assert_eq!(socket_diag::served(&among_others, &own()).unwrap(), alone, "{claim:?}");
        alone.contains(&claim)
    };
    let [first4, second4, first6, second6] = ADDRESSES.map(Some);
    (
        [one(Family::V4, None), one(Family::V4, first4), one(Family::V4, second4)],
        [one(Family::V6, None), one(Family::V6, first6), one(Family::V6, second6)],
    )
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn each_of_several_claims_gets_its_own_answer() {
    in_namespace(|| {
        let _v4 = TcpListener::bind("127.0.0.1:8080").unwrap();
        let _both = TcpListener::bind("[::]:8081").unwrap();
        let _udp = UdpSocket::bind("[::1]:8080").unwrap();
        let claim = |family, protocol, port| Claim { family, protocol, address: None, port };
        let mut claims = BTreeSet::new();
        for family in Family::ALL {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                claims.extend([8080, 8081, 8082].map(|port| claim(family, protocol, port)));
            }
        }
        let served = BTreeSet::from([
            claim(Family::V4, Protocol::Tcp, 8080),
            claim(Family::V4, Protocol::Tcp, 8081),
            claim(Family::V6, Protocol::Tcp, 8081),
            claim(Family::V6, Protocol::Udp, 8080),
        ]);
        assert_eq!(socket_diag::served(&claims, &own()).unwrap(), served);
    });
}

/// A node's resolver would be cut off without a word.
#[test]
#[ignore = "privileged: needs network namespaces"]
fn resolvers_listen_where_others_do_not() {
    in_namespace(|| {
        add_addresses();
        let listen = |port: u16| {
            let udp = UdpSocket::bind(("127.0.0.53", port)).unwrap();
            setsockopt(&udp, sockopt::BindToDevice, &"lo".into()).unwrap();
            (TcpListener::bind(("127.0.0.53", port)).unwrap(), udp)
        };
        let _resolver = (listen(53), listen(8080));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert_eq!(ask(protocol, 53), ([true, false, false], [false; 3]), "{protocol}");
            assert_eq!(ask(protocol, 8080), NOBODY, "{protocol}");
        }
    });
}

/// An IPv6 socket bound to port 8080 and, with TCP, listening.
fn bound6(kind: SockType, address: &str, v6only: bool) -> OwnedFd {
    let socket = socket(AddressFamily::Inet6, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&socket, sockopt::Ipv6V6Only, &v6only).unwrap();
    let address: SockaddrIn6 = format!("[{address}]:8080").parse().unwrap();
    bind(socket.as_raw_fd(), &address).unwrap();
    if kind == SockType::Stream {
        listen(&socket, Backlog::new(1).unwrap()).unwrap();
    }
    socket
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn listening_tcp_sockets() {
    in_namespace(|| {
        add_addresses();
        let answers = |address: &str| {
            let _listener = TcpListener::bind(address).unwrap();
            assert_eq!(ask(Protocol::Tcp, 8081), NOBODY, "{address}");
            assert_eq!(ask(Protocol::Udp, 8080), NOBODY, "{address}");
            ask(Protocol::Tcp, 8080)
        };
        assert_eq!(answers("0.0.0.0:8080"), ([true; 3], [false; 3]));
        assert_eq!(answers("192.0.2.1:8080"), ([true, true, false], [false; 3]));
        assert_eq!(answers("[2001:db8::1]:8080"), ([false; 3], [true, true, false]));
        assert_eq!(ask(Protocol::Tcp, 8080), NOBODY);
    });
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn ipv6_sockets_take_ipv4_unless_told_otherwise() {
    in_namespace(|| {
        add_addresses();
        for (kind, protocol) in
            [(SockType::Stream, Protocol::Tcp), (SockType::Datagram, Protocol::Udp)]
        {
            for (address, v6only, expected) in [
                ("::", false, ([true; 3], [true; 3])),
                ("::", true, ([false; 3], [true; 3])),
                ("2001:db8::1", false, ([false; 3], [true, true, false])),
                ("::ffff:192.0.2.1", false, ([true, true, false], [false; 3])),
                ("::ffff:0.0.0.0", false, ([true; 3], [false; 3])),
            ] {
                let _socket = bound6(kind, address, v6only);
                assert_eq!(ask(protocol, 8080), expected, "{protocol} {address} {v6only}");
            }
            assert_eq!(ask(protocol, 8080), NOBODY);
        }
    });
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn a_connection_without_a_listener_is_not_open() {
    in_namespace(|| {
        add_addresses();
        let listener = TcpListener::bind("192.0.2.1:8080").unwrap();
        let client = TcpStream::connect("192.0.2.1:8080").unwrap();
        let (server, _) = listener.accept().unwrap();
        let client_port = client.local_addr().unwrap().port();
        assert_eq!(ask(Protocol::Tcp, 8080), ([true, true, false], [false; 3]));
        drop(listener);
        assert_eq!(server.local_addr().unwrap().port(), 8080);
        assert_eq!(ask(Protocol::Tcp, 8080), NOBODY);
        assert_eq!(ask(Protocol::Tcp, client_port), NOBODY);
    });
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn udp_sockets_that_are_not_connected() {
    in_namespace(|| {
        add_addresses();
        let socket = UdpSocket::bind("0.0.0.0:8080").unwrap();
        assert_eq!(ask(Protocol::Udp, 8080), ([true; 3], [false; 3]));
        assert_eq!(ask(Protocol::Udp, 8081), NOBODY);
        assert_eq!(ask(Protocol::Tcp, 8080), NOBODY);
        socket.connect("192.0.2.2:53").unwrap();
        assert_eq!(ask(Protocol::Udp, 8080), NOBODY);
        drop(socket);

        let _one = UdpSocket::bind("192.0.2.2:8080").unwrap();
        assert_eq!(ask(Protocol::Udp, 8080), ([true, false, true], [false; 3]));
        let _group = UdpSocket::bind("224.0.0.251:5353").unwrap();
        assert_eq!(ask(Protocol::Udp, 5353), NOBODY);
    });
}

/// Without SCTP in the kernel, asking for it is not an error.
#[test]
#[ignore = "privileged: needs network namespaces"]
fn listening_sctp_sockets() {
    in_namespace(|| {
        add_addresses();
        assert_eq!(ask(Protocol::Sctp, 8080), NOBODY);
        let protocol = SockProtocol::Sctp;
        let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, protocol);
        let socket = match made {
            Err(Errno::EPROTONOSUPPORT) => return println!("no SCTP here"),
            made => made.unwrap(),
        };
        let address: SockaddrIn = "192.0.2.1:8080".parse().unwrap();
        bind(socket.as_raw_fd(), &address).unwrap();
        assert_eq!(ask(Protocol::Sctp, 8080), NOBODY);
        listen(&socket, Backlog::new(1).unwrap()).unwrap();
        assert_eq!(ask(Protocol::Sctp, 8080), ([true, true, false], [false; 3]));
    });
}

fn udp(local: &str, peer: &str) -> UdpSocket {
    let socket = UdpSocket::bind(local).unwrap();
    socket.connect(peer).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

fn to(protocol: Protocol, peer: &str) -> Vec<socket_diag::Connection> {
    socket_diag::connected_to(protocol, peer.parse().unwrap()).unwrap()
}

fn ends(found: &[socket_diag::Connection]) -> Vec<(SocketAddr, SocketAddr)> {
    let mut ends: Vec<_> = found.iter().map(|found| (found.local, found.peer)).collect();
    ends.sort();
    ends
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn only_the_socket_that_is_meant_is_ended() {
    in_namespace(|| {
        add_addresses();
        for (any, called, other, peer) in [
            ("0.0.0.0:0", "192.0.2.1:53", "192.0.2.1:54", "192.0.2.1:53"),
            ("0.0.0.0:0", "192.0.2.1:53", "192.0.2.2:53", "192.0.2.1:53"),
            ("[::]:0", "[2001:db8::1]:53", "[2001:db8::2]:53", "[2001:db8::1]:53"),
            // An IPv6 socket that talks IPv4.
            ("[::]:0", "[::ffff:192.0.2.1]:53", "[::ffff:192.0.2.2]:53", "192.0.2.1:53"),
        ] {
            let (meant, same, another) = (udp(any, called), udp(any, called), udp(any, other));
            let _waiting = UdpSocket::bind(any).unwrap();
            assert_eq!(to(Protocol::Tcp, peer), []);
            let port = meant.local_addr().unwrap().port();
            let (found, rest): (Vec<_>, Vec<_>) =
                to(Protocol::Udp, peer).into_iter().partition(|one| one.local.port() == port);
            assert_eq!((found.len(), rest.len()), (1, 1), "{peer}");
            assert_eq!(found[0].peer.to_string(), peer);

            assert_eq!(socket_diag::destroy(&found).unwrap(), 1);
            let error = meant.recv(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
            assert_eq!(meant.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
            for socket in [&same, &another] {
                assert_eq!(socket.recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
                socket.peer_addr().unwrap();
            }
            assert_eq!(to(Protocol::Udp, peer), rest);
            let both = [found, rest].concat();
            assert_eq!(socket_diag::destroy(&both).unwrap(), 1);
            assert_eq!(to(Protocol::Udp, peer), []);
        }
    });
}

#[test]
#[ignore = "privileged: needs network namespaces"]
fn connections_of_a_port_in_either_role() {
    in_namespace(|| {
        add_addresses();
        let listener = TcpListener::bind("[::]:40000").unwrap();
        let client = TcpStream::connect("192.0.2.1:40000").unwrap();
        let (_server, _) = listener.accept().unwrap();
        let _client6 = TcpStream::connect("[2001:db8::1]:40000").unwrap();
        let client_port = client.local_addr().unwrap().port();
        let among = |protocol, ports: &[u16]| {
            socket_diag::connected_from(protocol, &ports.iter().copied().collect()).unwrap()
        };
        let from = |protocol, port| among(protocol, &[port]);
        let found = from(Protocol::Tcp, 40000);
        assert_eq!(found.len(), 2);
        let expected = ("192.0.2.1:40000".parse().unwrap(), client.local_addr().unwrap());
        assert_eq!(ends(&found)[0], expected);
        let found = from(Protocol::Tcp, client_port);
        assert_eq!(ends(&found), [(expected.1, expected.0)]);
        assert_eq!(ends(&to(Protocol::Tcp, "192.0.2.1:40000")), [(expected.1, expected.0)]);
        assert_eq!(from(Protocol::Udp, 40000), []);
        assert_eq!(from(Protocol::Tcp, 40001), []);
        // Several ports at once, of which connections have one, two or none.
        assert_eq!(among(Protocol::Tcp, &[1, 40000]).len(), 2);
        assert_eq!(among(Protocol::Tcp, &[client_port, 40000]).len(), 3);
        assert_eq!(among(Protocol::Tcp, &[1, 40001]), []);

        let _waiting = UdpSocket::bind("192.0.2.2:40000").unwrap();
        let socket = udp("192.0.2.1:40000", "192.0.2.2:9");
        let found = from(Protocol::Udp, 40000);
        let expected = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
        assert_eq!(ends(&found), [expected]);
        let mut cookie = 0_u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        #[allow(unsafe_code, reason = "no crate reads SO_COOKIE")]
        // SAFETY: the kernel writes at most `length` bytes.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &mut length,
            )
        };
        assert_eq!((result, cookie), (0, found[0].cookie));

        drop(socket);
        drop(client);
        assert_eq!(from(Protocol::Udp, 40000), []);
    });
}
