//! Notes: small facts that hold until the next boot.

use std::collections::BTreeSet;

use super::{MOVING, Store, moving_name, record_name};
use crate::error::Result;

impl Store {
    /// A note, if it was made since boot.
    pub fn note(&self, name: &str) -> Result<Option<String>> {
        self.files.read_text(&path(name))
    }

    /// Whether there is a note. Those who change something ask for several that are not there: they are
    /// known after the first question.
    pub fn has_note(&self, name: &str) -> Result<bool> {
        self.with_notes(|notes| notes.contains(name))
    }

    /// Names of the notes that begin with `prefix`.
    pub fn notes(&self, prefix: &str) -> Result<Vec<String>> {
        self.with_notes(|notes| {
            notes.iter().filter(|name| name.starts_with(prefix)).cloned().collect()
        })
    }

    /// Makes a note, or removes it; a store that is only read keeps none.
    pub fn set_note(&self, name: &str, text: Option<&str>) -> Result<()> {
        if self.only_reads {
            return Ok(());
        }
        let path = path(name);
        let result = match text {
            Some(text) => self.files.replace(&path, text.as_bytes()),
            None => self.files.remove(&path),
        };
        result.map_err(|error| self.files.failed("write", &path, error))?;
        if let Some(known) = &mut *self.notes.borrow_mut() {
            match text {
                Some(_) => known.insert(name.to_owned()),
                None => known.remove(name),
            };
        }
        Ok(())
    }

    /// Makes a record's own file a note as well, staged or in place, under a second name: nothing has to be
    /// written. False where that cannot be done, as on a file system without hard links.
    pub fn set_note_of_record(&self, name: &str, id: &str, is_staged: bool) -> bool {
        let file = if is_staged { moving_name(id, MOVING[0]) } else { record_name(id) };
        let is_made = !self.only_reads && self.files.link(&file, &path(name)).is_ok();
        if let Some(known) = self.notes.borrow_mut().as_mut().filter(|_| is_made) {
            known.insert(name.to_owned());
        }
        is_made
    }

    /// Answers from the names of all notes, which are read once: the lock keeps them from changing.
    fn with_notes<T>(&self, answer: impl FnOnce(&BTreeSet<String>) -> T) -> Result<T> {
        let mut known = self.notes.borrow_mut();
        let names = match known.take() {
            Some(names) => names,
            None => self.files.names("notes")?,
        };
        Ok(answer(known.insert(names)))
    }
}

fn path(name: &str) -> String {
    ["notes/", name].concat()
}
