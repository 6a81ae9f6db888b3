//! A second reading of packets: what a program may do with one, and whether it has done it right.

use std::net::{IpAddr, SocketAddr};

use portmap::backend::ebpf::layout::Addr;

use crate::packet::{FRAGMENT, crc32c, sum};

const EXTENSIONS: [u8; 5] = [0, 43, 44, 51, 60];

/// An IP header and where it leads.
#[derive(Debug, Clone)]
struct Header {
    v4: bool,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    network: usize,
    transport: usize,
    end: usize,
    later: bool,
    more: bool,
    id: [u8; 4],
}

/// A packet that could be somebody's.
#[derive(Debug, Clone)]
pub struct Seen {
    outer: Header,
    /// Of an ICMP error: what it quotes.
    quoted: Option<Header>,
    /// Both ends; of an ICMP error, those of an answer to what it quotes. `None` for a fragment
    /// without ports.
    pub ends: Option<(SocketAddr, SocketAddr)>,
    pub protocol: u8,
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn header(bytes: &[u8], at: usize, v4: bool) -> Option<Header> {
    if v4 {
        let first = *bytes.get(at)?;
        let words = first & 15;
        (first >> 4 == 4 && words >= 5).then_some(())?;
        let fragment = u16::from_be_bytes(read(bytes, at + 6)?);
        Some(Header {
            v4,
            source: IpAddr::from(read::<4>(bytes, at + 12)?),
            destination: IpAddr::from(read::<4>(bytes, at + 16)?),
            protocol: *bytes.get(at + 9)?,
            network: at,
            transport: at + usize::from(words) * 4,
            end: at + usize::from(u16::from_be_bytes(read(bytes, at + 2)?)),
            later: fragment & 0x1fff != 0,
            more: fragment & 0x2000 != 0,
            id: [*bytes.get(at + 4)?, *bytes.get(at + 5)?, 0, 0],
        })
    } else {
        (*bytes.get(at)? >> 4 == 6).then_some(())?;
        let mut header = Header {
            v4,
            source: IpAddr::from(read::<16>(bytes, at + 8)?),
            destination: IpAddr::from(read::<16>(bytes, at + 24)?),
            protocol: *bytes.get(at + 6)?,
            network: at,
            transport: at + 40,
            end: at + 40 + usize::from(u16::from_be_bytes(read(bytes, at + 4)?)),
            later: false,
            more: false,
            id: [0; 4],
        };
        for _ in 0..6 {
            if !EXTENSIONS.contains(&header.protocol) {
                break;
            }
            let [next, length, high, low, id @ ..] = read::<8>(bytes, header.transport)?;
            header.transport += match header.protocol {
                44 => 8,
                51 => (usize::from(length) + 2) * 4,
                _ => (usize::from(length) + 1) * 8,
            };
            if header.protocol == 44 {
                let fragment = u16::from_be_bytes([high, low]);
                header.later = fragment & 0xfff8 != 0;
                header.more = fragment & 1 != 0;
                header.id = id;
            }
            if header.later {
                break;
            }
            header.protocol = next;
        }
        Some(header)
    }
}

impl Seen {
    /// `None` for what no program may touch.
    pub fn read(frame: &[u8]) -> Option<Self> {
        let v4 = match read(frame, 12)? {
            [8, 0] => true,
            [0x86, 0xdd] => false,
            _ => return None,
        };
        let outer = header(frame, 14, v4)?;
        (outer.end <= frame.len() && outer.transport <= outer.end).then_some(())?;
        let protocol = outer.protocol;
        if outer.later {
            return Some(Seen { outer, quoted: None, ends: None, protocol });
        }
        let ports = |header: &Header| {
            let [a, b, c, d] = read(&frame[..outer.end], header.transport)?;
            let (source, destination) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            Some((
                SocketAddr::new(header.source, source),
                SocketAddr::new(header.destination, destination),
            ))
        };
        let least = match protocol {
            6 => 20,
            17 => 8,
            132 => 12,
            number if number == if v4 { 1 } else { 58 } => {
                let kind = *frame.get(outer.transport)?;
                let kinds: &[u8] = if v4 { &[3, 11, 12] } else { &[1, 2, 3, 4] };
                kinds.contains(&kind).then_some(())?;
                let quoted = header(&frame[..outer.end], outer.transport + 8, v4)?;
                let known = [6, 17, 132].contains(&quoted.protocol) && !quoted.later;
                (known && !outer.more).then_some(())?;
                let (source, destination) = ports(&quoted)?;
                let protocol = quoted.protocol;
                let ends = Some((destination, source));
                return Some(Seen { outer, quoted: Some(quoted), ends, protocol });
            }
            _ => return None,
        };
        (outer.transport + least <= outer.end).then_some(())?;
        let ends = Some(ports(&outer)?);
        Some(Seen { outer, quoted: None, ends, protocol })
    }

