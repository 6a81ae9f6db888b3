//! Keys and values of the maps, byte for byte as `src/bpf/layout.h` defines them. A test compares
//! both through the object's BTF. Addresses are 16 bytes, IPv4 as `::ffff:a.b.c.d`; addresses and
//! ports are in network byte order, everything else in the host's.

mod config;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use zerocopy::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::model::{Claim, Family, Protocol};
pub use config::{Config, config_flags};

/// Number of the layout; part of the name of the directory that the maps are pinned in.
pub const LAYOUT: u32 = 1;
/// Of the programs: an older plugin leaves newer programs in place.
pub const REVISION: u32 = 1;

/// `struct addr`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    /// No address at all.
    pub const NONE: Addr = Addr([0; 16]);

    /// The key of claims to any address of a family.
    #[must_use]
    pub fn any(family: Family) -> Self {
        match family {
            Family::V4 => Addr([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0]),
            Family::V6 => Addr::NONE,
        }
    }

    /// IPv4 for `::ffff:a.b.c.d`.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        let ip = Ipv6Addr::from(self.0);
        ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4)
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Addr(ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => Addr(ip.octets()),
        }
    }
}

/// `struct claim_key`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct ClaimKey {
    pub addr: Addr,
    port: U16,
    pub protocol: u8,
    pad: u8,
}

impl ClaimKey {
    #[must_use]
    pub fn new(addr: Addr, protocol: Protocol, port: u16) -> Self {
        ClaimKey { addr, port: port.into(), protocol: protocol.number(), pad: 0 }
    }

    #[must_use]
    pub fn of(claim: &Claim) -> Self {
        let addr = claim.address.map_or(Addr::any(claim.family), Addr::from);
        ClaimKey::new(addr, claim.protocol, claim.port)
    }

    /// hostPort, or containerPort of an entry for the pod itself; host byte order.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.get()
    }

    /// The key of the claim that has the port where no claim has it of this very address.
    #[must_use]
    pub fn of_any(&self) -> Self {
        let family = Family::of(&self.addr.ip());
        ClaimKey { addr: Addr::any(family), ..*self }
    }
}

/// Bits of `flags` in `struct claim`.
pub mod claim_flags {
    /// The pod's own address and containerPort: flows are tracked, not translated.
    pub const SELF: u16 = 1;
    /// The pod sees `source` instead of the client.
    pub const MASQUERADE: u16 = 2;
    /// `mac` goes into frames for the pod.
    pub const MAC: u16 = 4;
}

/// `struct claim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ClaimValue {
    pub pod: Addr,
    pub source: Addr,
    port: U16,
    pub flags: u16,
    pub owner: u32,
    pub mac: [u8; 6],
    /// 1 when there have been connections, which programs say.
    used: u16,
}

impl ClaimValue {
    #[must_use]
    pub fn new(target: SocketAddr, owner: u32) -> Self {
        ClaimValue {
            pod: target.ip().into(),
            source: Addr::NONE,
            port: target.port().into(),
            flags: 0,
            owner,
            mac: [0; 6],
            used: 0,
        }
    }

    /// Whether there have been connections, of which flows may be left.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.used != 0
    }

    /// The same, whether or not there have been connections.
    #[must_use]
    pub fn with_used(self, used: bool) -> Self {
        Self { used: used.into(), ..self }
    }

    /// Whether two say the same, whatever has come of it.
    #[must_use]
    pub fn says(&self, other: &Self) -> bool {
        self.with_used(false) == other.with_used(false)
    }

    /// Where connections go.
    #[must_use]
    pub fn target(&self) -> SocketAddr {
        SocketAddr::new(self.pod.ip(), self.port.get())
    }
}

/// `struct flow_key`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct FlowKey {
    pub pod: Addr,
    pub peer: Addr,
    pod_port: U16,
    peer_port: U16,
    pub protocol: u8,
    pad: [u8; 3],
}

impl FlowKey {
    #[must_use]
    pub fn new(pod: SocketAddr, peer: SocketAddr, protocol: Protocol) -> Self {
        FlowKey {
            pod: pod.ip().into(),
            peer: peer.ip().into(),
            pod_port: pod.port().into(),
            peer_port: peer.port().into(),
            protocol: protocol.number(),
            pad: [0; 3],
        }
    }

