//! Finding records by what they have, without reading all.
//!
//! Who has a key of a kind of which few do ([`IndexKey::is_of_few`]) stands in one line, so that a port costs a
//! call as little as can be. For the others there is a directory with an empty file for each record, which
//! comes or goes without a look at the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
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
        let place = Place::of(key);
        let found = match place.is_of_few {
            true => self.others(key, id)?.iter().find_map(|other| look(other)),
            false => self
                .files
                .find(&place.path, |other| if other == id { None } else { look(other) })?,
        };
        found.unwrap_or(Ok(false))
    }

    /// Whether there is any record of the backend, by the names of files alone: none is read.
    pub fn is_used(&self, backend: BackendKind) -> Result<bool> {
        let is_there = |id: &str| self.files.exists(&record_name(id)).then_some(());
        Ok(self.files.find(&Place::of(&IndexKey::Backend(backend)).path, is_there)?.is_some())
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
            for name in self.files.names::<Vec<String>>(&["index/", &kind].concat())? {
                let place = Place::new(&kind, &name);
                let is_there = match place.is_of_few {
                    true => self.users_at(&place)?.contains(id),
                    false => self.files.exists(&place.entry(id)),
                };
                if is_there {
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
        let users = self.users_at(&Place::of(key))?;
        let others = but_id(&users);
        self.users.borrow_mut().insert(key.clone(), users);
        Ok(others)
    }

    fn users_at(&self, place: &Place) -> Result<BTreeSet<String>> {
        if !place.is_of_few {
            return self.files.names(&place.path);
        }
        let line = self.files.read_line(&place.path);
        let line = line.map_err(|error| self.files.failed("read", &place.path, error))?;
        let line = line.unwrap_or_default();
        Ok(line.split(SEPARATOR).filter(|id| !id.is_empty()).map(str::to_owned).collect())
    }

    /// Of a key of which few have one; nobody is the end of it.
    fn set_users(&self, place: &Place, users: &BTreeSet<String>) -> io::Result<()> {
        if users.is_empty() {
            return self.files.remove(&place.path);
        }
        let ids: Vec<&str> = users.iter().map(String::as_str).collect();
        self.files.replace_line(&place.path, &ids.join(SEPARATOR))
    }

    pub(super) fn index_add(&self, key: &IndexKey, id: &str) -> Result<()> {
        let place = Place::of(key);
        let failed = |error| self.files.failed("write the index entry", &place.path, error);
        let is_first = match place.is_of_few {
            true => self.files.make_line(&place.path, id),
            false => self.files.touch(&place.entry(id)),
        };
        let is_first = is_first.map_err(failed)?;
        if is_first {
            self.users.borrow_mut().insert(key.clone(), BTreeSet::from([id.to_owned()]));
        } else if place.is_of_few {
            let mut users = self.users_at(&place)?;
            if users.insert(id.to_owned()) {
                self.set_users(&place, &users).map_err(failed)?;
            }
            self.users.borrow_mut().insert(key.clone(), users);
        } else if let Some(users) = self.users.borrow_mut().get_mut(key) {
            users.insert(id.to_owned());
        }
        Ok(())
    }

    pub(super) fn index_remove(&self, key: &IndexKey, id: &str) -> Result<()> {
        let known = self.users.borrow_mut().remove(key);
        let left = self.index_entry_remove(&Place::of(key), id, known)?;
        if let Some(left) = left {
            self.users.borrow_mut().insert(key.clone(), left);
        }
        Ok(())
    }

    /// Removes an entry. Takes who is `known` to have the key, and returns who is left, as far as that had to be known.
    pub(super) fn index_entry_remove(
        &self,
        place: &Place,
        id: &str,
        known: Option<BTreeSet<String>>,
    ) -> Result<Option<BTreeSet<String>>> {
        if self.only_reads {
            return Ok(known);
        }
        let failed = |error| self.files.failed("remove the index entry", &place.path, error);
        if place.is_of_few {
            let mut users = known.map_or_else(|| self.users_at(place), Ok)?;
            if users.remove(id) {
                match self.set_users(place, &users) {
                    // Removing is what makes room, so it must not need any. An id without a record is nobody.
                    Err(error) if is_no_room(&error) => {}
                    written => written.map_err(failed)?,
                }
            }
            return Ok(Some(users));
        }
        let left = known.map(|mut users| {
            users.remove(id);
            users
        });
        self.files.remove(&place.entry(id)).map_err(failed)?;
        // Nobody is known of: the directory tells.
        if left.as_ref().is_none_or(BTreeSet::is_empty) {
            self.files.remove_empty_dir(&place.path).map_err(failed)?;
        }
        Ok(left)
    }
}

fn is_no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Between the ids of records in a line.
const SEPARATOR: &str = "/";

/// Where it stands who has a key.
pub(super) struct Place {
    path: String,
    is_of_few: bool,
}

impl Place {
    pub fn new(kind: &str, name: &str) -> Self {
        Place { path: ["index/", kind, "/", name].concat(), is_of_few: IndexKey::is_of_few(kind) }
    }

    fn of(key: &IndexKey) -> Self {
        let (kind, name) = key.path();
        Place::new(&kind, &name)
    }

    fn entry(&self, id: &str) -> String {
        [&self.path, "/", id].concat()
    }
}

/// The directory in which records of a backend have an entry each.
pub(super) fn dir_of_backend(kind: BackendKind) -> String {
    Place::of(&IndexKey::Backend(kind)).path
}
