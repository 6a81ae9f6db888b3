//! The tables of iptables-legacy, asked of the kernel itself: the tools may not be on the node, while
//! another container has used them. Nothing is listed here, only counted, and no table is made.
#![allow(
    unsafe_code,
    reason = "getsockopt(2) writes structures of linux/netfilter_ipv4/ip_tables.h"
)]

use std::io::{self, ErrorKind};
use std::mem::size_of;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::model::Family;

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`.
const GET_INFO: libc::c_int = 64;

/// `struct ipt_getinfo`, which is `struct ip6t_getinfo`.
#[repr(C)]
#[derive(Default)]
struct Info {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    num_entries: u32,
    size: u32,
}

/// Names of the tables of this network namespace that exist. Asking for others would make them.
///
/// # Errors
///
/// What reading /proc returns; none if the kernel has no such tables at all.
pub fn tables(family: Family) -> io::Result<Vec<String>> {
    let path = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    match std::fs::read_to_string(path) {
        Ok(names) => Ok(names.lines().map(ToOwned::to_owned).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// How many entries a table has beyond what every table has: rules, and two for each chain that
/// somebody made. The table must be there.
///
/// # Errors
///
/// What socket(2) and getsockopt(2) return: `EPERM` without `CAP_NET_ADMIN`.
pub fn entries(family: Family, table: &str) -> io::Result<usize> {
    let (domain, level) = match family {
        Family::V4 => (AddressFamily::Inet, libc::IPPROTO_IP),
        Family::V6 => (AddressFamily::Inet6, libc::IPPROTO_IPV6),
    };
    // Any socket of the family will do, and this kind takes no right of its own.
    let socket = socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut info = Info::default();
    for (to, from) in info.name.iter_mut().take(31).zip(table.as_bytes()) {
        *to = *from;
    }
    let mut length = size_of::<Info>() as libc::socklen_t;
    // SAFETY: the kernel reads and writes `length` bytes, which is the size of `info`; all of its
    // fields are integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            GET_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // A policy for each hook, and the entry that ends the table.
    let own = info.valid_hooks.count_ones() + 1;
    Ok(info.num_entries.saturating_sub(own) as usize)
}