    /// The pod, and its port.
    #[must_use]
    pub fn target(&self) -> SocketAddr {
        SocketAddr::new(self.pod.ip(), self.pod_port.get())
    }
}

/// Bits of `flags` in `struct flow`.
pub mod flow_flags {
    /// The node itself uses a hostPort's number as its source port.
    pub const NODE: u32 = 4;
    /// More than an opening packet has come.
    pub const GOES_ON: u32 = 64;
}

/// `struct flow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowValue {
    pub host: Addr,
    pub peer: Addr,
    host_port: U16,
    peer_port: U16,
    pub flags: u32,
    pub owner: u32,
    /// CLOCK_MONOTONIC in 2^30 ns.
    pub last: u32,
}

impl FlowValue {
    /// A flow of the node's own, which answers must not be taken for a new one.
    #[must_use]
    pub fn of_node(last: u32) -> Self {
        FlowValue {
            host: Addr::NONE,
            peer: Addr::NONE,
            host_port: 0.into(),
            peer_port: 0.into(),
            flags: flow_flags::NODE | flow_flags::GOES_ON,
            owner: 0,
            last,
        }
    }

    /// What was called; `key` is the flow's.
    #[must_use]
    pub fn called(&self, key: &FlowKey) -> ClaimKey {
        ClaimKey { addr: self.host, port: self.host_port, protocol: key.protocol, pad: 0 }
    }
}

/// `struct socket_key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SocketKey {
    pub cookie: u64,
    pub addr: Addr,
    port: U16,
    pub protocol: u8,
    pad: u8,
    pad2: u32,
}

impl SocketKey {
    /// Where the socket's packets go.
    #[must_use]
    pub fn pod(&self) -> SocketAddr {
        SocketAddr::new(self.addr.ip(), self.port.get())
    }
}

/// `struct socket_value`: what a socket of the node called before its destination was replaced.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SocketValue {
    pub addr: Addr,
    port: U16,
    pad: U16,
}

impl SocketValue {
    /// What was called; `key` is the entry's.
    #[must_use]
    pub fn called(&self, key: &SocketKey) -> ClaimKey {
        ClaimKey { addr: self.addr, port: self.port, protocol: key.protocol, pad: 0 }
    }
}

/// `struct traffic`, summed over all CPUs. Bytes are those of IP packets.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Traffic {
    pub connections: u64,
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
}

/// Word and bit of a port (host byte order) in the map of ports that concern somebody: 1024 words of
/// 64 bits.
#[must_use]
pub fn port_bit(port: u16) -> (u32, u64) {
    (u32::from(port >> 6), 1 << (port & 63))
}

/// The ports of a word in that map, lowest bit first.
pub fn ports_of(index: u32) -> impl Iterator<Item = u16> {
    let first = u16::try_from(index << 6).unwrap_or_default();
    first..=first | 63
}

