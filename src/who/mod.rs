//! Who answers on a port of the node, and why: claims, what else takes packets, and in which order they
//! are met. Pure but for `evidence`, which reads what others have on the node.

pub mod cilium;
pub mod evidence;
pub mod nat;
mod rivals;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

use crate::backend::ebpf::objects::is_reserved;
use crate::backend::{Leftover, Step};
use crate::claims::{choices, is_conditional};
use crate::inventory::{Entry, State, owner};
use crate::model::{BackendKind, Claim, Family, Protocol};
pub use evidence::Evidence;
pub use rivals::{Rival, Turn};

const LINK_LOCAL: &str = "eBPF takes no link-local addresses";

/// A port, and the protocol if one is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// 1 to 65535.
    pub number: u16,
    pub protocol: Option<Protocol>,
}

impl FromStr for Port {
    type Err = String;

    /// `8080`, `53/udp`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, protocol) = match text.split_once('/') {
            Some((number, protocol)) => (number, Some(protocol)),
            None => (text, None),
        };
        let number = number.parse().ok().filter(|number| *number != 0);
        let number = number.ok_or("a port is a number from 1 to 65535")?;
        let protocol = protocol
            .map(|name| Protocol::parse(name).ok_or("a protocol is tcp, udp or sctp"))
            .transpose()?;
        Ok(Port { number, protocol })
    }
}

/// What is known of one kind of call.
#[derive(Debug, Clone)]
pub struct Answer<'a> {
    /// What is called; without an address, every one of the node that has no claim of its own.
    pub call: Claim,
    /// The claims to it, in the order in which they are met.
    pub choices: Vec<Entry<'a>>,
    /// The way to the first of them.
    pub steps: Vec<Step>,
    /// What else takes such calls, in the order in which it is met.
    pub rivals: Vec<Rival>,
    /// Processes of the node that wait for such calls, in words.
    pub processes: Vec<String>,
    /// What happens to a connection from outside, and to one of the node itself; each completes
    /// "a connection ...".
    pub outside: String,
    pub node: String,
    /// Whether a hostPort answers.
    pub answered: bool,
}

/// The calls that a question is about: to the address that it names, or else to each address that
/// somebody claims, and to all others.
#[must_use]
pub fn calls(
    port: Port,
    address: Option<IpAddr>,
    entries: &[Entry],
    leftovers: &[Leftover],
) -> BTreeSet<Claim> {
    let protocols: Vec<Protocol> =
        port.protocol.map_or_else(|| Protocol::ALL.to_vec(), |protocol| vec![protocol]);
    let claimed: Vec<Claim> = entries
        .iter()
        .map(|entry| entry.holding.forward.claim)
        .chain(leftovers.iter().flat_map(|one| one.forwards.iter().map(|forward| forward.claim)))
        .collect();
    let mut calls = BTreeSet::new();
    for protocol in protocols {
        for family in Family::ALL {
            let call = |address| Claim { family, protocol, address, port: port.number };
            match address {
                Some(ip) if Family::of(&ip) != family => {}
                Some(ip) => drop(calls.insert(call(Some(ip).filter(|ip| !ip.is_unspecified())))),
                None => {
                    calls.insert(call(None));
                    calls.extend(
                        claimed.iter().copied().filter(|claim| *claim == call(claim.address)),
                    );
                }
            }
        }
    }
    calls
}

/// The first choice of a call.
#[must_use]
pub fn first<'a>(call: &Claim, entries: &[Entry<'a>]) -> Option<Entry<'a>> {
    let holdings: Vec<_> = entries.iter().map(|entry| entry.holding).collect();
    choices(&holdings, call).first().and_then(|index| entries.get(*index)).copied()
}

/// Weighs what was read. `None`: nobody has anything to do with such calls.
#[must_use]
pub fn judge<'a>(
    call: Claim,
    entries: &[Entry<'a>],
    leftovers: &[Leftover],
    evidence: &Evidence,
    steps: Vec<Step>,
) -> Option<Answer<'a>> {
    let holdings: Vec<_> = entries.iter().map(|entry| entry.holding).collect();
    let choices: Vec<Entry> = choices(&holdings, &call)
        .into_iter()
        .filter_map(|index| entries.get(index))
        .copied()
        .collect();
    let rivals = rivals::rivals(&call, choices.first(), leftovers, evidence);
    let processes = evidence.processes(&call);
    if choices.is_empty() && rivals.is_empty() && processes.is_empty() {
        return None;
    }
    let mut answer = Answer {
        call,
        choices,
        steps,
        rivals,
        processes,
        outside: String::new(),
        node: String::new(),
        answered: false,
    };
    let (outside, node) = (answer.fate_from_outside(evidence), answer.fate_from_node(evidence));
    let is_loopback = call.address.is_some_and(|ip| ip.is_loopback());
    answer.answered = if is_loopback { node.1 } else { outside.1 };
    (answer.outside, answer.node) = (outside.0, node.0);
    Some(answer)
}

