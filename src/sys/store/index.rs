//! Finding records by what they have, without reading all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::{Found, Store, record_name, record_path};
use crate::error::Result;
use crate::model::BackendKind;
use crate::record::{IndexKey, Part, Record};

impl Store {
    /// Every other record that shares one of the keys, oldest first.
    pub fn sharing(&self, keys: &BTreeSet<IndexKey>, id: &str) -> Result<Vec<Record>> {
        let mut found = BTreeMap::new();
        for key in keys {
            for other in self.others(key, id)? {
                if found.contains_key(&other) {
                    continue;
                }
                match self.get(&other)? {
                    Found::Record(record) if record.index_keys().contains(key) => {
                        found.insert(other, Record::clone(&record));
                    }
                    // A kill left the entry behind.
                    Found::None => self.index_remove(key, &other)?,
                    _ => {}
                }
            }
        }
        let mut records: Vec<Record> = found.into_values().collect();
        records.sort_by_key(|record| record.order);
        Ok(records)
    }

    /// Whether a record other than `id` has the key. Looks no further than the first, and reads no
    /// directory if one that was looked up has it: those of shared keys are as long as the node is busy.
    pub fn has_other(&self, key: &IndexKey, id: &str) -> Result<bool> {
        let has_key = |record: &Record| record.index_keys().contains(key);
        if self.looked_up.borrow().iter().any(|(other, record)| other != id && has_key(record)) {
            return Ok(true);
        }
        let look = |other: &str| match self.get(other) {
            Ok(Found::Record(record)) => has_key(&record).then_some(Ok(true)),
            // Its entry is all that can be read of it.
            Ok(Found::Newer(_)) => Some(Ok(true)),
            Ok(Found::Damaged(_) | Found::None) => None,
            Err(error) => Some(Err(error)),
        };
        let found =
            self.files.find(&dir_of(key), |other| if other == id { None } else { look(other) });
        found?.unwrap_or(Ok(false))
    }

    /// Whether there is any record of the backend, by the names of files alone: none is read.
    pub fn is_used(&self, backend: BackendKind) -> Result<bool> {
        let is_there = |id: &str| self.files.exists(&record_name(id)).then_some(());
        Ok(self.files.find(&dir_of(&IndexKey::Backend(backend)), is_there)?.is_some())
    }

    /// A record of a backend that a newer plugin has written in a format of its own, and the format:
    /// what it asks for is not known.
    pub fn newer(&self, backend: BackendKind) -> Result<Option<(PathBuf, u32)>> {
        for id in self.others(&IndexKey::Backend(backend), "")? {
            if let Found::Newer(format) = self.get(&id)? {
                return Ok(Some((record_path(self.files.root(), &id), format)));
            }
        }
        Ok(None)
    }

    /// The parts of a backend that records need.
    pub fn parts(&self, backend: BackendKind) -> Result<BTreeSet<Part>> {
        let mut parts = BTreeSet::new();
        for name in self.files.names::<Vec<String>>(&["index/parts-", backend.name()].concat())? {
            if let Some(part) = Part::parse(&name)
                && self.has_other(&IndexKey::Part(backend, part), "")?
            {
                parts.insert(part);
            }
        }
        Ok(parts)
    }

    /// Kinds and names of all keys under which a record is indexed, by whatever there is of it.
    pub fn index_of(&self, id: &str) -> Result<Vec<(String, String)>> {
        let mut keys = Vec::new();
        for kind in self.files.names::<Vec<String>>("index")? {
            for name in self.files.names::<Vec<String>>(&format!("index/{kind}"))? {
                if self.files.path(&index_dir(&kind, &name)).join(id).exists() {
                    keys.push((kind.clone(), name));
                }
            }
        }
        Ok(keys)
    }

    /// Records other than `id` that have a key.
    fn others(&self, key: &IndexKey, id: &str) -> Result<Vec<String>> {
        let but_id =
            |users: &BTreeSet<String>| users.iter().filter(|user| *user != id).cloned().collect();
        if let Some(users) = self.users.borrow().get(key) {
            return Ok(but_id(users));
        }
        let users = self.files.names(&dir_of(key))?;
        let others = but_id(&users);
        self.users.borrow_mut().insert(key.clone(), users);
        Ok(others)
    }

    pub(super) fn index_add(&self, key: &IndexKey, id: &str) -> Result<()> {
        let dir = dir_of(key);
        let entry = [&dir, "/", id].concat();
        let made = match key {
            // Somebody has them as long as the node is busy.
            IndexKey::Backend(_) | IndexKey::Part(..) => Ok(false),
            _ => self.files.make_dir(&dir),
        };
        let is_first = made
            .and_then(|made| Ok(self.files.touch(&entry)? || made))
            .map_err(|error| self.files.failed("write the index entry", &entry, error))?;
        let mut known = self.users.borrow_mut();
        if is_first {
            known.insert(key.clone(), BTreeSet::from([id.to_owned()]));
        } else if let Some(users) = known.get_mut(key) {
            users.insert(id.to_owned());
        }
        Ok(())
    }

    pub(super) fn index_remove(&self, key: &IndexKey, id: &str) -> Result<()> {
        let others = self.users.borrow().get(key).map(|users| users.iter().any(|user| user != id));
        self.index_entry_remove(&dir_of(key), id, others == Some(true))?;
        if let Some(users) = self.users.borrow_mut().get_mut(key) {
            users.remove(id);
        }
        Ok(())
    }

    /// Removes an entry, and its directory unless others are known to be there.
    pub(super) fn index_entry_remove(&self, dir: &str, id: &str, others: bool) -> Result<()> {
        if self.only_reads {
            return Ok(());
        }
        let removed = self.files.remove(&[dir, "/", id].concat());
        removed
            .and_then(|()| if others { Ok(()) } else { self.files.remove_empty_dir(dir) })
            .map_err(|error| self.files.failed("remove the index entry", dir, error))
    }
}

/// The directory of a key, with an entry for each record that has it.
pub(super) fn dir_of(key: &IndexKey) -> String {
    let (kind, name) = key.path();
    index_dir(&kind, &name)
}

pub(super) fn index_dir(kind: &str, name: &str) -> String {
    ["index/", kind, "/", name].concat()
}
