//! The vocabulary: what an attachment is, what it asks for, and what follows from it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address. IPv4-mapped IPv6 addresses count as IPv6; whoever parses
    /// configuration turns them into IPv4 first.
    #[must_use]
    pub fn of(ip: &IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// Length of a host prefix in bits: 32 or 128.
    #[must_use]
    pub fn max_prefix(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// A transport protocol that has ports. Ordered by name, as upstream orders its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Sctp,
    Tcp,
    Udp,
}

impl Protocol {
    pub const ALL: [Protocol; 3] = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp];

    /// Lower-case name, as iptables, nft and the CNI conventions spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Sctp => "sctp",
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }

    /// Protocol number (IANA).
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Protocol::Sctp => 132,
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
        }
    }

    /// Reads a name without regard to case.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.name().eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One `portMappings` entry, complete.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mapping {
    pub protocol: Protocol,
    /// 1 to 65535, host byte order.
    pub host_port: u16,
    /// 1 to 65535, host byte order.
    pub container_port: u16,
    /// `None`: any address of the node, both families. `0.0.0.0` and `::`: any of that family.
    #[serde(skip_serializing_if = "Option::is_none", default, rename = "hostIP")]
    pub host_ip: Option<IpAddr>,
}

impl Mapping {
    /// What the mapping asks for in one family, if anything.
    #[must_use]
    pub fn claim(&self, family: Family) -> Option<Claim> {
        if self.host_ip.is_some_and(|ip| Family::of(&ip) != family) {
            return None;
        }
        Some(Claim {
            family,
            protocol: self.protocol,
            address: self.host_ip.filter(|ip| !ip.is_unspecified()),
            port: self.host_port,
        })
    }
}

/// What a mapping asks of the node. Of several claims to the same the newest is active, and a claim
/// of a specific address goes before one of any address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    pub family: Family,
    pub protocol: Protocol,
    /// `None` is any local address of the family.
    pub address: Option<IpAddr>,
    pub port: u16,
}

impl Claim {
    /// Whether a connection to the node's loopback address could be meant.
    #[must_use]
    pub fn covers_loopback(&self) -> bool {
        self.address.is_none_or(|ip| ip.is_loopback())
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Claim { protocol, port, .. } = self;
        match (self.address, self.family) {
            (Some(IpAddr::V6(ip)), _) => write!(f, "{protocol} [{ip}]:{port}"),
            (Some(ip), _) => write!(f, "{protocol} {ip}:{port}"),
            (None, Family::V4) => write!(f, "{protocol} 0.0.0.0:{port}"),
            (None, Family::V6) => write!(f, "{protocol} [::]:{port}"),
        }
    }
}

/// A claim with its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Forward {
    pub claim: Claim,
    /// Address of the pod and containerPort.
    pub target: SocketAddr,
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.claim, self.target)
    }
}

/// One container interface on one network: the key of everything that is remembered.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    pub network: String,
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "container {} interface {} on network {}",
            self.container_id, self.ifname, self.network
        )
    }
}

/// A way to forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    Iptables,
    Nftables,
    Ebpf,
}

impl BackendKind {
    /// In the order in which `auto` tries them.
    pub const ALL: [BackendKind; 3] =
        [BackendKind::Iptables, BackendKind::Nftables, BackendKind::Ebpf];

    /// The value of the `backend` option.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Iptables => "iptables",
            BackendKind::Nftables => "nftables",
            BackendKind::Ebpf => "ebpf",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
