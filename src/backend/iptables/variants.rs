//! The two variants of iptables, whose rules packets meet one after the other: the tools in PATH may have
//! been of the other one when rules were made (`update-alternatives`, another image of the node).

use std::collections::BTreeSet;

use super::{Listing, failed, marks, script};
use crate::backend::{Desired, Unrecorded};
use crate::error::Result;
use crate::model::{Family, Forward};
use crate::record::chain_name_of_interface;
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::iptables::{Variant, nat_tables, other_variant, restore_in, table_in};

/// Takes all attachments that are recorded, or must be gone, out of the tables of the variant that the
/// tools in PATH are not, if that is known: taken for the other one, they would lose what they have just
/// written. What others have there stays.
pub fn clear_other(host: &Host, desired: &Desired, state: &script::Desired) -> Result<()> {
    let family = state.family;
    let Some(other) = other_variant(host, family) else {
        return Ok(());
    };
    let Some(listing) = read(host, other, family, "nat")? else {
        return Ok(());
    };
    let own = desired.records.iter().map(|record| &record.chain).chain(desired.purge);
    let purge: BTreeSet<String> = own.filter(|chain| listing.has_chain(chain)).cloned().collect();
    if purge.is_empty() {
        return Ok(());
    }
    let nothing = script::Desired {
        family,
        records: Vec::new(),
        parts: &BTreeSet::new(),
        purge: &purge,
        uplinks: &[],
        keep_base: state.keep_base,
        stale_bits: marks::bits(desired.parts, family).union(&state.stale_bits).copied().collect(),
    };
    let raw = match family {
        Family::V4 => read(host, other, family, "raw")?,
        Family::V6 => None,
    };
    let guard = raw.map(|raw| script::restore_raw(false, &raw)).unwrap_or_default();
    restore_in(host, other, family, &(guard + &script::restore_nat(&nothing, &listing)))
        .map_err(|error| failed("remove the rules of other iptables tools", family, error))
}

/// What that variant has in a table, if it can be read. iptables-nft calls one incompatible where
/// somebody has used nft (1.8.9: a statement like `masquerade` in any of its chains).
fn read(host: &Host, which: Variant, family: Family, table: &str) -> Result<Option<Listing>> {
    match table_in(host, which, family, table) {
        None | Some(Err(ToolError::Missing { .. })) => Ok(None),
        Some(Ok(listing)) => Ok(Some(listing)),
        // The next call may come to know.
        Some(Err(error @ (ToolError::Busy { .. } | ToolError::Hung { .. }))) => {
            Err(failed("read the rules of other iptables tools", family, error))
        }
        Some(Err(error)) => {
            host.warn(format!(
                "table {table} of {} ({family}) cannot be read, and is left as it is: {error}",
                which.name()
            ));
            Ok(None)
        }
    }
}

/// Removes chains of attachments without a record from both variants. No table is made by looking.
pub fn remove_unrecorded(
    host: &Host,
    unrecorded: &Unrecorded,
    removed: &mut BTreeSet<Forward>,
) -> Result<()> {
    let mut tables = Vec::new();
    for family in Family::ALL {
        for (variant, listing) in nat_tables(host, family) {
            match listing {
                Ok(listing) => tables.push((family, variant, listing)),
                Err(error @ ToolError::Busy { .. }) => {
                    return Err(failed("read the rules", family, error));
                }
                // What cannot be read holds nothing: no record says otherwise.
                Err(_) => {}
            }
        }
    }
    // Which name an interface's chain got, its record said.
    let own = match unrecorded {
        Unrecorded::One { attachment, chain } => {
            let of_interface = chain_name_of_interface(attachment);
            let is_there = tables.iter().any(|(_, _, listing)| listing.has_chain(&of_interface));
            if is_there { Some(of_interface) } else { chain.map(ToOwned::to_owned) }
        }
        Unrecorded::AllBut { .. } => None,
    };
    for (family, variant, listing) in tables {
        let chains: BTreeSet<String> = match unrecorded {
            Unrecorded::One { .. } => own.iter().cloned().collect(),
            Unrecorded::AllBut { network, keep, recorded, .. } => listing
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
        removed.extend(chains.iter().flat_map(|chain| listing.forwards(chain, family)));
    }
    Ok(())
}
