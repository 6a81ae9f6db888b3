//! Finding records by what they have, without reading all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::file::{entries, ignore_absent, touch};
use super::{Found, Store, record_path};
use crate::error::{Error, Result};
use crate::model::BackendKind;
use crate::record::{IndexKey, Part, Record};

impl Store {
    /// Every other record that shares one of the keys, oldest first.
    pub fn sharing(&self, keys: &BTreeSet<IndexKey>, id: &str) -> Result<Vec<Record>> {
        let mut found = BTreeMap::new();
        for key in keys.iter().filter(|key| !self.is_alone(key, id)) {
            for other in self.users(key)? {
                if other == id || found.contains_key(&other) {
                    continue;
                }
                match self.get(&other)?.record().filter(|record| record.index_keys().contains(key))
                {
                    Some(record) => {
                        found.insert(other, record);
                    }
                    // A kill left the entry behind.
                    None if !record_path(&self.dir, &other).exists() => {
                        self.index_remove(key, &other)?
                    }
                    None => {}
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
        let dir = self.index_dir(key);
        for other in entries(&dir)? {
            let other = other?;
            if other == id {
                continue;
            }
            let has_key = match self.get(&other)? {
                Found::Record(record) => has_key(&record),
                // Its entry is all that can be read of it.
                Found::Newer(_) => true,
                Found::Damaged(_) | Found::None => false,
            };
            if has_key {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A record of a backend that a newer plugin has written in a format of its own, and the format:
    /// what it asks for is not known.
    pub fn newer(&self, backend: BackendKind) -> Result<Option<(PathBuf, u32)>> {
        for id in self.users(&IndexKey::Backend(backend))? {
            if let Found::Newer(format) = self.get(&id)? {
                return Ok(Some((record_path(&self.dir, &id), format)));
            }
        }
        Ok(None)
    }

    /// The parts of a backend that records need.
    pub fn parts(&self, backend: BackendKind) -> Result<BTreeSet<Part>> {
        let mut parts = BTreeSet::new();
        for name in entries(&self.dir.join("index").join(format!("parts-{backend}")))? {
            let name = name?;
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
        let index = self.dir.join("index");
        let mut keys = Vec::new();
        for kind in entries(&index)? {
            let kind = kind?;
            for name in entries(&index.join(&kind))? {
                let name = name?;
                if index.join(&kind).join(&name).join(id).exists() {
                    keys.push((kind.clone(), name));
                }
            }
        }
        Ok(keys)
    }

    fn users(&self, key: &IndexKey) -> Result<Vec<String>> {
        entries(&self.index_dir(key))?.collect()
    }

    fn index_dir(&self, key: &IndexKey) -> PathBuf {
        let (kind, name) = key.path();
        self.dir.join("index").join(kind).join(name)
    }

    pub(super) fn index_add(&self, key: &IndexKey, id: &str) -> Result<()> {
        let path = self.index_dir(key).join(id);
        let is_first = touch(&path).map_err(|error| {
            Error::io(format!("write the index entry {}", path.display()), error)
        })?;
        let mut alone = self.alone.borrow_mut();
        match is_first {
            true => alone.insert(key.clone(), id.to_owned()),
            false => alone.remove(key),
        };
        Ok(())
    }

    /// Whether this call has made the first entry of a key, for this record.
    fn is_alone(&self, key: &IndexKey, id: &str) -> bool {
        self.alone.borrow().get(key).is_some_and(|first| first == id)
    }

    pub(super) fn index_remove(&self, key: &IndexKey, id: &str) -> Result<()> {
        self.index_entry_remove(&self.index_dir(key), id)
    }

    pub(super) fn index_entry_remove(&self, dir: &Path, id: &str) -> Result<()> {
        if self.only_reads {
            return Ok(());
        }
        ignore_absent(fs::remove_file(dir.join(id))).map_err(|error| {
            Error::io(format!("remove the index entry {}", dir.display()), error)
        })?;
        match fs::remove_dir(dir) {
            Err(error)
                if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) =>
            {
                Err(Error::io(format!("remove the index entry {}", dir.display()), error))
            }
            _ => Ok(()),
        }
    }
}
