//! Everything that forwards on this node, as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::Engine;
use super::health::{concerns_node, living, localnet_problem, node_problems};
use crate::backend::{self, Step};
use crate::claims::holdings;
use crate::error::{Error, Result};
use crate::inventory::{Attached, Inventory};
use crate::model::{BackendKind, Claim};
use crate::record::Record;
use crate::sys::Host;
use crate::sys::namespace::{self, Life};
use crate::sys::store::{has_records, is_of_another_boot};

/// Waits for the lock, if there is anything to be locked. Those who only look make no state directory, and
/// leave it to others to discard what is of another boot, which is nothing any more.
pub fn lock_to_look<'a>(host: &'a Host, state_dir: &Path) -> Result<Option<Engine<'a>>> {
    let is_there = has_records(state_dir)? && !is_of_another_boot(state_dir, host.boot_id())?;
    let engine = is_there.then(|| Engine::lock(host, state_dir)).transpose()?;
    if let Some(engine) = &engine
        && let Some(reason) = engine.away(state_dir)?
    {
        host.warn(reason);
    }
    Ok(engine)
}

/// All attachments with their state in the kernel, and what forwards without one. A backend that cannot
/// be read is a warning of the host, and leaves its part open.
pub fn survey(host: &Host, engine: Option<&Engine>) -> Result<Inventory> {
    let mut records = Vec::new();
    if let Some(engine) = engine {
        let (found, notes) = engine.store.all()?;
        notes.into_iter().for_each(|note| host.warn(note));
        records = found;
    }
    let mut inventory = Inventory::default();
    for kind in BackendKind::ALL {
        let own: Vec<Record> =
            records.iter().filter(|record| record.backend == kind).cloned().collect();
        if let Some(engine) = engine.filter(|_| !own.is_empty()) {
            engine.add_attachments(kind, &own, &mut inventory);
        }
        let backend = backend::of(kind);
        let packets = match backend.leftovers(host, &own) {
            Ok(leftovers) => {
                inventory.leftovers.extend(leftovers);
                backend.packets(host)
            }
            Err(error) => Err(error),
        };
        match packets {
            Ok(packets) => inventory.packets.extend(packets),
            Err(error) => unreadable(host, kind, &error),
        }
    }
    inventory.attached.sort_by_key(|attached| attached.record.order);
    Ok(inventory)
}

impl Engine<'_> {
    /// The records are all of their backend.
    fn add_attachments(&self, kind: BackendKind, records: &[Record], inventory: &mut Inventory) {
        let found = self.problems_of_all(kind, records);
        let mut problems = match found {
            Ok(problems) => problems.into_iter().map(Some).collect(),
            Err(error) => {
                unreadable(self.host, kind, &error);
                vec![None; records.len()]
            }
        };
        for (record, problems) in records.iter().zip(&mut problems) {
            let alive = namespace::life(record) != Life::Gone;
            let attached = Attached { record: record.clone(), alive, problems: problems.take() };
            inventory.attached.push(attached);
        }
        // Who is shadowed has no counters of its own: they are the claim's.
        let active = holdings(records)
            .iter()
            .filter(|holding| holding.shadowed_by.is_none())
            .map(|holding| holding.forward.claim)
            .collect();
        let counters = self.backend(kind).and_then(|backend| backend.counters(self.host, &active));
        // Where nothing can be read, that has been said.
        let counters = counters.unwrap_or_else(|_| BTreeMap::new());
        let of_kind = counters.into_iter().map(|(claim, counters)| ((kind, claim), counters));
        inventory.counters.extend(of_kind);
    }

    /// What a packet to a claim of the record meets, in its order.
    pub fn path(&self, record: &Record, claim: &Claim) -> Result<Vec<Step>> {
        let related = self.related(Some(record), None)?;
        let parts = self.store.parts(record.backend)?;
        let backend = self.backend(record.backend)?;
        backend.path(self.host, record, claim, &related, &parts)
    }

    /// [`Engine::problems`] of a backend's records, which are all of them.
    pub fn problems_of_all(
        &self,
        kind: BackendKind,
        records: &[Record],
    ) -> Result<Vec<Vec<String>>> {
        let (parts, facts) = (self.store.parts(kind)?, self.known_facts(kind)?);
        let mut problems = self.backend(kind)?.survey(self.host, records, &parts, &facts)?;
        if problems.iter().any(|problems| !problems.is_empty())
            && let Some(living) = living(records)
        {
            let without = self.backend(kind)?.survey(self.host, &living, &parts, &facts)?;
            let sound = living.iter().zip(&without).filter(|(_, problems)| problems.is_empty());
            let sound: BTreeSet<String> = sound.map(|(record, _)| record.id().to_owned()).collect();
            for (record, problems) in records.iter().zip(&mut problems) {
                if sound.contains(record.id()) {
                    problems.clear();
                }
            }
        }
        let now = match records.iter().any(concerns_node) {
            true => Some(self.host.node_facts()?),
            false => None,
        };
        for (record, problems) in records.iter().zip(&mut problems) {
            problems.extend(localnet_problem(record));
            problems.extend(now.iter().flat_map(|now| node_problems(record, &facts, now)));
        }
        Ok(problems)
    }
}

fn unreadable(host: &Host, kind: BackendKind, error: &Error) {
    host.warn(format!(
        "what {kind} has in the kernel cannot be read: {error}: {}",
        error.details()
    ));
}
