//! What is left of attachments whose network namespace is gone, without any call of a runtime.

use super::Engine;
use crate::error::{Error, Result};
use crate::record::Record;
use crate::sys::namespace::{self, Life};
use crate::sys::store::{Damaged, Newer};

/// What a collection came to, or would.
#[derive(Debug, Default)]
pub struct Collected {
    /// Attachments that are gone with their rules.
    pub removed: Vec<Record>,
    /// How many attachments stay.
    pub live: usize,
    /// Attachments that stay, because this process cannot see whether they live.
    pub unseen: Vec<Record>,
    /// Records that could not be read, and are gone with what their index named.
    pub repaired: Vec<Damaged>,
    /// Records that could not be read and stay: their container may be alive.
    pub unclear: Vec<Damaged>,
    /// Records that only a newer version can read, and tell whose they are.
    pub newer: Vec<Newer>,
    /// What could not be removed.
    pub failed: Vec<(String, Error)>,
}

impl Engine<'_> {
    /// Removes the attachments whose network namespace is gone; an attachment without a path counts as
    /// alive. Carries on after an error. `dry` changes nothing and says what would go.
    pub fn collect(&self, dry: bool) -> Result<Collected> {
        let mut collected = Collected::default();
        let (records, _) = self.store.all()?;
        for record in records {
            match namespace::life(&record) {
                Life::Lives => {
                    collected.live += 1;
                    continue;
                }
                Life::Unknown => {
                    collected.unseen.push(record);
                    continue;
                }
                Life::Gone => {}
            }
            match if dry { Ok(()) } else { self.remove(&record) } {
                Ok(()) => collected.removed.push(record),
                Err(error) => collected.failed.push((record.attachment.to_string(), error)),
            }
        }
        let (damaged, newer) = self.store.unreadable()?;
        collected.newer = newer;
        for damaged in damaged {
            // Nothing but the path tells a dead container from one that lives.
            let life = |netns: &String| namespace::life_at(netns, damaged.view);
            if damaged.netns.as_ref().is_none_or(|netns| life(netns) != Life::Gone) {
                collected.unclear.push(damaged);
                continue;
            }
            match if dry { Ok(()) } else { self.repair(&damaged.id) } {
                Ok(()) => collected.repaired.push(damaged),
                Err(error) => collected.failed.push((format!("record {}", damaged.id), error)),
            }
        }
        Ok(collected)
    }

    /// Other attachments that share a port with the record, whatever their backends.
    pub fn rivals(&self, record: &Record) -> Result<Vec<Record>> {
        self.store.sharing(&record.port_keys().collect(), record.id())
    }

    /// Removes `rivals` whose network namespace is gone, and returns the others. A dead pod's claim of an
    /// address would go before a living one's of any, and an older one would have the port back with the
    /// newer one's DEL.
    pub fn remove_dead_rivals(&self, record: &Record) -> Result<Vec<Record>> {
        let rivals = self.rivals(record)?;
        let is_dead = |other: &&Record| namespace::life(other) == Life::Gone;
        let dead: Vec<&Record> = rivals.iter().filter(is_dead).collect();
        if dead.is_empty() {
            return Ok(rivals);
        }
        for other in dead {
            if let Err(error) = self.remove(other) {
                self.host.warn(format!(
                    "{} is dead, has the same port, and cannot be removed: {error}: {}",
                    other.attachment,
                    error.details()
                ));
            }
        }
        self.rivals(record)
    }
}
