//! DEL: everything of the attachment goes. Needs nothing but its key, and is done as often as asked.

use crate::backend::Unrecorded;
use crate::cni::envelope::Envelope;
use crate::cni::invocation::Invocation;
use crate::conf::{NetConf, has_mappings};
use crate::engine::{self, Engine};
use crate::error::{Error, Result};
use crate::model::Attachment;
use crate::record::{IndexKey, chain_name, record_id};
use crate::request;
use crate::sys::Host;
use crate::sys::store::{Found, Store, has_records, is_recorded};

pub fn run(invocation: &Invocation, envelope: &Envelope, host: &Host) -> Result<()> {
    // No other key may keep DEL from its work: runtimes repeat it for ever.
    let dir = request::state_dir(NetConf::state_dir(envelope).unwrap_or_default());
    let attachment = request::attachment(invocation, envelope);
    let id = record_id(&attachment);
    let recorded = is_recorded(&dir, &id);
    if !recorded && !has_mappings(envelope) {
        return Ok(());
    }
    let engine = match Engine::lock_to_change(host, &dir) {
        // Nobody has kept anything there: the disk is full, or no ADD could keep anything either. Runtimes
        // would repeat this until the pod could be removed at last.
        Err(error)
            if !matches!(error, Error::Busy { .. }) && has_records(&dir).is_ok_and(|has| !has) =>
        {
            host.warn(format!("{error}: {}", error.details()));
            return remove_unrecorded(host, None, &attachment);
        }
        other => other?,
    };
    match engine.store.get(&id)? {
        // What is a newer version's, its GC will do: an error would be repeated for ever.
        Found::Record(record) => {
            return match engine.remove_dead_rivals(&record).and_then(|_| engine.remove(&record)) {
                Err(error) if error.is_newer() => {
                    host.warn(format!("{attachment} is left alone: {error}"));
                    Ok(())
                }
                other => other,
            };
        }
        Found::Newer(format) => {
            host.warn(format!("the record of {attachment} has format {format} of a newer portmap and is left alone"));
            return Ok(());
        }
        Found::Damaged(reason) => {
            host.warn(format!("the record of {attachment} is damaged: {reason}"));
            engine.repair(&id)?;
        }
        Found::None => engine.store.clear_moving(&id)?,
    }
    engine.recall_kernel()?;
    remove_unrecorded(host, Some(&engine.store), &attachment)
}

/// There is no record: perhaps upstream's plugin made rules, or the record is lost.
fn remove_unrecorded(host: &Host, store: Option<&Store>, attachment: &Attachment) -> Result<()> {
    let chain = chain_name(&attachment.network, &attachment.container_id);
    // The chain of a sibling interface is not ours.
    let is_siblings = match store {
        Some(store) => store.has_other(&IndexKey::Chain(chain.clone()), &record_id(attachment))?,
        None => false,
    };
    let chain = (!is_siblings).then_some(chain.as_str());
    let unrecorded = Unrecorded::One { attachment, chain };
    let errors = engine::remove_unrecorded(host, store, &unrecorded);
    match errors.is_empty() {
        true => Ok(()),
        false => {
            Err(Error::Several { what: format!("removing the rules of {attachment}"), errors })
        }
    }
}
