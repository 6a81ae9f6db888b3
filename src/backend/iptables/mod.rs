//! iptables, both variants: byte-compatible with upstream's portmap in table nat.
//!
//! Writing is one `iptables-restore --noflush` per family, reading goes through the `iptables` crate.

pub mod check;
mod left_out;
pub mod listing;
mod marks;
pub mod path;
pub mod rules;
pub mod script;
mod trial;
mod variants;

use std::collections::BTreeSet;

use listing::Listing;
use script::Shared;

use super::{
    Apply, Change, Desired, Leftover, Observe, Outcome, Recorded, Step, Unrecorded, Unusable,
};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::model::{Claim, Family, Forward};
use crate::record::{Part, Record};
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::iptables::{Variant, lacks_chain, list, list_chains, nat_tables, restore, used};
use crate::sys::netlink::nftables::NftReader;

/// The backend.
pub struct Iptables;

impl Observe for Iptables {
    fn probe(&self, host: &Host) -> Result<(), Unusable> {
        trial::probe(host, Family::V4)
    }

    fn probe_ipv6(&self, host: &Host) -> Result<(), Unusable> {
        trial::probe(host, Family::V6)
    }

    fn probe_node(&self, host: &Host, ipv6: bool) -> Result<(), Unusable> {
        trial::probe_node(host, ipv6)
    }

    fn problems(
        &self,
        host: &Host,
        record: &Record,
        _related: &[Record],
        _parts: &BTreeSet<Part>,
        facts: &NodeFacts,
        recorded: bool,
    ) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        for family in record.families() {
            let chains = [
                "PREROUTING",
                "OUTPUT",
                "POSTROUTING",
                rules::DNAT,
                rules::SETMARK,
                rules::MASQ,
                rules::NEIGHBOURS,
                rules::LOOPBACK,
                &record.chain,
            ];
            let listing = list_chains(host, family, "nat", &chains)
                .map_err(|error| failed("read the rules", family, error))?;
            let uplinks = recorded.then_some(&facts.uplinks);
            problems.extend(check::nat_problems(record, family, &listing, uplinks));
        }
        if recorded && record.parts().contains(&Part::Guard) {
            let listing = list(host, Family::V4, "raw")
                .map_err(|error| failed("read the rules", Family::V4, error))?;
            problems.extend(check::raw_problems(&listing));
        }
        Ok(problems)
    }

    /// Each table is listed once.
    fn survey(
        &self,
        host: &Host,
        records: &[Record],
        parts: &BTreeSet<Part>,
        facts: &NodeFacts,
    ) -> Result<Vec<Vec<String>>> {
        let mut problems = vec![Vec::new(); records.len()];
        for family in Family::ALL {
            if !parts.contains(&Part::Base(family)) {
                continue;
            }
            let listing = list(host, family, "nat")
                .map_err(|error| failed("read the rules", family, error))?;
            for (record, problems) in records.iter().zip(&mut problems) {
                if record.network(family).is_some() {
                    let uplinks = Some(&facts.uplinks);
                    problems.extend(check::nat_problems(record, family, &listing, uplinks));
                }
            }
        }
        if parts.contains(&Part::Guard) {
            let listing = list(host, Family::V4, "raw")
                .map_err(|error| failed("read the rules", Family::V4, error))?;
            let found = check::raw_problems(&listing);
            for (record, problems) in records.iter().zip(&mut problems) {
                if record.parts().contains(&Part::Guard) {
                    problems.extend(found.iter().cloned());
                }
            }
        }
        Ok(problems)
    }

    fn leftovers(&self, host: &Host, records: &[Record]) -> Result<Vec<Leftover>> {
        let recorded = records.iter().map(|record| record.chain.as_str()).collect();
        let mut leftovers = Vec::new();
        for family in Family::ALL {
            for (variant, listing) in nat_tables(host, family) {
                match listing {
                    Ok(listing) => leftovers.extend(path::leftovers(
                        variant.name(),
                        family,
                        &listing,
                        &recorded,
                    )),
                    Err(error) => host.warn(format!(
                        "table nat of {} ({family}) cannot be read: {error}",
                        variant.name()
                    )),
                }
            }
        }
        Ok(leftovers)
    }

    fn path(
        &self,
        host: &Host,
        record: &Record,
        claim: &Claim,
        _related: &[Record],
        _parts: &BTreeSet<Part>,
    ) -> Result<Vec<Step>> {
        let chains =
            ["PREROUTING", "OUTPUT", "POSTROUTING", rules::DNAT, rules::MASQ, &record.chain];
        let listing = list_chains(host, claim.family, "nat", &chains)
            .map_err(|error| failed("read the rules", claim.family, error))?;
        Ok(path::steps(record, claim, &listing))
    }
}

