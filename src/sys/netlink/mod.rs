//! What the kernel is asked without starting a process: links, addresses and routes
//! (`NETLINK_ROUTE`), connection tracking and nf_tables (`NETLINK_NETFILTER`), listening sockets
//! (`NETLINK_SOCK_DIAG`).
//!
//! Requests are built from the types of the netlink-packet crates. Answers are taken apart by
//! attribute number instead: those crates decode a message whole, so that one statistics block or
//! rule expression of a newer kernel that they do not know makes the message unreadable, and only
//! a handful of attributes is of interest here.

pub(crate) mod attributes;
pub mod conntrack;
pub mod nftables;
pub mod nftkey;
pub mod route;
pub mod rule;
pub mod socket;
pub mod socket_diag;

/// `struct nfgenmsg`, which begins every `NETLINK_NETFILTER` payload: family, version and a
/// resource number in network byte order.
const NFGENMSG_LENGTH: usize = 4;

/// The type of a `NETLINK_NETFILTER` message: the subsystem in the upper, its message in the lower
/// byte.
fn netfilter_kind(subsystem: libc::c_int, message: libc::c_int) -> u16 {
    ((subsystem as u16) << 8) | (message as u16 & 0xff)
}
