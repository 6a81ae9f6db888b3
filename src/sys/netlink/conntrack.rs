//! Forgetting tracked flows (`NETLINK_NETFILTER`, ctnetlink).
//!
//! A UDP flow keeps the translation that its first packet got for as long as it lasts, so after a
//! change of rules the entries of the changed ports have to go.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{
    DefaultNla, Emitable, NLA_F_NESTED, Nla, NlaBuffer, NlasIterator, Parseable,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, IPTuple, ProtoTuple, Tuple as TuplePart,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::socket::{Message, NetlinkSocket};
use super::{NFGENMSG_LENGTH, netfilter_kind};
use crate::model::{Family, Protocol};

// linux/netfilter/nfnetlink_conntrack.h
const IPCTNL_MSG_CT_NEW: libc::c_int = 0;
const IPCTNL_MSG_CT_GET: libc::c_int = 1;
const IPCTNL_MSG_CT_DELETE: libc::c_int = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_F_CTA_PROTO_NUM: u32 = 1 << 3;
const CTA_FILTER_F_CTA_PROTO_DST_PORT: u32 = 1 << 5;

/// A tracked connection, or what passes for one with UDP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    pub family: Family,
    /// IANA number.
    pub protocol: u8,
    /// As the first packet came in, before any translation.
    pub original: Tuple,
    /// As answers are expected, after translation: after a DNAT, `reply.source` is the target.
    pub reply: Tuple,
}

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// Deletes the entries of `family` whose original destination port and protocol are listed and
/// that `wanted` picks. Returns how many were deleted. Entries that end by themselves meanwhile
/// count neither as deleted nor as an error; nor do those that begin anew, which already follow
/// the present rules.
///
/// The table is read once. When only one protocol or one port is asked for, the kernel picks the
/// entries (Linux 5.8; see [`dump_request`]).
///
/// # Errors
///
/// What the dump or the first failed deletion returned; the other entries are deleted
/// nevertheless. EBUSY stands for a flow that was offloaded to a flowtable.
pub fn delete(
    family: Family,
    protocols_and_ports: &[(Protocol, u16)],
    wanted: impl Fn(&Flow) -> bool,
) -> io::Result<usize> {
    let listed: HashSet<(u8, u16)> =
        protocols_and_ports.iter().map(|(protocol, port)| (protocol.number(), *port)).collect();
    if listed.is_empty() {
        return Ok(0);
    }
    let mut socket = NetlinkSocket::open(NETLINK_NETFILTER)?;
    let chosen = dump(&mut socket, family, &listed, wanted)?;

    let mut deleted = 0;
    let mut failure = None;
    for identity in chosen {
        let kind = netfilter_kind(libc::NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE);
        let request = Message::new(kind, &header(family), &identity);
        match socket.request(&request, 0, |_, _| None::<()>) {
            Ok(_) => deleted += 1,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    failure.map_or(Ok(deleted), Err)
}

/// Returns what names each chosen entry in a deletion.
fn dump(
    socket: &mut NetlinkSocket,
    family: Family,
    listed: &HashSet<(u8, u16)>,
    wanted: impl Fn(&Flow) -> bool,
) -> io::Result<Vec<Vec<DefaultNla>>> {
    let new = netfilter_kind(libc::NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW);
    let mut read = |request: &Message| {
        socket.dump(request, |kind, payload| {
            let entry = (kind == new).then(|| entry(family, payload, listed))??;
            wanted(&entry.flow).then_some(entry.identity)
        })
    };
    if let Some(filter) = filter(listed) {
        match read(&dump_request(family, &filter)) {
            // The kernel knows CTA_FILTER, but not in this form.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ERANGE)
                ) => {}
            result => return result,
        }
    }
    read(&dump_request(family, &[]))
}

fn header(family: Family) -> NetfilterHeader {
    let family = match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    };
    NetfilterHeader::new(family, 0, 0)
}

/// `struct nfgenmsg` makes the kernel leave out the other family. Linux before 5.8 ignores the
/// attributes of a filter, so answers need checking whether or not there was one.
fn dump_request(family: Family, filter: &[DefaultNla]) -> Message {
    let kind = netfilter_kind(libc::NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET);
    Message::new(kind, &header(family), filter)
}

