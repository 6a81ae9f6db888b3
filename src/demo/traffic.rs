//! Calls from inside a namespace, and what came of them.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::netns::Netns;

/// How a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    Tcp,
    /// A socket connected with connect(2): the kernel drops answers from another address.
    Udp,
    /// A socket that uses sendto(2), as many resolvers do; the address that answers is compared.
    UdpUnconnected,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
            Transport::UdpUnconnected => "udp (sendto)",
        })
    }
}

/// One call to make.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub transport: Transport,
    pub target: SocketAddr,
    /// The local address and port to use; `None` leaves both to the kernel.
    pub bind: Option<SocketAddr>,
    /// How long to wait for the connection, and again for the answer.
    pub timeout: Duration,
}

impl Call {
    /// A call from whatever address and port the kernel takes.
    #[must_use]
    pub fn new(transport: Transport, target: SocketAddr, timeout: Duration) -> Self {
        Self { transport, target, bind: None, timeout }
    }
}

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The name of the server that answered.
    pub server: String,
    /// The caller's address as the server saw it.
    pub seen: SocketAddr,
    /// The caller's own address.
    pub local: SocketAddr,
}

/// Why a call had no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A TCP reset or an ICMP "port unreachable" came back.
    #[error("refused")]
    Refused,
    /// Nothing came back in time.
    #[error("timed out")]
    TimedOut,
    /// An unconnected socket got its answer from an address that it had not called.
    #[error("answered by {0} instead")]
    WrongSource(SocketAddr),
    /// Any other error of the kernel, or an answer that is not a server's.
    #[error("{0}")]
    Other(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Failure::Refused,
            // Linux ends a blocking connect(2) at SO_SNDTIMEO with EINPROGRESS, recv(2) with EAGAIN.
            Some(libc::EAGAIN | libc::EINPROGRESS | libc::ETIMEDOUT) => Failure::TimedOut,
            _ => Failure::Other(error.to_string()),
        }
    }
}

impl From<nix::Error> for Failure {
    fn from(error: nix::Error) -> Self {
        io::Error::from(error).into()
    }
}

/// Calls once and hangs up. Nothing is sent twice by this side: a lost datagram is a failure.
pub fn reach(from: &Netns, call: Call) -> Result<Reply, Failure> {
    Session::open(from, call)?.ask()
}

/// An open connection (or UDP socket), to find out whether it goes on working.
#[derive(Debug)]
pub struct Session {
    call: Call,
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

impl Session {
    /// Makes a socket inside `from` and connects it, if it is to be connected.
    pub fn open(from: &Netns, call: Call) -> Result<Self, Failure> {
        // connect(2) too happens inside: hooks of cgroups look at the calling process.
        let fd = from.run(|| open_socket(call))??;
        let socket = match call.transport {
            Transport::Tcp => Socket::Tcp(BufReader::new(TcpStream::from(fd))),
            Transport::Udp | Transport::UdpUnconnected => Socket::Udp(UdpSocket::from(fd)),
        };
        Ok(Self { call, socket })
    }

    /// Sends one question and waits for its answer.
    pub fn ask(&mut self) -> Result<Reply, Failure> {
        let (text, local) = match &mut self.socket {
            Socket::Tcp(reader) => {
                reader.get_mut().write_all(b"who am I?\n")?;
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Err(Failure::Other("closed without an answer".to_owned()));
                }
                (line, reader.get_ref().local_addr()?)
            }
            Socket::Udp(socket) => {
                let mut buffer = [0; 512];
                let question = b"who am I?";
                let length = if self.call.transport == Transport::Udp {
                    uninterrupted(|| socket.send(question))?;
                    uninterrupted(|| socket.recv(&mut buffer))?
                } else {
                    uninterrupted(|| socket.send_to(question, self.call.target))?;
                    let (length, source) = uninterrupted(|| socket.recv_from(&mut buffer))?;
                    if source != self.call.target {
                        return Err(Failure::WrongSource(source));
                    }
                    length
                };
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                (text, socket.local_addr()?)
            }
        };
        let strange = || Failure::Other(format!("strange answer {text:?}"));
        let (server, seen) = text.trim_end().rsplit_once(' ').ok_or_else(strange)?;
        Ok(Reply { server: server.to_owned(), seen: seen.parse().map_err(|_| strange())?, local })
    }
}

fn open_socket(call: Call) -> Result<OwnedFd, Failure> {
    let family = if call.target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let kind = match call.transport {
        Transport::Tcp => SockType::Stream,
        Transport::Udp | Transport::UdpUnconnected => SockType::Datagram,
    };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    let timeout = TimeVal::new(call.timeout.as_secs() as i64, call.timeout.subsec_micros() as i64);
    setsockopt(&fd, sockopt::SendTimeout, &timeout)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &timeout)?;
    if let Some(local) = call.bind {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(local))?;
    }
    if call.transport != Transport::UdpUnconnected {
        let target = SockaddrStorage::from(call.target);
        // Another call waits for what the first one has begun.
        uninterrupted(|| connect(fd.as_raw_fd(), &target).map_err(io::Error::from))?;
    }
    Ok(fd)
}

/// Calls again what a stop of the process has ended: with a timeout, sockets return `EINTR` then, although no
/// handler has run (signal(7)).
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
