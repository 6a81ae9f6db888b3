//! The fast path changes one attachment and lets the kernel itself refuse if anything it builds on is
//! missing: `-C` lines, which iptables-restore understands, check the shared chains inside the
//! transaction.

use std::collections::BTreeSet;

use super::super::rules::{
    DNAT, DNAT_JUMP, GUARD, GUARD_JUMP, GUARD_RULE, LOOPBACK, LOOPBACK_JUMP, LOOPBACK_RULE, MASQ,
    MASQ_JUMP, NEIGHBOURS, NEIGHBOURS_JUMP, SETMARK, chain_rules, entry_rules, masq_rule,
    neighbour_rules_of, setmark_rule, uplink_rule,
};
use super::{Table, competes, has_any};
use crate::model::Family;
use crate::record::{Part, Record};

/// Who makes sure that the shared chains are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared<'a> {
    /// `-C` lines in the transaction. iptables-legacy has the whole table at hand anyway.
    CheckedInside { uplinks: &'a BTreeSet<String> },
    /// The caller has looked. iptables-nft would read every rule of the table for a `-C` (6 ms at
    /// 1,000 mappings).
    CheckedBefore,
}

/// The shared chains that a record's rules build on: table, chain, and the chain that a rule of it
/// must lead to, or else that it must have a rule at all.
#[must_use]
pub fn shared_chains(
    record: &Record,
    family: Family,
) -> Vec<(&'static str, &'static str, Option<&'static str>)> {
    let mut chains = vec![("nat", "PREROUTING", Some(DNAT)), ("nat", "OUTPUT", Some(DNAT))];
    if family == Family::V6 {
        chains.extend([("nat", "OUTPUT", Some(LOOPBACK)), ("nat", LOOPBACK, None)]);
    }
    for part in record.parts() {
        match part {
            Part::Mark(of, _) if of == family => {
                chains.extend([
                    ("nat", "POSTROUTING", Some(MASQ)),
                    ("nat", MASQ, None),
                    ("nat", SETMARK, None),
                ]);
            }
            Part::Neighbours(of) if of == family => {
                chains.push(("nat", "PREROUTING", Some(NEIGHBOURS)))
            }
            Part::Guard if family == Family::V4 => {
                chains.extend([("raw", "PREROUTING", Some(GUARD)), ("raw", GUARD, None)]);
            }
            _ => {}
        }
    }
    chains
}

/// Puts one attachment's rules in place, for the tables of one family. `removed` is the same
/// attachment's earlier record, whose rules are there.
#[must_use]
pub fn add(record: &Record, removed: Option<&Record>, family: Family, shared: Shared) -> String {
    let mut raw = Table::default();
    let mut nat = Table::default();
    if let Shared::CheckedInside { uplinks } = shared {
        check_shared(&mut raw, &mut nat, record, family, uplinks);
    }
    if let Some(removed) = removed {
        remove_rules(&mut nat, removed, family);
    }
    nat.chain(&record.chain);
    for rule in chain_rules(record, family) {
        nat.line("-A", &record.chain, &rule);
    }
    for rule in neighbour_rules_of(record, family) {
        nat.line("-A", NEIGHBOURS, &rule);
    }
    // Each goes to the head: the last inserted ends up first.
    for rule in entry_rules(record, family).iter().rev() {
        nat.line("-I", DNAT, rule);
    }
    raw.finish("raw") + &nat.finish("nat")
}