impl Answer<'_> {
    /// In words, and whether a hostPort answers.
    fn fate_from_outside(&self, evidence: &Evidence) -> (String, bool) {
        match self.call.address {
            Some(ip) if ip.is_loopback() => {
                ("cannot come: the address is the node's own".into(), false)
            }
            Some(ip) if !evidence.local.contains(&ip) && !evidence.routed.contains(&ip) => {
                (not_local(ip), false)
            }
            Some(ip) if self.is_by_ebpf() && is_reserved(&ip) => {
                self.fate(|rival| rival.outside, Some(LINK_LOCAL))
            }
            _ => self.fate(|rival| rival.outside, None),
        }
    }

    fn fate_from_node(&self, evidence: &Evidence) -> (String, bool) {
        let is_nothing = |ip: &IpAddr| {
            ip.is_ipv6() && is_reserved(ip) && self.is_by_ebpf() && evidence.routed.contains(ip)
        };
        if self.call.address.is_some_and(|ip| is_nothing(&ip)) {
            return self.fate(|rival| rival.node, Some(LINK_LOCAL));
        }
        // Programs at sockets know the node's addresses from a list.
        let is_known = |ip: &IpAddr| {
            let routed = evidence.routed.contains(ip) && !self.is_by_ebpf();
            ip.is_loopback() || evidence.local.contains(ip) || routed
        };
        if let Some(ip) = self.call.address.filter(|ip| !is_known(ip)) {
            return (not_local(ip), false);
        }
        let Some(first) = self.choices.first() else {
            return self.fate(|rival| rival.node, None);
        };
        let record = first.holding.record;
        let loopback = match (record.backend, self.call.family) {
            (BackendKind::Ebpf, _) => true,
            // There is no route_localnet for IPv6.
            (_, Family::V6) => false,
            (_, Family::V4) => record.routes_loopback() && record.localnet_device.is_some(),
        };
        if record.backend == BackendKind::Ebpf
            && !self.steps.iter().any(|step| step.place.starts_with("cgroup"))
        {
            let why = "there are no programs at sockets for it";
            return self.fate(|rival| rival.node, Some(why));
        }
        let name = match self.call.family {
            Family::V4 => "127.0.0.1",
            Family::V6 => "[::1]",
        };
        match self.call.address {
            Some(ip) if ip.is_loopback() && !loopback => {
                let why = "connections to the loopback address are not forwarded";
                self.fate(|rival| rival.node, Some(why))
            }
            Some(_) => self.fate(|rival| rival.node, None),
            None => {
                let (mut text, answered) = self.fate(|rival| rival.node, None);
                if answered {
                    text += if loopback { "; by " } else { "; not by " };
                    text += name;
                    text += if loopback { " as well" } else { "" };
                }
                (text, answered)
            }
        }
    }

    fn is_by_ebpf(&self) -> bool {
        let backend = |choice: &Entry| choice.holding.record.backend;
        self.choices.first().map(backend) == Some(BackendKind::Ebpf)
    }

    /// Where such a connection ends; `not_by_us` is why no claim has it.
    fn fate(
        &self,
        turn: impl Fn(&Rival) -> Option<Turn>,
        not_by_us: Option<&str>,
    ) -> (String, bool) {
        // What stands behind a claim gets its turn where the claim does not take the packet.
        let is_first = |rival: &&Rival| match turn(rival) {
            Some(Turn::First) => true,
            Some(Turn::Behind) => not_by_us.is_some() || self.choices.is_empty(),
            _ => false,
        };
        let perhaps: Vec<&str> = self
            .rivals
            .iter()
            .filter(|rival| turn(rival) == Some(Turn::Perhaps))
            .map(|rival| rival.what.as_str())
            .collect();
        let doubt = match perhaps.is_empty() {
            true => String::new(),
            false => format!(", unless {} takes it before", perhaps.join(" or ")),
        };
        if let Some(rival) = self.rivals.iter().find(is_first) {
            return (format!("goes to {}{doubt}", rival.what), rival.is_host_port);
        }
        let choice = self.choices.first().filter(|_| not_by_us.is_none());
        let (text, answered) = match choice {
            Some(choice) => reached(choice),
            None => {
                let process = self.processes.first().map(|process| format!("reaches {process}"));
                let nobody = || "is refused: nobody waits for it".to_owned();
                let why = not_by_us.map(|why| format!(": {why}")).unwrap_or_default();
                (process.unwrap_or_else(nobody) + &why, false)
            }
        };
        (text + &doubt, answered)
    }
}

/// Where the first choice takes a connection.
fn reached(choice: &Entry) -> (String, bool) {
    let (record, target) = (choice.holding.record, choice.holding.forward.target);
    let who = format!("{target} of {}", owner(record));
    let family = choice.holding.forward.claim.family;
    match choice.state() {
        State::Dead => (format!("goes to {who}, which is gone (portmap gc removes it)"), false),
        State::Missing => (
            format!(
                "should go to {who}, which is not in the kernel as recorded (portmap restore puts it back)"
            ),
            false,
        ),
        State::Unknown => (format!("should go to {who}; whether it does cannot be read"), false),
        State::Active | State::Shadowed if is_conditional(record, family) => (
            format!(
                "goes to {who} if it meets the conditions of network {}",
                record.attachment.network
            ),
            true,
        ),
        State::Active | State::Shadowed => (format!("goes to {who}"), true),
    }
}

fn not_local(ip: IpAddr) -> String {
    format!("is not forwarded: {ip} is not an address of this node")
}

#[cfg(test)]
mod tests;
