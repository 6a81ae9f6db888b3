//! Sockets of the node's processes, asked of sock_diag (`NETLINK_SOCK_DIAG`, Linux 3.3): those of the
//! network namespace of the calling thread.

mod connected;
mod waiting;

use std::io;

use netlink_packet_core::DefaultNla;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};

use super::socket::{Message, NetlinkSocket};
use crate::model::{Family, Protocol};

pub use connected::{Connection, connected_from, connected_to, destroy};
pub use waiting::{Waiting, served, waiting_on};

// linux/inet_diag.h: `struct inet_diag_msg` is family, state, two timer bytes, the socket's
// identity and five numbers.
const STATE: usize = 1;
const IDENTITY: std::ops::Range<usize> = 4..52;

/// Where sockets that can have to do with a family are: the kernel files a socket under the family
/// that it was made with, and IPv6 sockets speak IPv4 too.
fn domains(family: Family) -> &'static [u8] {
    match family {
        Family::V4 => &[AF_INET, AF_INET6],
        Family::V6 => &[AF_INET6],
    }
}

/// `struct inet_diag_req_v2`. `states` has a bit for each one of `TCP_*`. A dump heeds the ports of
/// `id` and ignores its addresses.
fn request(kind: u16, domain: u8, protocol: Protocol, states: u32, id: &SocketId) -> Message {
    request_with(kind, domain, protocol, states, id, &[])
}

fn request_with(
    kind: u16,
    domain: u8,
    protocol: Protocol,
    states: u32,
    id: &SocketId,
    attributes: &[DefaultNla],
) -> Message {
    let request = InetRequest {
        family: domain,
        protocol: protocol.number(),
        // What is of interest comes without being asked for.
        extensions: ExtensionFlags::empty(),
        states: StateFlags::from_bits_retain(states),
        socket_id: id.clone(),
    };
    Message::new(kind, &request, attributes)
}

/// The answers to a request; none if the kernel cannot say.
fn ask<T>(
    socket: &mut NetlinkSocket,
    request: &Message,
    decode: impl FnMut(u16, &[u8]) -> Option<T>,
) -> io::Result<Vec<T>> {
    match socket.dump(request, decode) {
        // The handler of the family (`__sock_diag_cmd`) or of the protocol
        // (`inet_diag_lock_handler`) is missing. The kernel tries to load it first; since Linux
        // 4.17 only if the protocol itself is there (`sock_load_diag_module`), so that asking
        // does not bring SCTP to a node that has no use for it.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_sock_diag::constants::{TCP_CLOSE, TCP_LISTEN};

    use super::*;

    #[test]
    fn a_request_names_family_protocol_state_and_port() {
        let id = SocketId { source_port: 8080, ..SocketId::new_v6() };
        let mut expected = [0; 56];
        expected[..2].copy_from_slice(&[2, 6]);
        expected[4..8].copy_from_slice(&0x400_u32.to_ne_bytes());
        expected[8..10].copy_from_slice(&[0x1f, 0x90]);
        assert_eq!(request(20, AF_INET, Protocol::Tcp, 1 << TCP_LISTEN, &id).payload(), expected);
        expected[..2].copy_from_slice(&[10, 132]);
        assert_eq!(request(20, AF_INET6, Protocol::Sctp, 1 << TCP_LISTEN, &id).payload(), expected);
        expected[..2].copy_from_slice(&[10, 17]);
        expected[4..8].copy_from_slice(&0x80_u32.to_ne_bytes());
        assert_eq!(request(20, AF_INET6, Protocol::Udp, 1 << TCP_CLOSE, &id).payload(), expected);
    }
}
