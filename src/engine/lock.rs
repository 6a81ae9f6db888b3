//! Beginning: the node's lock, and what a killed call has left to be finished.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use super::Engine;
use super::step::Lost;
use crate::error::{Error, Result};
use crate::model::BackendKind;
use crate::record::Record;
use crate::sys::store::Store;
use crate::sys::{Host, namespace};

/// Name of the note with the record of a step that has begun, or a list of its records: if it is there, the
/// step was killed or failed half-way, and the kernel may be in any state between.
const PENDING_NOTE: &str = "pending";

/// Other calls have the lock for milliseconds.
const SOON: Duration = Duration::from_secs(1);

impl<'a> Engine<'a> {
    /// Waits for the node's lock.
    pub fn lock(host: &'a Host, state_dir: &Path) -> Result<Self> {
        Ok(Self::on(host, Store::open(state_dir, host.boot_id())?))
    }

    /// The node's state as it was opened: by [`Store::look`] for who only asks.
    #[must_use]
    pub fn on(host: &'a Host, store: Store) -> Self {
        Engine { host, store, unfinished: Vec::new() }
    }

    /// Waits for the node's lock in order to change something, and first finishes what a killed call
    /// has begun.
    pub fn lock_to_change(host: &'a Host, state_dir: &Path) -> Result<Self> {
        Self::lock(host, state_dir)?.ready()
    }

    /// As [`Engine::lock_to_change`], for what may be left undone rather than keep a pod waiting.
    pub fn lock_soon(host: &'a Host, state_dir: &Path) -> Result<Self> {
        Self::on(host, Store::open_within(state_dir, host.boot_id(), SOON)?).ready()
    }

    /// As [`Engine::lock_to_change`], for commands: who types one may be in a container, where nothing is
    /// found of what the records say, and where nobody misses it.
    ///
    /// # Errors
    ///
    /// One that names the network namespace to be in.
    pub fn lock_at_home(host: &'a Host, state_dir: &Path) -> Result<Self> {
        let engine = Self::lock(host, state_dir)?;
        engine.must_be_at_home(state_dir)?;
        engine.ready()
    }

    /// Fails as [`Engine::lock_at_home`].
    pub fn must_be_at_home(&self, state_dir: &Path) -> Result<()> {
        self.away(state_dir)?.map_or(Ok(()), |reason| Err(Error::Environment(reason)))
    }

    /// Why nothing of what the records say is to be found from here.
    pub(super) fn away(&self, state_dir: &Path) -> Result<Option<String>> {
        let own = namespace::own();
        let (records, _) = self.store.all()?;
        let mut nodes = records.iter().filter_map(|record| record.view).map(|view| view.node);
        let Some(first) = nodes.next() else {
            return Ok(None);
        };
        // A node may have got another one since, which later calls have seen.
        let is_away = own.is_some_and(|own| own != first && nodes.all(|node| node != own));
        Ok(is_away.then(|| {
            format!(
                "the hostPorts that {} tells of are in the network namespace net:[{first}], and this process is in another one: repeat it on the node itself, or in a container that has the node's network",
                state_dir.display()
            )
        }))
    }

    fn ready(mut self) -> Result<Self> {
        match self.recover() {
            Err(error @ Error::Busy { .. }) => Err(error),
            // The next call tries again; this one may well have to do with another backend.
            Err(error) => {
                self.host.warn(format!(
                    "an interrupted call is not finished yet: {error}: {}",
                    error.details()
                ));
                self.unfinished = self.pending()?.unwrap_or_default();
                Ok(self)
            }
            Ok(()) => Ok(self),
        }
    }

    fn recover(&self) -> Result<()> {
        let Some(pending) = self.pending()? else {
            return Ok(());
        };
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

    /// Records of the step that a killed call has begun.
    fn pending(&self) -> Result<Option<Vec<Record>>> {
        if !self.is_interrupted()? {
            return Ok(None);
        }
        // Written as a whole; one that cannot be read is another version's.
        let read = |note: String| match serde_json::from_str(&note) {
            Ok(record) => vec![record],
            Err(_) => serde_json::from_str(&note).unwrap_or_default(),
        };
        Ok(self.store.note(PENDING_NOTE)?.map(read))
    }

    /// Whether a step was begun and not finished; only to be asked by who has the lock.
    pub fn is_interrupted(&self) -> Result<bool> {
        self.store.has_note(PENDING_NOTE)
    }

    /// Notes which records a step is about, for the next call if this one is killed: one record, which is
    /// what nearly all steps are about, by its file, several by a list of them. `is_staged`: see
    /// [`Store::stage`].
    pub(super) fn begin(&self, records: &[&Record], is_staged: bool) -> Result<()> {
        if let ([record], []) = (records, &self.unfinished[..])
            && self.store.set_note_of_record(PENDING_NOTE, record.id(), is_staged)
        {
            return Ok(());
        }
        let pending: Vec<&Record> = self.unfinished.iter().chain(records.iter().copied()).collect();
        let text =
            serde_json::to_string(&pending).map_err(|error| Error::Decode(error.to_string()))?;
        self.store.set_note(PENDING_NOTE, Some(&text))
    }

    pub(super) fn finish(&self) -> Result<()> {
        match self.unfinished.is_empty() {
            true => self.store.set_note(PENDING_NOTE, None),
            false => self.begin(&[], false),
        }
    }
}
