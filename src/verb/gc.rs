//! GC: attachments of this network that the runtime does not know any more go.

use std::collections::BTreeSet;

use crate::backend::Unrecorded;
use crate::cni::envelope::{Envelope, ValidAttachment};
use crate::conf::NetConf;
use crate::engine::{self, Engine};
use crate::error::{Error, Result};
use crate::model::Attachment;
use crate::record::{owner_of, record_id};
use crate::request;
use crate::sys::Host;
use crate::sys::store::is_recorded;

pub fn run(envelope: &Envelope, host: &Host) -> Result<()> {
    envelope.version.require("GC", "1.1.0")?;
    let valid = envelope.valid_attachments()?;
    let dir = request::state_dir(NetConf::state_dir(envelope)?);
    let engine = Engine::lock_to_change(host, &dir)?;
    let (records, problems) = engine.store.all()?;
    for problem in problems {
        host.warn(problem);
    }
    let mut errors: Vec<Error> = Vec::new();
    let mut recorded: BTreeSet<String> = BTreeSet::new();
    for record in &records {
        recorded.insert(record.chain.clone());
        let attachment = &record.attachment;
        let is_valid = valid.iter().any(|valid| {
            valid.container_id == attachment.container_id && valid.ifname == attachment.ifname
        });
        if attachment.network == envelope.name && !is_valid {
            match engine.remove(record) {
                Err(error) if error.is_newer() => {
                    host.warn(format!("{attachment} is left alone: {error}"));
                }
                Err(error) => errors.push(Error::Several {
                    what: format!("removing the rules of {attachment}"),
                    errors: vec![error],
                }),
                Ok(()) => {}
            }
        }
    }
    let keep: BTreeSet<&str> = valid.iter().map(|valid| valid.container_id.as_str()).collect();
    let owner = |valid: &ValidAttachment| {
        owner_of(&Attachment {
            network: envelope.name.clone(),
            container_id: valid.container_id.clone(),
            ifname: valid.ifname.clone(),
        })
    };
    let unrecorded = Unrecorded::AllBut {
        network: &envelope.name,
        keep: &keep,
        recorded: &recorded,
        owners: &valid.iter().map(owner).collect(),
        is_recorded: &|attachment| is_recorded(&dir, &record_id(attachment)),
    };
    errors.extend(engine::remove_unrecorded(host, Some(&engine.store), &unrecorded));
    match errors.is_empty() {
        true => Ok(()),
        false => Err(Error::Several { what: format!("GC of network {}", envelope.name), errors }),
    }
}