    /// Checks that only what belongs to a translation differs, and that every checksum is as right
    /// or as wrong as it was.
    #[track_caller]
    pub fn check(&self, before: &[u8], after: &[u8]) {
        assert_eq!(before.len(), after.len());
        let free = self.changeable();
        for (at, (old, new)) in before.iter().zip(after).enumerate() {
            assert!(
                old == new || free.iter().any(|(from, to)| (*from..*to).contains(&at)),
                "byte {at} of {self:?}"
            );
        }
        assert_eq!(self.errors(before), self.errors(after), "{self:?}");
    }

    /// Ranges of bytes that a translation may change.
    fn changeable(&self) -> Vec<(usize, usize)> {
        let mut free = vec![(0, 12)];
        for header in [Some(&self.outer), self.quoted.as_ref()].into_iter().flatten() {
            let at = header.network;
            match header.v4 {
                true => free.extend([(at + 10, at + 20)]),
                false => free.extend([(at + 8, at + 40)]),
            }
        }
        if self.outer.later {
            return free;
        }
        let at = self.outer.transport;
        if let Some(quoted) = &self.quoted {
            free.extend([(at + 2, at + 4), (quoted.transport, quoted.transport + 4)]);
            return free;
        }
        free.push((at, at + 4));
        free.push(match self.protocol {
            6 => (at + 16, at + 18),
            17 => (at + 6, at + 8),
            _ => (at + 8, at + 12),
        });
        free
    }

    /// How wrong each checksum is.
    fn errors(&self, frame: &[u8]) -> Vec<u32> {
        let mut errors = Vec::new();
        for header in [Some(&self.outer), self.quoted.as_ref()].into_iter().flatten() {
            if header.v4 {
                errors.push(folded(&frame[header.network..header.network + 20], 0));
            }
        }
        if self.outer.later {
            return errors;
        }
        let transport = &frame[self.outer.transport..self.outer.end];
        // What is in a pseudo-header beside the addresses does not change.
        let addresses = match self.outer.v4 {
            true => &frame[self.outer.network + 12..self.outer.network + 20],
            false => &frame[self.outer.network + 8..self.outer.network + 40],
        };
        match self.protocol {
            _ if self.quoted.is_some() => {
                let begin = if self.outer.v4 { 0 } else { sum(addresses, 0) };
                errors.push(folded(transport, begin));
            }
            132 => {
                let stored = u32::from_le_bytes(transport[8..12].try_into().unwrap());
                if stored != 0 {
                    let mut bytes = transport.to_vec();
                    bytes[8..12].fill(0);
                    errors.push(crc32c(&bytes) ^ stored);
                } else {
                    errors.push(0);
                }
            }
            17 if transport[6..8] == [0, 0] => errors.push(u32::MAX),
            _ => errors.push(folded(transport, sum(addresses, 0))),
        }
        errors
    }

    /// `struct fragment_key`.
    pub fn fragment_key(&self, outgoing: bool) -> Vec<u8> {
        let Header { v4, source, destination, protocol, id, .. } = self.outer;
        let protocol = if v4 { protocol } else { FRAGMENT };
        let end = [protocol, u8::from(outgoing), 0, 0];
        [&Addr::from(source).0, &Addr::from(destination).0, id.as_slice(), &end].concat()
    }
}

/// The ones' complement sum, which has two zeros.
fn folded(bytes: &[u8], begin: u16) -> u32 {
    u32::from(sum(bytes, begin)) % 0xffff
}