fn check_shared(
    raw: &mut Table,
    nat: &mut Table,
    record: &Record,
    family: Family,
    uplinks: &BTreeSet<String>,
) {
    nat.line("-C", "PREROUTING", DNAT_JUMP);
    nat.line("-C", "OUTPUT", DNAT_JUMP);
    if family == Family::V6 {
        nat.line("-C", "OUTPUT", LOOPBACK_JUMP);
        nat.line("-C", LOOPBACK, LOOPBACK_RULE);
    }
    for part in record.parts() {
        match part {
            Part::Mark(of, bit) if of == family => {
                nat.line("-C", "POSTROUTING", MASQ_JUMP);
                nat.line("-C", MASQ, &masq_rule(bit));
                nat.line("-C", SETMARK, &setmark_rule(bit));
            }
            Part::Neighbours(of) if of == family => {
                nat.line("-C", "PREROUTING", NEIGHBOURS_JUMP);
                for device in uplinks {
                    nat.line("-C", NEIGHBOURS, &uplink_rule(device));
                }
            }
            Part::Guard if family == Family::V4 => {
                raw.line("-C", "PREROUTING", GUARD_JUMP);
                raw.line("-C", GUARD, GUARD_RULE);
            }
            _ => {}
        }
    }
}

/// Takes one attachment's rules away, and the shared parts in `gone`, which nothing needs any more;
/// those in `left` are still needed. `uplinks` are those that the rules spare.
#[must_use]
pub fn remove(
    record: &Record,
    family: Family,
    gone: &BTreeSet<Part>,
    left: &BTreeSet<Part>,
    uplinks: &BTreeSet<String>,
) -> String {
    let mut nat = Table::default();
    remove_rules(&mut nat, record, family);
    nat.line("-F", &record.chain, "");
    nat.line("-X", &record.chain, "");
    for part in gone {
        match *part {
            Part::Neighbours(of) if of == family => {
                nat.line("-D", "PREROUTING", NEIGHBOURS_JUMP);
                for device in uplinks {
                    nat.line("-D", NEIGHBOURS, &uplink_rule(device));
                }
                // Not `-F`: rules of attachments without a record make this fail.
                nat.line("-X", NEIGHBOURS, "");
            }
            Part::Mark(of, bit) if of == family => {
                nat.line("-D", SETMARK, &setmark_rule(bit));
                nat.line("-D", MASQ, &masq_rule(bit));
            }
            Part::Base(of) if of == family => {
                nat.line("-D", "PREROUTING", DNAT_JUMP);
                nat.line("-D", "OUTPUT", DNAT_JUMP);
                nat.line("-X", DNAT, "");
                if family == Family::V6 {
                    nat.line("-D", "OUTPUT", LOOPBACK_JUMP);
                    nat.line("-F", LOOPBACK, "");
                    nat.line("-X", LOOPBACK, "");
                }
            }
            _ => {}
        }
    }
    let marks = |parts: &BTreeSet<Part>| {
        parts.iter().any(|part| matches!(part, Part::Mark(of, _) if *of == family))
    };
    if marks(gone) && !marks(left) {
        nat.line("-D", "POSTROUTING", MASQ_JUMP);
        nat.line("-X", MASQ, "");
        nat.line("-X", SETMARK, "");
    }
    let mut raw = Table::default();
    if family == Family::V4 && gone.contains(&Part::Guard) {
        raw.line("-D", "PREROUTING", GUARD_JUMP);
        raw.line("-F", GUARD, "");
        raw.line("-X", GUARD, "");
    }
    nat.finish("nat") + &raw.finish("raw")
}

fn remove_rules(nat: &mut Table, record: &Record, family: Family) {
    for rule in entry_rules(record, family) {
        nat.line("-D", DNAT, &rule);
    }
    for rule in neighbour_rules_of(record, family) {
        nat.line("-D", NEIGHBOURS, &rule);
    }
}

/// Whether two records have the same port, one for any address and one for a specific one, or both
/// for the same specific one and one of them some port for any: then the order of the entry rules
/// depends on more than age.
#[must_use]
pub fn order_is_contested(record: &Record, others: &[Record], family: Family) -> bool {
    record.forwards(family).iter().any(|own| {
        others.iter().any(|other| {
            let mixed = has_any(record, family) || has_any(other, family);
            other.forwards(family).iter().any(|other| {
                competes(&own.claim, &other.claim)
                    && (own.claim.address != other.claim.address
                        || own.claim.address.is_some() && mixed)
            })
        })
    })
}
