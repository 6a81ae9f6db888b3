//! Which conntrack entries a change of rules makes stale. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use crate::facts::NodeFacts;
use crate::model::{BackendKind, Claim, Family, Protocol};
use crate::record::Record;
use crate::sys::netlink::conntrack::Flow;

/// TCP connections end with their pod; UDP and SCTP entries are kept alive by packets alone.
fn is_flushed(protocol: Protocol) -> bool {
    matches!(protocol, Protocol::Udp | Protocol::Sctp)
}

/// Whether an attachment has claims of which entries can go stale. With eBPF packets are translated
/// before conntrack sees them.
#[must_use]
pub fn concerns(record: &Record) -> bool {
    record.backend != BackendKind::Ebpf
        && record.mappings.iter().any(|mapping| is_flushed(mapping.protocol))
}

/// Claims of which entries may be stale, and where they lead now.
pub struct Flush<'a> {
    claims: BTreeSet<Claim>,
    targets: BTreeMap<Claim, SocketAddr>,
    /// Where packets went before, which they must not any more.
    former_pods: BTreeSet<IpAddr>,
    facts: &'a NodeFacts,
}

impl<'a> Flush<'a> {
    /// The claims of either have changed hands. `others` are the records that share ports with the two.
    #[must_use]
    pub fn new(
        added: Option<&Record>,
        removed: Option<&Record>,
        others: &[Record],
        facts: &'a NodeFacts,
    ) -> Self {
        let former_pods = removed
            .iter()
            .flat_map(|record| &record.addresses)
            .map(ipnetwork::IpNetwork::ip)
            .collect();
        Flush {
            claims: claims(added.iter().chain(&removed).copied()),
            targets: targets(others.iter().chain(added)),
            former_pods,
            facts,
        }
    }

    /// Rules of `records` have been missing, or may have been, and are there again.
    #[must_use]
    pub fn restored(records: &[&Record], facts: &'a NodeFacts) -> Self {
        Flush {
            claims: claims(records.iter().copied()),
            targets: targets(records.iter().copied()),
            former_pods: BTreeSet::new(),
            facts,
        }
    }

    /// Protocols and ports of one family, to preselect entries.
    #[must_use]
    pub fn ports(&self, family: Family) -> Vec<(Protocol, u16)> {
        let ports: BTreeSet<(Protocol, u16)> = self
            .claims
            .iter()
            .filter(|claim| claim.family == family)
            .map(|claim| (claim.protocol, claim.port))
            .collect();
        ports.into_iter().collect()
    }

    /// Whether an entry belongs to one of the claims and leads elsewhere than the rules do now. A
    /// flow that merely has the port, to an address that is none of the node's, is never taken.
    #[must_use]
    pub fn takes(&self, flow: &Flow) -> bool {
        let numbered = |protocol: &Protocol| protocol.number() == flow.protocol;
        let Some(protocol) = Protocol::ALL.into_iter().find(numbered) else {
            return false;
        };
        let (ip, port) = (flow.original.destination.ip(), flow.original.destination.port());
        let any = Claim { family: flow.family, protocol, address: None, port };
        let specific = Claim { address: Some(ip), ..any };
        let claimed = self.claims.contains(&specific)
            || (self.claims.contains(&any) && self.facts.is_local(&ip));
        claimed
            && match self.targets.get(&specific).or_else(|| self.targets.get(&any)) {
                Some(target) => flow.reply.source != *target,
                // Nothing has the claim any more: what was not translated goes on.
                None => self.former_pods.contains(&flow.reply.source.ip()),
            }
    }
}

fn claims<'a>(records: impl Iterator<Item = &'a Record>) -> BTreeSet<Claim> {
    records.flat_map(Record::claims).filter(|claim| is_flushed(claim.protocol)).collect()
}

