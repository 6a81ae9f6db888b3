//! Whether the kernel holds what the records ask for, and bringing it there without any call of a
//! runtime: after a reload of the node's firewall, say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::step::Lost;
use super::{Engine, localnet_path};
use crate::backend::Observe;
use crate::error::{Error, Result};
use crate::facts::{NodeFacts, SERVICES_UNKNOWN};
use crate::model::{BackendKind, Family};
use crate::record::Record;
use crate::sys::namespace::{self, Life};
use crate::sys::sysctl;

/// What a restoration came to.
#[derive(Debug, Default)]
pub struct Restored {
    /// Attachments that were looked at.
    pub attachments: usize,
    /// What was wrong with which, and is right now.
    pub repaired: Vec<(Record, Vec<String>)>,
    /// Attachments whose network namespace is gone: nothing was put back for them.
    pub dead: Vec<Record>,
    /// What could not be looked at, or not be repaired: attachments, and backends.
    pub failed: Vec<(String, Error)>,
    /// How many records could not be read. Each is a warning of the host.
    pub unread: usize,
}

impl Engine<'_> {
    /// Where the kernel differs from what an attachment asks for, in the field's terms. `recorded` is
    /// false for one that upstream's plugin made.
    pub fn problems(&self, record: &Record, recorded: bool) -> Result<Vec<String>> {
        let mut related = self.store.sharing(&record.rival_keys().collect(), record.id())?;
        related.retain(|other| other.backend == record.backend);
        let parts = self.store.parts(record.backend)?;
        let facts = self.known_facts(record.backend)?;
        let observer: &dyn Observe = self.backend(record.backend)?;
        let look = |related: &[Record]| {
            observer.problems(self.host, record, related, &parts, &facts, recorded)
        };
        let mut problems = look(&related)?;
        if !problems.is_empty() {
            let all = related.len();
            related.retain(|record| namespace::life(record) != Life::Gone);
            if related.len() < all && look(&related)?.is_empty() {
                problems = Vec::new();
            }
        }
        problems.extend(localnet_problem(record));
        if recorded && concerns_node(record) {
            problems.extend(node_problems(record, &facts, &self.host.node_facts()?));
        }
        Ok(problems)
    }

    /// Brings the kernel to what the records of live attachments ask for, one transaction for each
    /// backend in which something is wrong. Where nothing is, nothing is changed.
    pub fn restore(&self) -> Result<Restored> {
        let (records, notes) = self.store.all()?;
        let mut restored = Restored { unread: notes.len(), ..Restored::default() };
        for note in notes {
            self.host.warn(note);
        }
        let mut wrong: BTreeMap<BackendKind, Vec<(Record, Vec<String>)>> = BTreeMap::new();
        for kind in BackendKind::ALL {
            let own: Vec<Record> =
                records.iter().filter(|record| record.backend == kind).cloned().collect();
            if own.is_empty() {
                continue;
            }
            let problems = match self.problems_of_all(kind, &own) {
                Ok(problems) => problems,
                // The other backends' are none the worse for it.
                Err(error) => {
                    restored.failed.push((kind.to_string(), error));
                    continue;
                }
            };
            for (record, problems) in own.into_iter().zip(problems) {
                if namespace::life(&record) == Life::Gone {
                    restored.dead.push(record);
                    continue;
                }
                restored.attachments += 1;
                if !problems.is_empty() {
                    wrong.entry(kind).or_default().push((record, problems));
                }
            }
        }
        let facts = self.host.node_facts()?;
        for (kind, records) in wrong {
            let lost = Lost {
                without: restored.dead.iter().map(|record| record.id().to_owned()).collect(),
                ..Lost::default()
            };
            let left = self
                .restore_without(kind, None, None, &lost, &facts, &BTreeSet::new())
                .and_then(|()| self.problems_left(kind));
            match left {
                Ok(mut left) => {
                    for (record, problems) in records {
                        match left.remove(record.id()) {
                            None => restored.repaired.push((record, problems)),
                            Some(left) => restored.failed.push((
                                record.attachment.to_string(),
                                Error::Drift(format!("not repaired: {}", left.join("; "))),
                            )),
                        }
                    }
                }
                Err(error) => restored.failed.push((kind.to_string(), error)),
            }
        }
        Ok(restored)
    }

    /// What is wrong with which record, by its id. Not everything can be put back: the chain that
    /// `externalSetMarkChain` names, or programs at a cgroup that another program has for itself.
    fn problems_left(&self, kind: BackendKind) -> Result<BTreeMap<String, Vec<String>>> {
        let (mut records, _) = self.store.all()?;
        records.retain(|record| record.backend == kind);
        let problems = self.problems_of_all(kind, &records)?;
        let ids = records.iter().map(|record| record.id().to_owned());
        Ok(ids.zip(problems).filter(|(_, problems)| !problems.is_empty()).collect())
    }
}