/// `enum reason`, in the order of its values: names for people.
pub const REASONS: [&str; 21] = [
    "forwarded",
    "answered",
    "newFlow",
    "hairpin",
    "remapped",
    "masqueraded",
    "nodeFlow",
    "notLocal",
    "icmpIn",
    "icmpOut",
    "fragmentIn",
    "fragmentOut",
    "sctpChecksum",
    "connect",
    "sendmsg",
    "recvmsg",
    "peername",
    "dropNoPort",
    "dropRewrite",
    "sctpFragment",
    "held",
];

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::collections::BTreeMap;
    use std::mem::offset_of;

    use super::*;
    use crate::backend::ebpf::loaded::OWN;

    /// A kind of linux/btf.h, and how many bytes each kind has behind its first 12.
    const STRUCT: u32 = 4;
    fn trailer(kind: u32, members: usize) -> usize {
        match kind {
            1 | 14 | 17 => 4,
            3 => 12,
            4 | 5 | 15 | 19 => members * 12,
            6 | 13 => members * 8,
            _ => 0,
        }
    }

    /// A struct's size, and the offsets of its members, in bytes.
    type Members = (usize, Vec<(String, usize)>);

    /// The structs of an object by name, from its BTF (Linux, Documentation/bpf/btf.rst).
    fn types(object: &[u8]) -> BTreeMap<String, Members> {
        let btf = aya_obj::Object::parse(object).unwrap().btf.unwrap().to_bytes();
        let word = |at: usize| u32::from_le_bytes(btf[at..at + 4].try_into().unwrap()) as usize;
        let header = word(4);
        let (types, length, strings) = (header + word(8), word(12), header + word(16));
        let text = |offset: usize| {
            let rest = &btf[strings + offset..];
            let end = rest.iter().position(|byte| *byte == 0).unwrap();
            String::from_utf8_lossy(&rest[..end]).into_owned()
        };
        let mut found = BTreeMap::new();
        let mut at = types;
        while at < types + length {
            let (name, info, size) = (text(word(at)), word(at + 4), word(at + 8));
            let (kind, count) = ((info >> 24 & 0x1f) as u32, info & 0xffff);
            let members = at + 12;
            if kind == STRUCT {
                let member = |n: usize| {
                    (text(word(members + n * 12)), (word(members + n * 12 + 8) & 0xff_ffff) / 8)
                };
                found.insert(name, (size, (0..count).map(member).collect()));
            }
            at = members + trailer(kind, count);
        }
        found
    }

    macro_rules! members {
        ($type:ty: $($field:ident),*) => {
            (size_of::<$type>(), vec![$((stringify!($field).to_owned(), offset_of!($type, $field))),*])
        };
    }

    #[test]
    fn keys_and_values_are_those_of_the_programs() {
        let theirs = types(OWN.object);
        let ours: [(&str, Members); 9] = [
            ("claim_key", members!(ClaimKey: addr, port, protocol, pad)),
            ("claim", members!(ClaimValue: pod, source, port, flags, owner, mac, used)),
            ("flow_key", members!(FlowKey: pod, peer, pod_port, peer_port, protocol, pad)),
            ("flow", members!(FlowValue: host, peer, host_port, peer_port, flags, owner, last)),
            ("socket_key", members!(SocketKey: cookie, addr, port, protocol, pad, pad2)),
            ("socket_value", members!(SocketValue: addr, port, pad)),
            (
                "config",
                members!(
                    Config: netns_cookie, revision, flags, learn_address, learn_port, pad,
                    ephemeral_first, ephemeral_last, hold_until, pad_at_end
                ),
            ),
            (
                "traffic",
                members!(Traffic: connections, packets_in, bytes_in, packets_out, bytes_out),
            ),
            ("addr", (size_of::<Addr>(), vec![("w".to_owned(), 0)])),
        ];
        for (name, members) in ours {
            assert_eq!(theirs.get(name), Some(&members), "struct {name}");
        }
    }

    #[test]
    fn reasons_have_the_programs_names_in_their_order() {
        let camel_case = |name: &str| {
            let mut words = name.trim_start_matches("REASON_").split('_').map(str::to_lowercase);
            let first = words.next().unwrap();
            words.fold(first, |text, word| text + &word[..1].to_uppercase() + &word[1..])
        };
        // No program has a variable of this type, so that it is not in the BTF.
        let header = include_str!("../../bpf/layout.h");
        let (_, list) = header.split_once("enum reason {").unwrap();
        let (list, _) = list.split_once('}').unwrap();
        let words = list.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let theirs: Vec<String> =
            words.filter(|word| word.starts_with("REASON_")).map(camel_case).collect();
        assert_eq!(theirs, REASONS);
        let maps = crate::sys::bpf::object::Object::parse(OWN.object).unwrap().maps();
        assert_eq!(maps["pm_reasons"].max_entries as usize, REASONS.len());
    }

    #[test]
    fn layout_and_revision_are_the_programs() {
        let header = include_str!("../../bpf/layout.h");
        let number = |name: &str| {
            let line = header.lines().find(|line| line.starts_with(&format!("#define {name} ")));
            line.unwrap().rsplit(' ').next().unwrap().parse::<u32>().unwrap()
        };
        assert_eq!((number("LAYOUT"), number("REVISION")), (LAYOUT, REVISION));
    }
}