/// Where new flows are sent: the newest has a claim.
fn targets<'a>(records: impl Iterator<Item = &'a Record>) -> BTreeMap<Claim, SocketAddr> {
    let mut records: Vec<&Record> = records.collect();
    records.sort_by_key(|record| record.order);
    let forwards = records
        .into_iter()
        .flat_map(|record| Family::ALL.into_iter().flat_map(|family| record.forwards(family)));
    forwards.map(|forward| (forward.claim, forward.target)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::model::BackendKind;
    use crate::record::samples::record;
    use crate::sys::netlink::conntrack::Tuple;

    const CLIENT: &str = "198.51.100.2:4000";

    /// A UDP flow from the client to `to` that was translated to `now_at`.
    fn flow(to: &str, now_at: &str) -> Flow {
        let client: SocketAddr = CLIENT.parse().unwrap();
        Flow {
            family: Family::V4,
            protocol: 17,
            original: Tuple { source: client, destination: to.parse().unwrap() },
            reply: Tuple { source: now_at.parse().unwrap(), destination: client },
        }
    }

    fn node() -> NodeFacts {
        NodeFacts {
            addresses: BTreeSet::from(["192.0.2.1".parse().unwrap(), "192.0.2.9".parse().unwrap()]),
            ..NodeFacts::default()
        }
    }

    #[test]
    fn add_takes_untranslated_and_former_flows_and_leaves_the_rest() {
        let facts = node();
        let new = record("new", &["10.0.0.3/24"], &["udp 53 5353"], BackendKind::Nftables, 2);
        let flush = Flush::new(Some(&new), None, &[], &facts);
        for (to, now_at, taken) in [
            ("192.0.2.1:53", "192.0.2.1:53", true),
            ("127.0.0.1:53", "127.0.0.1:53", true),
            ("192.0.2.1:53", "10.0.0.2:5353", true),
            ("192.0.2.1:53", "10.0.0.3:5353", false),
            ("192.0.2.1:54", "192.0.2.1:54", false),
            ("10.96.0.10:53", "10.0.0.9:53", false),
            ("203.0.113.7:53", "203.0.113.7:53", false),
        ] {
            assert_eq!(flush.takes(&flow(to, now_at)), taken, "{to} {now_at}");
        }
        assert_eq!(flush.ports(Family::V4), [(Protocol::Udp, 53)]);
        assert_eq!(flush.ports(Family::V6), []);
    }

    #[test]
    fn a_specific_address_has_its_own_flows() {
        let facts = node();
        let specific =
            record("s", &["10.0.0.2/24"], &["udp 53 53 192.0.2.9"], BackendKind::Nftables, 1);
        let any = record("a", &["10.0.0.3/24"], &["udp 53 53"], BackendKind::Nftables, 2);
        let others = [specific.clone()];
        let flush = Flush::new(Some(&any), None, &others, &facts);
        assert!(!flush.takes(&flow("192.0.2.9:53", "10.0.0.2:53")));
        assert!(flush.takes(&flow("192.0.2.1:53", "192.0.2.1:53")));
        let others = [any];
        let flush = Flush::new(Some(&specific), None, &others, &facts);
        assert!(flush.takes(&flow("192.0.2.9:53", "10.0.0.3:53")));
        assert!(!flush.takes(&flow("192.0.2.1:53", "10.0.0.3:53")));
    }

    #[test]
    fn what_began_without_rules_is_taken() {
        let facts = node();
        let older = record("o", &["10.0.0.2/24"], &["udp 53 53"], BackendKind::Iptables, 1);
        let newer = record("n", &["10.0.0.3/24"], &["udp 53 53"], BackendKind::Iptables, 2);
        let other = record("x", &["10.0.0.4/24"], &["sctp 9 9"], BackendKind::Iptables, 3);
        let flush = Flush::restored(&[&older, &newer, &other], &facts);
        for (to, now_at, taken) in [
            ("192.0.2.1:53", "192.0.2.1:53", true),
            ("192.0.2.1:53", "10.0.0.2:53", true),
            ("192.0.2.1:53", "10.0.0.3:53", false),
            ("192.0.2.1:9", "192.0.2.1:9", false),
            ("203.0.113.7:53", "203.0.113.7:53", false),
        ] {
            assert_eq!(flush.takes(&flow(to, now_at)), taken, "{to} {now_at}");
        }
        assert_eq!(flush.ports(Family::V4), [(Protocol::Sctp, 9), (Protocol::Udp, 53)]);
    }

    #[test]
    fn del_takes_what_led_to_the_pod() {
        let facts = node();
        let gone =
            record("gone", &["10.0.0.2/24"], &["udp 53 53", "tcp 80 80"], BackendKind::Nftables, 1);
        let flush = Flush::new(None, Some(&gone), &[], &facts);
        assert!(flush.takes(&flow("192.0.2.1:53", "10.0.0.2:53")));
        assert!(!flush.takes(&flow("192.0.2.1:53", "192.0.2.1:53")));
        assert!(!flush.takes(&flow("192.0.2.1:53", "10.0.0.9:53")));
        assert!(concerns(&gone));
        assert!(!concerns(&record(
            "tcp",
            &["10.0.0.2/24"],
            &["tcp 80 80"],
            BackendKind::Nftables,
            1
        )));
    }
}