impl Apply for Iptables {
    fn prepare(&self, host: &Host) -> Result<()> {
        let missing = |tool: &&str| host.tools.find(tool).is_none();
        match ["iptables", "iptables-restore"].into_iter().find(missing) {
            Some(tool) => Err(ToolError::Missing { tool: tool.to_owned() }
                .into_error("cannot use iptables".to_owned())),
            None => Ok(()),
        }
    }

    fn change(&self, host: &Host, change: &Change) -> Result<Outcome> {
        if let Some(reason) = needs_listing(change) {
            return Ok(Outcome::NeedsRestore(reason));
        }
        let gone = change.gone();
        for family in change.families() {
            let text = match (change.added, change.removed) {
                (Some(added), removed) => {
                    match shared_chains(host, added, family, &change.facts.uplinks) {
                        Some(Ok(())) => script::add(added, removed, family, Shared::CheckedBefore),
                        Some(Err(missing)) => return Ok(Outcome::NeedsRestore(missing)),
                        None => {
                            let shared = Shared::CheckedInside { uplinks: &change.facts.uplinks };
                            script::add(added, removed, family, shared)
                        }
                    }
                }
                (None, Some(removed)) => {
                    let uplinks = &change.facts_before.uplinks;
                    script::remove(removed, family, &gone, change.parts_after, uplinks)
                }
                (None, None) => continue,
            };
            match restore(host, family, &text) {
                Ok(()) => {}
                Err(ToolError::Failed { stderr, .. }) => return Ok(Outcome::NeedsRestore(stderr)),
                Err(error) => return Err(failed("change the rules", family, error)),
            }
        }
        Ok(Outcome::Done)
    }

    fn restore(&self, host: &Host, desired: &Desired, kept: &mut BTreeSet<Part>) -> Result<()> {
        let uplinks: Vec<String> = desired.facts.uplinks.iter().cloned().collect();
        // Everything is read before anything is changed: what an ADD that fails has not looked at
        // would be taken for its own when it is undone.
        let mut listings = Vec::new();
        for family in Family::ALL {
            let records: Vec<&Record> =
                desired.records.iter().filter(|record| record.network(family).is_some()).collect();
            // Reading would make the kernel load the family's table, which others take notice of.
            if records.is_empty() && !desired.families.contains(&family) {
                continue;
            }
            let listing = list(host, family, "nat")
                .map_err(|error| failed("read the rules", family, error))?;
            let found =
                desired.first.iter().filter(|part| marks::is_there(**part, family, &listing));
            kept.extend(found);
            listings.push((family, records, listing));
        }
        for (family, records, listing) in &mut listings {
            left_out::unmarkable(host, records, desired.added, *family, listing)?;
        }
        let mut cleared = Ok(());
        for (family, records, listing) in listings {
            let is_kept = |part: &Part| desired.kept.contains(part) || kept.contains(part);
            let stale = desired.gone.iter().filter(|part| !is_kept(part));
            let mut state = script::Desired {
                family,
                records,
                parts: desired.parts,
                purge: desired.purge,
                uplinks: &uplinks,
                keep_base: is_kept(&Part::Base(family)),
                stale_bits: marks::bits(stale, family),
            };
            let raw =
                if family == Family::V4 { restore_guard(host, desired)? } else { String::new() };
            // The guard comes before and goes after what needs it: the sysctl follows the rules on
            // ADD and precedes them on DEL, so the order of the tables does not matter.
            let send = |state: &script::Desired| {
                restore(host, family, &(raw.clone() + &script::restore_nat(state, &listing)))
            };
            let mut sent = send(&state);
            if matches!(sent, Err(ToolError::Failed { .. }))
                && left_out::unloadable(host, &mut state.records, desired.added, family)
            {
                sent = send(&state);
            }
            sent.map_err(|error| failed("change the rules", family, error))?;
            match variants::clear_other(host, desired, &state) {
                Ok(()) => {}
                // A repeated DEL comes upon it again; nobody else is the worse for it. One error is
                // enough for that, and keeps no other family from being cleared.
                Err(error)
                    if desired.added.is_some() || desired.purge.is_empty() || cleared.is_err() =>
                {
                    host.warn(format!("{error}: {}", error.details()));
                }
                Err(error) => cleared = Err(error),
            }
        }
        cleared
    }

