//! What the rules of a base chain do to packets on their way to a pod, as far as rules can be understood
//! from outside. Pure.
//!
//! Rules that accept only some callers (`-s`), or only what belongs to known connections, let no
//! hostPort work by themselves: they count as not met where it is asked what becomes of a packet. Where it
//! is asked who is kept out, rules about some callers count.

mod iptables;
mod nft;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnetwork::IpNetwork;

use super::Told;
use crate::model::{Family, Protocol};
pub use iptables::{drops, of_iptables};
pub use nft::of_nft;

/// A base chain as it was read.
#[derive(Debug, Clone)]
pub struct Base {
    /// `chain FORWARD of table filter (iptables-nft, IPv4)`.
    pub place: String,
    pub families: Vec<Family>,
    /// Its name.
    pub entry: String,
    /// Whether its policy is to drop.
    pub drops: bool,
    pub rules: Told<Chains>,
    /// The command that makes a rule before its others.
    pub insert: Insert,
}

/// A command that makes a rule, up to what the rule says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Insert {
    Iptables(String),
    Nft(String),
}

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
    /// The destination is an address of the node.
    Local,
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

/// The first packet of a caller on its way to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Whose hostPort it is, for messages.
    pub who: String,
    /// The device towards the pod.
    pub device: Option<String>,
    pub protocol: Protocol,
    /// `None` for a pod that is yet to come.
    pub target: Option<SocketAddr>,
    /// Whether that is an address of the node still.
    pub is_local: bool,
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

/// Of devices that rules do not tell apart one: a node may have hundreds of pods' links, and rules about few
/// of them. `None` where no device is known.
#[must_use]
pub fn told_apart<'a>(chains: &Chains, devices: &'a [String]) -> Vec<Option<&'a str>> {
    let conditions = chains.values().flatten().flat_map(|rule| &rule.conditions);
    let named: BTreeSet<&str> = conditions
        .filter_map(|condition| match &condition.of {
            Of::In(names) => Some(names.iter().map(String::as_str)),
            _ => None,
        })
        .flatten()
        .collect();
    let mut seen = BTreeSet::new();
    let is_new = |device: &&String| {
        seen.insert(named.iter().map(|name| is_named(Some(device), name)).collect::<Vec<_>>())
    };
    let none = devices.is_empty().then_some(None);
    devices.iter().filter(is_new).map(|device| Some(device.as_str())).chain(none).collect()
}

/// What becomes of a packet in a base chain whose policy is to drop, or to accept: of one that may come in
/// by several devices, by that which serves it best.
#[must_use]
pub fn fate(
    chains: &Chains,
    entry: &str,
    drops: bool,
    devices: &[Option<&str>],
    packet: &Packet,
) -> Fate {
    let by_device = |device: &Option<&str>| {
        let mut walk = Walk::new(chains, packet, *device, false);
        match (walk.through(entry, true), walk.doubt) {
            (Some(Fate::Accepted), _) => Fate::Accepted,
            (_, Some(rule)) => Fate::Unknown(rule),
            (Some(fate), None) => fate,
            (None, None) if drops => Fate::Dropped(None),
            (None, None) => Fate::Accepted,
        }
    };
    let mut fates: Vec<Fate> = devices.iter().map(by_device).collect();
    let rank = |fate: &Fate| match fate {
        Fate::Accepted => 0,
        Fate::Unknown(_) => 1,
        Fate::Dropped(_) => 2,
    };
    fates.sort_by_key(rank);
    fates.into_iter().next().unwrap_or(Fate::Accepted)
}

/// What drops a packet, of some caller and by some device at least, and does not drop the packet that has been
/// made of it: rules with those that lead to them, `None` for the policy.
#[must_use]
pub fn passed_by(
    chains: &Chains,
    entry: &str,
    drops: bool,
    devices: &[Option<&str>],
    packets: [&Packet; 2],
) -> Vec<Option<String>> {
    let mut found = Vec::new();
    for device in devices {
        let [before, after] = packets.map(|packet| {
            let mut walk = Walk::new(chains, packet, *device, true);
            let ended = walk.through(entry, true).is_some();
            let mut dropped: Vec<Option<String>> = walk.dropping.into_iter().map(Some).collect();
            dropped.extend((drops && !ended).then_some(None));
            dropped
        });
        found.extend(before.into_iter().filter(|rule| !after.contains(rule)));
    }
    found
}

struct Walk<'a> {
    chains: &'a Chains,
    packet: &'a Packet,
    uplink: Option<&'a str>,
    /// Whether rules about some callers count, too.
    some_callers: bool,
    /// The first rule that may accept the packet.
    doubt: Option<String>,
    /// Rules that drop it, or may, each behind the jumps that lead there.
    dropping: Vec<String>,
    /// The rules that lead to the one looked at, and itself.
    path: Vec<&'a str>,
}

impl<'a> Walk<'a> {
    fn new(
        chains: &'a Chains,
        packet: &'a Packet,
        uplink: Option<&'a str>,
        some_callers: bool,
    ) -> Self {
        let (doubt, dropping, path) = (None, Vec::new(), Vec::new());
        Walk { chains, packet, uplink, some_callers, doubt, dropping, path }
    }

