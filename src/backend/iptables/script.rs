//! What is sent to `iptables-restore --noflush`. Pure, golden-tested.
//!
//! One input is one transaction per table. The fast path changes one attachment and lets the kernel
//! itself refuse if anything it builds on is missing: `-C` lines, which both variants of
//! iptables-restore understand, check the shared chains inside the transaction. The slow path
//! brings the tables from whatever a listing shows to the state that all records ask for.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::listing::{Listing, target_of};
use super::rules::{
    DNAT, DNAT_JUMP, GUARD, GUARD_JUMP, GUARD_RULE, LOOPBACK, LOOPBACK_JUMP, LOOPBACK_RULE, MASQ,
    MASQ_JUMP, NEIGHBOURS, NEIGHBOURS_JUMP, SETMARK, chain_rules, entry_rules, masq_rule,
    neighbour_rules, neighbour_rules_of, promoted_rules, setmark_rule,
};
use crate::model::{Family, Protocol};
use crate::record::{Part, Record, old_snat_chain};

/// Lines of one table.
#[derive(Debug, Default)]
struct Table {
    lines: String,
    /// Chains whose listed rules are gone by the last line, and cannot be deleted once more.
    emptied: BTreeSet<String>,
}

impl Table {
    fn line(&mut self, command: &str, chain: &str, rest: &str) {
        let space = if rest.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = writeln!(self.lines, "{command} {chain}{space}{rest}");
    }

    /// Makes the chain, or empties it.
    fn chain(&mut self, chain: &str) {
        let _ = writeln!(self.lines, ":{chain} - [0:0]");
        self.emptied.insert(chain.to_owned());
    }

    fn finish(self, table: &str) -> String {
        if self.lines.is_empty() {
            String::new()
        } else {
            format!("*{table}\n{}COMMIT\n", self.lines)
        }
    }
}

