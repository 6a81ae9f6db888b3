//! Packets, built from nothing every time: what a program has made of one is compared byte for byte
//! with another one that was built, so that every checksum is computed anew and in full.

use std::net::{IpAddr, SocketAddr};

/// Where the frame goes to and comes from. The first is no device's here.
const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

pub const SCTP_DATA: u8 = 0;
pub const SCTP_INIT: u8 = 1;
pub const SCTP_ABORT: u8 = 6;
pub const SCTP_SHUTDOWN_COMPLETE: u8 = 14;

pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const AUTHENTICATION: u8 = 51;
pub const DESTINATION: u8 = 60;

/// The transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// With these flags.
    Tcp(u8),
    Udp,
    /// With 0 for a checksum: none (RFC 768, RFC 6935).
    UdpWithout,
    /// With this type of first chunk.
    Sctp(u8),
    /// With 0 for a checksum: the device computes it.
    SctpWithout,
}

impl Kind {
    pub fn protocol(self) -> u8 {
        match self {
            Kind::Tcp(_) => 6,
            Kind::Udp | Kind::UdpWithout => 17,
            Kind::Sctp(_) | Kind::SctpWithout => 132,
        }
    }

    /// Offset of the checksum in the header.
    pub fn checksum(self) -> usize {
        match self {
            Kind::Tcp(_) => 16,
            Kind::Udp | Kind::UdpWithout => 6,
            Kind::Sctp(_) | Kind::SctpWithout => 8,
        }
    }
}

/// One of each transport header that the programs know.
pub const KINDS: [Kind; 5] =
    [Kind::Tcp(SYN), Kind::Udp, Kind::UdpWithout, Kind::Sctp(SCTP_INIT), Kind::SctpWithout];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub macs: [u8; 12],
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub kind: Kind,
    pub payload: Vec<u8>,
    /// IPv4 options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: number and bytes, of which the first will say what comes next.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Of fragments; 16 bits of it in IPv4.
    pub id: u32,
}

impl Packet {
    pub fn new(kind: Kind, source: SocketAddr, destination: SocketAddr) -> Self {
        Packet {
            macs: MACS,
            source,
            destination,
            kind,
            // An odd length: the last byte counts as the upper half of a word.
            payload: (0..43).collect(),
            options: Vec::new(),
            extensions: Vec::new(),
            id: 7,
        }
    }

    pub fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// The same between others.
    pub fn between(&self, source: SocketAddr, destination: SocketAddr) -> Self {
        Packet { source, destination, ..self.clone() }
    }

    pub fn to(&self, destination: SocketAddr) -> Self {
        self.between(self.source, destination)
    }

    pub fn from(&self, source: SocketAddr) -> Self {
        self.between(source, self.destination)
    }

    /// An answer to it.
    pub fn turned(&self) -> Self {
        let kind = if let Kind::Tcp(SYN) = self.kind { Kind::Tcp(SYN | ACK) } else { self.kind };
        Packet { kind, ..self.between(self.destination, self.source) }
    }

    pub fn with(&self, kind: Kind) -> Self {
        Packet { kind, ..self.clone() }
    }

    pub fn sized(&self, payload: usize) -> Self {
        let bytes = (0..payload).map(|at| at.to_le_bytes()[0].wrapping_mul(31)).collect();
        Packet { payload: bytes, ..self.clone() }
    }

    pub fn with_extensions(&self, extensions: &[(u8, Vec<u8>)]) -> Self {
        Packet { extensions: extensions.to_vec(), ..self.clone() }
    }

    /// With the Ethernet addresses exchanged.
    pub fn bounced(&self) -> Self {
        let mut macs = self.macs;
        macs.rotate_left(6);
        Packet { macs, ..self.clone() }
    }