/// A filter on the original tuple; `None` if entries of several protocols are asked for, which
/// the kernel has no way to say.
fn filter(listed: &HashSet<(u8, u16)>) -> Option<Vec<DefaultNla>> {
    let (protocol, port) = *listed.iter().next()?;
    if listed.iter().any(|(other, _)| *other != protocol) {
        return None;
    }
    let mut parts = vec![ProtoTuple::Protocol(protocol.into())];
    let mut flags = CTA_FILTER_F_CTA_PROTO_NUM;
    if listed.len() == 1 {
        parts.push(ProtoTuple::DestinationPort(port));
        flags |= CTA_FILTER_F_CTA_PROTO_DST_PORT;
    }
    // Host byte order, unlike everything else in ctnetlink.
    let flags = DefaultNla::new(CTA_FILTER_ORIG_FLAGS, flags.to_ne_bytes().to_vec());
    Some(vec![nested(CTA_TUPLE_ORIG, &[TuplePart::Proto(parts)]), nested(CTA_FILTER, &[flags])])
}

/// An attribute with the flag that says that it holds others, without which the kernel refuses
/// CTA_FILTER: newer attributes are validated strictly. `ConntrackAttribute::Other` of
/// netlink-packet-netfilter 0.4 loses the flag.
fn nested<N: Nla>(kind: u16, inner: &[N]) -> DefaultNla {
    let mut value = vec![0; inner.buffer_len()];
    inner.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

struct Entry {
    flow: Flow,
    /// The attributes that name the entry in a deletion, byte for byte as the kernel sent them:
    /// original tuple, zone, and the ID, by which a flow that began anew is told from this one.
    identity: Vec<DefaultNla>,
}

/// `payload`: `struct nfgenmsg` and attributes. `None` for what is not listed, or has no ports.
fn entry(family: Family, payload: &[u8], listed: &HashSet<(u8, u16)>) -> Option<Entry> {
    let attributes = NlasIterator::new(payload.get(NFGENMSG_LENGTH..)?);
    let (mut original, mut reply, mut identity) = (None, None, Vec::new());
    for attribute in attributes {
        let attribute = attribute.ok()?;
        match attribute.kind() {
            CTA_TUPLE_ORIG => {
                let (protocol, found) = tuple(&attribute)?;
                // The kernel sends this attribute first, so the bulk of the table ends here.
                if !listed.contains(&(protocol, found.destination.port())) {
                    return None;
                }
                original = Some((protocol, found));
                identity.push(DefaultNla::parse(&attribute).ok()?);
            }
            CTA_TUPLE_REPLY => reply = Some(tuple(&attribute)?.1),
            CTA_ZONE | CTA_ID => identity.push(DefaultNla::parse(&attribute).ok()?),
            _ => {}
        }
    }
    let (protocol, original) = original?;
    Some(Entry {
        flow: Flow {
            family: Family::of(&original.destination.ip()),
            protocol,
            original,
            reply: reply?,
        },
        identity,
    })
    .filter(|entry| entry.flow.family == family)
}

/// Protocol number, addresses and ports of CTA_TUPLE_ORIG or CTA_TUPLE_REPLY.
fn tuple(attribute: &NlaBuffer<&[u8]>) -> Option<(u8, Tuple)> {
    let parts = match ConntrackAttribute::parse(attribute).ok()? {
        ConntrackAttribute::CtaTupleOrig(parts) | ConntrackAttribute::CtaTupleReply(parts) => parts,
        _ => return None,
    };
    let mut addresses: (Option<IpAddr>, Option<IpAddr>) = (None, None);
    let mut ports: (Option<u16>, Option<u16>) = (None, None);
    let mut protocol = None;
    for part in parts {
        match part {
            TuplePart::Ip(parts) => {
                for part in parts {
                    match part {
                        IPTuple::SourceAddress(ip) => addresses.0 = Some(ip),
                        IPTuple::DestinationAddress(ip) => addresses.1 = Some(ip),
                        _ => {}
                    }
                }
            }
            TuplePart::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(number) => protocol = Some(number.into()),
                        ProtoTuple::SourcePort(port) => ports.0 = Some(port),
                        ProtoTuple::DestinationPort(port) => ports.1 = Some(port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some((
        protocol?,
        Tuple {
            source: SocketAddr::new(addresses.0?, ports.0?),
            destination: SocketAddr::new(addresses.1?, ports.1?),
        },
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    fn listed(all: &[(u8, u16)]) -> HashSet<(u8, u16)> {
        all.iter().copied().collect()
    }

    #[test]
    fn a_filter_on_protocol_and_port() {
        let filter = filter(&listed(&[(17, 53)])).unwrap();
        let request = dump_request(Family::V4, &filter);
        assert_eq!(
            request.payload(),
            [
                2, 0, 0, 0, // nfgenmsg
                24, 0, 1, 0x80, // CTA_TUPLE_ORIG
                20, 0, 2, 0x80, // CTA_TUPLE_PROTO
                5, 0, 1, 0, 17, 0, 0, 0, // CTA_PROTO_NUM
                6, 0, 3, 0, 0, 53, 0, 0, // CTA_PROTO_DST_PORT
                12, 0, 25, 0x80, // CTA_FILTER
                8, 0, 1, 0, 0b10_1000, 0, 0, 0,
            ]
        );
    }

    #[test]
    fn the_filter_is_as_narrow_as_it_can_be() {
        let ports = filter(&listed(&[(17, 53), (17, 54)])).unwrap();
        let request = dump_request(Family::V6, &ports);
        assert_eq!(request.payload()[0], 10);
        assert_eq!(request.payload()[4..16], [16, 0, 1, 0x80, 12, 0, 2, 0x80, 5, 0, 1, 0]);
        assert_eq!(request.payload().last_chunk(), Some(&[0b1000, 0, 0, 0]));
        assert!(filter(&listed(&[(17, 53), (132, 53)])).is_none());
        assert!(filter(&listed(&[])).is_none());
        assert_eq!(dump_request(Family::V4, &[]).payload(), [2, 0, 0, 0]);
    }

    fn direction(kind: u16, source: [u8; 6], destination: [u8; 6], protocol: u8) -> Vec<u8> {
        let (s, d) = (source, destination);
        let mut bytes = vec![52, 0];
        bytes.extend((kind | NLA_F_NESTED).to_ne_bytes());
        bytes.extend([20, 0, 1, 0x80, 8, 0, 1, 0, s[0], s[1], s[2], s[3]]);
        bytes.extend([8, 0, 2, 0, d[0], d[1], d[2], d[3]]);
        bytes.extend([28, 0, 2, 0x80, 5, 0, 1, 0, protocol, 0, 0, 0]);
        bytes.extend([6, 0, 2, 0, s[4], s[5], 0, 0, 6, 0, 3, 0, d[4], d[5], 0, 0]);
        bytes
    }

    fn sample() -> Vec<u8> {
        let client = [192, 0, 2, 9, 0x9c, 0x40];
        let mut bytes = vec![2, 0, 0, 0];
        bytes.extend(direction(1, client, [192, 0, 2, 1, 0x1f, 0x90], 17));
        bytes.extend(direction(2, [10, 0, 0, 2, 0, 80], client, 17));
        bytes.extend([8, 0, 3, 0, 0, 0, 1, 0x8e]); // CTA_STATUS
        bytes.extend([6, 0, 18, 0, 0, 7, 0, 0]); // CTA_ZONE
        bytes.extend([8, 0, 12, 0, 1, 2, 3, 4]); // CTA_ID
        bytes
    }

    #[test]
    fn an_entry_is_a_flow_and_what_names_it() {
        let entry = entry(Family::V4, &sample(), &listed(&[(17, 8080)])).unwrap();
        assert_eq!(
            entry.flow,
            Flow {
                family: Family::V4,
                protocol: 17,
                original: Tuple {
                    source: "192.0.2.9:40000".parse().unwrap(),
                    destination: "192.0.2.1:8080".parse().unwrap(),
                },
                reply: Tuple {
                    source: "10.0.0.2:80".parse().unwrap(),
                    destination: "192.0.2.9:40000".parse().unwrap(),
                },
            }
        );
        let kinds: Vec<u16> = entry.identity.iter().map(Nla::kind).collect();
        assert_eq!(kinds, [CTA_TUPLE_ORIG | NLA_F_NESTED, CTA_ZONE, CTA_ID]);
        let deletion = Message::new(0, &header(Family::V4), &entry.identity);
        assert_eq!(deletion.payload()[4..56], sample()[4..56]);
    }

    #[test]
    fn other_entries_are_not_read() {
        let wanted = listed(&[(17, 8080)]);
        assert!(entry(Family::V4, &sample(), &listed(&[(6, 8080), (17, 80)])).is_none());
        assert!(entry(Family::V6, &sample(), &wanted).is_none());
        assert!(entry(Family::V4, &sample()[..60], &wanted).is_none());
        assert!(entry(Family::V4, b"", &wanted).is_none());
    }
}
