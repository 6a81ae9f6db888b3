//! From one set of records to another, in the kernel and in the state directory, under the lock.
//!
//! A record is written before the kernel is changed and removed after, so that a kill at any point
//! leaves one from which a repeated ADD, a DEL or GC finishes. The fast path changes one attachment;
//! when the kernel is not in the state that the records say, everything is brought in order once.

mod effects;
mod gc;
mod health;
mod kernel;
mod lock;
mod step;
mod survey;
mod unrecorded;

use std::collections::BTreeSet;

use crate::backend::{self, Unrecorded, Unusable};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::flush;
use crate::model::BackendKind;
use crate::record::{IndexKey, Record};
use crate::sys::Host;
use crate::sys::store::Store;
pub use effects::localnet_path;
pub use gc::Collected;
pub use health::Restored;
use step::Lost;
pub use survey::{lock_to_look, survey};
pub use unrecorded::{behind_upstream, remove_unrecorded};

/// What a flush came to.
#[derive(Debug)]
pub struct Flushed {
    pub removed: Vec<Record>,
    /// What could not be removed.
    pub failed: Vec<(String, Error)>,
    /// How many records could not be read, and were left. Each is a warning of the host.
    pub unread: usize,
}

/// The node's state, locked.
pub struct Engine<'a> {
    pub host: &'a Host,
    pub store: Store,
    /// Records of a killed call's step that could not be finished so far.
    unfinished: Vec<Record>,
}

impl<'a> Engine<'a> {
    /// The configured backend, or the first that works for a pod with or without an IPv6 address. What
    /// was found is remembered until the next boot or until other tools are in PATH.
    pub fn choose_backend(
        &self,
        configured: Option<BackendKind>,
        ipv6: bool,
    ) -> Result<BackendKind> {
        if let Some(kind) = configured {
            return Ok(kind);
        }
        if let Some(kind) = self.remembered_backend(ipv6)? {
            return Ok(kind);
        }
        let kind = probe(self.host, ipv6)?;
        let fingerprint = self.host.tools_fingerprint();
        self.store.set_note(backend_note(ipv6), Some(&format!("{kind}\n{fingerprint}")))?;
        Ok(kind)
    }

    /// What `auto` has chosen for such pods, as long as calls go by it.
    pub fn remembered_backend(&self, ipv6: bool) -> Result<Option<BackendKind>> {
        let note = self.store.note(backend_note(ipv6))?.unwrap_or_default();
        let (name, known) = note.split_once('\n').unwrap_or_default();
        let kind = BackendKind::ALL.into_iter().find(|kind| kind.name() == name);
        Ok(kind.filter(|_| known == self.host.tools_fingerprint()))
    }

    /// Puts a record in place of `old`, which is the same attachment's, and its rules into the kernel.
    /// On an error everything is as before.
    pub fn add(&self, record: &Record, old: Option<&Record>, facts: &NodeFacts) -> Result<()> {
        let (same_backend, other_backend) = match old {
            Some(old) if old.backend != record.backend => (None, Some(old)),
            old => (old, None),
        };
        self.backend(record.backend)?.prepare(self.host)?;
        old.map_or(Ok(()), |old| self.known(old.backend)?.admit(self.host))?;
        other_backend.map_or(Ok(()), |old| self.backend(old.backend)?.prepare(self.host))?;
        let before = self.before(record.backend, self.store.is_used(record.backend)?)?;
        let first = record.parts().difference(&before.parts).copied().collect();
        let involved: Vec<&Record> = old.into_iter().chain([record]).collect();
        let written = (self.store.stage(record))
            .and_then(|()| self.begin(&involved, true))
            .and_then(|()| self.store.put(record, old));
        if let Err(error) = written {
            // What cannot be cleared away now, the attachment's next call clears.
            drop(self.store.clear_moving(record.id()));
            drop(self.finish());
            return Err(error);
        }
        let result = self
            .release_unused_localnets("")
            .and_then(|()| self.apply(Some(record), same_backend, &before, facts, &first))
            .and_then(|()| self.enable_localnet(record))
            .and_then(|()| match other_backend {
                // Only now, so that the port is never without an owner.
                Some(other) => self.restore_without(
                    other.backend,
                    None,
                    None,
                    &Lost::of(&[other]),
                    facts,
                    &BTreeSet::new(),
                ),
                None => Ok(()),
            });
        if let Err(error) = result {
            return Err(self.undo(record, old, facts, error));
        }
        if flush::concerns(record) || old.is_some_and(flush::concerns) {
            self.flush_conntrack(Some(record), old, facts);
        }
        if let Err(error) = self.finish() {
            // All is done, and the next call will look whether it is.
            self.host.warn(format!("{error}: {}", error.details()));
        }
        Ok(())
    }