    fn remove_unrecorded(
        &self,
        host: &Host,
        unrecorded: &Unrecorded,
        _records: Recorded,
        removed: &mut BTreeSet<Forward>,
    ) -> Result<()> {
        variants::remove_unrecorded(host, unrecorded, removed)
    }
}

/// With iptables-nft, looks over netlink whether the shared chains lead where they should; `None` with
/// other tools, and where netlink does not tell.
fn shared_chains(
    host: &Host,
    record: &Record,
    family: Family,
    uplinks: &BTreeSet<String>,
) -> Option<std::result::Result<(), String>> {
    if used(host, family) != Some(Variant::Nft) {
        return None;
    }
    let mut reader = NftReader::open().ok()?;
    for (table, chain, target) in script::shared_chains(record, family) {
        let jumps = reader.rule_jumps(family.into(), table, chain).ok()?;
        let found = match target {
            Some(target) => jumps.iter().flatten().any(|jump| jump == target),
            None => !jumps.is_empty(),
        };
        if !found {
            let what = target
                .map_or("any rule".to_owned(), |target| format!("a rule that leads to {target}"));
            return Some(Err(format!("chain {chain} of table {table} does not have {what}")));
        }
    }
    if record.masquerades_neighbours(family) {
        // A rule that returns leads to no chain; those that mark lead to one.
        let jumps = reader.rule_jumps(family.into(), "nat", rules::NEIGHBOURS).ok()?;
        if jumps.iter().take_while(|jump| jump.is_none()).count() != uplinks.len() {
            return Some(Err(format!(
                "chain {} of table nat does not spare the uplinks",
                rules::NEIGHBOURS
            )));
        }
    }
    Some(Ok(()))
}

/// Steps that the fast path cannot express.
fn needs_listing(change: &Change) -> Option<String> {
    if change.begins_a_part() {
        return Some("the shared chains are not there yet".into());
    }
    let neighbours = change.parts_after.iter().any(|part| matches!(part, Part::Neighbours(_)));
    if neighbours && change.facts_before.uplinks != change.facts.uplinks {
        return Some("the node's uplinks have changed".into());
    }
    let gone = change.gone();
    if !gone.is_disjoint(change.kept) {
        return Some("shared chains were there before".into());
    }
    let bits_change = |family| {
        !marks::bits(&gone, family).is_empty()
            && !marks::bits(change.parts_after, family).is_empty()
    };
    // `ip6tables-legacy -D` of 1.8.9 does not tell one bit from another.
    if Family::ALL.into_iter().any(bits_change) {
        return Some("one of several bits of the packet mark is not needed any more".into());
    }
    let newer = |added: &Record| change.related.iter().any(|other| other.order > added.order);
    if change.added.is_some_and(newer) {
        return Some("a newer attachment has the same port".into());
    }
    for record in change.added.iter().chain(&change.removed) {
        if Family::ALL
            .into_iter()
            .any(|family| script::order_is_contested(record, change.related, family))
        {
            return Some("a port is mapped for a specific and for any address".into());
        }
    }
    match (change.added, change.removed) {
        (Some(added), Some(removed))
            if added.parts() != removed.parts() || added.chain != removed.chain =>
        {
            Some("the attachment needs other shared chains than before".into())
        }
        _ => None,
    }
}

fn restore_guard(host: &Host, desired: &Desired) -> Result<String> {
    let wanted = desired.parts.contains(&Part::Guard);
    // Without the chain there is nothing of ours, and nothing that it would have to replace.
    let listing = match lacks_chain(host, Family::V4, "raw", rules::GUARD) {
        true => Ok(Listing::default()),
        false => list(host, Family::V4, "raw"),
    };
    match listing {
        Ok(listing) => Ok(script::restore_raw(wanted, &listing)),
        // A kernel without table raw has no guard.
        Err(ToolError::Missing { .. } | ToolError::Failed { .. }) if !wanted => Ok(String::new()),
        Err(error) => Err(failed("read the rules of table raw", Family::V4, error)),
    }
}

fn failed(action: &str, family: Family, error: ToolError) -> Error {
    error.into_error(format!("cannot {action} ({family})"))
}
