//! Connected TCP and UDP sockets, by one of their ends.
//!
//! The kernel compares the ports and states of a request itself, and goes through its table of
//! connections for that, once for each family.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::ParseableParametrized;
use netlink_packet_sock_diag::constants::{
    SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, TCP_CLOSE_WAIT, TCP_CLOSING, TCP_ESTABLISHED, TCP_FIN_WAIT1,
    TCP_FIN_WAIT2, TCP_LAST_ACK, TCP_SYN_RECV, TCP_SYN_SENT,
};
use netlink_packet_sock_diag::inet::SocketId;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::super::socket::NetlinkSocket;
use super::{IDENTITY, STATE, ask, domains, request};
use crate::model::{Family, Protocol};

/// Of the states of TCP, those in which packets of both sides can be under way. A connected UDP
/// socket is in `TCP_ESTABLISHED`.
const CONNECTED: [u8; 8] = [
    TCP_ESTABLISHED,
    TCP_SYN_SENT,
    TCP_SYN_RECV,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_CLOSE_WAIT,
    TCP_LAST_ACK,
    TCP_CLOSING,
];

/// A connected socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    pub protocol: Protocol,
    /// As are those of `peer`, IPv4 addresses of an IPv6 socket are IPv4 addresses here.
    pub local: SocketAddr,
    pub peer: SocketAddr,
    /// The kernel's number for the socket, which eBPF programs see as well
    /// (`bpf_get_socket_cookie`). Never used again until the next boot.
    pub cookie: u64,
    domain: u8,
    id: SocketId,
}

/// The connected sockets with one of these local ports. There are none of SCTP, and none with port 0.
///
/// # Errors
///
/// The `errno` of opening the netlink socket, or with which the kernel refuses the dump.
pub fn connected_from(protocol: Protocol, ports: &BTreeSet<u16>) -> io::Result<Vec<Connection>> {
    // The kernel goes through all connections for each request, and compares with one port or none.
    let source_port = match ports.first() {
        None => return Ok(Vec::new()),
        Some(port) if ports.len() == 1 => *port,
        Some(_) => 0,
    };
    let id = SocketId { source_port, ..SocketId::new_v6() };
    connected(protocol, Family::V4, &id, |connection| {
        let port = connection.local.port();
        port != 0 && ports.contains(&port)
    })
}

/// The sockets that are connected to this address and port, which is not 0.
///
/// # Errors
///
/// As [`connected_from`].
pub fn connected_to(protocol: Protocol, peer: SocketAddr) -> io::Result<Vec<Connection>> {
    let (ip, port) = (peer.ip(), peer.port());
    if port == 0 {
        return Ok(Vec::new());
    }
    let id = SocketId { destination_port: port, ..SocketId::new_v6() };
    connected(protocol, Family::of(&ip), &id, |connection| {
        (connection.peer.ip(), connection.peer.port()) == (ip, port)
    })
}

fn connected(
    protocol: Protocol,
    family: Family,
    id: &SocketId,
    wanted: impl Fn(&Connection) -> bool,
) -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    if protocol == Protocol::Sctp {
        return Ok(found);
    }
    let states = CONNECTED.iter().fold(0, |states, state| states | 1 << state);
    let mut socket = NetlinkSocket::open(NETLINK_SOCK_DIAG)?;
    for domain in domains(family) {
        let request = request(SOCK_DIAG_BY_FAMILY, *domain, protocol, states, id);
        found.extend(ask(&mut socket, &request, |kind, payload| {
            connection(protocol, kind, payload).filter(&wanted)
        })?);
    }
    Ok(found)
}