    /// Takes a record's rules out of the kernel, and then the record away.
    ///
    /// # Errors
    ///
    /// One that [`Error::is_newer`], and nothing has changed, where only a newer portmap can do that.
    pub fn remove(&self, record: &Record) -> Result<()> {
        self.known(record.backend)?.admit(self.host)?;
        let before = self.before(record.backend, true)?;
        if let Err(error) = self.begin(&[record], false) {
            // A full disk must not keep DEL from its work; the record itself is still there.
            self.host.warn(format!("{error}: {}", error.details()));
        }
        self.release_unused_localnets(record.id())?;
        let removed = self.apply(None, Some(record), &before, &before.facts, &BTreeSet::new());
        if removed.as_ref().is_err_and(Error::is_newer) {
            // Nothing has been done that others would have to finish.
            drop(self.finish());
        }
        removed?;
        if flush::concerns(record) {
            // The addresses of now, for what is left behind in conntrack.
            let facts = self.host.node_facts().unwrap_or(before.facts);
            self.flush_conntrack(None, Some(record), &facts);
        }
        self.store.remove(record)?;
        self.finish()
    }

    /// Lets a pod without mappings reach the hostPorts of others.
    pub fn welcome(&self, kind: BackendKind, links: &[String]) -> Result<()> {
        self.backend(kind)?.welcome(self.host, links)
    }

    /// Removes all attachments, or those of one network, and with the last of them whatever outlives
    /// it. Carries on after an error and reports them all.
    pub fn flush(&self, network: Option<&str>) -> Result<Flushed> {
        let (records, problems) = self.store.all()?;
        let (mut removed, mut failed) = (Vec::new(), Vec::new());
        let unread = problems.len();
        for problem in problems {
            self.host.warn(problem);
        }
        for record in records {
            if network.is_some_and(|network| record.attachment.network != network) {
                continue;
            }
            match self.remove(&record) {
                Ok(()) => removed.push(record),
                Err(error) => failed.push((record.attachment.to_string(), error)),
            }
        }
        // No more than that: eBPF need not work where rules are taken away.
        let outliving = |kind| move |error| (format!("what outlives attachments of {kind}"), error);
        failed.extend(self.recall_kernel().err().map(outliving(BackendKind::Ebpf)));
        for kind in BackendKind::ALL {
            // A network of which there is nothing here may be of another state directory.
            if network.is_some() && !removed.iter().any(|record| record.backend == kind) {
                continue;
            }
            if !self.is_needed(kind) {
                failed.extend(backend::of(kind).unload(self.host).err().map(outliving(kind)));
            }
        }
        Ok(Flushed { removed, failed, unread })
    }

    /// Whether a record has the backend, also one that only a newer plugin can read; true if that cannot be told.
    fn is_needed(&self, kind: BackendKind) -> bool {
        self.store.has_other(&IndexKey::Backend(kind), "").unwrap_or(true)
    }

