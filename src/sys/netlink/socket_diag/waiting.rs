//! Whether processes of the node wait for traffic to ports.
//!
//! Which socket would get a packet to an address the kernel looks up as it does for the packet itself
//! (`inet_diag_find_one_icsk`, `udp_dump_one`). All sockets of some ports come by a dump, for which the
//! kernel goes through its table of listening sockets, or of all sockets of UDP, once for either family: that
//! takes it as long as a dozen lookups or two. It compares family, state and source port
//! (`inet_diag_dump_icsk`, `udp_dump`, `sctp_ep_dump`), and leaves the table of TCP connections and that of
//! SCTP associations alone if nothing but `TCP_LISTEN` is asked for. Everything is checked here as well.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use netlink_packet_core::{DefaultNla, ParseableParametrized};
use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, INET_DIAG_LOCALS, INET_DIAG_SKV6ONLY, SOCK_DIAG_BY_FAMILY, TCP_CLOSE,
    TCP_LISTEN,
};
use netlink_packet_sock_diag::inet::SocketId;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::super::attributes::find;
use super::super::socket::{Message, NetlinkSocket};
use super::{IDENTITY, STATE, ask, domains, request, request_with};
use crate::model::{Claim, Family, Protocol};

/// The last member of `struct inet_diag_msg`.
const INODE: usize = 68;
/// Behind `struct inet_diag_msg`.
const ATTRIBUTES: usize = 72;

const DNS: u16 = 53;
/// For more lookups than these of a protocol, dumps are quicker: of IPv4 and IPv6 sockets.
const LOOKUPS: usize = 16;

// linux/inet_diag.h.
const INET_DIAG_REQ_BYTECODE: u16 = 1;
const INET_DIAG_BC_S_GE: u8 = 2;
const INET_DIAG_BC_S_LE: u8 = 3;

/// `sizeof(struct sockaddr_storage)`.
const SOCKADDR_STORAGE: usize = 128;

/// Those of the claims whose packets a socket of the calling thread's network namespace would get: a
/// listening TCP or SCTP socket, or a UDP socket that is bound and not connected. IPv6 sockets that
/// take IPv4 as well (without `IPV6_V6ONLY`) count for both families.
///
/// A claim of any address, and likewise of the unspecified one, stands for those in `own` and for
/// 127.0.0.1 and ::1; of port 53 for all, since resolvers of the node listen on others of 127.0.0.0/8 and on
/// `lo` alone (127.0.0.53%lo of systemd). Otherwise sockets that are bound to a device do not count, but
/// those of SCTP. Nothing listens on port 0.
///
/// A kernel that cannot say (without `inet_diag`, `tcp_diag`, `udp_diag` or, before Linux 4.7 in
/// any case, `sctp_diag`, or where they are modules that cannot be loaded) counts as one without
/// such a socket.
///
/// # Errors
///
/// The `errno` of opening the netlink socket, or with which the kernel refuses to answer.
pub fn served(claims: &BTreeSet<Claim>, own: &BTreeSet<IpAddr>) -> io::Result<BTreeSet<Claim>> {
    let mut socket = NetlinkSocket::open_for_short(NETLINK_SOCK_DIAG)?;
    let mut served = BTreeSet::new();
    for protocol in Protocol::ALL {
        // In a request, source port 0 is every port.
        let asked: Vec<&Claim> =
            claims.iter().filter(|claim| claim.protocol == protocol && claim.port != 0).collect();
        let addresses: Vec<_> = asked.iter().map(|claim| addresses(claim, own)).collect();
        let together = addresses.iter().flatten().map(BTreeSet::len).sum::<usize>() > LOOKUPS;
        let (mut lookups, mut listed) = (Vec::new(), Vec::new());
        for (claim, addresses) in asked.into_iter().zip(addresses) {
            match addresses {
                Some(addresses) if !together => {
                    lookups.extend(addresses.into_iter().map(|ip| (claim, ip)));
                }
                addresses => listed.push((claim, addresses)),
            }
        }
        served.extend(looked_up(&mut socket, &lookups)?);
        served.extend(listed_as_waiting(&mut socket, protocol, &listed)?);
    }
    Ok(served)
}