/// Puts one attachment's rules in place, for the tables of one family. `removed` is the same
/// attachment's earlier record, whose rules are there.
#[must_use]
pub fn add(record: &Record, removed: Option<&Record>, family: Family) -> String {
    let parts = record.parts();
    let mut raw = Table::default();
    if family == Family::V4 && parts.contains(&Part::Guard) {
        raw.line("-C", "PREROUTING", GUARD_JUMP);
        raw.line("-C", GUARD, GUARD_RULE);
    }
    let mut nat = Table::default();
    nat.line("-C", "PREROUTING", DNAT_JUMP);
    nat.line("-C", "OUTPUT", DNAT_JUMP);
    if family == Family::V6 {
        nat.line("-C", "OUTPUT", LOOPBACK_JUMP);
        nat.line("-C", LOOPBACK, LOOPBACK_RULE);
    }
    for part in parts {
        match part {
            Part::Mark(of, bit) if of == family => {
                nat.line("-C", "POSTROUTING", MASQ_JUMP);
                nat.line("-C", MASQ, &masq_rule(bit));
                nat.line("-C", SETMARK, &setmark_rule(bit));
            }
            Part::Neighbours(of) if of == family => nat.line("-C", "PREROUTING", NEIGHBOURS_JUMP),
            _ => {}
        }
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

/// Takes one attachment's rules away, and the shared parts in `gone`, which nothing needs any more;
/// those in `left` are still needed.
#[must_use]
pub fn remove(
    record: &Record,
    family: Family,
    gone: &BTreeSet<Part>,
    left: &BTreeSet<Part>,
) -> String {
    let mut nat = Table::default();
    remove_rules(&mut nat, record, family);
    nat.line("-F", &record.chain, "");
    nat.line("-X", &record.chain, "");
    for part in gone {
        match *part {
            Part::Neighbours(of) if of == family => {
                nat.line("-D", "PREROUTING", NEIGHBOURS_JUMP);
                nat.line("-F", NEIGHBOURS, "");
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

/// Whether two records have the same port, one for any address and one for a specific one: then
/// the order of the entry rules depends on more than age.
#[must_use]
pub fn order_is_contested(record: &Record, others: &[Record], family: Family) -> bool {
    record.forwards(family).iter().any(|own| {
        others.iter().flat_map(|other| other.forwards(family)).any(|other| {
            (own.claim.protocol, own.claim.port) == (other.claim.protocol, other.claim.port)
                && own.claim.address.is_some() != other.claim.address.is_some()
        })
    })
}

/// Everything the slow path needs to know.
#[derive(Debug)]
pub struct Desired<'a> {
    pub family: Family,
    /// All records of this backend with an address of the family, oldest first.
    pub records: Vec<&'a Record>,
    /// Chains of attachments that must be gone.
    pub purge: &'a BTreeSet<String>,
    /// Devices that lead out of the node.
    pub uplinks: &'a [String],
    /// The base chains were there before this plugin came: they stay.
    pub keep_base: bool,
}

impl Desired<'_> {
    fn parts(&self) -> BTreeSet<Part> {
        self.records.iter().flat_map(|record| record.parts()).collect()
    }

    /// Entry rules in the order in which packets must meet them.
    #[must_use]
    pub fn entries(&self) -> Vec<String> {
        let any_address = |record: &Record| {
            record.forwards(self.family).iter().any(|f| f.claim.address.is_none())
        };
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for record in self.records.iter().rev() {
            let contested = |protocol: Protocol, port: u16| {
                self.records.iter().any(|other| {
                    other.id() != record.id()
                        && other.forwards(self.family).iter().any(|f| {
                            f.claim.address.is_none()
                                && (f.claim.protocol, f.claim.port) == (protocol, port)
                        })
                })
            };
            if any_address(record) {
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
    let family = desired.family;
    let parts = desired.parts();
    let ours: BTreeSet<&str> = desired.records.iter().map(|record| record.chain.as_str()).collect();
    let foreign: Vec<&String> = listing
        .rules(DNAT)
        .iter()
        .filter(|rule| {
            target_of(rule).is_none_or(|target| {
                !ours.contains(target.as_str()) && !desired.purge.contains(&target)
            })
        })
        .collect();
    let keep_base = !desired.records.is_empty() || desired.keep_base || !foreign.is_empty();
    let mut nat = Table::default();

    if keep_base && (!desired.records.is_empty() || listing.has_chain(DNAT)) {
        nat.chain(DNAT);
    } else if !keep_base {
        drop_chain(&mut nat, listing, DNAT);
    }
    if parts.contains(&Part::Neighbours(family)) {
        nat.chain(NEIGHBOURS);
    } else {
        drop_chain(&mut nat, listing, NEIGHBOURS);
    }
    for chain in desired.purge.iter().filter(|chain| !ours.contains(chain.as_str())) {
        drop_chain(&mut nat, listing, chain);
        drop_chain(&mut nat, listing, &old_snat_chain(chain));
    }
    // After everything that leads to SETMARK.
    let others = desired.keep_base || !foreign.is_empty();
    restore_marks(&mut nat, listing, family, &parts, others);
    if family == Family::V6 {
        if desired.records.is_empty() {
            drop_chain(&mut nat, listing, LOOPBACK);
        } else {
            nat.chain(LOOPBACK);
            nat.line("-A", LOOPBACK, LOOPBACK_RULE);
        }
    }
    if !desired.records.is_empty() {
        restore_jumps(&mut nat, listing, family, &parts);
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
    }
    for rule in desired.entries().iter().chain(foreign) {
        nat.line("-A", DNAT, rule);
    }
    nat.finish("nat")
}

/// Marking and masquerading. Bits that no record needs go, unless others may rely on them.
fn restore_marks(
    nat: &mut Table,
    listing: &Listing,
    family: Family,
    parts: &BTreeSet<Part>,
    others: bool,
) {
    let bits: BTreeSet<u32> = parts
        .iter()
        .filter_map(|part| match part {
            Part::Mark(of, bit) if *of == family => Some(*bit),
            _ => None,
        })
        .collect();
    if bits.is_empty() && !others {
        drop_chain(nat, listing, MASQ);
        drop_chain(nat, listing, SETMARK);
        return;
    }
    if bits.is_empty() {
        return;
    }
    for chain in [SETMARK, MASQ] {
        if !listing.has_chain(chain) {
            nat.chain(chain);
        }
    }
    for bit in bits {
        for (chain, rule) in [(SETMARK, setmark_rule(bit)), (MASQ, masq_rule(bit))] {
            if listing.position(chain, &rule).is_none() {
                nat.line("-A", chain, &rule);
            }
        }
    }
    if listing.position("POSTROUTING", MASQ_JUMP).is_none() {
        nat.line("-I", "POSTROUTING", MASQ_JUMP);
    }
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
    nat.finish("nat")
}