    /// After a failed ADD: what was there before comes back. The record stays if that fails as well,
    /// so that the DEL which follows a failed ADD finishes.
    fn undo(
        &self,
        record: &Record,
        old: Option<&Record>,
        facts: &NodeFacts,
        error: Error,
    ) -> Error {
        let none = BTreeSet::new();
        let lost = Lost::of(&[record]);
        let undone = match old {
            Some(old) => (self.store.stage(old))
                .and_then(|()| self.store.put(old, Some(record)))
                .and_then(|()| {
                    let kinds = BTreeSet::from([record.backend, old.backend]);
                    self.release_unused_localnets("")?;
                    let restore =
                        |kind| self.restore_without(kind, None, None, &lost, facts, &none);
                    // One that fails keeps no other from its former state.
                    let errors: Vec<Error> =
                        kinds.into_iter().filter_map(|kind| restore(kind).err()).collect();
                    match errors.is_empty() {
                        true => Ok(()),
                        false => {
                            Err(Error::Several { what: "restoring what was there".into(), errors })
                        }
                    }
                }),
            None => self
                .release_unused_localnets(record.id())
                .and_then(|()| {
                    self.restore_without(record.backend, Some(record), None, &lost, facts, &none)
                })
                .and_then(|()| self.store.remove(record))
                .inspect(|()| {
                    // Nobody else needs what this ADD may have begun to load. Whatever cannot be
                    // taken away again the next ADD makes use of.
                    if !self.is_needed(record.backend) {
                        drop(backend::of(record.backend).unload(self.host));
                    }
                }),
        };
        match undone.and_then(|()| self.finish()) {
            Ok(()) => error,
            // A tool that cannot even read has not written; what another family's has, goes alone.
            Err(Error::Tool { .. }) if old.is_none() && self.purge(record).is_ok() => error,
            Err(second) if second.code() == error.code() => error,
            Err(second) => Error::Several {
                what: "the ADD failed, and undoing it as well".into(),
                errors: vec![error, second],
            },
        }
    }

    /// Removes a record and its rules where they can be reached, without regard to shared ones.
    fn purge(&self, record: &Record) -> Result<()> {
        let own = Unrecorded::One { attachment: &record.attachment, chain: Some(&record.chain) };
        let others = || unrecorded::others(&self.store, record.backend, &own);
        let mut removed = BTreeSet::new();
        let backend = self.backend(record.backend)?;
        backend.remove_unrecorded(self.host, &own, &others, &mut removed)?;
        self.store.remove(record)?;
        self.finish()
    }
}

/// Name of the note that says which backend `auto` chose.
#[must_use]
pub fn backend_note(ipv6: bool) -> &'static str {
    if ipv6 { "backend-ipv6" } else { "backend" }
}

/// The first backend that works here, in the order of preference: for IPv4 alone, or for IPv6 too. One
/// that is busy may well work: it is not passed over.
pub fn probe(host: &Host, ipv6: bool) -> Result<BackendKind> {
    first(host, |backend| {
        backend.probe(host)?;
        if ipv6 {
            backend.probe_ipv6(host)?;
        }
        backend.probe_node(host, ipv6)
    })
}

/// As [`probe`], for who asks every few seconds: others' rules, which may be many, are not read, nor is
/// anything known of IPv6.
pub fn probe_briefly(host: &Host) -> Result<BackendKind> {
    first(host, |backend| backend.probe(host))
}

fn first(
    host: &Host,
    works: impl Fn(&dyn backend::Backend) -> Result<(), Unusable>,
) -> Result<BackendKind> {
    let mut reasons = Vec::new();
    for kind in BackendKind::ALL {
        let backend = backend::of(kind);
        match works(backend) {
            Ok(()) => match backend.objection(host) {
                None => return Ok(kind),
                Some(objection) => reasons.push(format!("{kind}: {objection}")),
            },
            Err(Unusable::Busy(error)) => return Err(error),
            Err(Unusable::Broken(reason)) => reasons.push(format!("{kind}: {reason}")),
        }
    }
    Err(Error::NoBackend { reasons: reasons.join("; ") })
}
