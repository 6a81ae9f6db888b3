//! Compares what should be with what a listing shows. Pure.

use std::collections::BTreeSet;

use super::listing::{Listing, canonical, option, target_of};
use super::rules::{
    DNAT, DNAT_JUMP, GUARD, GUARD_JUMP, GUARD_RULE, LOOPBACK, LOOPBACK_JUMP, LOOPBACK_RULE, MASQ,
    MASQ_JUMP, NEIGHBOURS, NEIGHBOURS_JUMP, SETMARK, chain_rules, entry_rules, masq_rule,
    neighbour_rules_of, setmark_rule, uplink_rule,
};
use crate::model::Family;
use crate::record::{Part, Record};

/// What is wrong in table nat for an attachment; empty if packets find their way. `uplinks` are
/// the devices that the rules know as such; none for attachments that upstream made, which have none
/// of our additions.
#[must_use]
pub fn nat_problems(
    record: &Record,
    family: Family,
    listing: &Listing,
    uplinks: Option<&BTreeSet<String>>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let mut need = |chain: &str, rule: &str, why: &str| {
        if listing.position(chain, rule).is_none() {
            problems
                .push(format!("{family}: {why}: chain {chain} of table nat has no rule `{rule}`"));
        }
    };
    need("PREROUTING", DNAT_JUMP, "traffic from outside is not forwarded");
    need("OUTPUT", DNAT_JUMP, "traffic from the node is not forwarded");
    for part in record.parts() {
        match part {
            Part::Mark(of, bit) if of == family => {
                need("POSTROUTING", MASQ_JUMP, "nothing is masqueraded");
                need(MASQ, &masq_rule(bit), "nothing is masqueraded");
                need(SETMARK, &setmark_rule(bit), "nothing is marked for masquerading");
            }
            Part::Neighbours(of) if of == family && uplinks.is_some() => {
                need("PREROUTING", NEIGHBOURS_JUMP, "pods of this node get no answer");
                for device in uplinks.into_iter().flatten() {
                    need(NEIGHBOURS, &uplink_rule(device), "outside clients lose their address");
                }
                for rule in neighbour_rules_of(record, family) {
                    need(NEIGHBOURS, &rule, "pods of this node get no answer");
                }
            }
            Part::Base(Family::V6) if family == Family::V6 && uplinks.is_some() => {
                need("OUTPUT", LOOPBACK_JUMP, "connections to ::1 are lost");
                need(LOOPBACK, LOOPBACK_RULE, "connections to ::1 are lost");
            }
            _ => {}
        }
    }
    problems.extend(entry_problems(record, family, listing));
    problems.extend(chain_problems(record, family, listing));
    problems
}

/// The guard of 127.0.0.0/8 in table raw.
#[must_use]
pub fn raw_problems(listing: &Listing) -> Vec<String> {
    [("PREROUTING", GUARD_JUMP), (GUARD, GUARD_RULE)]
        .into_iter()
        .filter(|(chain, rule)| listing.position(chain, rule).is_none())
        .map(|(chain, rule)| {
            format!("route_localnet is on without its guard: chain {chain} of table raw has no rule `{rule}`")
        })
        .collect()
}

/// The way from `CNI-HOSTPORT-DNAT` to the attachment's chain: there, and met first.
fn entry_problems(record: &Record, family: Family, listing: &Listing) -> Vec<String> {
    let mut problems = Vec::new();
    for rule in entry_rules(record, family) {
        let Some(found) = entry_position(record, family, &rule, listing) else {
            problems.push(format!(
                "{family}: {} is not reached: chain {DNAT} of table nat has no rule `{rule}`",
                described(record, family)
            ));
            continue;
        };
        let thief = listing.rules(DNAT).iter().take(found).find(|earlier| takes(earlier, &rule));
        if let Some(thief) = thief {
            problems.push(format!(
                "{family}: {} is not reached: the rule `{thief}` in chain {DNAT} comes first",
                described(record, family)
            ));
        }
    }
    problems
}

/// Where in `CNI-HOSTPORT-DNAT` one of the record's entry rules is. Conditions are printed by the
/// kernel in a form of their own: only what this plugin adds to them is compared.
pub(super) fn entry_position(
    record: &Record,
    family: Family,
    rule: &str,
    listing: &Listing,
) -> Option<usize> {
    if record.options.conditions(family).is_empty() {
        return listing.position(DNAT, rule);
    }
    listing.rules(DNAT).iter().position(|present| {
        target_of(present) == target_of(rule)
            && ["-p", "--dports", "--comment"]
                .iter()
                .all(|name| option(present, name) == option(rule, name))
    })
}

/// Whether a rule of others could take a packet that is meant for `entry`. Other attachments' chains
/// are a matter of precedence, not of damage.
fn takes(rule: &str, entry: &str) -> bool {
    // Compared as text: a busy node has hundreds of such rules, each of which is asked about for each.
    let mut last = rule.rsplit(' ');
    if last.next().is_some_and(|target| target.starts_with("CNI-DN-")) && last.next() == Some("-j")
    {
        return false;
    }
    let differs = |name: &str| matches!((option(rule, name), option(entry, name)), (Some(a), Some(b)) if a != b);
    let ports = option(entry, "--dports").unwrap_or_default();
    let other_port =
        option(rule, "--dport").is_some_and(|port| !ports.split(',').any(|own| own == port));
    target_of(rule).is_some() && !differs("-p") && !other_port
}

/// The attachment's own chain, rule by rule.
fn chain_problems(record: &Record, family: Family, listing: &Listing) -> Vec<String> {
    let chain = &record.chain;
    if !listing.has_chain(chain) {
        return vec![format!(
            "{family}: {} is not forwarded: table nat has no chain {chain}",
            described(record, family)
        )];
    }
    let expected = chain_rules(record, family);
    let found = listing.rules(chain);
    if expected.iter().map(|rule| canonical(rule)).eq(found.iter().map(|rule| canonical(rule))) {
        return Vec::new();
    }
    let wanted = record.forwards(family);
    let present = listing.forwards(chain, family);
    let mut problems: Vec<String> = wanted
        .iter()
        .filter(|forward| !present.contains(forward))
        .map(|forward| {
            let instead: Vec<String> = present
                .iter()
                .filter(|other| other.claim == forward.claim)
                .map(|other| other.target.to_string())
                .collect();
            let instead =
                if instead.is_empty() { "nothing".to_owned() } else { instead.join(", ") };
            format!("{family}: {forward} expected, found {instead} in chain {chain} of table nat")
        })
        .collect();
    if problems.is_empty() {
        problems.push(format!(
            "{family}: chain {chain} of table nat differs: expected `{}`, found `{}`",
            expected.join("`, `"),
            found.join("`, `")
        ));
    }
    problems
}

fn described(record: &Record, family: Family) -> String {
    record.forwards(family).iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
