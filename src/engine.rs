//! From one set of records to another, in the kernel and in the state directory, under the lock.
//!
//! A record is written before the kernel is changed and removed after, so that a kill at any point
//! leaves one from which a repeated ADD, a DEL or GC finishes. The fast path changes one attachment;
//! when the kernel is not in the state that the records say, everything is brought in order once.

use std::collections::BTreeSet;
use std::path::Path;

use crate::backend::{self, Change, Desired, Outcome, Unrecorded, Unusable};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::flush::{self, Flush};
use crate::model::{BackendKind, Family};
use crate::record::{IndexKey, Part, Record};
use crate::sys::Host;
use crate::sys::store::Store;
use crate::sys::{netlink, sysctl};

/// Name of the note that says which backend `auto` chose.
const BACKEND_NOTE: &str = "backend";
/// Name of the note with the records of a step that has begun: if it is there, the step was killed or
/// failed half-way, and the kernel may be in any state between.
const PENDING_NOTE: &str = "pending";
/// Beginning of the names of the notes with former values of `route_localnet`.
const LOCALNET_NOTE: &str = "localnet-";

/// The node's state, locked.
pub struct Engine<'a> {
    pub host: &'a Host,
    pub store: Store,
}

impl<'a> Engine<'a> {
    /// Waits for the node's lock.
    pub fn lock(host: &'a Host, state_dir: &Path) -> Result<Self> {
        Ok(Engine { host, store: Store::open(state_dir, &host.boot_id())? })
    }

    /// Waits for the node's lock in order to change something, and first finishes what a killed call
    /// has begun.
    pub fn lock_to_change(host: &'a Host, state_dir: &Path) -> Result<Self> {
        let engine = Self::lock(host, state_dir)?;
        match engine.recover() {
            Err(error @ Error::Busy { .. }) => Err(error),
            // The next call tries again; this one may well have to do with another backend.
            Err(error) => {
                host.warn(format!(
                    "an interrupted call is not finished yet: {error}: {}",
                    error.details()
                ));
                Ok(engine)
            }
            Ok(()) => Ok(engine),
        }
    }

    fn recover(&self) -> Result<()> {
        let Some(note) = self.store.note(PENDING_NOTE)? else {
            return Ok(());
        };
        // A note is written as a whole; one that cannot be read is another version's.
        let pending: Vec<Record> = serde_json::from_str(&note).unwrap_or_default();
        let facts = self.host.node_facts()?;
        self.release_unused_localnets("")?;
        for kind in BackendKind::ALL {
            let lost: Vec<&Record> =
                pending.iter().filter(|record| record.backend == kind).collect();
            if !lost.is_empty() {
                self.restore_without(kind, None, None, &Lost::of(&lost), &facts, &BTreeSet::new())?;
            }
        }
        self.store.set_note(PENDING_NOTE, None)
    }

    fn begin(&self, records: &[&Record]) -> Result<()> {
        let text =
            serde_json::to_string(records).map_err(|error| Error::Decode(error.to_string()))?;
        self.store.set_note(PENDING_NOTE, Some(&text))
    }

    fn finish(&self) -> Result<()> {
        self.store.set_note(PENDING_NOTE, None)
    }

    /// The configured backend, or the first that works. What was found is remembered until the next
    /// boot or until other tools are in PATH.
    pub fn choose_backend(&self, configured: Option<BackendKind>) -> Result<BackendKind> {
        if let Some(kind) = configured {
            return Ok(kind);
        }
        let fingerprint = self.host.tools_fingerprint();
        if let Some(note) = self.store.note(BACKEND_NOTE)?
            && let Some((name, known)) = note.split_once('\n')
            && known == fingerprint
            && let Some(kind) = BackendKind::ALL.into_iter().find(|kind| kind.name() == name)
        {
            return Ok(kind);
        }
        let kind = probe(self.host)?;
        self.store.set_note(BACKEND_NOTE, Some(&format!("{kind}\n{fingerprint}")))?;
        Ok(kind)
    }

