//! Attachments whose records are lost: entries tell by a digest whose they are.

use super::flows::Suspects;
use super::loaded::{self, Found};
use super::{entries, failed, forget, objects, open, rule_out};
use crate::backend::{Recorded, Unrecorded};
use crate::error::{Error, Result};
use crate::sys::Host;

/// Takes an attachment's claims away. Where `records` have the same, they lead to these from then on.
pub fn remove(host: &Host, unrecorded: &Unrecorded, records: Recorded) -> Result<()> {
    // Nothing tells of networks.
    let Unrecorded::One { attachment, .. } = unrecorded else {
        return Ok(());
    };
    if !loaded::is_pinned() {
        return Ok(());
    }
    let loaded = match open(host) {
        Ok(Found::Loaded(loaded)) => loaded,
        Ok(Found::Missing(_)) => return Ok(()),
        // A newer portmap's maps, or a right that is lacking: runtimes would repeat this for ever.
        Err(error) if error.is_newer() || is_refusal(&error) => {
            let details = error.details();
            host.warn(format!(
                "what eBPF may have of {attachment}, which has no record, is left alone: {error}: {details}"
            ));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let owner = objects::owner_of(attachment);
    let mut lost = entries::claims(&loaded.maps).map_err(failed("read the eBPF maps"))?;
    lost.retain(|_, value| value.owner == owner);
    if lost.is_empty() {
        return Ok(());
    }
    let keys = lost.into_keys().collect();
    let after = objects::claims_at(&keys, &records()?, None);
    let former = entries::change(&loaded.maps, &keys, &after, false)
        .map_err(failed("write the eBPF maps"))?;
    forget(host, &loaded, Suspects::Former(&former))?;
    rule_out(host, &loaded);
    Ok(())
}

/// Whether the kernel does not let this process use eBPF, or has none.
fn is_refusal(error: &Error) -> bool {
    use std::io::ErrorKind::{PermissionDenied, Unsupported};
    let refuses = |kind| matches!(kind, PermissionDenied | Unsupported);
    match error {
        Error::Io { source, .. } => refuses(source.kind()),
        other => matches!(other, Error::BackendUnusable { .. }),
    }
}