    /// None if the packet leaves the chain. `sure` is false below a jump of which nobody knows whether it
    /// is taken.
    fn through(&mut self, chain: &str, mut sure: bool) -> Option<Fate> {
        // Deeper than the kernel allows (NFT_JUMP_STACK_SIZE): it is a loop.
        if self.path.len() > 16 {
            return None;
        }
        let chains = self.chains;
        for rule in chains.get(chain).into_iter().flatten() {
            let met = rule.meets(self.packet, self.uplink, self.some_callers);
            if met == Some(false) {
                continue;
            }
            let is_met = sure && met == Some(true);
            self.path.push(&rule.text);
            let verdict = match &rule.end {
                End::Accept => Some(Fate::Accepted),
                End::Drop => {
                    self.dropping.push(self.path.join(", then "));
                    Some(Fate::Dropped(Some(rule.text.clone())))
                }
                End::Return | End::Next => None,
                End::Jump(target) | End::Goto(target) => self.through(target, is_met),
            };
            self.path.pop();
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
    fn meets(&self, packet: &Packet, uplink: Option<&str>, some_callers: bool) -> Option<bool> {
        let mut all = Some(true);
        for condition in &self.conditions {
            match condition.holds(packet, uplink, some_callers) {
                Some(false) => return Some(false),
                None => all = None,
                Some(true) => {}
            }
        }
        all
    }
}

impl Condition {
    fn holds(&self, packet: &Packet, uplink: Option<&str>, some_callers: bool) -> Option<bool> {
        let target = packet.target;
        let of_other_family = |networks: &[IpNetwork]| {
            target.is_some_and(|target| networks.iter().all(|of| of.is_ipv6() != target.is_ipv6()))
        };
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
            // In chains of both families the other one's rules are not met, whatever they say.
            Of::Source(networks) | Of::Destination(networks) if of_other_family(networks) => {
                return Some(false);
            }
            Of::Source(networks) => {
                is_known = false;
                let is_any = networks.iter().any(|network| network.prefix() == 0);
                if some_callers && !is_any {
                    return None;
                }
                is_any
            }
            Of::Destination(networks) => match target {
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
            Of::Local => packet.is_local,
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

    pub const ETH0: [Option<&str>; 1] = [Some("eth0")];

    /// To a pod behind `cni0`, translated from a hostPort.
    pub fn packet() -> Packet {
        Packet {
            who: "web".into(),
            device: Some("cni0".into()),
            protocol: Protocol::Tcp,
            target: Some("10.88.0.2:80".parse().unwrap()),
            is_local: false,
            translated: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::samples::{ETH0, packet};
    use super::*;

    #[test]
    fn ebpf_is_no_translation_of_conntrack_and_pods_to_come_have_no_address() {
        let chains = of_iptables("-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n");
        let packet = Packet { translated: false, ..packet() };
        assert_eq!(fate(&chains, "FORWARD", true, &ETH0, &packet), Fate::Dropped(None));
        let packet = Packet { target: None, ..packet };
        let chains = of_iptables("-A FORWARD -d 10.88.0.7/32 -j ACCEPT\n");
        assert_eq!(fate(&chains, "FORWARD", true, &ETH0, &packet), Fate::Dropped(None));
        // Its network may be that.
        let chains = of_iptables("-A FORWARD -d 10.88.0.0/16 -j ACCEPT\n");
        assert!(matches!(fate(&chains, "FORWARD", true, &ETH0, &packet), Fate::Unknown(_)));
    }

    #[test]
    fn what_one_device_accepts_is_not_dropped() {
        let chains = of_iptables("-A FORWARD -i eth0 -j DROP\n");
        let packet = packet();
        let dropped = Fate::Dropped(Some("-i eth0 -j DROP".into()));
        assert_eq!(fate(&chains, "FORWARD", false, &ETH0, &packet), dropped);
        let both = [Some("eth0"), Some("eth1")];
        assert_eq!(fate(&chains, "FORWARD", false, &both, &packet), Fate::Accepted);
        assert!(matches!(fate(&chains, "FORWARD", true, &both, &packet), Fate::Dropped(_)));
    }

    #[test]
    fn of_devices_that_no_rule_tells_apart_one_is_tried() {
        let pods = (0..250).map(|pod| format!("cali{pod}"));
        let devices: Vec<String> = pods.chain(["eth0".into(), "eth1".into()]).collect();
        let of = |rules: &str| told_apart(&of_iptables(rules), &devices);
        assert_eq!(of("-A PREROUTING -p tcp -j DROP\n"), [Some("cali0")]);
        assert_eq!(of("-A PREROUTING ! -i lo -j DROP\n"), [Some("cali0")]);
        assert_eq!(of("-A SUB -i eth1 -j DROP\n"), [Some("cali0"), Some("eth1")]);
        let patterns = "-A PREROUTING -i cali+ -j ACCEPT\n-A PREROUTING ! -i cali7 -j DROP\n";
        assert_eq!(of(patterns), [Some("cali0"), Some("cali7"), Some("eth0")]);
        assert_eq!(told_apart(&of_iptables(patterns), &[]), [None]);
    }
}
