//! The slow path brings the tables from whatever a listing shows to the state that all records ask
//! for.

use std::collections::BTreeSet;

use super::super::listing::{Listing, option, target_of};
use super::super::marks;
use super::super::rules::{
    DNAT, DNAT_JUMP, GUARD, GUARD_JUMP, GUARD_RULE, LOOPBACK, LOOPBACK_JUMP, LOOPBACK_RULE, MASQ,
    NEIGHBOURS, NEIGHBOURS_JUMP, SETMARK, chain_rules, entry_rules, neighbour_rules,
    promoted_rules,
};
use super::{Table, competes, has_any};
use crate::model::{Claim, Family};
use crate::record::{Part, Record, old_snat_chain};

/// Everything the slow path needs to know.
#[derive(Debug)]
pub struct Desired<'a> {
    pub family: Family,
    /// All records of this backend with an address of the family, oldest first.
    pub records: Vec<&'a Record>,
    /// As in `backend::Desired`.
    pub parts: &'a BTreeSet<Part>,
    /// Chains of attachments that must be gone.
    pub purge: &'a BTreeSet<String>,
    /// Devices that lead out of the node.
    pub uplinks: &'a [String],
    /// The base chains were there before this plugin came: they stay.
    pub keep_base: bool,
    /// Bits of the packet mark whose rules this plugin made, and that may not be needed any more.
    pub stale_bits: BTreeSet<u32>,
}

impl Desired<'_> {
    /// Entry rules in the order in which packets must meet them.
    #[must_use]
    pub fn entries(&self) -> Vec<String> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for record in self.records.iter().rev() {
            let contested = |claim: &Claim| {
                self.records.iter().any(|other| {
                    other.id() != record.id()
                        && other.forwards(self.family).iter().any(|f| competes(claim, &f.claim))
                })
            };
            if has_any(record, self.family) {
                first.extend(promoted_rules(record, self.family, &contested));
                second.extend(entry_rules(record, self.family));
            } else {
                first.extend(entry_rules(record, self.family));
            }
        }
        first.extend(second);
        first
    }
}

/// Brings table nat from `listing` to the desired state. What others made stays as it is: entries
/// of attachments without a record (upstream's) follow ours in their order.
#[must_use]
pub fn restore_nat(desired: &Desired, listing: &Listing) -> String {
    let (family, parts) = (desired.family, desired.parts);
    let base = parts.contains(&Part::Base(family));
    let ours: BTreeSet<&str> = desired.records.iter().map(|record| record.chain.as_str()).collect();
    let owns = |chain: &String| ours.contains(chain.as_str()) || desired.purge.contains(chain);
    let is_foreign = |rule: &&String| target_of(rule).is_none_or(|target| !owns(&target));
    let foreign: Vec<&String> = listing.rules(DNAT).iter().filter(is_foreign).collect();
    let neighbours = foreign_neighbours(listing, &owns);
    let keep_base = base || desired.keep_base || !foreign.is_empty();
    let mut nat = Table::default();

    if keep_base && (base || listing.has_chain(DNAT)) {
        nat.chain(DNAT);
    } else if !keep_base {
        drop_chain(&mut nat, listing, DNAT);
    }
    if parts.contains(&Part::Neighbours(family)) {
        nat.chain(NEIGHBOURS);
    } else if neighbours.is_empty() {
        drop_chain(&mut nat, listing, NEIGHBOURS);
    } else {
        forget_neighbours(&mut nat, listing, owns);
    }
    for chain in desired.purge.iter().filter(|chain| !ours.contains(chain.as_str())) {
        drop_chain(&mut nat, listing, chain);
        drop_chain(&mut nat, listing, &old_snat_chain(chain));
    }
    // After everything that leads to SETMARK.
    let others = desired.keep_base || !foreign.is_empty() || !neighbours.is_empty();
    let bits = marks::bits(parts, family);
    if bits.is_empty() && !others {
        drop_chain(&mut nat, listing, MASQ);
        drop_chain(&mut nat, listing, SETMARK);
    } else {
        marks::restore(&mut nat, listing, &bits, &desired.stale_bits);
    }
    if family == Family::V6 {
        if base {
            nat.chain(LOOPBACK);
            nat.line("-A", LOOPBACK, LOOPBACK_RULE);
        } else {
            drop_chain(&mut nat, listing, LOOPBACK);
        }
    }
    if base {
        restore_jumps(&mut nat, listing, family, parts);
    }

    for record in &desired.records {
        nat.chain(&record.chain);
        for rule in chain_rules(record, family) {
            nat.line("-A", &record.chain, &rule);
        }
    }
    if parts.contains(&Part::Neighbours(family)) {
        for rule in neighbour_rules(&desired.records, family, desired.uplinks) {
            nat.line("-A", NEIGHBOURS, &rule);
        }
        for rule in neighbours {
            nat.line("-A", NEIGHBOURS, rule);
        }
    }
    for rule in desired.entries().iter().chain(foreign) {
        nat.line("-A", DNAT, rule);
    }
    nat.finish("nat")
}

