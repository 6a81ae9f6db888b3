//! Frames for programs to be tried on. Checksums are left zero: nobody looks at them here.

use std::net::{IpAddr, SocketAddr};

/// Both ends of the link are unicast addresses: programs leave others alone.
const ETHERNET: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
const PAYLOAD: [u8; 64] = [0; 64];

/// What is in a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
    /// An echo request; ports are not used.
    Icmp,
}

/// A frame that a program ignores at once: neither IPv4 nor IPv6.
pub fn arp() -> Vec<u8> {
    [&ETHERNET[..], &[0x08, 0x06], &PAYLOAD].concat()
}

/// A frame in the middle of a connection.
pub fn frame(transport: Transport, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let header = match transport {
        Transport::Tcp => {
            let mut header = ports(source, destination);
            // Numbers of sequence and acknowledgement, length, ACK, window, checksum, urgent.
            header.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
            header
        }
        Transport::Udp => {
            let mut header = ports(source, destination);
            header.extend([0, 8 + PAYLOAD.len() as u8, 0, 0]);
            header
        }
        Transport::Icmp => vec![if source.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 1, 0, 1],
    };
    let protocol = match transport {
        Transport::Tcp => 6,
        Transport::Udp => 17,
        Transport::Icmp if source.is_ipv4() => 1,
        Transport::Icmp => 58,
    };
    let length = (header.len() + PAYLOAD.len()) as u8;
    let ip = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut ip = vec![0x08, 0, 0x45, 0, 0, 20 + length, 0, 0, 0x40, 0, 64, protocol, 0, 0];
            ip.extend([source.octets(), destination.octets()].concat());
            ip
        }
        (source, destination) => {
            let mut ip = vec![0x86, 0xdd, 0x60, 0, 0, 0, 0, length, protocol, 64];
            for address in [source, destination] {
                let address = match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped(),
                    IpAddr::V6(address) => address,
                };
                ip.extend(address.octets());
            }
            ip
        }
    };
    [&ETHERNET[..], &ip, &header, &PAYLOAD].concat()
}

fn ports(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat()
}
