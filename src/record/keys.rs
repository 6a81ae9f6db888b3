//! What records have in common: pieces of rules that they share, and what they are found by.

use std::borrow::Cow;
use std::net::IpAddr;

use crate::model::{BackendKind, Family, Protocol};

/// A shared piece of a backend's rules, there as long as a record needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Base chains and their jumps.
    Base(Family),
    /// Masquerading by this bit of the packet mark.
    Mark(Family, u32),
    /// nftables: masquerading sources in the pod's own network of this prefix length.
    Near(Family, u8),
    /// Masquerading sources that arrive over local pod links.
    Neighbours(Family),
    /// nftables: attachments whose rules are not map elements.
    OwnChains(Family),
    /// Packets to 127.0.0.0/8 from outside are dropped while `route_localnet` is on.
    Guard,
}

impl Part {
    /// Stable name, for the index.
    #[must_use]
    pub fn name(self) -> String {
        let digit = |family| match family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        match self {
            Part::Base(family) => format!("base{}", digit(family)),
            Part::Mark(family, bit) => format!("mark{}-{bit}", digit(family)),
            Part::Near(family, prefix) => format!("near{}-{prefix}", digit(family)),
            Part::Neighbours(family) => format!("neighbours{}", digit(family)),
            Part::OwnChains(family) => format!("own{}", digit(family)),
            Part::Guard => "guard".to_owned(),
        }
    }

    /// Reads what `name` wrote.
    #[must_use]
    pub fn parse(name: &str) -> Option<Part> {
        if name == "guard" {
            return Some(Part::Guard);
        }
        let (word, number) =
            name.split_once('-').map_or((name, None), |(word, number)| (word, Some(number)));
        let family = match word.chars().last()? {
            '4' => Family::V4,
            '6' => Family::V6,
            _ => return None,
        };
        match (word.get(..word.len() - 1)?, number) {
            ("base", None) => Some(Part::Base(family)),
            ("mark", Some(bit)) => Some(Part::Mark(family, bit.parse().ok()?)),
            ("near", Some(prefix)) => Some(Part::Near(family, prefix.parse().ok()?)),
            ("neighbours", None) => Some(Part::Neighbours(family)),
            ("own", None) => Some(Part::OwnChains(family)),
            _ => None,
        }
    }
}

/// A way to find records without reading all.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum IndexKey {
    /// Protocol and hostPort.
    Port(Protocol, u16),
    Pod(IpAddr),
    Chain(String),
    Localnet(String),
    Backend(BackendKind),
    Part(BackendKind, Part),
}

impl IndexKey {
    /// Reads the name of a port's key.
    #[must_use]
    pub fn parse_port(name: &str) -> Option<(Protocol, u16)> {
        let (protocol, port) = name.split_once('-')?;
        Some((Protocol::parse(protocol)?, port.parse().ok()?))
    }

    /// Whether so many records have one key of a kind, named as in [`IndexKey::path`], as have something to do
    /// with each other: often one, seldom several. Of other kinds all records of a node may have the same.
    #[must_use]
    pub fn is_of_few(kind: &str) -> bool {
        matches!(kind, "ports" | "pods" | "chains")
    }

    /// Kind and name of the key.
    #[must_use]
    pub fn path(&self) -> (Cow<'_, str>, Cow<'_, str>) {
        match self {
            IndexKey::Port(protocol, port) => ("ports".into(), format!("{protocol}-{port}").into()),
            IndexKey::Pod(ip) => ("pods".into(), ip.to_string().into()),
            IndexKey::Chain(chain) => ("chains".into(), chain.into()),
            IndexKey::Localnet(device) => ("localnet".into(), device.into()),
            IndexKey::Backend(kind) => ("backends".into(), kind.name().into()),
            IndexKey::Part(kind, part) => (format!("parts-{kind}").into(), part.name().into()),
        }
    }
}
