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
    /// Devices that it may come in by.
    pub uplinks: Vec<String>,
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
    /// By this rule, or by the policy, which is to drop.
    Dropped(Option<String>),
    /// A rule that is not understood may accept it.
    Unknown(String),
}

/// What becomes of a packet in a base chain whose policy is to drop, or to accept: of one that may come in
/// by several devices, by that which serves it best.
#[must_use]
pub fn fate(chains: &Chains, entry: &str, drops: bool, packet: &Packet) -> Fate {
    let of_uplink = |uplink: Option<&str>| {
        let mut walk = Walk { chains, packet, uplink, doubt: None };
        match (walk.through(entry, true, 0), walk.doubt) {
            (Some(Fate::Accepted), _) => Fate::Accepted,
            (_, Some(rule)) => Fate::Unknown(rule),
            (Some(fate), None) => fate,
            (None, None) if drops => Fate::Dropped(None),
            (None, None) => Fate::Accepted,
        }
    };
    let mut fates: Vec<Fate> =
        packet.uplinks.iter().map(|uplink| of_uplink(Some(uplink))).collect();
    let rank = |fate: &Fate| match fate {
        Fate::Accepted => 0,
        Fate::Unknown(_) => 1,
        Fate::Dropped(_) => 2,
    };
    fates.sort_by_key(rank);
    fates.into_iter().next().unwrap_or_else(|| of_uplink(None))
}

struct Walk<'a> {
    chains: &'a Chains,
    packet: &'a Packet,
    uplink: Option<&'a str>,
    /// The first rule that may accept the packet.
    doubt: Option<String>,
}

impl Walk<'_> {
    /// None if the packet leaves the chain. `sure` is false below a jump of which nobody knows whether it
    /// is taken.
    fn through(&mut self, chain: &str, mut sure: bool, depth: usize) -> Option<Fate> {
        // Deeper than the kernel allows (NFT_JUMP_STACK_SIZE): it is a loop.
        if depth > 16 {
            return None;
        }
        let chains = self.chains;
        for rule in chains.get(chain).into_iter().flatten() {
            let met = rule.meets(self.packet, self.uplink);
            if met == Some(false) {
                continue;
            }
            let is_met = sure && met == Some(true);
            let verdict = match &rule.end {
                End::Accept => Some(Fate::Accepted),
                End::Drop => Some(Fate::Dropped(Some(rule.text.clone()))),
                End::Return => None,
                End::Next => continue,
                End::Jump(target) | End::Goto(target) => self.through(target, is_met, depth + 1),
            };
            match verdict {
                Some(verdict) if is_met => return Some(verdict),
                Some(Fate::Accepted) => {
                    self.doubt.get_or_insert_with(|| rule.text.clone());
                }
                _ => {}
            }
            match rule.end {
                End::Return | End::Goto(_) if is_met => return None,
                // What follows is perhaps never reached.
                End::Return | End::Goto(_) => sure = false,
                _ => {}
            }
        }
        None
    }
}

impl Rule {
    /// `None` if nobody knows.
    fn meets(&self, packet: &Packet, uplink: Option<&str>) -> Option<bool> {
        let mut all = Some(true);
        for condition in &self.conditions {
            match condition.holds(packet, uplink) {
                Some(false) => return Some(false),
                None => all = None,
                Some(true) => {}
            }
        }
        all
    }
}

impl Condition {
    fn holds(&self, packet: &Packet, uplink: Option<&str>) -> Option<bool> {
        let target = packet.target;
        let mut is_known = true;
        let holds = match &self.of {
            Of::In(names) => {
                is_known = uplink.is_some();
                names.iter().any(|name| is_named(uplink, name))
            }
            Of::Out(names) => {
                is_known = packet.device.is_some();
                names.iter().any(|name| is_named(packet.device.as_deref(), name))
            }
            Of::Source(networks) => {
                is_known = false;
                networks.iter().any(|network| network.prefix() == 0)
            }
            Of::Destination(networks) => match target {
                // In chains of both families the other one's rules are not met, whatever they say.
                Some(target) if networks.iter().all(|of| of.is_ipv6() != target.is_ipv6()) => {
                    return Some(false);
                }
                Some(target) => networks.iter().any(|network| network.contains(target.ip())),
                None if networks.iter().any(|network| network.prefix() == 0) => true,
                // A pod to come has no address that a rule names by now, but may be of a network.
                None if networks.iter().all(is_host) => false,
                None => return None,
            },
            Of::Protocol(names) => names.iter().any(|name| {
                name == "all"
                    || name == packet.protocol.name()
                    || *name == packet.protocol.number().to_string()
            }),
            Of::Port(ranges) => {
                is_known = target.is_some();
                target.is_some_and(|target| {
                    ranges.iter().any(|(first, last)| (*first..=*last).contains(&target.port()))
                })
            }
            Of::State(states) => {
                states.iter().any(|state| state == "new" || state == "dnat" && packet.translated)
            }
            Of::Mark => {
                is_known = false;
                false
            }
            Of::Unknown => return None,
        };
        match self.negated {
            // Who is not known to have something need not be without it.
            true if !holds && !is_known => None,
            negated => Some(holds != negated),
        }
    }
}

fn is_host(network: &IpNetwork) -> bool {
    network.prefix() == if network.is_ipv6() { 128 } else { 32 }
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
            uplinks: vec!["eth0".into()],
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
        assert_eq!(fate(&chains, "FORWARD", true, &packet), Fate::Dropped(None));
        let packet = Packet { target: None, ..packet };
        let (_, chains) = of_iptables("-A FORWARD -d 10.88.0.7/32 -j ACCEPT\n");
        assert_eq!(fate(&chains, "FORWARD", true, &packet), Fate::Dropped(None));
        // Its network may be that.
        let (_, chains) = of_iptables("-A FORWARD -d 10.88.0.0/16 -j ACCEPT\n");
        assert!(matches!(fate(&chains, "FORWARD", true, &packet), Fate::Unknown(_)));
    }

    #[test]
    fn what_one_device_accepts_is_not_dropped() {
        let (_, chains) = of_iptables("-A FORWARD -i eth0 -j DROP\n");
        let packet = packet();
        let dropped = Fate::Dropped(Some("-i eth0 -j DROP".into()));
        assert_eq!(fate(&chains, "FORWARD", false, &packet), dropped);
        let uplinks = vec!["eth0".into(), "eth1".into()];
        let packet = Packet { uplinks, ..packet };
        assert_eq!(fate(&chains, "FORWARD", false, &packet), Fate::Accepted);
        assert!(matches!(fate(&chains, "FORWARD", true, &packet), Fate::Dropped(_)));
    }
}
