//! Which conntrack entries a change of rules makes stale. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use crate::facts::NodeFacts;
use crate::model::{BackendKind, Claim, Family, Forward, Protocol};
use crate::record::{IndexKey, Record};
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

/// What attachments had that no record tells of, as far as entries of it can go stale.
#[derive(Debug, Default)]
pub struct Former {
    claims: BTreeSet<Claim>,
    pods: BTreeSet<IpAddr>,
}

impl Former {
    /// By what their rules forwarded.
    #[must_use]
    pub fn of_rules(forwards: &BTreeSet<Forward>) -> Self {
        let flushed = || forwards.iter().filter(|forward| is_flushed(forward.claim.protocol));
        Former {
            claims: flushed().map(|forward| forward.claim).collect(),
            pods: flushed().map(|forward| forward.target.ip()).collect(),
        }
    }

    /// By the names of a record's index entries. They do not tell the hostIP: flows to any address of
    /// the node may have led to these pods.
    #[must_use]
    pub fn of_index(ports: &BTreeSet<String>, pods: &BTreeSet<String>) -> Self {
        let pods: BTreeSet<IpAddr> = pods.iter().filter_map(|name| name.parse().ok()).collect();
        let families: BTreeSet<Family> = pods.iter().map(Family::of).collect();
        let ports = ports.iter().filter_map(|name| IndexKey::parse_port(name));
        let claims =
            ports.filter(|(protocol, _)| is_flushed(*protocol)).flat_map(|(protocol, port)| {
                families.iter().map(move |family| Claim {
                    family: *family,
                    protocol,
                    address: None,
                    port,
                })
            });
        Former { claims: claims.collect(), pods }
    }

    /// Whether there is nothing to be flushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// Who has one of these by now.
    #[must_use]
    pub fn ports(&self) -> BTreeSet<IndexKey> {
        self.claims.iter().map(|claim| IndexKey::Port(claim.protocol, claim.port)).collect()
    }
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

    /// Rules that no record tells of are gone. `others` are the records that share ports with them.
    #[must_use]
    pub fn former(former: &Former, others: &[Record], facts: &'a NodeFacts) -> Self {
        Flush {
            claims: former.claims.clone(),
            targets: targets(others.iter().filter(|record| concerns(record))),
            former_pods: former.pods.clone(),
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

    /// What is left of a pod `10.0.0.2` that had udp 53 and tcp 80.
    fn formers() -> [Former; 2] {
        let forward = |protocol, port| Forward {
            claim: Claim { family: Family::V4, protocol, address: None, port },
            target: SocketAddr::new("10.0.0.2".parse().unwrap(), port),
        };
        let rules = BTreeSet::from([forward(Protocol::Udp, 53), forward(Protocol::Tcp, 80)]);
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let ports = names(&["udp-53", "tcp-80", "?"]);
        [Former::of_rules(&rules), Former::of_index(&ports, &names(&["10.0.0.2", "?"]))]
    }

    #[test]
    fn without_a_record_what_led_to_the_pod_is_taken() {
        let facts = node();
        for former in formers() {
            let flush = Flush::former(&former, &[], &facts);
            assert_eq!(flush.ports(Family::V4), [(Protocol::Udp, 53)]);
            assert_eq!(flush.ports(Family::V6), []);
            assert_eq!(former.ports(), BTreeSet::from([IndexKey::Port(Protocol::Udp, 53)]));
            for (to, now_at, taken) in [
                ("192.0.2.1:53", "10.0.0.2:53", true),
                ("192.0.2.1:53", "192.0.2.1:53", false),
                ("192.0.2.1:53", "10.0.0.9:53", false),
                ("192.0.2.1:54", "10.0.0.2:54", false),
                ("203.0.113.7:53", "10.0.0.2:53", false),
            ] {
                assert_eq!(flush.takes(&flow(to, now_at)), taken, "{to} {now_at}");
            }
        }
        assert!(Former::of_rules(&BTreeSet::new()).is_empty());
    }

    #[test]
    fn who_has_the_port_by_now_keeps_its_flows_also_with_the_former_address() {
        let facts = node();
        let again = record("again", &["10.0.0.2/24"], &["udp 53 53"], BackendKind::Iptables, 1);
        let ebpf = record("ebpf", &["10.0.0.3/24"], &["udp 53 53"], BackendKind::Ebpf, 2);
        let others = [again, ebpf];
        for former in formers() {
            let flush = Flush::former(&former, &others, &facts);
            assert!(!flush.takes(&flow("192.0.2.1:53", "10.0.0.2:53")));
            assert!(flush.takes(&flow("192.0.2.1:53", "10.0.0.2:54")));
            // What eBPF forwards has no entry that could be stale.
            let flush = Flush::former(&former, &others[1..], &facts);
            assert!(!flush.takes(&flow("192.0.2.1:53", "192.0.2.1:53")));
            assert!(flush.takes(&flow("192.0.2.1:53", "10.0.0.2:53")));
        }
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
