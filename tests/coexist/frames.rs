//! Frames as nobody's stack would send them.
#![allow(unsafe_code, reason = "addresses of packet(7) sockets have no safe constructor")]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use portmap::demo::netns::Netns;

use crate::standins::link;

const UDP: u8 = 17;

/// A datagram in an Ethernet frame to a MAC address.
pub fn udp_v4(mac: &[u8], [source, destination]: [Ipv4Addr; 2], port: u16, text: &[u8]) -> Vec<u8> {
    let datagram = udp(port, text, 0);
    let length = (20 + datagram.len()) as u16;
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 1, 0, 0, 64, UDP, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let checksum = !sum(&header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame(mac, libc::ETH_P_IP, &[header, datagram])
}

/// The same by IPv6, which has no datagrams without a checksum.
pub fn udp_v6(mac: &[u8], [source, destination]: [Ipv6Addr; 2], port: u16, text: &[u8]) -> Vec<u8> {
    let length = (8 + text.len()) as u16;
    let addresses = [source.octets(), destination.octets()].concat();
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(length.to_be_bytes());
    header.extend([UDP, 64]);
    header.extend(&addresses);
    let pseudo = [addresses, u32::from(length).to_be_bytes().into(), vec![0, 0, 0, UDP]].concat();
    let checksum = !sum(&[pseudo, udp(port, text, 0)].concat());
    frame(mac, libc::ETH_P_IPV6, &[header, udp(port, text, checksum)])
}

fn udp(port: u16, text: &[u8], checksum: u16) -> Vec<u8> {
    let length = (8 + text.len()) as u16;
    let fields = [5555, port, length, checksum].map(u16::to_be_bytes);
    [fields.as_flattened(), text].concat()
}

fn frame(mac: &[u8], ethertype: i32, parts: &[Vec<u8>]) -> Vec<u8> {
    let source = [2, 0, 0, 0, 0, 0x99];
    [mac, &source, &(ethertype as u16).to_be_bytes(), &parts.concat()].concat()
}

/// The frame with a tag (802.1Q): 3 bits of priority, one more, and 12 bits of a VLAN's number.
pub fn tagged(frame: &[u8], tag: u16) -> Vec<u8> {
    [&frame[..12], &(libc::ETH_P_8021Q as u16).to_be_bytes(), &tag.to_be_bytes(), &frame[12..]]
        .concat()
}

/// RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Puts a frame on the wire.
pub fn send(from: &Netns, device: &str, frame: &[u8]) {
    let index = link(from, device).index;
    let make = || socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None);
    let socket = from.run(make).unwrap().unwrap();
    // SAFETY: integers throughout.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index as i32;
    let size = std::mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: both are as long as said, and the call only reads them.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size,
        )
    };
    assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
}
