//! What forwards on a node, as records and kernel tell it, and the state of every claim. Pure.

use std::collections::BTreeMap;

use crate::backend::{Counters, Leftover};
use crate::claims::{Holding, holdings};
use crate::model::{BackendKind, Claim};
use crate::record::Record;

/// An attachment and what was found of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub record: Record,
    /// Whether its network namespace exists, as far as its path is known.
    pub alive: bool,
    /// Where the kernel differs from the record; `None` if it could not be read.
    pub problems: Option<Vec<String>>,
}

/// Everything that forwards.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Oldest first.
    pub attached: Vec<Attached>,
    pub counters: BTreeMap<(BackendKind, Claim), Counters>,
    /// What eBPF programs have done with packets, by reason; empty where there are none.
    pub packets: BTreeMap<&'static str, u64>,
    /// What has no record.
    pub leftovers: Vec<Leftover>,
}

/// How a claim is doing. Of several that hold, the first one is what an operator has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// The container is gone, and the claim takes its packets to nowhere.
    Dead,
    /// The kernel could not be read.
    Unknown,
    /// The attachment is not in the kernel as recorded.
    Missing,
    /// Somebody else has all of its packets.
    Shadowed,
    Active,
}

impl State {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            State::Dead => "dead",
            State::Unknown => "unknown",
            State::Missing => "missing",
            State::Shadowed => "shadowed",
            State::Active => "active",
        }
    }
}

/// One claim of the node.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    pub holding: Holding<'a>,
    pub attached: &'a Attached,
    /// Of the claim's present owner alone.
    pub counters: Option<&'a Counters>,
}

impl Entry<'_> {
    #[must_use]
    pub fn state(&self) -> State {
        match (&self.attached.problems, self.holding.shadowed_by) {
            _ if !self.attached.alive => State::Dead,
            (None, _) => State::Unknown,
            (Some(problems), _) if !problems.is_empty() => State::Missing,
            (_, Some(_)) => State::Shadowed,
            (_, None) => State::Active,
        }
    }
}

impl Inventory {
    /// The claims of all attachments, in the order of [`holdings`] of `records`, which are those of the
    /// inventory.
    #[must_use]
    pub fn entries<'a>(&'a self, records: &'a [Record]) -> Vec<Entry<'a>> {
        let by_id: BTreeMap<&str, &Attached> =
            self.attached.iter().map(|attached| (attached.record.id(), attached)).collect();
        holdings(records)
            .into_iter()
            .filter_map(|holding| {
                let attached = by_id.get(holding.record.id())?;
                let key = (holding.record.backend, holding.forward.claim);
                let counters = self.counters.get(&key).filter(|_| holding.shadowed_by.is_none());
                Some(Entry { holding, attached, counters })
            })
            .collect()
    }

    /// All records, oldest first.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.attached.iter().map(|attached| attached.record.clone()).collect()
    }
}

/// Who is behind an attachment: the pod's namespace and name, or where no runtime has told them, the
/// beginning of the container's ID.
#[must_use]
pub fn owner(record: &Record) -> String {
    match record.pod.name.as_str() {
        "" => short_id(&record.attachment.container_id),
        name => format!("{}/{name}", record.pod.namespace),
    }
}

/// The beginning of a container ID, as container tools show it.
#[must_use]
pub fn short_id(container_id: &str) -> String {
    container_id.chars().take(12).collect()
}
