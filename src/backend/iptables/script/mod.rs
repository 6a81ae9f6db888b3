//! What is sent to `iptables-restore --noflush`. Pure, golden-tested. One input is one transaction per
//! table.

mod change;
mod restore;

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::rules::{DNAT, entry_rules};
use crate::model::{Claim, Family};
use crate::record::Record;

pub use change::{Shared, add, order_is_contested, remove, shared_chains};
pub use restore::{Desired, purge, restore_nat, restore_raw};

/// Lines of one table.
#[derive(Debug, Default)]
pub(super) struct Table {
    lines: String,
    /// Chains that have lost their rules by now: none of them can be deleted again.
    emptied: BTreeSet<String>,
}

impl Table {
    pub(super) fn line(&mut self, command: &str, chain: &str, rest: &str) {
        let space = if rest.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = writeln!(self.lines, "{command} {chain}{space}{rest}");
    }

    /// Makes the chain, or empties it.
    pub(super) fn chain(&mut self, chain: &str) {
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

/// An attachment's entry rules in chains that lead nowhere, to have their text tried.
#[must_use]
pub fn entries_alone(record: &Record, family: Family) -> String {
    let mut nat = Table::default();
    nat.chain(DNAT);
    nat.chain(&record.chain);
    for rule in entry_rules(record, family) {
        nat.line("-A", DNAT, &rule);
    }
    nat.finish("nat")
}

/// Whether there is a packet for which both claims could be meant.
fn competes(one: &Claim, other: &Claim) -> bool {
    (one.protocol, one.port) == (other.protocol, other.port)
        && (one.address.is_none() || other.address.is_none() || one.address == other.address)
}

fn has_any(record: &Record, family: Family) -> bool {
    record.forwards(family).iter().any(|forward| forward.claim.address.is_none())
}