/// The records whose network namespaces are not gone; `None` if these are all. Restoring puts nothing
/// back for the dead, which is no fault of those who live: the kernel may be right with them or without.
pub(super) fn living(records: &[Record]) -> Option<Vec<Record>> {
    let lives = |record: &&Record| namespace::life(record) != Life::Gone;
    let living: Vec<Record> = records.iter().filter(lives).cloned().collect();
    (living.len() < records.len()).then_some(living)
}

/// Whether rules of the record depend on what the node has, which may change without a call.
pub(super) fn concerns_node(record: &Record) -> bool {
    concerns_uplinks(record) || record.backend == BackendKind::Nftables
}

/// What the node has got since the rules were told.
pub(super) fn node_problems(record: &Record, known: &NodeFacts, now: &NodeFacts) -> Vec<String> {
    let uplinks = uplink_problem(known, now).filter(|_| concerns_uplinks(record));
    let addresses = match record.backend {
        BackendKind::Nftables => address_problem(record, known, now),
        BackendKind::Iptables | BackendKind::Ebpf => None,
    };
    uplinks.into_iter().chain(addresses).collect()
}

/// Whether the record's rules tell uplinks from other devices.
fn concerns_uplinks(record: &Record) -> bool {
    Family::ALL.into_iter().any(|family| record.masquerades_neighbours(family))
}

/// Where Services' addresses are bound to the node, the table takes none but those that it lists, of the
/// families that somebody needs.
fn address_problem(record: &Record, known: &NodeFacts, now: &NodeFacts) -> Option<String> {
    if now.binds_services && !known.binds_services {
        return Some(SERVICES_UNKNOWN.to_owned());
    }
    let is_needed = |ip: &&IpAddr| record.network(Family::of(ip)).is_some();
    let new = now.addresses.difference(&known.addresses).filter(|_| known.binds_services);
    let new: Vec<String> = new.filter(is_needed).map(ToString::to_string).collect();
    (!new.is_empty()).then(|| format!("{} is not known as an address of the node", new.join(", ")))
}

/// What comes by a device that the rules do not know as an uplink looks like a neighbour's. One that has
/// gone harms nobody.
fn uplink_problem(known: &NodeFacts, now: &NodeFacts) -> Option<String> {
    let new: Vec<&str> = now.uplinks.difference(&known.uplinks).map(String::as_str).collect();
    (!new.is_empty()).then(|| {
        format!(
            "outside clients lose their address: {} leads out of the node, and the rules do not know it",
            new.join(", ")
        )
    })
}

pub(super) fn localnet_problem(record: &Record) -> Option<String> {
    let device = record.localnet_device.as_ref()?;
    let value = sysctl::read(&localnet_path(device)).unwrap_or_else(|error| error.to_string());
    (value != "1")
        .then(|| format!("127.0.0.1 is not forwarded: net.ipv4.conf.{device}.route_localnet should be 1 and is {value}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::record::samples::record;

    #[test]
    fn an_address_is_missed_where_lists_count_and_a_pod_has_its_family() {
        let facts = |addresses: &[&str], binds_services| NodeFacts {
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            binds_services,
            ..NodeFacts::default()
        };
        let said = |backend, network: &str, known: &NodeFacts, now: &NodeFacts| {
            let mut pod = record("a", &[network], &["tcp 80 8080"], backend, 1);
            pod.options.no_snat = true;
            node_problems(&pod, known, now).join("; ")
        };
        let new = ["192.0.2.1", "192.0.2.2", "fd00::1"];
        let (before, after) = (facts(&["192.0.2.1"], true), facts(&new, true));
        let found = said(BackendKind::Nftables, "10.0.0.2/24", &before, &after);
        assert_eq!(found, "192.0.2.2 is not known as an address of the node");
        let found = said(BackendKind::Nftables, "fd00:1::2/64", &before, &after);
        assert_eq!(found, "fd00::1 is not known as an address of the node");
        for backend in [BackendKind::Iptables, BackendKind::Ebpf] {
            assert_eq!(said(backend, "10.0.0.2/24", &before, &after), "");
        }
        let (before, after) = (facts(&["192.0.2.1"], false), facts(&new, false));
        assert_eq!(said(BackendKind::Nftables, "10.0.0.2/24", &before, &after), "");
        let found = said(BackendKind::Nftables, "10.0.0.2/24", &before, &facts(&[], true));
        assert_eq!(found, SERVICES_UNKNOWN);
        assert_eq!(said(BackendKind::Nftables, "10.0.0.2/24", &facts(&new, true), &before), "");
    }
}
