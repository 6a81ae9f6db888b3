//! iptables, both variants: byte-compatible with upstream's portmap in table nat.
//!
//! Writing is one `iptables-restore --noflush` per family, reading goes through the `iptables` crate.

pub mod check;
pub mod listing;
pub mod rules;
pub mod script;

use std::collections::BTreeSet;

use listing::Listing;

use super::{Apply, Change, Desired, Observe, Outcome, Unrecorded};
use crate::error::{Error, Result};
use crate::model::Family;
use crate::record::{Part, Record};
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::iptables::{list, list_chains, restore};
use crate::sys::namespace::in_scratch_netns;

/// The backend.
pub struct Iptables;

impl Observe for Iptables {
    fn probe(&self, host: &Host) -> Result<(), String> {
        let sample = super::probe_record(crate::model::BackendKind::Iptables);
        let desired = script::Desired {
            family: Family::V4,
            records: vec![&sample],
            purge: &BTreeSet::new(),
            uplinks: &["eth0".to_owned()],
            keep_base: false,
        };
        let text = script::restore_nat(&desired, &Listing::default())
            + &script::restore_raw(true, &Listing::default());
        in_scratch_netns(|| restore(host, Family::V4, &text).map_err(|error| error.to_string()))
    }

    fn problems(
        &self,
        host: &Host,
        record: &Record,
        _related: &[Record],
        _parts: &BTreeSet<Part>,
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
                &record.chain,
            ];
            let listing = list_chains(host, family, "nat", &chains)
                .map_err(|error| failed("read the rules", family, error))?;
            problems.extend(check::nat_problems(record, family, &listing, recorded));
        }
        if recorded && record.parts().contains(&Part::Guard) {
            let listing = list(host, Family::V4, "raw")
                .map_err(|error| failed("read the rules", Family::V4, error))?;
            problems.extend(check::raw_problems(&listing));
        }
        Ok(problems)
    }
}

impl Apply for Iptables {
    fn change(&self, host: &Host, change: &Change) -> Result<Outcome> {
        if let Some(reason) = needs_listing(change) {
            return Ok(Outcome::NeedsRestore(reason));
        }
        let mut gone = change.gone();
        gone.retain(
            |part| !matches!(part, Part::Mark(family, _) if change.keep_base.contains(family)),
        );
        for family in change.families() {
            let text = match (change.added, change.removed) {
                (Some(added), removed) => script::add(added, removed, family),
                (None, Some(removed)) => script::remove(removed, family, &gone, change.parts_after),
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

    fn restore(&self, host: &Host, desired: &Desired) -> Result<BTreeSet<Family>> {
        let mut kept = BTreeSet::new();
        let uplinks: Vec<String> = desired.facts.uplinks.iter().cloned().collect();
        for family in Family::ALL {
            let records: Vec<&Record> =
                desired.records.iter().filter(|record| record.network(family).is_some()).collect();
            let needed = !records.is_empty() || desired.families.contains(&family);
            let listing = match list(host, family, "nat") {
                Ok(listing) => listing,
                Err(_) if !needed => continue,
                Err(error) => return Err(failed("read the rules", family, error)),
            };
            mark_chains_exist(&records, family, &listing)?;
            if desired.first_in.contains(&family) && listing.has_chain(rules::DNAT) {
                kept.insert(family);
            }
            let state = script::Desired {
                family,
                records,
                purge: desired.purge,
                uplinks: &uplinks,
                keep_base: desired.keep_base.contains(&family) || kept.contains(&family),
            };
            let nat = script::restore_nat(&state, &listing);
            let raw =
                if family == Family::V4 { restore_guard(host, desired)? } else { String::new() };
            // The guard comes before and goes after what needs it: the sysctl follows the rules on
            // ADD and precedes them on DEL, so the order of the tables does not matter.
            restore(host, family, &(raw + &nat))
                .map_err(|error| failed("change the rules", family, error))?;
        }
        Ok(kept)
    }

    fn remove_unrecorded(&self, host: &Host, unrecorded: &Unrecorded) -> Result<()> {
        for family in Family::ALL {
            // A family that cannot be read holds nothing: no record says otherwise.
            let Ok(listing) = list(host, family, "nat") else {
                continue;
            };
            let chains: BTreeSet<String> = match unrecorded {
                Unrecorded::One { chain, .. } => BTreeSet::from([(*chain).to_owned()]),
                Unrecorded::AllBut { network, keep, recorded } => listing
                    .attachments()
                    .into_iter()
                    .filter(|found| {
                        found.network == *network && !keep.contains(found.container_id.as_str())
                    })
                    .map(|found| found.chain)
                    .filter(|chain| !recorded.contains(chain))
                    .collect(),
            };
            let text = script::purge(&chains, &listing);
            if !text.is_empty() {
                restore(host, family, &text)
                    .map_err(|error| failed("remove the rules", family, error))?;
            }
        }
        Ok(())
    }
}

/// Steps that the fast path cannot express.
fn needs_listing(change: &Change) -> Option<String> {
    if change.begins_a_part() {
        return Some("the shared chains are not there yet".into());
    }
    // Our additions go with the last record, upstream's chains stay.
    let shared =
        |part: &Part| matches!(part, Part::Base(family) if change.keep_base.contains(family));
    if change.gone().iter().any(shared) {
        return Some("the shared chains belong to others too".into());
    }
    let neighbours = change.parts_after.iter().any(|part| matches!(part, Part::Neighbours(_)));
    if neighbours && change.facts_before.uplinks != change.facts.uplinks {
        return Some("the node's uplinks have changed".into());
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

fn mark_chains_exist(records: &[&Record], family: Family, listing: &Listing) -> Result<()> {
    for record in records {
        if let Some(chain) = record.options.external_set_mark_chain.as_ref()
            && !record.options.no_snat
            && !listing.has_chain(chain)
        {
            return Err(Error::MarkChainMissing { chain: chain.clone(), family });
        }
    }
    Ok(())
}

/// The guard is needed while any record has a device with `route_localnet`.
fn restore_guard(host: &Host, desired: &Desired) -> Result<String> {
    let wanted = desired.records.iter().any(|record| record.parts().contains(&Part::Guard));
    match list(host, Family::V4, "raw") {
        Ok(listing) => Ok(script::restore_raw(wanted, &listing)),
        Err(_) if !wanted => Ok(String::new()),
        Err(error) => Err(failed("read the rules of table raw", Family::V4, error)),
    }
}

fn failed(action: &str, family: Family, error: ToolError) -> Error {
    error.into_error(format!("cannot {action} ({family})"))
}
