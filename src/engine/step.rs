//! One step in the kernel: the fast path, and the slow one where the kernel is not as recorded.

use std::collections::BTreeSet;

use super::Engine;
use crate::backend::{Change, Desired, Outcome};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::model::{BackendKind, Family};
use crate::record::{IndexKey, Part, Record};

/// What goes with a record.
#[derive(Default)]
pub(super) struct Lost {
    pub chains: BTreeSet<String>,
    pub families: BTreeSet<Family>,
    pub parts: BTreeSet<Part>,
    /// Ids of records that nothing is put back for, although they are there.
    pub without: BTreeSet<String>,
}

/// What the kernel has its state from before a step.
pub(super) struct Before {
    /// Some record has the backend.
    pub is_used: bool,
    pub parts: BTreeSet<Part>,
    pub facts: NodeFacts,
}

impl Lost {
    pub fn of(records: &[&Record]) -> Self {
        Lost {
            chains: records.iter().map(|record| record.chain.clone()).collect(),
            families: records.iter().flat_map(|record| record.families()).collect(),
            parts: records.iter().flat_map(|record| record.parts()).collect(),
            without: BTreeSet::new(),
        }
    }
}

impl Engine<'_> {
    pub(super) fn before(&self, kind: BackendKind, is_used: bool) -> Result<Before> {
        Ok(Before { is_used, parts: self.store.parts(kind)?, facts: self.known_facts(kind)? })
    }

    /// `first` are the parts that nothing needed before.
    pub(super) fn apply(
        &self,
        added: Option<&Record>,
        removed: Option<&Record>,
        before: &Before,
        facts: &NodeFacts,
        first: &BTreeSet<Part>,
    ) -> Result<()> {
        let Some(record) = added.or(removed) else {
            return Ok(());
        };
        let kind = record.backend;
        let related = self.related(added, removed)?;
        let Before { is_used, parts, facts: known } = before;
        let after = self.parts_with(kind, added, record.id(), parts)?;
        let kept = self.kept(kind, parts)?;
        let change = Change {
            added,
            removed,
            related: &related,
            parts_before: parts,
            parts_after: &after,
            is_first: !is_used,
            facts_before: known,
            facts,
            kept: &kept,
        };
        let backend = self.backend(kind)?;
        // A repeated ADD is how runtimes and people repair an attachment, and a step from a record to
        // the same record changes nothing on the fast path.
        let is_whole = match (added, removed) {
            (Some(_), Some(old)) => backend
                .problems(self.host, old, &related, parts, known, true)
                .is_ok_and(|problems| problems.is_empty()),
            _ => true,
        };
        let programs = self.host.programs();
        let outcome = if is_whole {
            backend.change(self.host, &change)?
        } else {
            Outcome::NeedsRestore("the attachment's rules are not as recorded".into())
        };
        let done = match outcome {
            Outcome::Done => self.remember_facts(kind, known, facts),
            Outcome::NeedsRestore(reason) => {
                let gone = if added.is_none() { Some(record) } else { None };
                // The note of a DEL may be missing or old, and the slow path writes all of it anew.
                let now = if added.is_none() { self.host.node_facts().ok() } else { None };
                let facts = now.as_ref().unwrap_or(facts);
                let lost: Vec<&Record> = removed.into_iter().collect();
                self.restore_without(kind, gone, added, &Lost::of(&lost), facts, first)
                    .map_err(|error| error.after(&reason))
            }
        };
        if done.is_ok() && self.host.programs() != programs {
            // The next call is slower without, and no worse.
            drop(self.remember_kernel());
        }
        done
    }

    /// Restores from all records but `gone`. `added` must come to be there, and `lost` goes, as far as
    /// no record has it.
    pub(super) fn restore_without(
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
        // In chains others' rules stay; tables and maps are made anew, from what is known.
        if kind != BackendKind::Iptables
            && let Some((path, format)) = self.store.newer(kind)?
        {
            let reason = format!(
                "format {format} is a newer portmap's, whose hostPorts would be lost where those of {kind} are made anew"
            );
            return Err(Error::Record { path, reason });
        }
        records.retain(|record| {
            record.backend == kind
                && gone.is_none_or(|gone| record.id() != gone.id())
                && !lost.without.contains(record.id())
        });
        let gone = gone.map(Record::id).unwrap_or_default();
        let mut parts = self.parts_with(kind, None, gone, &self.store.parts(kind)?)?;
        parts.extend(records.iter().flat_map(Record::parts));
        let others = parts.union(&lost.parts).filter(|part| !first.contains(part)).copied();
        let known = self.kept(kind, &others.collect())?;
        let desired = Desired {
            records: &records,
            parts: &parts,
            added,
            purge: &lost.chains,
            families: &lost.families,
            facts,
            kept: &known,
            gone: &lost.parts,
            first,
        };
        let mut kept = BTreeSet::new();
        let result = self.backend(kind)?.restore(self.host, &desired, &mut kept);
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
        // What is added has a flush of its own.
        let is_added = |record: &Record| added.is_some_and(|added| added.id() == record.id());
        self.flush_restored(records.iter().filter(|record| !is_added(record)), facts);
        match self.remember_facts(kind, &NodeFacts::default(), facts) {
            // The rules are right. Where the disk is full, DEL is what makes room.
            Err(error) if added.is_none() => {
                self.host.warn(format!("{error}: {}", error.details()));
                Ok(())
            }
            other => other,
        }
    }

    /// Other records of the same backend that share a port or a pod address with either.
    pub(super) fn related(
        &self,
        added: Option<&Record>,
        removed: Option<&Record>,
    ) -> Result<Vec<Record>> {
        let keys = added.into_iter().chain(removed).flat_map(Record::rival_keys).collect();
        let (id, kind) = added.or(removed).map(|record| (record.id(), record.backend)).unzip();
        let mut records = self.store.sharing(&keys, id.unwrap_or_default())?;
        records.retain(|record| Some(record.backend) == kind);
        Ok(records)
    }

    /// The parts that are needed when `added` is there and the record `id` is otherwise not.
    pub(super) fn parts_with(
        &self,
        kind: BackendKind,
        added: Option<&Record>,
        id: &str,
        before: &BTreeSet<Part>,
    ) -> Result<BTreeSet<Part>> {
        let mut parts = added.map(Record::parts).unwrap_or_default();
        for part in before {
            if !parts.contains(part) && self.store.has_other(&IndexKey::Part(kind, *part), id)? {
                parts.insert(*part);
            }
        }
        Ok(parts)
    }

    /// Those of the parts that were there before this plugin needed them.
    pub(super) fn kept(&self, kind: BackendKind, parts: &BTreeSet<Part>) -> Result<BTreeSet<Part>> {
        let mut kept = BTreeSet::new();
        for part in parts.iter().filter(|part| matches!(part, Part::Base(_) | Part::Mark(..))) {
            if self.store.has_note(&kept_note(kind, *part))? {
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

    pub(super) fn remember_facts(
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
}

fn facts_note(kind: BackendKind) -> String {
    format!("facts-{kind}")
}

fn kept_note(kind: BackendKind, part: Part) -> String {
    format!("kept-{kind}-{}", part.name())
}