fn looked_up(
    socket: &mut NetlinkSocket,
    lookups: &[(&Claim, IpAddr)],
) -> io::Result<BTreeSet<Claim>> {
    let requests: Vec<Message> =
        lookups.iter().map(|(claim, ip)| lookup(claim.protocol, *ip, claim.port)).collect();
    let answers =
        socket.ask_all(&requests, |kind, _| (kind == SOCK_DIAG_BY_FAMILY).then_some(()))?;
    let mut served = BTreeSet::new();
    for ((claim, _), answer) in lookups.iter().zip(answers) {
        match answer {
            Ok(Some(())) => drop(served.insert(**claim)),
            Ok(None) => {}
            // No socket, or no kernel that could say: EINVAL is one without IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(served)
}

fn listed_as_waiting(
    socket: &mut NetlinkSocket,
    protocol: Protocol,
    claims: &[(&Claim, Option<BTreeSet<IpAddr>>)],
) -> io::Result<BTreeSet<Claim>> {
    let ports = || claims.iter().map(|(claim, _)| claim.port);
    let Some((first, last)) = ports().min().zip(ports().max()) else {
        return Ok(BTreeSet::new());
    };
    let families: BTreeSet<Family> = claims.iter().map(|(claim, _)| claim.family).collect();
    let domains: BTreeSet<u8> = families.into_iter().flat_map(domains).copied().collect();
    let mut found = Vec::new();
    for domain in domains {
        found.extend(dump(socket, domain, protocol, first..=last)?);
    }
    let is_served = |(claim, addresses): &&(&Claim, Option<BTreeSet<IpAddr>>)| {
        found.iter().filter(|found| found.port == claim.port).any(|found| match addresses {
            None => found.socket.gets(claim),
            // As a lookup would tell.
            Some(addresses) => {
                let at = |ip: &IpAddr| Claim { address: Some(*ip), ..**claim };
                !found.is_of_device && addresses.iter().any(|ip| found.socket.gets(&at(ip)))
            }
        })
    };
    Ok(claims.iter().filter(is_served).map(|(claim, _)| **claim).collect())
}

/// The addresses to look up for a claim; `None` where a dump tells more.
fn addresses(claim: &Claim, own: &BTreeSet<IpAddr>) -> Option<BTreeSet<IpAddr>> {
    let loopback = match claim.family {
        Family::V4 => IpAddr::from(Ipv4Addr::LOCALHOST),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    };
    let addresses: BTreeSet<IpAddr> = match claim.address.filter(|ip| !ip.is_unspecified()) {
        Some(ip) => BTreeSet::from([ip]),
        // `lo` has addresses of the node, too.
        None => {
            let own = own.iter().copied().filter(|ip| Family::of(ip) == claim.family);
            std::iter::once(loopback).chain(own).collect()
        }
    };
    // It can look up associations of SCTP, and no sockets that listen (`sctp_diag_dump_one`).
    let is_for_dump = claim.protocol == Protocol::Sctp || addresses.len() > 1 && claim.port == DNS;
    (!is_for_dump).then_some(addresses)
}

/// Asks for the socket that a packet from nobody to this address and port would reach. The kernel
/// takes the identity for the socket's own with TCP, and for the packet's with UDP (`udp_dump_one`:
/// "src and dst are swapped for historical reasons").
fn lookup(protocol: Protocol, address: IpAddr, port: u16) -> Message {
    let (domain, nobody) = match address {
        IpAddr::V4(_) => (AF_INET, SocketId::new_v4()),
        IpAddr::V6(_) => (AF_INET6, SocketId::new_v6()),
    };
    // INET_DIAG_NOCOOKIE.
    let any = SocketId { cookie: [0xff; 8], ..nobody };
    let id = match protocol {
        Protocol::Udp => SocketId { destination_address: address, destination_port: port, ..any },
        Protocol::Tcp | Protocol::Sctp => {
            SocketId { source_address: address, source_port: port, ..any }
        }
    };
    request(SOCK_DIAG_BY_FAMILY, domain, protocol, 1 << waiting_state(protocol), &id)
}

/// The sockets that wait for traffic to a port, IPv4 ones first. As for errors and kernels that cannot
/// say, see [`served`].
pub fn waiting_on(protocol: Protocol, port: u16) -> io::Result<Vec<Waiting>> {
    let mut socket = NetlinkSocket::open(NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    for domain in [AF_INET, AF_INET6] {
        found.extend(dump(&mut socket, domain, protocol, port..=port)?);
    }
    Ok(found.into_iter().map(|found| found.socket).collect())
}

/// The sockets that wait for traffic to some ports.
fn dump(
    socket: &mut NetlinkSocket,
    domain: u8,
    protocol: Protocol,
    ports: RangeInclusive<u16>,
) -> io::Result<Vec<Found>> {
    let (first, last) = (*ports.start(), *ports.end());
    let (port, filter) = match first == last {
        true => (first, Vec::new()),
        false => (0, vec![DefaultNla::new(INET_DIAG_REQ_BYTECODE, between(first, last))]),
    };
    let id = SocketId { source_port: port, ..SocketId::new_v6() };
    let states = 1 << waiting_state(protocol);
    let request = request_with(SOCK_DIAG_BY_FAMILY, domain, protocol, states, &id, &filter);
    ask(socket, &request, |kind, payload| {
        waiting(protocol, kind, payload).filter(|found| ports.contains(&found.port))
    })
}

/// Two comparisons of the source port, each a `struct inet_diag_bc_op` and one with nothing but the port. One
/// that holds leads 8 bytes on, to the next or the end; one that does not, 4 bytes past the end
/// (`inet_diag_bc_run`). The kernel asks none of this of SCTP's sockets.
fn between(first: u16, last: u16) -> Vec<u8> {
    let comparison = |code: u8, past_end: u16, port: u16| {
        let [no, port] = [past_end.to_ne_bytes(), port.to_ne_bytes()];
        [[code, 8], no, [0, 0], port].concat()
    };
    [comparison(INET_DIAG_BC_S_GE, 20, first), comparison(INET_DIAG_BC_S_LE, 12, last)].concat()
}

/// The state of a socket that waits for anybody. A UDP socket is in `TCP_CLOSE`, and in
/// `TCP_ESTABLISHED` while it is connected; SCTP's `SCTP_SS_LISTENING` is `TCP_LISTEN`.
fn waiting_state(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp | Protocol::Sctp => TCP_LISTEN,
        Protocol::Udp => TCP_CLOSE,
    }
}

/// A socket that waits for traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// What it is bound to.
    pub addresses: Vec<IpAddr>,
    pub v6only: bool,
    /// By which its process is found.
    pub inode: u32,
}

impl Waiting {
    /// Whether packets to a claim are its own.
    #[must_use]
    pub fn gets(&self, claim: &Claim) -> bool {
        let address = claim.address.filter(|ip| !ip.is_unspecified());
        self.addresses.iter().any(|bound| {
            // An IPv6 socket that is bound to an IPv4-mapped address has to do with IPv4 only.
            let bound = bound.to_canonical();
            if bound == Ipv6Addr::UNSPECIFIED && !self.v6only {
                return true;
            }
            Family::of(&bound) == claim.family
                && (bound.is_unspecified()
                    || address.map_or(!bound.is_multicast(), |address| address == bound))
        })
    }
}

struct Found {
    port: u16,
    /// Bound to a device.
    is_of_device: bool,
    socket: Waiting,
}

/// `payload`: `struct inet_diag_msg` and attributes. `None` for a socket that does not wait.
fn waiting(protocol: Protocol, kind: u16, payload: &[u8]) -> Option<Found> {
    if kind != SOCK_DIAG_BY_FAMILY || *payload.get(STATE)? != waiting_state(protocol) {
        return None;
    }
    let identity = SocketId::parse_with_param(payload.get(IDENTITY)?, *payload.first()?).ok()?;
    let attributes = payload.get(ATTRIBUTES..)?;
    // Sent unasked for every IPv6 socket in one of the two states, by Linux 4.3 at the latest. Older
    // kernels leave it open; taking both families is the default.
    let v6only =
        find(attributes, INET_DIAG_SKV6ONLY).and_then(<[u8]>::first).is_some_and(|v| *v != 0);
    // An SCTP socket can have several addresses, of which the identity names one.
    let more = find(attributes, INET_DIAG_LOCALS).unwrap_or_default();
    let more = more.chunks_exact(SOCKADDR_STORAGE).filter_map(socket_address);
    let socket = Waiting {
        addresses: std::iter::once(identity.source_address).chain(more).collect(),
        v6only,
        inode: u32::from_ne_bytes(*payload.get(INODE..)?.first_chunk()?),
    };
    Some(Found { port: identity.source_port, is_of_device: identity.interface_id != 0, socket })
}

/// The address in a `struct sockaddr_in` (behind family and port) or `struct sockaddr_in6` (behind
/// the flow label too). The family is in host byte order.
fn socket_address(storage: &[u8]) -> Option<IpAddr> {
    match i32::from(u16::from_ne_bytes(*storage.first_chunk()?)) {
        libc::AF_INET => {
            storage.get(4..)?.first_chunk().map(|ip: &[u8; 4]| Ipv4Addr::from(*ip).into())
        }
        libc::AF_INET6 => {
            storage.get(8..)?.first_chunk().map(|ip: &[u8; 16]| Ipv6Addr::from(*ip).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// An answer as the kernel writes it.
    fn answer(state: u8, port: u16, bound: &str, attributes: &[u8]) -> Vec<u8> {
        let (family, octets) = match ip(bound) {
            IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
            IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
        };
        let mut bytes = vec![family, state, 0, 0];
        bytes.extend(port.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(octets);
        bytes.resize(68, 0);
        bytes.extend(0x0403_0201_u32.to_ne_bytes());
        bytes.extend(attributes);
        bytes
    }

    fn v6only(value: u8) -> [u8; 16] {
        // INET_DIAG_SHUTDOWN comes first.
        [5, 0, 8, 0, 0, 0, 0, 0, 5, 0, 11, 0, value, 0, 0, 0]
    }

    fn tcp(bound: &str, attributes: &[u8]) -> Waiting {
        let answer = answer(TCP_LISTEN, 8080, bound, attributes);
        let found = waiting(Protocol::Tcp, SOCK_DIAG_BY_FAMILY, &answer).unwrap();
        assert!(found.port == 8080 && !found.is_of_device);
        found.socket
    }

    fn claim(family: Family, address: Option<&str>, port: u16) -> Claim {
        Claim { family, protocol: Protocol::Tcp, address: address.map(ip), port }
    }

    #[test]
    fn an_answer_is_state_port_address_and_v6only() {
        let expected =
            |bound, v6only| Waiting { addresses: vec![ip(bound)], v6only, inode: 0x0403_0201 };
        assert_eq!(tcp("192.0.2.1", &[]), expected("192.0.2.1", false));
        assert_eq!(tcp("::", &[]), expected("::", false));
        assert_eq!(tcp("::", &v6only(0)), expected("::", false));
        assert_eq!(tcp("2001:db8::1", &v6only(1)), expected("2001:db8::1", true));
    }

    #[test]
    fn what_was_not_asked_for_is_left_out() {
        let read = |protocol, port, kind, bytes: &[u8]| {
            waiting(protocol, kind, bytes).filter(|found| found.port == port)
        };
        let listening = answer(TCP_LISTEN, 53, "0.0.0.0", &[]);
        let closed = answer(TCP_CLOSE, 53, "0.0.0.0", &[]);
        let connected = answer(1, 53, "192.0.2.1", &[]);
        assert!(read(Protocol::Tcp, 53, 20, &listening).is_some());
        assert!(read(Protocol::Sctp, 53, 20, &listening).is_some());
        assert!(read(Protocol::Udp, 53, 20, &closed).is_some());
        assert!(read(Protocol::Tcp, 53, 21, &listening).is_none());
        assert!(read(Protocol::Tcp, 54, 20, &listening).is_none());
        assert!(read(Protocol::Udp, 53, 20, &listening).is_none());
        assert!(read(Protocol::Tcp, 53, 20, &closed).is_none());
        assert!(read(Protocol::Tcp, 53, 20, &connected).is_none());
        assert!(read(Protocol::Udp, 53, 20, &connected).is_none());
        for length in 0..listening.len() {
            assert!(read(Protocol::Tcp, 53, 20, &listening[..length]).is_none(), "{length}");
        }
        let mut unknown = listening;
        unknown[0] = 1;
        assert!(read(Protocol::Tcp, 53, 20, &unknown).is_none());
    }

    #[test]
    fn who_gets_the_traffic() {
        use Family::{V4, V6};
        let gets = |bound, only, family, address: &str| {
            let address = (!address.is_empty()).then_some(address);
            tcp(bound, &v6only(only)).gets(&claim(family, address, 8080))
        };
        for (bound, only, family, address, expected) in [
            ("0.0.0.0", 0, V4, "", true),
            ("0.0.0.0", 0, V4, "192.0.2.1", true),
            ("0.0.0.0", 0, V6, "", false),
            ("192.0.2.1", 0, V4, "", true),
            ("192.0.2.1", 0, V4, "192.0.2.1", true),
            ("192.0.2.1", 0, V4, "192.0.2.2", false),
            ("::", 0, V6, "", true),
            ("::", 0, V6, "2001:db8::1", true),
            ("::", 0, V4, "", true),
            ("::", 0, V4, "192.0.2.1", true),
            ("::", 1, V6, "", true),
            ("::", 1, V6, "2001:db8::1", true),
            ("::", 1, V4, "", false),
            ("::", 1, V4, "192.0.2.1", false),
            ("2001:db8::1", 0, V6, "", true),
            ("2001:db8::1", 0, V6, "2001:db8::1", true),
            ("2001:db8::1", 0, V6, "2001:db8::2", false),
            ("2001:db8::1", 0, V4, "", false),
            ("::ffff:192.0.2.1", 0, V4, "", true),
            ("::ffff:192.0.2.1", 0, V4, "192.0.2.1", true),
            ("::ffff:192.0.2.1", 0, V4, "192.0.2.2", false),
            ("::ffff:192.0.2.1", 0, V6, "", false),
            ("::ffff:0.0.0.0", 0, V4, "192.0.2.1", true),
            ("::ffff:0.0.0.0", 0, V6, "", false),
            ("224.0.0.251", 0, V4, "", false),
            ("224.0.0.251", 0, V4, "192.0.2.1", false),
            ("ff02::fb", 0, V6, "", false),
        ] {
            let case = format!("{bound} v6only={only}, {family} {address}");
            assert_eq!(gets(bound, only, family, address), expected, "{case}");
        }
    }

    #[test]
    fn an_sctp_socket_has_several_addresses() {
        let mut locals = vec![0; 4 + 3 * 128];
        locals[..2].copy_from_slice(&(4 + 3 * 128_u16).to_ne_bytes());
        locals[2] = 12;
        locals[4..12].copy_from_slice(&[2, 0, 0x1f, 0x90, 192, 0, 2, 1]);
        locals[132..136].copy_from_slice(&[10, 0, 0x1f, 0x90]);
        locals[140..142].copy_from_slice(&[0x20, 1]);
        locals[155] = 9;
        locals[260] = 1; // no such family
        let answer = answer(TCP_LISTEN, 8080, "192.0.2.7", &locals);
        let socket = waiting(Protocol::Sctp, SOCK_DIAG_BY_FAMILY, &answer).unwrap().socket;
        assert_eq!(socket.addresses, [ip("192.0.2.7"), ip("192.0.2.1"), ip("2001::9")]);
        assert!(socket.gets(&claim(Family::V4, Some("192.0.2.1"), 8080)));
        assert!(socket.gets(&claim(Family::V6, Some("2001::9"), 8080)));
        assert!(!socket.gets(&claim(Family::V4, Some("192.0.2.2"), 8080)));
    }

    #[test]
    fn a_lookup_names_the_packet_with_udp_and_the_socket_otherwise() {
        let identity = |protocol, address| {
            let message = lookup(protocol, ip(address), 8080);
            let id = &message.payload()[8..];
            (message.payload()[0], id[..4].to_vec(), id[4..8].to_vec(), id[20..24].to_vec())
        };
        let (own, port) = ([192, 0, 2, 1], [0x1f, 0x90]);
        let socket = (2, [port, [0; 2]].concat(), own.to_vec(), vec![0; 4]);
        assert_eq!(identity(Protocol::Tcp, "192.0.2.1"), socket);
        let packet = (2, [[0; 2], port].concat(), vec![0; 4], own.to_vec());
        assert_eq!(identity(Protocol::Udp, "192.0.2.1"), packet);
        assert_eq!(identity(Protocol::Tcp, "::1").0, 10);
        let asked = lookup(Protocol::Tcp, ip("::1"), 8080);
        assert_eq!(asked.payload()[48..56], [0xff; 8]);
    }

    #[test]
    fn a_range_of_ports_is_two_comparisons() {
        let [first, last] = [0x1f90_u16, 0x2000].map(u16::to_ne_bytes);
        let [twenty, twelve] = [20_u16, 12].map(u16::to_ne_bytes);
        let expected = [[2, 8], twenty, [0, 0], first, [3, 8], twelve, [0, 0], last].concat();
        assert_eq!(between(0x1f90, 0x2000), expected);
    }

    #[test]
    fn nothing_listens_on_port_0() {
        let claims = BTreeSet::from([claim(Family::V4, None, 0)]);
        assert_eq!(served(&claims, &BTreeSet::new()).unwrap(), BTreeSet::new());
    }
}
