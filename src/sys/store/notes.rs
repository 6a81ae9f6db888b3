//! Notes: small facts that hold until the next boot.

use std::fs;
use std::io::ErrorKind;

use super::Store;
use super::file::{entries, ignore_absent, write_atomically};
use crate::error::{Error, Result};

impl Store {
    /// A note, if it was made since boot.
    pub fn note(&self, name: &str) -> Result<Option<String>> {
        let path = self.dir.join("notes").join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("read {}", path.display()), error)),
        }
    }

    /// Names of the notes that begin with `prefix`.
    pub fn notes(&self, prefix: &str) -> Result<Vec<String>> {
        let dir = self.dir.join("notes");
        let names = entries(&dir)?;
        names.filter(|name| name.as_ref().map_or(true, |name| name.starts_with(prefix))).collect()
    }

    /// Makes a note, or removes it; a store that is only read keeps none.
    pub fn set_note(&self, name: &str, text: Option<&str>) -> Result<()> {
        if self.only_reads {
            return Ok(());
        }
        let path = self.dir.join("notes").join(name);
        let result = match text {
            Some(text) => write_atomically(&path, text.as_bytes()),
            None => ignore_absent(fs::remove_file(&path)),
        };
        result.map_err(|error| Error::io(format!("write {}", path.display()), error))
    }
}
