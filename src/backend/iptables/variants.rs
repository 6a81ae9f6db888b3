//! The two variants of iptables, whose rules packets meet one after the other: the tools in PATH may have
//! been of the other one when rules were made (`update-alternatives`, another image of the node).

use std::collections::BTreeSet;

use super::{failed, marks, script};
use crate::backend::{Desired, Unrecorded};
use crate::error::Result;
use crate::model::Family;
use crate::record::{Part, Record};
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::iptables::{nat_tables, other_variant, restore_in, table_in};

/// Takes all attachments that are recorded, or must be gone, out of the tables of the variant that the
/// tools in PATH are not. What others have there stays.
pub fn clear_other(host: &Host, desired: &Desired, state: &script::Desired) -> Result<()> {
    let (family, other) = (state.family, other_variant(host, state.family));
    let unread = |error| failed("read the rules of other iptables tools", family, error);
    let listing = match table_in(host, other, family, "nat") {
        None | Some(Err(ToolError::Missing { .. })) => return Ok(()),
        Some(listing) => listing.map_err(unread)?,
    };
    let own = desired.records.iter().map(|record| &record.chain).chain(desired.purge);
    let purge: BTreeSet<String> = own.filter(|chain| listing.has_chain(chain)).cloned().collect();
    if purge.is_empty() {
        return Ok(());
    }
    let parts: BTreeSet<Part> = desired.records.iter().flat_map(Record::parts).collect();
    let nothing = script::Desired {
        family,
        records: Vec::new(),
        purge: &purge,
        uplinks: &[],
        keep_base: state.keep_base,
        stale_bits: marks::bits(&parts, family).union(&state.stale_bits).copied().collect(),
    };
    let guard = match table_in(host, other, family, "raw") {
        Some(raw) if family == Family::V4 => script::restore_raw(false, &raw.map_err(unread)?),
        _ => String::new(),
    };
    restore_in(host, other, family, &(guard + &script::restore_nat(&nothing, &listing)))
        .map_err(|error| failed("remove the rules of other iptables tools", family, error))
}

/// Removes chains of attachments without a record from both variants. No table is made by looking.
pub fn remove_unrecorded(host: &Host, unrecorded: &Unrecorded) -> Result<()> {
    for family in Family::ALL {
        for (variant, listing) in nat_tables(host, family) {
            let listing = match listing {
                Ok(listing) => listing,
                Err(error @ ToolError::Busy { .. }) => {
                    return Err(failed("read the rules", family, error));
                }
                // What cannot be read holds nothing: no record says otherwise.
                Err(_) => continue,
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
            restore_in(host, variant, family, &script::purge(&chains, &listing))
                .map_err(|error| failed("remove the rules", family, error))?;
        }
    }
    Ok(())
}