    /// The transport header with its checksum, and the payload.
    pub fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.port().to_be_bytes());
        bytes.extend(self.destination.port().to_be_bytes());
        match self.kind {
            Kind::Tcp(flags) => {
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 4, 0, 0, 0, 0, 0]);
            }
            Kind::Udp | Kind::UdpWithout => {
                bytes.extend(u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes());
                bytes.extend([0, 0]);
            }
            Kind::Sctp(chunk) => bytes.extend([1, 2, 3, 4, 0, 0, 0, 0, chunk, 0, 0, 4]),
            Kind::SctpWithout => bytes.extend([1, 2, 3, 4, 0, 0, 0, 0, SCTP_INIT, 0, 0, 4]),
        }
        bytes.extend(&self.payload);
        let at = self.kind.checksum();
        match self.kind {
            Kind::UdpWithout | Kind::SctpWithout => {}
            Kind::Sctp(_) => {
                let checksum = crc32c(&bytes).to_le_bytes();
                bytes[at..at + 4].copy_from_slice(&checksum);
            }
            Kind::Tcp(_) | Kind::Udp => {
                let (source, destination) = (self.source.ip(), self.destination.ip());
                let mut checksum =
                    !sum(&bytes, pseudo(source, destination, self.kind.protocol(), bytes.len()));
                if checksum == 0 && self.kind == Kind::Udp {
                    checksum = 0xffff;
                }
                bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
            }
        }
        bytes
    }

    /// The IP packet.
    pub fn ip(&self) -> Vec<u8> {
        self.headers(&self.transport(), None)
    }

    /// The Ethernet frame.
    pub fn frame(&self) -> Vec<u8> {
        self.framed(&self.ip())
    }

    pub fn framed(&self, ip: &[u8]) -> Vec<u8> {
        let ether_type: [u8; 2] = if self.is_v4() { [8, 0] } else { [0x86, 0xdd] };
        [self.macs.as_slice(), &ether_type, ip].concat()
    }

    /// Frames with `size` bytes each of what is behind the headers (a multiple of 8).
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        assert_eq!(size % 8, 0);
        let transport = self.transport();
        let last = transport.len().div_ceil(size) - 1;
        let fragment = |(number, part): (usize, &[u8])| {
            let offset = u16::try_from(number * size).unwrap();
            self.framed(&self.headers(part, Some((offset, number != last))))
        };
        transport.chunks(size).enumerate().map(fragment).collect()
    }

    fn headers(&self, payload: &[u8], fragment: Option<(u16, bool)>) -> Vec<u8> {
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let length = 20 + self.options.len();
                let (offset, more) = fragment.unwrap_or((0, false));
                let mut bytes = vec![0x40 | u8::try_from(length / 4).unwrap(), 0];
                bytes.extend(u16::try_from(length + payload.len()).unwrap().to_be_bytes());
                bytes.extend(u16::try_from(self.id & 0xffff).unwrap().to_be_bytes());
                bytes.extend(((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
                bytes.extend([64, self.kind.protocol(), 0, 0]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(&self.options);
                let checksum = !sum(&bytes, 0);
                bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
                bytes.extend(payload);
                bytes
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut extensions = self.extensions.clone();
                if let Some((offset, more)) = fragment {
                    let mut header = vec![0, 0];
                    header.extend((offset | u16::from(more)).to_be_bytes());
                    header.extend(self.id.to_be_bytes());
                    extensions.push((FRAGMENT, header));
                }
                let last = [(self.kind.protocol(), Vec::new())];
                let all: Vec<_> = extensions.iter().chain(&last).collect();
                let length = extensions.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
                let mut bytes = vec![0x60, 0, 0, 0];
                bytes.extend(u16::try_from(length + payload.len()).unwrap().to_be_bytes());
                bytes.extend([all[0].0, 64]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                for pair in all.windows(2) {
                    bytes.push(pair[1].0);
                    bytes.extend(&pair[0].1[1..]);
                }
                bytes.extend(payload);
                bytes
            }
            _ => panic!("two families in one packet"),
        }
    }

    /// What a router quotes of it: the IP headers and `length` bytes behind them.
    pub fn quoted(&self, length: usize) -> Vec<u8> {
        let mut ip = self.ip();
        ip.truncate(ip.len() - self.transport().len() + length);
        ip
    }

    /// What is quoted of this packet once it has become another: the checksum of the transport
    /// header stays what it was, since nobody looks at it.
    pub fn quoted_as(&self, other: &Packet, length: usize) -> Vec<u8> {
        let mut quoted = other.quoted(length);
        let at = quoted.len() - length + self.kind.checksum();
        let before = self.transport();
        let width = if let Kind::Sctp(_) = self.kind { 4 } else { 2 };
        for byte in at..(at + width).min(quoted.len()) {
            quoted[byte] = before[byte - (quoted.len() - length)];
        }
        quoted
    }
}

/// A frame with an ICMP error: `kind` is its type.
pub fn error(from: IpAddr, to: IpAddr, kind: u8, quoted: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 1, 0, 0, 0, 0, 5, 0x14];
    bytes.extend(quoted);
    let protocol = if from.is_ipv4() { 1 } else { 58 };
    let begin = if from.is_ipv4() { 0 } else { pseudo(from, to, protocol, bytes.len()) };
    let checksum = !sum(&bytes, begin);
    bytes[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut outer = Packet::new(Kind::Udp, SocketAddr::new(from, 0), SocketAddr::new(to, 0))
        .headers(&bytes, None);
    if from.is_ipv4() {
        outer[9] = protocol;
        outer[10..12].copy_from_slice(&[0, 0]);
        let checksum = !sum(&outer[..20], 0);
        outer[10..12].copy_from_slice(&checksum.to_be_bytes());
    } else {
        outer[6] = protocol;
    }
    let ether_type: [u8; 2] = if from.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
    [MACS.as_slice(), &ether_type, &outer].concat()
}

/// Types of ICMP errors.
pub fn error_kinds(v4: bool) -> &'static [u8] {
    if v4 { &[3, 11, 12] } else { &[1, 2, 3, 4] }
}

/// The frame with its Ethernet addresses exchanged.
pub fn bounced(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..12].rotate_left(6);
    frame
}

/// The ones' complement sum of a pseudo-header (RFC 9293, RFC 8200).
fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u16 {
    let mut bytes = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    sum(&bytes, 0)
}

/// The ones' complement sum (RFC 1071) of bytes and what has been summed up already.
pub fn sum(bytes: &[u8], begin: u16) -> u16 {
    let words =
        bytes.chunks(2).map(|word| u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
    words.fold(begin, |sum, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// CRC32c (RFC 9260, appendix A), bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

#[test]
fn checksums_are_the_published_ones() {
    // RFC 3720, appendix B.4, and the CRC's usual check value.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    // RFC 1071, section 3.
    assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0), 0xddf2);
}

#[test]
fn packets_have_their_checksums() {
    for (source, destination) in [("10.0.0.1:5", "10.0.0.2:6"), ("[fd00::1]:5", "[fd00::2]:6")] {
        let packet = Packet::new(Kind::Udp, source.parse().unwrap(), destination.parse().unwrap());
        let transport = packet.transport();
        let begin = pseudo(packet.source.ip(), packet.destination.ip(), 17, transport.len());
        assert_eq!(sum(&transport, begin), 0xffff);
        if packet.is_v4() {
            assert_eq!(sum(&packet.ip()[..20], 0), 0xffff);
        }
    }
}