    /// Puts a record in place of `old`, which is the same attachment's, and its rules into the kernel.
    /// On an error everything is as before.
    pub fn add(&self, record: &Record, old: Option<&Record>, facts: &NodeFacts) -> Result<()> {
        let (same_backend, other_backend) = match old {
            Some(old) if old.backend != record.backend => (None, Some(old)),
            old => (old, None),
        };
        let before = self.store.parts(record.backend)?;
        let first = record.parts().difference(&before).copied().collect();
        let involved: Vec<&Record> = old.into_iter().chain([record]).collect();
        let written = self.begin(&involved).and_then(|()| self.store.put(record, old));
        if let Err(error) = written {
            // What cannot be cleared away now, the attachment's next call clears.
            drop(self.store.clear_moving(&record.id()));
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
        self.finish()
    }

    /// Takes a record's rules out of the kernel, and then the record away.
    pub fn remove(&self, record: &Record) -> Result<()> {
        let before = self.store.parts(record.backend)?;
        let facts = self.known_facts(record.backend)?;
        if let Err(error) = self.begin(&[record]) {
            // A full disk must not keep DEL from its work; the record itself is still there.
            self.host.warn(format!("{error}: {}", error.details()));
        }
        self.release_unused_localnets(&record.id())?;
        self.apply(None, Some(record), &before, &facts, &BTreeSet::new())?;
        if flush::concerns(record) {
            // The addresses of now, for what is left behind in conntrack.
            let facts = self.host.node_facts().unwrap_or(facts);
            self.flush_conntrack(None, Some(record), &facts);
        }
        self.store.remove(record)?;
        self.finish()
    }

    /// Removes what is left of a record that cannot be read: its index entries still say which
    /// backend, chain and families it had.
    pub fn repair(&self, id: &str) -> Result<()> {
        let keys = self.store.index_of(id)?;
        let named = |kind: &str| {
            keys.iter()
                .filter(|(of, _)| of == kind)
                .map(|(_, name)| name.clone())
                .collect::<BTreeSet<_>>()
        };
        self.store.remove_file(id)?;
        self.release_unused_localnets(id)?;
        let facts = self.host.node_facts()?;
        for kind in
            BackendKind::ALL.into_iter().filter(|kind| named("backends").contains(kind.name()))
        {
            let parts: BTreeSet<Part> = named(&format!("parts-{kind}"))
                .iter()
                .filter_map(|name| Part::parse(name))
                .collect();
            let families = Family::ALL
                .into_iter()
                .filter(|family| parts.contains(&Part::Base(*family)))
                .collect();
            let lost = Lost { chains: named("chains"), families, parts };
            self.restore_without(kind, None, None, &lost, &facts, &BTreeSet::new())?;
        }
        self.store.forget(id, &keys)
    }

    fn apply(
        &self,
        added: Option<&Record>,
        removed: Option<&Record>,
        before: &BTreeSet<Part>,
        facts: &NodeFacts,
        first: &BTreeSet<Part>,
    ) -> Result<()> {
        let Some(record) = added.or(removed) else {
            return Ok(());
        };
        let kind = record.backend;
        let related = self.related(added, removed)?;
        let after = self.parts_with(kind, added, record, before)?;
        let known = self.known_facts(kind)?;
        let kept = self.kept(kind, before)?;
        let change = Change {
            added,
            removed,
            related: &related,
            parts_before: before,
            parts_after: &after,
            facts_before: &known,
            facts,
            kept: &kept,
        };
        let backend = backend::of(kind);
        // A repeated ADD is how runtimes and people repair an attachment, and a step from a record to
        // the same record changes nothing on the fast path.
        let is_whole = match (added, removed) {
            (Some(_), Some(old)) => backend
                .problems(self.host, old, &related, before, &known, true)
                .is_ok_and(|problems| problems.is_empty()),
            _ => true,
        };
        let outcome = if is_whole {
            backend.change(self.host, &change)?
        } else {
            Outcome::NeedsRestore("the attachment's rules are not as recorded".into())
        };
        match outcome {
            Outcome::Done => self.remember_facts(kind, &known, facts),
            Outcome::NeedsRestore(reason) => {
                let gone = if added.is_none() { Some(record) } else { None };
                // The note of a DEL may be missing or old, and the slow path writes all of it anew.
                let now = if added.is_none() { self.host.node_facts().ok() } else { None };
                let facts = now.as_ref().unwrap_or(facts);
                let lost: Vec<&Record> = removed.into_iter().collect();
                self.restore_without(kind, gone, added, &Lost::of(&lost), facts, first)
                    .map_err(|error| error.after(&reason))
            }
        }
    }

    /// Restores from all records but `gone`. `added` must come to be there, and `lost` goes, as far as
    /// no record has it.
    fn restore_without(
        &self,
        kind: BackendKind,
        gone: Option<&Record>,
        added: Option<&Record>,
        lost: &Lost,
        facts: &NodeFacts,
        first: &BTreeSet<Part>,
    ) -> Result<()> {
        let (mut records, problems) = self.store.all()?;
        for problem in problems {
            self.host.warn(problem);
        }
        records.retain(|record| {
            record.backend == kind && gone.is_none_or(|gone| record.id() != gone.id())
        });
        let parts = records.iter().flat_map(Record::parts).chain(lost.parts.iter().copied());
        let known = self.kept(kind, &parts.filter(|part| !first.contains(part)).collect())?;
        let desired = Desired {
            records: &records,
            added,
            purge: &lost.chains,
            families: &lost.families,
            facts,
            kept: &known,
            gone: &lost.parts,
            first,
        };
        let mut kept = BTreeSet::new();
        let result = backend::of(kind).restore(self.host, &desired, &mut kept);
        for part in first {
            let note = kept.contains(part).then_some("");
            self.store.set_note(&kept_note(kind, *part), note)?;
        }
        result?;
        for record in &records {
            // Devices of pods that are gone without a DEL are gone, too.
            if let Err(error) = self.enable_localnet(record) {
                self.host.warn(format!("{error}: {}", error.details()));
            }
        }
        self.remember_facts(kind, &NodeFacts::default(), facts)
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
            Some(old) => self.store.put(old, Some(record)).and_then(|()| {
                let kinds = BTreeSet::from([record.backend, old.backend]);
                self.release_unused_localnets("")?;
                kinds.into_iter().try_for_each(|kind| {
                    self.restore_without(kind, None, None, &lost, facts, &none)
                })
            }),
            None => self
                .release_unused_localnets(&record.id())
                .and_then(|()| {
                    self.restore_without(record.backend, Some(record), None, &lost, facts, &none)
                })
                .and_then(|()| self.store.remove(record)),
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
        let unrecorded = Unrecorded::One { attachment: &record.attachment, chain: &record.chain };
        backend::of(record.backend).remove_unrecorded(self.host, &unrecorded)?;
        self.store.remove(record)?;
        self.finish()
    }

    /// Other records of the same backend that share a port or a pod address with either.
    fn related(&self, added: Option<&Record>, removed: Option<&Record>) -> Result<Vec<Record>> {
        let keys: BTreeSet<IndexKey> = added
            .iter()
            .chain(&removed)
            .flat_map(|record| record.index_keys())
            .filter(|key| matches!(key, IndexKey::Port(_) | IndexKey::Pod(_)))
            .collect();
        let (id, kind) = added.or(removed).map(|record| (record.id(), record.backend)).unzip();
        let mut records = self.store.sharing(&keys, &id.unwrap_or_default())?;
        records.retain(|record| Some(record.backend) == kind);
        Ok(records)
    }

    /// The parts that are needed when `added` is there and `record` is otherwise not.
    fn parts_with(
        &self,
        kind: BackendKind,
        added: Option<&Record>,
        record: &Record,
        before: &BTreeSet<Part>,
    ) -> Result<BTreeSet<Part>> {
        let mut parts = added.map(Record::parts).unwrap_or_default();
        for part in before {
            if !parts.contains(part)
                && self.store.has_other(&IndexKey::Part(kind, *part), &record.id())?
            {
                parts.insert(*part);
            }
        }
        Ok(parts)
    }

    /// Those of the parts that were there before this plugin needed them.
    fn kept(&self, kind: BackendKind, parts: &BTreeSet<Part>) -> Result<BTreeSet<Part>> {
        let mut kept = BTreeSet::new();
        for part in parts.iter().filter(|part| matches!(part, Part::Base(_) | Part::Mark(..))) {
            if self.store.note(&kept_note(kind, *part))?.is_some() {
                kept.insert(*part);
            }
        }
        Ok(kept)
    }

    /// The node as the rules of a backend know it.
    pub fn known_facts(&self, kind: BackendKind) -> Result<NodeFacts> {
        let note = self.store.note(&facts_note(kind))?;
        Ok(note.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
    }

    fn remember_facts(
        &self,
        kind: BackendKind,
        known: &NodeFacts,
        facts: &NodeFacts,
    ) -> Result<()> {
        if known == facts {
            return Ok(());
        }
        let text =
            serde_json::to_string(facts).map_err(|error| Error::Decode(error.to_string()))?;
        self.store.set_note(&facts_note(kind), Some(&text))
    }

    /// Turns `route_localnet` on for the pod's device. Its guard is in place by now.
    fn enable_localnet(&self, record: &Record) -> Result<()> {
        let Some(device) = &record.localnet_device else {
            return Ok(());
        };
        let path = localnet_path(device);
        let failed =
            |error| Error::io(format!("set net.ipv4.conf.{device}.route_localnet to 1"), error);
        let present = sysctl::read(&path).map_err(failed)?;
        if present == "1" {
            return Ok(());
        }
        self.store.set_note(&format!("{LOCALNET_NOTE}{device}"), Some(&present))?;
        sysctl::write(&path, "1").map_err(failed)
    }

    /// Gives `route_localnet` its former value back on every device that no record needs, or none but
    /// `id`. Before the guard goes.
    fn release_unused_localnets(&self, id: &str) -> Result<()> {
        for note in self.store.notes(LOCALNET_NOTE)? {
            let device = note.strip_prefix(LOCALNET_NOTE).unwrap_or_default();
            if self.store.has_other(&IndexKey::Localnet(device.to_owned()), id)? {
                continue;
            }
            let former = self.store.note(&note)?.unwrap_or_default();
            match sysctl::write(&localnet_path(device), &former) {
                // The device went with its pod.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => self.host.warn(format!(
                    "cannot set net.ipv4.conf.{device}.route_localnet back to {former}: {error}"
                )),
                Ok(()) => {}
            }
            self.store.set_note(&note, None)?;
        }
        Ok(())
    }

