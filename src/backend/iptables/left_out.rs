//! Attachments that cannot be put back, because something of others' that they name is gone. One
//! transaction is for all attachments: they must not keep others from coming and going.

use super::listing::Listing;
use super::script;
use crate::error::{Error, Result};
use crate::model::Family;
use crate::record::Record;
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::iptables::test;

/// Leaves out those whose `externalSetMarkChain` has gone: a rule that leads to a chain which does not
/// exist would make the transaction fail. That of `added` is an error.
pub fn unmarkable(
    host: &Host,
    records: &mut Vec<&Record>,
    added: Option<&Record>,
    family: Family,
    listing: &Listing,
) -> Result<()> {
    let missing = |record: &Record| {
        let chain = record.options.external_set_mark_chain.as_ref()?;
        (!record.options.no_snat && !listing.has_chain(chain)).then(|| chain.clone())
    };
    if let Some(added) = added.filter(|added| added.network(family).is_some())
        && let Some(chain) = missing(added)
    {
        return Err(Error::MarkChainMissing { chain, family });
    }
    records.retain(|record| {
        if let Some(chain) = missing(record) {
            host.warn(format!(
                "{} is not forwarded: its externalSetMarkChain {chain} is missing ({family})",
                record.attachment
            ));
            return false;
        }
        true
    });
    Ok(())
}

/// Leaves out those with conditions that iptables does not take any more, since a set has gone, say, and
/// tells whether there are any. For when the transaction has failed: each of them costs a process.
pub fn unloadable(
    host: &Host,
    records: &mut Vec<&Record>,
    added: Option<&Record>,
    family: Family,
) -> bool {
    let before = records.len();
    records.retain(|record| {
        if record.options.conditions(family).is_empty()
            || added.is_some_and(|added| added.id() == record.id())
        {
            return true;
        }
        match test(host, family, &script::entries_alone(record, family)) {
            Err(ToolError::Failed { stderr, .. }) => {
                host.warn(format!(
                    "{} is not forwarded: iptables does not take its conditions any more ({family}): {stderr}",
                    record.attachment
                ));
                false
            }
            _ => true,
        }
    });
    records.len() < before
}