/// The rules of `PORTMAP-NEIGHBOURS` for attachments that are there without a record that can be read: a
/// newer portmap's, or those of a state directory that was lost.
fn foreign_neighbours<'a>(
    listing: &'a Listing,
    owns: &impl Fn(&String) -> bool,
) -> Vec<&'a String> {
    let is_foreign = |chain: &String| listing.has_chain(chain) && !owns(chain);
    let rules = listing.rules(NEIGHBOURS).iter();
    rules.filter(|rule| neighbour_of(rule).as_ref().is_some_and(is_foreign)).collect()
}

/// Takes rules out of `PORTMAP-NEIGHBOURS` by the chains of their attachments.
fn forget_neighbours(nat: &mut Table, listing: &Listing, is_gone: impl Fn(&String) -> bool) {
    for rule in listing.rules(NEIGHBOURS) {
        if neighbour_of(rule).is_some_and(|chain| is_gone(&chain)) {
            nat.line("-D", NEIGHBOURS, rule);
        }
    }
}

/// The chain of the attachment that a rule of `PORTMAP-NEIGHBOURS` is for.
fn neighbour_of(rule: &str) -> Option<String> {
    option(rule, "--comment").filter(|comment| comment.starts_with("CNI-DN-"))
}

/// The jumps of the builtin chains. Ours that come before upstream's keep that order.
fn restore_jumps(nat: &mut Table, listing: &Listing, family: Family, parts: &BTreeSet<Part>) {
    let early_jump = |chain: &str| match chain {
        "PREROUTING" => parts.contains(&Part::Neighbours(family)).then_some(NEIGHBOURS_JUMP),
        _ => (family == Family::V6).then_some(LOOPBACK_JUMP),
    };
    for chain in ["PREROUTING", "OUTPUT"] {
        let base = listing.position(chain, DNAT_JUMP);
        if let Some(jump) = early_jump(chain) {
            let present = listing.position(chain, jump);
            match (present, base) {
                (Some(early), Some(late)) if early < late => {}
                (None, None) => nat.line("-A", chain, jump),
                (Some(_), None) => {}
                (present, Some(late)) => {
                    if present.is_some() {
                        nat.line("-D", chain, jump);
                    }
                    nat.line("-I", chain, &format!("{} {jump}", late + 1));
                }
            }
        }
        if base.is_none() {
            nat.line("-A", chain, DNAT_JUMP);
        }
    }
}

/// Removes a chain with everything that leads to it.
fn drop_chain(nat: &mut Table, listing: &Listing, chain: &str) {
    if !listing.has_chain(chain) {
        return;
    }
    for (from, rules) in &listing.chains {
        // `CNI-HOSTPORT-DNAT` is written anew as a whole.
        if from != DNAT && !nat.emptied.contains(from) {
            for rule in rules.iter().filter(|rule| target_of(rule).as_deref() == Some(chain)) {
                nat.line("-D", from, rule);
            }
        }
    }
    nat.line("-F", chain, "");
    nat.line("-X", chain, "");
    nat.emptied.insert(chain.to_owned());
}

/// Brings table raw from `listing` to the state with or without the guard.
#[must_use]
pub fn restore_raw(guard: bool, listing: &Listing) -> String {
    let mut raw = Table::default();
    if !guard {
        drop_chain(&mut raw, listing, GUARD);
    } else if listing.position("PREROUTING", GUARD_JUMP).is_none()
        || listing.rules(GUARD) != [GUARD_RULE]
    {
        raw.chain(GUARD);
        raw.line("-A", GUARD, GUARD_RULE);
        if listing.position("PREROUTING", GUARD_JUMP).is_none() {
            raw.line("-A", "PREROUTING", GUARD_JUMP);
        }
    }
    raw.finish("raw")
}

/// Removes chains of attachments that have no record, and what leads to them. Shared chains stay, as
/// they do when upstream removes an attachment.
#[must_use]
pub fn purge(chains: &BTreeSet<String>, listing: &Listing) -> String {
    let mut nat = Table::default();
    for chain in chains.iter().flat_map(|chain| [chain.clone(), old_snat_chain(chain)]) {
        for rule in listing.jumps(DNAT, &chain) {
            nat.line("-D", DNAT, rule);
        }
        drop_chain(&mut nat, listing, &chain);
    }
    forget_neighbours(&mut nat, listing, |chain| chains.contains(chain));
    nat.finish("nat")
}
