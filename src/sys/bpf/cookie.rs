//! The cookie of a network namespace, by which programs on socket calls (`bpf_get_netns_cookie`,
//! Linux 5.7) tell the processes of the node from those of pods.

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The cookie of the network namespace of this thread; `None` from a kernel that does not tell
/// processes (before 5.14).
///
/// # Errors
///
/// What making a socket returns.
pub fn own() -> io::Result<Option<u64>> {
    of(&socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// [`own`], of the network namespace of a socket of whichever kind.
///
/// # Errors
///
/// What getsockopt(2) returns.
pub fn of(socket: &impl AsFd) -> io::Result<Option<u64>> {
    match super::syscall::netns_cookie(socket) {
        Ok(cookie) => Ok(Some(cookie)),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Learns the cookie from a program on connect4 that is attached already: `expect` tells it which
/// address to look out for, and a socket of this thread's network namespace connects to that.
/// Nothing is sent. Until that happens another process of the machine could connect to the address,
/// which is a random one of 2^31.
///
/// # Errors
///
/// What `expect` and making a socket return.
pub fn teach(expect: impl FnOnce(SocketAddrV4) -> io::Result<()>) -> io::Result<()> {
    let mut random = [0; 4];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    let [third, fourth, high, low] = random;
    let port = u16::from_be_bytes([high | 0x80, low]);
    let address = SocketAddrV4::new(Ipv4Addr::new(127, 255, third, fourth), port);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    expect(address)?;
    // The program has run before the kernel looks for a route, which it may not find.
    socket.connect(address).ok();
    Ok(())
}
