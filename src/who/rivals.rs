//! What takes packets beside the claims, and when. Pure.

use super::evidence::{Evidence, Service};
use super::{cilium, nat};
use crate::backend::Leftover;
use crate::inventory::{Entry, short_id};
use crate::model::{BackendKind, Claim};

/// When something gets a packet, compared with the claim that is met first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Turn {
    /// Before it, or there is no claim.
    First,
    /// Before it or not: what decides cannot be read.
    Perhaps,
    /// Only what the claim leaves.
    Behind,
}

/// Something else that takes packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rival {
    /// In words that follow "goes to".
    pub what: String,
    /// Where it was found.
    pub place: String,
    /// For connections from outside, and for those of the node; `None`: not for such.
    pub outside: Option<Turn>,
    pub node: Option<Turn>,
    /// It is a hostPort as well, without a record.
    pub is_host_port: bool,
}

/// Priorities of chains of table nat (NF_IP_PRI_NAT_DST), and of ours.
const IPTABLES: i32 = -100;
const NFTABLES: i32 = -99;

/// All of them, in the order in which packets meet them.
#[must_use]
pub fn rivals(
    call: &Claim,
    first: Option<&Entry>,
    leftovers: &[Leftover],
    evidence: &Evidence,
) -> Vec<Rival> {
    let backend = first.map(|entry| entry.holding.record.backend);
    let mut rivals = Vec::new();
    for frontend in evidence.frontends(call) {
        // Its programs are at the same hooks as ours, and its order is its own.
        let turn = Some(match backend {
            Some(_) => Turn::Perhaps,
            None => Turn::First,
        });
        rivals.push(Rival {
            what: format!("Cilium's own {} of {}", frontend.kind, frontend.address),
            place: cilium::map_path(call.family).into(),
            outside: turn,
            node: turn,
            is_host_port: frontend.kind == "hostPort",
        });
    }
    let mut behind = Vec::new();
    rivals.extend(of_leftovers(call, leftovers, "ebpf", backend));
    for (family, variant, listing) in &evidence.nat {
        if *family != call.family {
            continue;
        }
        let chain = first.map(|entry| entry.holding.record.chain.as_str());
        let is_ours = chain.is_some_and(|chain| listing.has_chain(chain));
        let rules_are_elsewhere =
            !is_ours && matches!(backend, Some(BackendKind::Iptables | BackendKind::Nftables));
        let [outside, node] = ["PREROUTING", "OUTPUT"].map(|base| {
            let mut takers = nat::takers(listing, base, call, &evidence.local);
            if rules_are_elsewhere {
                let last = takers.iter().position(|taker| taker.spares && !taker.some);
                takers.truncate(last.unwrap_or(takers.len()));
                takers.retain(|taker| !taker.spares);
            }
            takers
        });
        let turn = |taker: &nat::Taker| {
            let turn = match backend {
                None | Some(BackendKind::Nftables) => Turn::First,
                Some(BackendKind::Ebpf) => Turn::Behind,
                // Of two tables at one priority the one that was registered last comes first.
                Some(BackendKind::Iptables) if !is_ours => Turn::Perhaps,
                Some(BackendKind::Iptables) if taker.before => Turn::First,
                Some(BackendKind::Iptables) => Turn::Behind,
            };
            if taker.some && turn == Turn::First { Turn::Perhaps } else { turn }
        };
        let place =
            |taker: &nat::Taker| format!("{} nat {}", variant.name(), taker.chains.join(" > "));
        let mut found: Vec<(bool, Rival)> = Vec::new();
        for taker in &outside {
            found.push((
                taker.before,
                Rival {
                    what: taker.describe(),
                    place: place(taker),
                    outside: Some(turn(taker)),
                    node: None,
                    is_host_port: false,
                },
            ));
        }
        for taker in &node {
            let same = outside.iter().position(|other| {
                other.rule == taker.rule && other.chains.get(1..) == taker.chains.get(1..)
            });
            match same.and_then(|index| found.get_mut(index)) {
                Some((_, rival)) => rival.node = Some(turn(taker)),
                None => found.push((
                    taker.before,
                    Rival {
                        what: taker.describe(),
                        place: place(taker),
                        outside: None,
                        node: Some(turn(taker)),
                        is_host_port: false,
                    },
                )),
            }
        }
        let (before, after): (Vec<_>, Vec<_>) = found.into_iter().partition(|(before, _)| *before);
        rivals.extend(before.into_iter().map(|(_, rival)| rival));
        rivals.extend(of_leftovers(call, leftovers, variant.name(), backend).into_iter().map(
            |rival| {
                // The newest attachment has its entry rules first.
                let turn = if is_ours { Some(Turn::Behind) } else { rival.outside };
                Rival { outside: turn, node: turn, ..rival }
            },
        ));
        behind.extend(after.into_iter().map(|(_, rival)| rival));
    }
    rivals.extend(behind);
    rivals.extend(evidence.services.iter().filter(|service| service.is_for(call)).map(|service| {
        let turn = Some(by_priority(service.priority, backend));
        Rival {
            what: format!("the NodePort of a Service ({})", service.chain),
            place: service.place(),
            outside: turn,
            node: turn,
            is_host_port: false,
        }
    }));
    rivals.extend(of_leftovers(call, leftovers, "nftables", backend));
    rivals
}

impl Service {
    fn is_for(&self, call: &Claim) -> bool {
        (self.family, self.protocol) == (call.family, call.protocol)
            && (self.addresses.is_empty()
                || call.address.is_none_or(|ip| self.addresses.contains(&ip)))
    }
}

fn by_priority(priority: i32, backend: Option<BackendKind>) -> Turn {
    let ours = match backend {
        None => return Turn::First,
        Some(BackendKind::Ebpf) => return Turn::Behind,
        Some(BackendKind::Iptables) => IPTABLES,
        Some(BackendKind::Nftables) => NFTABLES,
    };
    match priority.cmp(&ours) {
        std::cmp::Ordering::Less => Turn::First,
        std::cmp::Ordering::Equal => Turn::Perhaps,
        std::cmp::Ordering::Greater => Turn::Behind,
    }
}

fn of_leftovers(
    call: &Claim,
    leftovers: &[Leftover],
    place: &str,
    backend: Option<BackendKind>,
) -> Vec<Rival> {
    // Where packets meet it: programs, our own nftables chains, upstream's (dstnat), table nat of either variant.
    let turn = |leftover: &Leftover| match place {
        "ebpf" if backend == Some(BackendKind::Ebpf) => Turn::Behind,
        "ebpf" => Turn::First,
        "nftables" if !leftover.is_of_upstream() => by_priority(NFTABLES, backend),
        _ => by_priority(IPTABLES, backend),
    };
    leftovers
        .iter()
        .filter(|leftover| leftover.place == place)
        .flat_map(|leftover| leftover.forwards.iter().map(move |forward| (leftover, forward)))
        .filter(|(_, forward)| {
            let claim = forward.claim;
            claim == Claim { address: claim.address, ..*call }
                && claim.address.is_none_or(|own| call.address == Some(own))
        })
        .map(|(leftover, forward)| Rival {
            what: match leftover.container_id.as_str() {
                "" => format!("{}, which has no record", forward.target),
                id => {
                    format!("{} of container {}, which has no record", forward.target, short_id(id))
                }
            },
            place: format!("{} {}", leftover.place, leftover.object),
            outside: Some(turn(leftover)),
            node: Some(turn(leftover)),
            is_host_port: true,
        })
        .collect()
}
