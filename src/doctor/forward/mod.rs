//! What the rules of a chain do to packets on their way to a pod, as far as rules can be understood
//! from outside. Pure.
//!
//! Rules that accept only some callers (`-s`), or only what belongs to known connections, let no
//! hostPort work by themselves: they count as not met.

mod iptables;
mod nft;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnetwork::IpNetwork;

use crate::model::Protocol;
pub use iptables::of_iptables;
pub use nft::of_nft;

/// Chains of a table by name.
pub type Chains = BTreeMap<String, Vec<Rule>>;

/// A rule: what it asks of a packet, and what becomes of one that has all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    conditions: Vec<Condition>,
    end: End,
    /// As the tool lists it.
    text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Condition {
    negated: bool,
    of: Of,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Of {
    /// The packet comes in by one of these devices; patterns may end in `+` or `*`.
    In(Vec<String>),
    Out(Vec<String>),
    Source(Vec<IpNetwork>),
    Destination(Vec<IpNetwork>),
    Protocol(Vec<String>),
    /// Bounds, both included.
    Port(Vec<(u16, u16)>),
    /// Of conntrack, in lower case: `new`, `established`, `dnat`.
    State(Vec<String>),
    /// Bits of the packet mark are set, which hostPorts do not need.
    Mark,
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
    /// Whatever it does, the packet goes on.
    Next,
}

/// The first packet of a caller from outside on its way to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Whose hostPort it is, for messages.
    pub who: String,
    pub uplink: Option<String>,
    /// The device towards the pod.
    pub device: Option<String>,
    pub protocol: Protocol,
    /// `None` for a pod that is yet to come.
    pub target: Option<SocketAddr>,
    /// Whether conntrack has translated it: rules do, eBPF does not.
    pub translated: bool,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    Accepted,
    /// No rule takes it, and the policy is to drop.
    Dropped,
    /// A rule that is not understood may accept it.
    Unknown(String),
}

/// What becomes of a packet in a base chain whose policy is to drop.
#[must_use]
pub fn fate(chains: &Chains, entry: &str, packet: &Packet) -> Fate {
    let mut doubt = None;
    match walk(chains, entry, packet, true, &mut doubt, 0) {
        Some(true) => Fate::Accepted,
        _ => doubt.map_or(Fate::Dropped, Fate::Unknown),
    }
}

/// Some(true) if accepted, Some(false) if dropped, None if the packet leaves the chain. `sure` is
/// false below a jump of which nobody knows whether it is taken.
fn walk(
    chains: &Chains,
    chain: &str,
    packet: &Packet,
    sure: bool,
    doubt: &mut Option<String>,
    depth: usize,
) -> Option<bool> {
    // Deeper than the kernel allows (NFT_JUMP_STACK_SIZE): it is a loop.
    if depth > 16 {
        return None;
    }
    for rule in chains.get(chain).into_iter().flatten() {
        let met = rule.meets(packet);
        if met == Some(false) {
            continue;
        }
        let sure = sure && met == Some(true);
        let verdict = match &rule.end {
            End::Accept => Some(true),
            End::Drop => Some(false),
            End::Return if sure => return None,
            End::Return | End::Next => None,
            End::Jump(target) => walk(chains, target, packet, sure, doubt, depth + 1),
            End::Goto(target) => {
                let verdict = walk(chains, target, packet, sure, doubt, depth + 1);
                if sure {
                    return verdict;
                }
                verdict
            }
        };
        match verdict {
            Some(verdict) if sure => return Some(verdict),
            Some(true) => drop(doubt.get_or_insert_with(|| rule.text.clone())),
            Some(false) | None => {}
        }
    }
    None
}

impl Rule {
    /// `None` if nobody knows.
    fn meets(&self, packet: &Packet) -> Option<bool> {
        let mut all = Some(true);
        for condition in &self.conditions {
            match condition.holds(packet) {
                Some(false) => return Some(false),
                None => all = None,
                Some(true) => {}
            }
        }
        all
    }
}

impl Condition {
    fn holds(&self, packet: &Packet) -> Option<bool> {
        let target = packet.target;
        let holds = match &self.of {
            Of::In(names) => names.iter().any(|name| is_named(packet.uplink.as_deref(), name)),
            Of::Out(names) => names.iter().any(|name| is_named(packet.device.as_deref(), name)),
            Of::Source(networks) => networks.iter().any(|network| network.prefix() == 0),
            Of::Destination(networks) => target
                .is_some_and(|target| networks.iter().any(|network| network.contains(target.ip()))),
            Of::Protocol(names) => names.iter().any(|name| {
                name == "all"
                    || name == packet.protocol.name()
                    || *name == packet.protocol.number().to_string()
            }),
            Of::Port(ranges) => target.is_some_and(|target| {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&target.port()))
            }),
            Of::State(states) => {
                states.iter().any(|state| state == "new" || state == "dnat" && packet.translated)
            }
            Of::Mark => false,
            Of::Unknown => return None,
        };
        Some(holds != self.negated)
    }
}

fn is_named(device: Option<&str>, pattern: &str) -> bool {
    match (device, pattern.strip_suffix(['+', '*'])) {
        (_, Some("")) => true,
        (Some(device), Some(beginning)) => device.starts_with(beginning),
        (Some(device), None) => device == pattern,
        (None, _) => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod samples {
    use super::*;

    /// To a pod behind `cni0`, translated from a hostPort.
    pub fn packet() -> Packet {
        Packet {
            who: "web".into(),
            uplink: Some("eth0".into()),
            device: Some("cni0".into()),
            protocol: Protocol::Tcp,
            target: Some("10.88.0.2:80".parse().unwrap()),
            translated: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::samples::packet;
    use super::*;

    #[test]
    fn ebpf_is_no_translation_of_conntrack_and_pods_to_come_have_no_address() {
        let (_, chains) = of_iptables("-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n");
        let packet = Packet { translated: false, ..packet() };
        assert_eq!(fate(&chains, "FORWARD", &packet), Fate::Dropped);
        let (_, chains) = of_iptables("-A FORWARD -d 10.88.0.0/16 -j ACCEPT\n");
        assert_eq!(fate(&chains, "FORWARD", &Packet { target: None, ..packet }), Fate::Dropped);
    }
}