/// Ends connections from outside: the next call on the socket fails with `ECONNABORTED`, once, and a
/// UDP socket is no longer connected then. Sockets that are gone or no longer connected as they were
/// are left alone. Says how many were ended. Linux 4.5, UDP 4.9.
///
/// # Errors
///
/// The `errno` of opening the netlink socket; `EOPNOTSUPP` from a kernel without
/// `CONFIG_INET_DIAG_DESTROY`, `EPERM` without `CAP_NET_ADMIN`.
pub fn destroy(connections: &[Connection]) -> io::Result<usize> {
    let mut ended = 0;
    if connections.is_empty() {
        return Ok(ended);
    }
    let mut socket = NetlinkSocket::open(NETLINK_SOCK_DIAG)?;
    for connection in connections {
        let Connection { domain, protocol, id, .. } = connection;
        let request = request(SOCK_DESTROY, *domain, *protocol, 0, id);
        match socket.request(&request, 0, |_, _| None::<()>) {
            Ok(_) => ended += 1,
            // The kernel compares both ends and the cookie.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ended)
}

/// `payload`: `struct inet_diag_msg` and attributes. `None` for a socket in another state.
fn connection(protocol: Protocol, kind: u16, payload: &[u8]) -> Option<Connection> {
    if kind != SOCK_DIAG_BY_FAMILY || !CONNECTED.contains(payload.get(STATE)?) {
        return None;
    }
    let domain = *payload.first()?;
    let id = SocketId::parse_with_param(payload.get(IDENTITY)?, domain).ok()?;
    // An array of two words in host byte order, the lower one first.
    let [low, high] =
        [0, 4].map(|at| u32::from_ne_bytes(std::array::from_fn(|byte| id.cookie[at + byte])));
    let end = |ip: IpAddr, port| SocketAddr::new(ip.to_canonical(), port);
    Some(Connection {
        protocol,
        local: end(id.source_address, id.source_port),
        peer: end(id.destination_address, id.destination_port),
        cookie: u64::from(low) | u64::from(high) << 32,
        domain,
        id,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use netlink_packet_sock_diag::constants::{TCP_CLOSE, TCP_LISTEN, TCP_TIME_WAIT};

    use super::*;

    fn answer(family: u8, state: u8, local: &[u8], peer: &[u8]) -> Vec<u8> {
        let mut bytes = vec![family, state, 0, 0, 0x9c, 0x40, 0x1f, 0x90];
        for address in [local, peer] {
            bytes.extend(address);
            bytes.extend(vec![0; 16 - address.len()]);
        }
        bytes.extend(7_u32.to_ne_bytes());
        bytes.extend(0x89ab_cdef_u32.to_ne_bytes());
        bytes.extend(0x0123_4567_u32.to_ne_bytes());
        bytes.resize(72, 0);
        bytes
    }

    fn read(answer: &[u8]) -> Option<Connection> {
        connection(Protocol::Tcp, SOCK_DIAG_BY_FAMILY, answer)
    }

    #[test]
    fn an_answer_has_both_ends_and_a_cookie() {
        let found = read(&answer(2, 1, &[192, 0, 2, 1], &[10, 0, 0, 2])).unwrap();
        assert_eq!(found.local.to_string(), "192.0.2.1:40000");
        assert_eq!(found.peer.to_string(), "10.0.0.2:8080");
        assert_eq!((found.cookie, found.id.interface_id), (0x0123_4567_89ab_cdef, 7));
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2];
        let found = read(&answer(10, 2, &mapped, &mapped)).unwrap();
        assert_eq!((found.peer.to_string().as_str(), found.domain), ("10.0.0.2:8080", 10));
    }

    #[test]
    fn only_connected_sockets_count() {
        let of = |state| answer(2, state, &[10, 0, 0, 1], &[10, 0, 0, 2]);
        for state in [TCP_LISTEN, TCP_CLOSE, TCP_TIME_WAIT, 0, 12, 255] {
            assert_eq!(read(&of(state)), None);
        }
        assert!(connection(Protocol::Tcp, 20 + 1, &of(1)).is_none());
        for length in 0..52 {
            assert_eq!(read(&of(1)[..length]), None, "{length}");
        }
        assert_eq!(read(&answer(1, 1, &[], &[])), None);
    }

    #[test]
    fn port_0_and_sctp_are_not_asked_for() {
        for ports in [&[][..], &[0]] {
            assert_eq!(
                connected_from(Protocol::Tcp, &ports.iter().copied().collect()).unwrap(),
                []
            );
        }
        assert_eq!(connected_from(Protocol::Sctp, &BTreeSet::from([80])).unwrap(), []);
        assert_eq!(connected_to(Protocol::Udp, "10.0.0.2:0".parse().unwrap()).unwrap(), []);
        assert_eq!(destroy(&[]).unwrap(), 0);
    }
}