    fn flush_conntrack(&self, added: Option<&Record>, removed: Option<&Record>, facts: &NodeFacts) {
        let others = match self.related(added, removed) {
            Ok(others) => others,
            Err(error) => {
                return self.host.warn(format!("conntrack entries are not flushed: {error}"));
            }
        };
        let flush = Flush::new(added, removed, &others, facts);
        for family in Family::ALL {
            let ports = flush.ports(family);
            if let Err(error) = netlink::conntrack::delete(family, &ports, |flow| flush.takes(flow))
            {
                self.host.warn(format!("conntrack entries of {family} are not flushed: {error}"));
            }
        }
    }
}

/// What goes with a record.
#[derive(Default)]
struct Lost {
    chains: BTreeSet<String>,
    families: BTreeSet<Family>,
    parts: BTreeSet<Part>,
}

impl Lost {
    fn of(records: &[&Record]) -> Self {
        Lost {
            chains: records.iter().map(|record| record.chain.clone()).collect(),
            families: records.iter().flat_map(|record| record.families()).collect(),
            parts: records.iter().flat_map(|record| record.parts()).collect(),
        }
    }
}

/// The first backend that works, in the order of preference. One that is busy may well work: it is
/// not passed over.
pub fn probe(host: &Host) -> Result<BackendKind> {
    let mut reasons = Vec::new();
    for kind in BackendKind::ALL {
        match backend::of(kind).probe(host) {
            Ok(()) => return Ok(kind),
            Err(Unusable::Busy(error)) => return Err(error),
            Err(Unusable::Broken(reason)) => reasons.push(format!("{kind}: {reason}")),
        }
    }
    Err(Error::NoBackend { reasons: reasons.join("; ") })
}

fn facts_note(kind: BackendKind) -> String {
    format!("facts-{kind}")
}

fn kept_note(kind: BackendKind, part: Part) -> String {
    format!("kept-{kind}-{}", part.name())
}

/// Path of a device's `route_localnet` below /proc/sys.
#[must_use]
pub fn localnet_path(device: &str) -> [&str; 5] {
    ["net", "ipv4", "conf", device, "route_localnet"]
}
