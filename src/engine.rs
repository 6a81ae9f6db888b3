//! From one set of records to another, in the kernel and in the state directory, under the lock.
//!
//! A record is written before the kernel is changed and removed after, so that a kill at any point
//! leaves one from which a repeated ADD, a DEL or GC finishes. The fast path changes one attachment;
//! when the kernel is not in the state that the records say, everything is brought in order once.

use std::collections::BTreeSet;
use std::path::Path;

use crate::backend::{self, Change, Desired, Outcome};
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

    /// Puts a record in place of `old`, which is the same attachment's with the same backend, and its
    /// rules into the kernel. On an error neither is there any more.
    pub fn add(&self, record: &Record, old: Option<&Record>) -> Result<()> {
        let facts = self.host.node_facts()?;
        let before = self.store.parts(record.backend)?;
        let first_in = self.first_families(record, &before);
        self.store.put(record, old)?;
        let result = self
            .apply(Some(record), old, &before, &facts, &first_in)
            .and_then(|()| self.enable_localnet(record, old));
        if let Err(error) = result {
            return Err(self.undo(record, &facts, error));
        }
        self.flush_conntrack(record, old, &facts);
        Ok(())
    }

    /// Takes a record's rules out of the kernel, and then the record away.
    pub fn remove(&self, record: &Record) -> Result<()> {
        let before = self.store.parts(record.backend)?;
        let facts = self.known_facts(record.backend)?;
        self.disable_localnet(record)?;
        self.apply(None, Some(record), &before, &facts, &BTreeSet::new())?;
        self.store.remove(record)?;
        if flush::concerns(record) {
            // The addresses of now, for what is left behind in conntrack.
            let facts = self.host.node_facts().unwrap_or(facts);
            self.flush_conntrack_of(None, Some(record), &facts);
        }
        Ok(())
    }

    /// Brings everything of a backend into the state that the records ask for.
    pub fn restore(
        &self,
        kind: BackendKind,
        purge: &BTreeSet<String>,
        facts: &NodeFacts,
    ) -> Result<()> {
        self.restore_without(kind, None, purge, facts, &BTreeSet::new())
    }

    fn apply(
        &self,
        added: Option<&Record>,
        removed: Option<&Record>,
        before: &BTreeSet<Part>,
        facts: &NodeFacts,
        first_in: &BTreeSet<Family>,
    ) -> Result<()> {
        let Some(record) = added.or(removed) else {
            return Ok(());
        };
        let kind = record.backend;
        let related = self.related(added, removed)?;
        let after = self.parts_with(kind, added, record, before)?;
        let known = self.known_facts(kind)?;
        let keep_base = self.kept_bases(kind)?;
        let change = Change {
            added,
            removed,
            related: &related,
            parts_before: before,
            parts_after: &after,
            facts_before: &known,
            facts,
            keep_base: &keep_base,
        };
        // After a kill the kernel may hold what an earlier record said, and a transaction that
        // builds on the present one could succeed and leave some of that behind.
        let outcome = match self.store.begin_change(kind)? {
            true => Outcome::NeedsRestore("an earlier change was interrupted".into()),
            false => backend::of(kind).change(self.host, &change)?,
        };
        match outcome {
            Outcome::Done => {
                self.remember_facts(kind, &known, facts)?;
                self.store.end_change(kind)
            }
            Outcome::NeedsRestore(_) => {
                let gone = if added.is_none() { Some(record) } else { None };
                let purge = BTreeSet::from_iter(removed.map(|removed| removed.chain.clone()));
                self.restore_without(kind, gone, &purge, facts, first_in)
            }
        }
    }

    /// Restores from all records but `gone`, whose families are brought in order nevertheless.
    fn restore_without(
        &self,
        kind: BackendKind,
        gone: Option<&Record>,
        purge: &BTreeSet<String>,
        facts: &NodeFacts,
        first_in: &BTreeSet<Family>,
    ) -> Result<()> {
        let (mut records, problems) = self.store.all()?;
        for problem in problems {
            self.host.warn(problem);
        }
        let families = gone.map(|record| record.families().collect()).unwrap_or_default();
        records.retain(|record| {
            record.backend == kind && gone.is_none_or(|gone| record.id() != gone.id())
        });
        let keep_base = self.kept_bases(kind)?;
        let desired = Desired {
            records: &records,
            purge,
            families: &families,
            facts,
            keep_base: &keep_base,
            first_in,
        };
        let kept = backend::of(kind).restore(self.host, &desired)?;
        for family in kept {
            self.store.set_note(&kept_base_note(kind, family), Some(""))?;
        }
        self.remember_facts(kind, &NodeFacts::default(), facts)?;
        self.store.end_change(kind)
    }

    /// After a failed ADD: the record goes, and with it whatever was done. Both errors are reported.
    fn undo(&self, record: &Record, facts: &NodeFacts, error: Error) -> Error {
        let purge = BTreeSet::from([record.chain.clone()]);
        let undone =
            self.disable_localnet(record).and_then(|()| self.store.remove(record)).and_then(|()| {
                self.restore_without(record.backend, Some(record), &purge, facts, &BTreeSet::new())
            });
        match undone {
            Ok(()) => error,
            // A backend that does not work at all has also left nothing behind.
            Err(Error::Tool { .. }) if matches!(error, Error::Tool { .. }) => error,
            Err(second) => Error::Several {
                what: "the ADD failed, and undoing it as well".into(),
                errors: vec![error, second],
            },
        }
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

    fn first_families(&self, record: &Record, before: &BTreeSet<Part>) -> BTreeSet<Family> {
        record.families().filter(|family| !before.contains(&Part::Base(*family))).collect()
    }

    fn kept_bases(&self, kind: BackendKind) -> Result<BTreeSet<Family>> {
        let mut kept = BTreeSet::new();
        for family in Family::ALL {
            if self.store.note(&kept_base_note(kind, family))?.is_some() {
                kept.insert(family);
            }
        }
        Ok(kept)
    }

    /// The node as the rules of a backend know it.
    fn known_facts(&self, kind: BackendKind) -> Result<NodeFacts> {
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
    fn enable_localnet(&self, record: &Record, old: Option<&Record>) -> Result<()> {
        if let Some(device) = old.and_then(|old| old.localnet_device.as_ref())
            && record.localnet_device.as_ref() != Some(device)
        {
            self.release_localnet(device, &record.id())?;
        }
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
        self.store.set_note(&localnet_note(device), Some(&present))?;
        sysctl::write(&path, "1").map_err(failed)
    }

    fn disable_localnet(&self, record: &Record) -> Result<()> {
        record
            .localnet_device
            .as_ref()
            .map_or(Ok(()), |device| self.release_localnet(device, &record.id()))
    }

    /// Gives `route_localnet` back its former value when nothing but `id` needs it. Before the guard
    /// goes.
    fn release_localnet(&self, device: &str, id: &str) -> Result<()> {
        if self.store.has_other(&IndexKey::Localnet(device.to_owned()), id)? {
            return Ok(());
        }
        let note = localnet_note(device);
        let Some(former) = self.store.note(&note)? else {
            return Ok(());
        };
        match sysctl::write(&localnet_path(device), &former) {
            // The device went with its pod.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => self.host.warn(format!(
                "cannot set net.ipv4.conf.{device}.route_localnet back to {former}: {error}"
            )),
            Ok(()) => {}
        }
        self.store.set_note(&note, None)
    }

    fn flush_conntrack(&self, record: &Record, old: Option<&Record>, facts: &NodeFacts) {
        if flush::concerns(record) || old.is_some_and(flush::concerns) {
            self.flush_conntrack_of(Some(record), old, facts);
        }
    }

    /// A flow whose first packet was seen before the rules changed goes on as before, for UDP as long
    /// as packets come. A failure costs those flows, not the call.
    fn flush_conntrack_of(
        &self,
        added: Option<&Record>,
        removed: Option<&Record>,
        facts: &NodeFacts,
    ) {
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

/// The first backend that works, in the order of preference.
pub fn probe(host: &Host) -> Result<BackendKind> {
    let mut reasons = Vec::new();
    for kind in BackendKind::ALL {
        match backend::of(kind).probe(host) {
            Ok(()) => return Ok(kind),
            Err(reason) => reasons.push(format!("{kind}: {reason}")),
        }
    }
    Err(Error::NoBackend { reasons: reasons.join("; ") })
}

fn facts_note(kind: BackendKind) -> String {
    format!("facts-{kind}")
}

fn kept_base_note(kind: BackendKind, family: Family) -> String {
    format!("base-{kind}-{family}")
}

fn localnet_note(device: &str) -> String {
    format!("localnet-{device}")
}

fn localnet_path(device: &str) -> [&str; 5] {
    ["net", "ipv4", "conf", device, "route_localnet"]
}
