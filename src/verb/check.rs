//! CHECK: the kernel is compared with what the attachment asked for. Changes nothing.

use std::collections::BTreeSet;
use std::rc::Rc;

use crate::cni::envelope::Envelope;
use crate::cni::invocation::Invocation;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::{BackendKind, Mapping};
use crate::record::{Record, record_id};
use crate::request::Request;
use crate::sys::Host;
use crate::sys::store::{Found, is_recorded, newer_record, record_path};

pub fn run(invocation: &Invocation, envelope: &Envelope, host: &Host) -> Result<()> {
    envelope.version.require("CHECK", "0.4.0")?;
    let request = Request::read(invocation, envelope)?;
    let dir = request.state_dir();
    let id = record_id(&request.attachment);
    if !request.forwards() && !is_recorded(&dir, &id) {
        return Ok(());
    }
    let engine = Engine::lock(host, &dir)?;
    let mut problems = Vec::new();
    let (expected, recorded) = match engine.store.get(&id)? {
        Found::Record(record) => {
            problems.extend(differences(&request, &record));
            (record, true)
        }
        Found::None => (Rc::new(as_upstream_would(&request, host)), false),
        Found::Newer(format) => return Err(newer_record(&dir, &id, format)),
        Found::Damaged(reason) => {
            return Err(Error::Drift(format!(
                "{}: its record {} is damaged: {reason}",
                request.attachment,
                record_path(&dir, &id).display()
            )));
        }
    };
    problems.extend(engine.problems(&expected, recorded)?);
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Drift(format!("{}: {}", request.attachment, problems.join("; "))))
}

/// An attachment without a record may be upstream's, which uses iptables unless told otherwise or without
/// that tool (1.6.0 and later).
fn as_upstream_would(request: &Request, host: &Host) -> Record {
    let default = match host.tools.find("iptables").is_none() && host.tools.find("nft").is_some() {
        true => BackendKind::Nftables,
        false => BackendKind::Iptables,
    };
    Record::new(
        request.attachment.clone(),
        request.conf.mappings.clone(),
        request.addresses.clone(),
        request.conf.options.clone(),
        request.conf.backend.unwrap_or(default),
    )
}

/// Where the request is not what was carried out.
fn differences(request: &Request, record: &Record) -> Vec<String> {
    let mut problems = Vec::new();
    let wanted: Vec<String> = request.addresses.iter().map(ToString::to_string).collect();
    let known: Vec<String> = record.addresses.iter().map(ToString::to_string).collect();
    if wanted != known {
        problems.push(format!(
            "prevResult has the addresses {}, forwarded are {}",
            wanted.join(", "),
            known.join(", ")
        ));
    }
    let wanted: BTreeSet<&Mapping> = request.conf.mappings.iter().collect();
    let known: BTreeSet<&Mapping> = record.mappings.iter().collect();
    for mapping in request.conf.mappings.iter().filter(|mapping| !known.contains(mapping)) {
        problems.push(format!(
            "{} {} to containerPort {} is asked for and was not at ADD",
            mapping.protocol, mapping.host_port, mapping.container_port
        ));
    }
    for mapping in record.mappings.iter().filter(|mapping| !wanted.contains(mapping)) {
        problems.push(format!(
            "{} {} to containerPort {} is forwarded and not asked for any more",
            mapping.protocol, mapping.host_port, mapping.container_port
        ));
    }
    problems
}
