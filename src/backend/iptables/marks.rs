//! The chains that mark packets and masquerade marked ones. They are shared: with upstream's pods,
//! and among attachments that use different bits of the packet mark. Pure.

use std::collections::BTreeSet;

use super::listing::{Listing, canonical};
use super::rules::{DNAT, MASQ, MASQ_JUMP, SETMARK, masq_rule, setmark_rule};
use super::script::Table;
use crate::model::Family;
use crate::record::Part;

/// The bits of one family among parts.
#[must_use]
pub fn bits<'a>(parts: impl IntoIterator<Item = &'a Part>, family: Family) -> BTreeSet<u32> {
    let bit = |part: &Part| match part {
        Part::Mark(of, bit) if *of == family => Some(*bit),
        _ => None,
    };
    parts.into_iter().filter_map(bit).collect()
}

/// Whether a part that upstream's plugin makes too is there.
#[must_use]
pub fn is_there(part: Part, family: Family, listing: &Listing) -> bool {
    match part {
        Part::Base(of) => of == family && listing.has_chain(DNAT),
        Part::Mark(of, bit) => {
            of == family && listing.position(SETMARK, &setmark_rule(bit)).is_some()
        }
        _ => false,
    }
}

/// Puts the rules of `needed` bits in place and takes those of `stale` ones away, unless no other
/// bit would remain for pods without a record: any bit serves all of them, since a packet that is
/// marked is marked with every bit.
pub fn restore(nat: &mut Table, listing: &Listing, needed: &BTreeSet<u32>, stale: &BTreeSet<u32>) {
    for (chain, rule_of) in [(SETMARK, setmark_rule as fn(u32) -> String), (MASQ, masq_rule)] {
        let stale_rules: Vec<Vec<String>> =
            stale.difference(needed).map(|bit| canonical(&rule_of(*bit))).collect();
        let present = listing.rules(chain);
        let mut rules: Vec<String> = present
            .iter()
            .filter(|rule| !stale_rules.contains(&canonical(rule)))
            .cloned()
            .collect();
        if rules.is_empty() && needed.is_empty() {
            continue;
        }
        // Not `-D`: `ip6tables-legacy` of 1.8.9 does not tell one bit from another.
        let rewritten = rules.len() < present.len() || !listing.has_chain(chain);
        if rewritten {
            nat.chain(chain);
        } else {
            rules.clear();
        }
        let missing = needed.iter().map(|bit| rule_of(*bit));
        rules.extend(missing.filter(|rule| listing.position(chain, rule).is_none()));
        for rule in rules {
            nat.line("-A", chain, &rule);
        }
    }
    if !needed.is_empty() && listing.position("POSTROUTING", MASQ_JUMP).is_none() {
        nat.line("-I", "POSTROUTING", MASQ_JUMP);
    }
}
