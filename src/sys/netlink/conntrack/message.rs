//! The messages of ctnetlink, without a socket.

use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{
    DefaultNla, Emitable, NLA_F_NESTED, Nla, NlaBuffer, NlasIterator, Parseable,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, IPTuple, ProtoTuple, Tuple as TuplePart,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterProtoFamily};

use crate::model::Family;
use crate::sys::netlink::socket::Message;
use crate::sys::netlink::{NFGENMSG_LENGTH, netfilter_kind};

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

/// What a dump is narrowed to: a protocol number, and possibly an original destination port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) protocol: u8,
    pub(super) port: Option<u16>,
}

impl Filter {
    pub(super) fn admits(self, protocol: u8, port: u16) -> bool {
        self.protocol == protocol && self.port.is_none_or(|only| only == port)
    }

    fn attributes(self) -> [DefaultNla; 2] {
        let mut parts = vec![ProtoTuple::Protocol(self.protocol.into())];
        let mut flags = CTA_FILTER_F_CTA_PROTO_NUM;
        if let Some(port) = self.port {
            parts.push(ProtoTuple::DestinationPort(port));
            flags |= CTA_FILTER_F_CTA_PROTO_DST_PORT;
        }
        // Host byte order, unlike everything else in ctnetlink.
        let flags = DefaultNla::new(CTA_FILTER_ORIG_FLAGS, flags.to_ne_bytes().to_vec());
        [nested(CTA_TUPLE_ORIG, &[TuplePart::Proto(parts)]), nested(CTA_FILTER, &[flags])]
    }
}

fn header(family: Family) -> NetfilterHeader {
    let family = match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    };
    NetfilterHeader::new(family, 0, 0)
}

/// `struct nfgenmsg` makes the kernel leave out the other family.
pub(super) fn dump_request(family: Family, filter: Option<Filter>) -> Message {
    let kind = netfilter_kind(libc::NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET);
    let attributes = filter.map(Filter::attributes);
    Message::new(
        kind,
        &header(family),
        attributes.as_ref().map_or(&[], |attributes| &attributes[..]),
    )
}

/// The deletion of one entry.
pub(super) fn deletion(family: Family, identity: &[DefaultNla]) -> Message {
    let kind = netfilter_kind(libc::NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE);
    Message::new(kind, &header(family), identity)
}

/// An attribute with the flag that says that it holds others, without which the kernel refuses
/// CTA_FILTER: newer attributes are validated strictly. `ConntrackAttribute::Other` of
/// netlink-packet-netfilter 0.4 loses the flag.
fn nested<N: Nla>(kind: u16, inner: &[N]) -> DefaultNla {
    let mut value = vec![0; inner.buffer_len()];
    inner.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

pub(super) struct Entry {
    pub(super) flow: Flow,
    /// The attributes that name the entry in a deletion, byte for byte as the kernel sent them:
    /// original tuple, zone, and the ID, by which a flow that began anew is told from this one.
    pub(super) identity: Vec<DefaultNla>,
}

/// `payload`: `struct nfgenmsg` and attributes. `pick` gets the protocol and the original
/// destination port. `None` for what it refuses, or what has no ports.
pub(super) fn entry(
    family: Family,
    kind: u16,
    payload: &[u8],
    mut pick: impl FnMut(u8, u16) -> bool,
) -> Option<Entry> {
    if kind != netfilter_kind(libc::NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW) {
        return None;
    }
    let attributes = NlasIterator::new(payload.get(NFGENMSG_LENGTH..)?);
    let (mut original, mut reply, mut identity) = (None, None, Vec::new());
    for attribute in attributes {
        let attribute = attribute.ok()?;
        match attribute.kind() {
            CTA_TUPLE_ORIG => {
                let (protocol, found) = tuple(&attribute)?;
                // The kernel sends this attribute first, so the bulk of the table ends here.
                if !pick(protocol, found.destination.port()) {
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

    /// NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_NEW.
    const NEW: u16 = 0x100;

    #[test]
    fn a_filter_on_protocol_and_port() {
        let filter = Filter { protocol: 17, port: Some(53) };
        let request = dump_request(Family::V4, Some(filter));
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
        assert!(filter.admits(17, 53) && !filter.admits(6, 53) && !filter.admits(17, 54));
    }

    #[test]
    fn a_filter_on_a_protocol() {
        let filter = Filter { protocol: 17, port: None };
        let request = dump_request(Family::V6, Some(filter));
        assert_eq!(request.payload()[0], 10);
        assert_eq!(request.payload()[4..16], [16, 0, 1, 0x80, 12, 0, 2, 0x80, 5, 0, 1, 0]);
        assert_eq!(request.payload().last_chunk(), Some(&[0b1000, 0, 0, 0]));
        assert!(filter.admits(17, 54) && !filter.admits(132, 54));
        assert_eq!(dump_request(Family::V4, None).payload(), [2, 0, 0, 0]);
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
        let entry =
            entry(Family::V4, NEW, &sample(), |protocol, port| (protocol, port) == (17, 8080))
                .unwrap();
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
        let deletion = deletion(Family::V4, &entry.identity);
        assert_eq!(deletion.payload()[4..56], sample()[4..56]);
    }

    #[test]
    fn other_entries_are_not_read() {
        let wanted = |_, _| true;
        assert!(entry(Family::V4, NEW, &sample(), |_, _| false).is_none());
        assert!(entry(Family::V6, NEW, &sample(), wanted).is_none());
        assert!(entry(Family::V4, NEW, &sample()[..60], wanted).is_none());
        assert!(entry(Family::V4, NEW, b"", wanted).is_none());
    }
}
