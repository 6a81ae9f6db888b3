//! Servers that tell every caller who they are and which address they saw.
//!
//! The answer to a line (TCP) or a datagram (UDP) is `<name> <address>:<port>`, where the name says
//! which server it was and the rest is the caller's address as it arrived.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

use super::LabError;
use super::netns::Netns;
use super::traffic::Transport;
use crate::model::Family;

/// How long a server sleeps in a system call before it looks whether it should end.
const POLL: Duration = Duration::from_millis(50);
/// How long to wait for a port that a server had which has ended.
const HANDOVER: Duration = Duration::from_secs(2);

/// Running servers of one namespace; dropping this ends them and closes their ports. Established
/// TCP connections end too.
#[derive(Debug, Default)]
pub struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    /// Starts TCP and UDP servers on all addresses of both families (where the kernel has both), at
    /// the given ports.
    pub fn start(netns: &Netns, name: &str, tcp: &[u16], udp: &[u16]) -> Result<Self, LabError> {
        let mut servers = Self::default();
        for family in Family::ALL {
            if family == Family::V6 && !super::topology::kernel_has_ipv6() {
                continue;
            }
            let any = match family {
                Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
            };
            for port in tcp {
                servers.add(netns, name, Transport::Tcp, SocketAddr::new(any, *port))?;
            }
            for port in udp {
                servers.add(netns, name, Transport::Udp, SocketAddr::new(any, *port))?;
            }
        }
        Ok(servers)
    }

    /// Starts one more server on exactly this address. IPv6 sockets do not take IPv4 callers.
    pub fn add(
        &mut self,
        netns: &Netns,
        name: &str,
        transport: Transport,
        address: SocketAddr,
    ) -> Result<(), LabError> {
        let describe = |source| LabError::Step {
            step: format!("{}: serving {transport} on {address}", netns.name()),
            source,
        };
        let bound = netns
            .run(|| bound_socket(transport, address))
            .and_then(|bound| bound)
            .map_err(describe)?;
        let (name, stop) = (name.to_owned(), Arc::clone(&self.stop));
        let thread = std::thread::Builder::new()
            .spawn(move || match transport {
                Transport::Tcp => serve_tcp(&TcpListener::from(bound), &name, &stop),
                Transport::Udp | Transport::UdpUnconnected => {
                    serve_udp(&UdpSocket::from(bound), &name, &stop);
                }
            })
            .map_err(describe)?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

fn bound_socket(transport: Transport, address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let kind = match transport {
        Transport::Tcp => SockType::Stream,
        Transport::Udp | Transport::UdpUnconnected => SockType::Datagram,
    };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    // For accept(2) and recv(2) alike, so that a server notices that it should end.
    let timeout = TimeVal::new(0, POLL.as_micros() as i64);
    setsockopt(&fd, sockopt::ReceiveTimeout, &timeout)?;
    // A server that has ended may live on for moments: its sockets belong to a process, too, that another
    // thread has forked and that has not begun its program yet.
    let deadline = Instant::now() + HANDOVER;
    while let Err(error) =
        bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrStorage::from(address))
    {
        if error != nix::Error::EADDRINUSE || Instant::now() > deadline {
            return Err(error.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if transport == Transport::Tcp {
        listen(&fd, Backlog::new(128)?)?;
    }
    Ok(fd)
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        // An error is the timeout, or an ICMP error of an earlier answer: neither ends a server.
        if let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            socket.send_to(answer(name, peer).as_bytes(), peer).ok();
        }
    }
}

fn serve_tcp(listener: &TcpListener, name: &str, stop: &Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let Ok((stream, peer)) = listener.accept() else {
            continue;
        };
        let (name, stop) = (name.to_owned(), Arc::clone(stop));
        std::thread::spawn(move || converse(&stream, &answer(&name, peer), &stop).ok());
    }
}

/// Answers every line until the caller closes or the servers end.
fn converse(stream: &TcpStream, answer: &str, stop: &AtomicBool) -> io::Result<()> {
    stream.set_read_timeout(Some(POLL))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !stop.load(Ordering::Relaxed) {
        match reader.read_line(&mut line) {
            Ok(0) => break,
            Ok(_) => {
                line.clear();
                let mut stream = stream;
                stream.write_all(answer.as_bytes())?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn answer(name: &str, peer: SocketAddr) -> String {
    format!("{name} {peer}\n")
}
