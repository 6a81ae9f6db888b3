//! The state directory: records, their index, and the lock that guards them and the kernel.
//!
//! ```text
//! lock                          flock(2) of whoever changes anything
//! boot                          boot id for which the rest holds
//! records/<id>.json             one record per attachment
//! records/<id>.in, <id>.out     one on its way in or out: its index entries may still exist
//! index/<kind>/<key>            which records have this port, pod address, chain …: a link with their
//!                               ids for a target, or a directory with empty files
//! notes/<name>                  small facts, such as the backend that was found to work; one that is a
//!                               record may be a second name of the record's file
//! ```
//!
//! The index always holds at least what the records say (it is written before a record and removed
//! after it), so a reader checks what it finds. What a kill in between leaves does no harm, and the
//! attachment's next call clears it away.

mod directory;
mod file;
mod holder;
mod index;
mod lock;
mod look;
mod notes;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::Flock;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::record::{FORMAT, IndexKey, Record, View};
use directory::open_state_dir;
pub use directory::{
    check_usable, has_records, is_of_another_boot, is_recorded, note_of, refusal, uses_backend,
};
use file::{Files, ignore_absent};
use index::Place;
use lock::{LOCK_DEADLINE, lock};
pub use look::Looked;

/// Where state lives unless `stateDir` says otherwise.
pub const DEFAULT_DIR: &str = "/run/cni/portmap";

/// Endings of the files of records on their way in and out.
const MOVING: [&str; 2] = ["in", "out"];

/// The state directory, locked until dropped.
pub struct Store {
    files: Files,
    /// What has been read, which the lock keeps from changing: records, by their ids; ...
    looked_up: RefCell<BTreeMap<String, Rc<Record>>>,
    /// ... the records that have a key; ...
    users: RefCell<BTreeMap<IndexKey, BTreeSet<String>>>,
    /// ... and the names of all notes.
    notes: RefCell<Option<BTreeSet<String>>>,
    /// Opened by [`Store::look`]: what a kill has left is skipped, not cleared away.
    only_reads: bool,
    /// `None` where nobody has ever locked it, and only readers are.
    _lock: Option<Flock<File>>,
}

/// A record's file as it was found.
#[derive(Debug)]
pub enum Found {
    None,
    Record(Rc<Record>),
    /// Not readable as a record: cut off or damaged.
    Damaged(String),
    /// Written by a newer version of this plugin.
    Newer(u32),
}

impl Found {
    #[must_use]
    pub fn record(self) -> Option<Rc<Record>> {
        match self {
            Found::Record(record) => Some(record),
            _ => None,
        }
    }
}

/// A record that cannot be read as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    pub id: String,
    pub reason: String,
    /// Path of the network namespace, where that much can be read.
    pub netns: Option<String>,
    /// As in a record.
    pub view: Option<View>,
}

/// A record that a newer version of this plugin has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newer {
    pub id: String,
    pub format: u32,
}

impl Store {
    /// Waits for the lock and opens the directory, which is made if it is missing. State of an
    /// earlier boot is discarded: the rules it describes are gone. `boot_id` is empty where it is not
    /// known, and then nothing is.
    pub fn open(dir: &Path, boot_id: &str) -> Result<Self> {
        Self::open_within(dir, boot_id, LOCK_DEADLINE)
    }

    /// As [`Store::open`], with another time to wait.
    pub fn open_within(dir: &Path, boot_id: &str, patience: Duration) -> Result<Self> {
        let files = Files::new(dir, open_state_dir(dir)?);
        let held = lock(&files, patience)?;
        let store = Store::new(files, Some(held));
        match store.files.read_text("boot")? {
            Some(known) if known == boot_id => return Ok(store),
            // A call that cannot tell the boot has not seen another one.
            Some(_) if boot_id.is_empty() => return Ok(store),
            Some(known) if known.is_empty() => {}
            Some(_) => store.discard()?,
            None => {}
        }
        store
            .files
            .replace("boot", boot_id.as_bytes())
            .map_err(|error| store.files.failed("write", "boot", error))?;
        Ok(store)
    }

    fn new(files: Files, held: Option<Flock<File>>) -> Self {
        Store {
            files,
            looked_up: RefCell::default(),
            users: RefCell::default(),
            notes: RefCell::default(),
            only_reads: false,
            _lock: held,
        }
    }

    fn discard(&self) -> Result<()> {
        for name in ["index", "notes", "records"] {
            ignore_absent(fs::remove_dir_all(self.files.path(name)))
                .map_err(|error| self.files.failed("remove", name, error))?;
        }
        Ok(())
    }

    /// The record called `id`.
    pub fn get(&self, id: &str) -> Result<Found> {
        if let Some(record) = self.looked_up.borrow().get(id) {
            return Ok(Found::Record(Rc::clone(record)));
        }
        let found = self.read(id)?;
        if let Found::Record(record) = &found {
            self.looked_up.borrow_mut().insert(id.to_owned(), Rc::clone(record));
        }
        Ok(found)
    }

    fn read(&self, id: &str) -> Result<Found> {
        let name = record_name(id);
        let text = self.files.read(&name);
        let text = text.map_err(|error| self.files.failed("read record", &name, error))?;
        Ok(text.map_or(Found::None, |text| parse(&text)))
    }

    /// Writes a record, durably and as a whole, where nobody takes it for one yet.
    pub fn stage(&self, record: &Record) -> Result<()> {
        let id = record.id();
        self.clear_moving(id)?;
        let [incoming, _] = MOVING.map(|way| moving_name(id, way));
        let json = record.to_json()?;
        let written = self.files.write(&incoming, json.as_bytes());
        written.map_err(|error| self.files.failed("write record", &record_name(id), error))
    }

    /// Puts a record in place that has been staged, and then takes back the index entries that only
    /// `replaced` had.
    pub fn put(&self, record: &Record, replaced: Option<&Record>) -> Result<()> {
        let id = record.id();
        let name = record_name(id);
        let [incoming, outgoing] = MOVING.map(|way| moving_name(id, way));
        let failed = |error| self.files.failed("write record", &name, error);
        let keys = record.index_keys();
        for key in &keys {
            self.index_add(key, id)?;
        }
        let former = if replaced.is_some() { self.get(id)?.record() } else { None };
        if former.is_some() {
            ignore_absent(self.files.link(&name, &outgoing)).map_err(failed)?;
        }
        self.looked_up.borrow_mut().remove(id);
        self.files.rename(&incoming, &name).map_err(failed)?;
        former.map_or(Ok(()), |former| self.finish_moving(&outgoing, id, &former, &keys))
    }

    /// Removes a record and its index entries.
    pub fn remove(&self, record: &Record) -> Result<()> {
        let id = record.id();
        self.clear_moving(id)?;
        let Some(record) = self.get(id)?.record() else {
            return self.remove_file(id);
        };
        let name = record_name(id);
        let [_, outgoing] = MOVING.map(|way| moving_name(id, way));
        self.looked_up.borrow_mut().remove(id);
        ignore_absent(self.files.rename(&name, &outgoing))
            .map_err(|error| self.files.failed("remove record", &name, error))?;
        self.finish_moving(&outgoing, id, &record, &BTreeSet::new())
    }

    /// Removes a record that is on its way in or out, by now or since a kill, and those of its index
    /// entries that are not also the present record's.
    pub fn clear_moving(&self, id: &str) -> Result<()> {
        if self.only_reads {
            return Ok(());
        }
        for way in MOVING {
            let name = moving_name(id, way);
            let text = self.files.read(&name);
            let Some(text) = text.map_err(|error| self.files.failed("read", &name, error))? else {
                continue;
            };
            // One that was cut off has no index entries yet.
            let Some(moving) = parse(&text).record() else {
                self.remove_name(&name)?;
                continue;
            };
            let present = self.get(id)?.record();
            let kept = present.map(|record| record.index_keys()).unwrap_or_default();
            self.finish_moving(&name, id, &moving, &kept)?;
        }
        Ok(())
    }

    /// Removes the file of a moving record, after its index entries but those `kept`.
    fn finish_moving(
        &self,
        name: &str,
        id: &str,
        moving: &Record,
        kept: &BTreeSet<IndexKey>,
    ) -> Result<()> {
        for key in moving.index_keys().difference(kept) {
            self.index_remove(key, id)?;
        }
        self.remove_name(name)
    }

    /// Removes a record's file alone: for one that cannot be read.
    pub fn remove_file(&self, id: &str) -> Result<()> {
        self.looked_up.borrow_mut().remove(id);
        self.remove_name(&record_name(id))
    }

    fn remove_name(&self, name: &str) -> Result<()> {
        self.files.remove(name).map_err(|error| self.files.failed("remove", name, error))
    }

    /// Every record, oldest first, and what is wrong with the files that are none.
    pub fn all(&self) -> Result<(Vec<Record>, Vec<String>)> {
        let (mut records, mut problems) = (Vec::new(), Vec::new());
        for name in self.files.names::<Vec<String>>("records")? {
            let Some(id) = name.strip_suffix(".json") else {
                if let Some((id, way)) = name.split_once('.')
                    && MOVING.contains(&way)
                {
                    self.clear_moving(id)?;
                }
                continue;
            };
            match self.read(id)? {
                Found::Record(record) => records.push(Rc::unwrap_or_clone(record)),
                Found::None => {}
                Found::Damaged(reason) => {
                    problems.push(format!("record {id} is damaged: {reason}"))
                }
                Found::Newer(format) => problems
                    .push(format!("record {id} has format {format}, written by a newer portmap")),
            }
        }
        records.sort_by_key(|record| record.order);
        Ok((records, problems))
    }

    /// The records that cannot be read, and those that only a newer version can read.
    pub fn unreadable(&self) -> Result<(Vec<Damaged>, Vec<Newer>)> {
        let (mut found, mut newer) = (Vec::new(), Vec::new());
        for name in self.files.names::<Vec<String>>("records")? {
            let Some(id) = name.strip_suffix(".json") else {
                continue;
            };
            match self.read(id)? {
                Found::None | Found::Record(_) => {}
                Found::Newer(format) => newer.push(Newer { id: id.to_owned(), format }),
                Found::Damaged(reason) => {
                    let text = self.files.read(&record_name(id)).ok().flatten().unwrap_or_default();
                    let value: serde_json::Value =
                        serde_json::from_slice(&text).unwrap_or_default();
                    let netns = value.get("netns").and_then(|netns| netns.as_str());
                    let netns = netns.filter(|netns| !netns.is_empty()).map(str::to_owned);
                    let view = value.get("view").and_then(|view| View::deserialize(view).ok());
                    found.push(Damaged { id: id.to_owned(), reason, netns, view });
                }
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        newer.sort_by(|a, b| a.id.cmp(&b.id));
        Ok((found, newer))
    }

    /// Removes everything of a record that cannot be read.
    pub fn forget(&self, id: &str, keys: &[(String, String)]) -> Result<()> {
        self.clear_moving(id)?;
        self.remove_file(id)?;
        self.users.borrow_mut().clear();
        keys.iter().try_for_each(|(kind, name)| {
            self.index_entry_remove(&Place::new(kind, name), id, None).map(drop)
        })
    }
}

/// The file of a record.
#[must_use]
pub fn record_path(dir: &Path, id: &str) -> PathBuf {
    dir.join(record_name(id))
}

/// A record that a newer version of this plugin has written.
#[must_use]
pub fn newer_record(dir: &Path, id: &str, format: u32) -> Error {
    let reason = format!("format {format} is a newer portmap's");
    Error::Record { path: record_path(dir, id), reason }
}

fn record_name(id: &str) -> String {
    ["records/", id, ".json"].concat()
}

fn moving_name(id: &str, way: &str) -> String {
    ["records/", id, ".", way].concat()
}

fn parse(text: &[u8]) -> Found {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    match serde_json::from_slice::<Record>(text) {
        Ok(record) if record.format <= FORMAT => Found::Record(Rc::new(record)),
        Ok(record) => Found::Newer(record.format),
        Err(error) => match serde_json::from_slice(text) {
            Ok(Format { format }) if format > FORMAT => Found::Newer(format),
            _ => Found::Damaged(error.to_string()),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::model::{BackendKind, Protocol};
    use crate::record::Part;
    use crate::record::samples::record;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir =
                std::env::temp_dir().join(format!("portmap-store-{name}-{}", std::process::id()));
            drop(fs::remove_dir_all(&dir));
            Dir(dir)
        }

        fn files(&self) -> Vec<String> {
            let mut found = Vec::new();
            let mut todo = vec![self.0.clone()];
            while let Some(dir) = todo.pop() {
                for entry in fs::read_dir(dir).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        todo.push(path)
                    } else {
                        found.push(path.file_name().unwrap().to_string_lossy().into_owned())
                    }
                }
            }
            found.sort();
            found
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    fn put(store: &Store, record: &Record, replaced: Option<&Record>) {
        store.stage(record).unwrap();
        store.put(record, replaced).unwrap();
    }

    #[test]
    fn records_and_index_come_and_go_together() {
        let dir = Dir::new("index");
        let store = Store::open(&dir.0, "boot").unwrap();
        let before = dir.files();
        let old =
            record("a", &["10.0.0.2/24"], &["tcp 80 80", "udp 53 53"], BackendKind::Iptables, 1);
        let new = record("b", &["10.0.0.3/24"], &["tcp 80 81"], BackendKind::Iptables, 2);
        put(&store, &old, None);
        put(&store, &new, None);
        let port = BTreeSet::from([IndexKey::Port(Protocol::Tcp, 80)]);
        assert_eq!(store.sharing(&port, new.id()).unwrap(), std::slice::from_ref(&old));
        assert_eq!(store.sharing(&port, "").unwrap(), [old.clone(), new.clone()]);
        assert!(store.has_other(&IndexKey::Backend(BackendKind::Iptables), new.id()).unwrap());
        assert!(store.is_used(BackendKind::Iptables).unwrap());
        assert!(!store.is_used(BackendKind::Ebpf).unwrap());
        assert!(
            store
                .parts(BackendKind::Iptables)
                .unwrap()
                .contains(&Part::Base(crate::model::Family::V4))
        );

        let moved = record("b", &["10.0.0.3/24"], &["tcp 81 81"], BackendKind::Iptables, 3);
        put(&store, &moved, Some(&new));
        assert_eq!(store.sharing(&port, "").unwrap(), std::slice::from_ref(&old));
        let port = IndexKey::Port(Protocol::Tcp, 80);
        assert!(store.has_other(&port, "").unwrap());
        assert!(!store.has_other(&port, old.id()).unwrap());
        store.remove(&old).unwrap();
        store.remove(&moved).unwrap();
        store.remove(&moved).unwrap();
        assert_eq!(dir.files(), before);
        assert_eq!(store.parts(BackendKind::Iptables).unwrap(), BTreeSet::new());
    }

    #[test]
    fn what_a_kill_leaves_in_the_index_is_not_believed() {
        let dir = Dir::new("stale");
        let store = Store::open(&dir.0, "boot").unwrap();
        let key = IndexKey::Port(Protocol::Tcp, 80);
        let before = dir.files();
        store.index_add(&key, "gone").unwrap();
        assert!(!store.has_other(&key, "").unwrap());
        let backend = IndexKey::Backend(BackendKind::Ebpf);
        store.index_add(&backend, "gone").unwrap();
        assert!(!store.is_used(BackendKind::Ebpf).unwrap());
        store.index_remove(&backend, "gone").unwrap();
        assert_eq!(store.sharing(&BTreeSet::from([key.clone()]), "").unwrap(), []);
        assert_eq!(dir.files(), before);
    }

    #[test]
    fn a_key_may_have_more_users_than_a_link_has_room_for() {
        let dir = Dir::new("users");
        let store = Store::open(&dir.0, "boot").unwrap();
        let before = dir.files();
        let ids: Vec<String> = (0..50).map(|number| format!("{number:032x}")).collect();
        let key = IndexKey::Port(Protocol::Tcp, 80);
        let path = dir.0.join("index/ports/tcp-80");
        let again = || Store::new(Files::new(&dir.0, open_state_dir(&dir.0).unwrap()), None);
        let listed = |store: &Store| {
            let of_all = ids.iter().filter(|id| !store.index_of(id).unwrap().is_empty());
            of_all.cloned().collect::<Vec<_>>()
        };
        for (number, id) in ids.iter().enumerate() {
            // Of a store that knows what it has written, and of one that reads it.
            let other = again();
            let store = if number % 2 == 0 { &store } else { &other };
            store.index_add(&key, id).unwrap();
            store.index_add(&key, id).unwrap();
            // What a kill has left is neither followed nor in the way.
            let left = dir.0.join("index/ports/.tmp");
            std::os::unix::fs::symlink("../../boot", left).unwrap();
            assert_eq!(listed(&again()), ids[..=number]);
        }
        assert!(path.is_file() && !path.is_symlink());
        assert_eq!(fs::read_to_string(dir.0.join("boot")).unwrap(), "boot");
        for (number, id) in ids.iter().enumerate() {
            again().index_remove(&key, id).unwrap();
            again().index_remove(&key, id).unwrap();
            assert_eq!(listed(&again()), ids[number + 1..]);
        }
        assert!(!path.is_file() && !path.is_symlink());
        fs::remove_file(dir.0.join("index/ports/.tmp")).ok();
        assert_eq!(dir.files(), before);
    }

    #[test]
    fn what_a_kill_leaves_of_a_record_goes_with_the_next_change() {
        let with = |ports: &[&str], order| {
            record("a", &["10.0.0.2/24"], ports, BackendKind::Iptables, order)
        };
        let (old, new) = (with(&["tcp 80 80"], 1), with(&["tcp 81 80"], 2));
        for way in MOVING {
            for does_put in [true, false] {
                let dir = Dir::new(way);
                let store = Store::open(&dir.0, "boot").unwrap();
                let before = dir.files();
                // Killed on its way in, or out, with its index entries.
                put(&store, &old, None);
                let moving = dir.0.join(moving_name(old.id(), way));
                fs::rename(record_path(&dir.0, old.id()), moving).unwrap();
                drop(store);

                let store = Store::open(&dir.0, "boot").unwrap();
                if does_put {
                    put(&store, &new, None);
                    let port = dir.0.join("index/ports/tcp-80");
                    assert!(!port.is_symlink(), "{way}: {:?}", dir.files());
                }
                store.remove(&new).unwrap();
                assert_eq!(dir.files(), before, "{way} {does_put}");
            }
        }
    }

    #[test]
    fn a_record_s_file_is_a_note_under_a_second_name() {
        let dir = Dir::new("named");
        let store = Store::open(&dir.0, "boot").unwrap();
        let record = record("a", &["10.0.0.2/24"], &["tcp 80 80"], BackendKind::Iptables, 1);
        let id = record.id();
        store.set_note("backend", Some("iptables")).unwrap();
        let before = dir.files();
        assert!(!store.set_note_of_record("pending", id, true), "there is no such file");
        assert!(!store.has_note("pending").unwrap());
        // Staged, and in place, by which it is the same file.
        store.stage(&record).unwrap();
        assert!(store.set_note_of_record("pending", id, true));
        store.put(&record, None).unwrap();
        assert!(store.has_note("pending").unwrap());
        assert_eq!(store.note("pending").unwrap(), Some(record.to_json().unwrap()));
        assert!(!store.set_note_of_record("pending", id, false), "the name is taken");
        store.set_note("pending", None).unwrap();
        assert!(!store.has_note("pending").unwrap());
        assert_eq!(store.get(id).unwrap().record().as_deref(), Some(&record));

        // What happens to either name then is nothing to the other.
        assert!(store.set_note_of_record("pending", id, false));
        store.set_note("pending", Some("other")).unwrap();
        assert_eq!(store.read(id).unwrap().record().as_deref(), Some(&record));
        store.set_note("pending", None).unwrap();
        assert!(store.set_note_of_record("pending", id, false));
        store.remove(&record).unwrap();
        assert_eq!(store.note("pending").unwrap(), Some(record.to_json().unwrap()));
        store.set_note("pending", None).unwrap();
        assert_eq!(dir.files(), before);
    }

    #[test]
    fn a_reboot_discards_and_newer_formats_are_told_apart() {
        let dir = Dir::new("boot");
        let record = record("a", &["10.0.0.2/24"], &["tcp 80 80"], BackendKind::Iptables, 1);
        let store = Store::open(&dir.0, "first").unwrap();
        put(&store, &record, None);
        store.set_note("backend", Some("iptables")).unwrap();
        let path = record_path(&dir.0, "newer");
        fs::write(path, r#"{"format":99,"shape":"unknown"}"#).unwrap();
        fs::write(record_path(&dir.0, "half"), r#"{"format":1,"netw"#).unwrap();
        assert!(matches!(store.get("newer").unwrap(), Found::Newer(99)));
        assert!(matches!(store.get("half").unwrap(), Found::Damaged(_)));
        assert_eq!(store.all().unwrap().1.len(), 2);
        let (damaged, newer) = store.unreadable().unwrap();
        assert_eq!((damaged.len(), newer.len(), newer[0].format), (1, 1, 99));
        // A newer one uses what its index entries name, a damaged one does not.
        assert_eq!(store.newer(BackendKind::Iptables).unwrap(), None);
        store.index_add(&IndexKey::Backend(BackendKind::Iptables), "newer").unwrap();
        let [newer, damaged] = [28, 24].map(|prefix| Part::Near(crate::model::Family::V4, prefix));
        for (part, id) in [(newer, "newer"), (damaged, "half")] {
            store.index_add(&IndexKey::Part(BackendKind::Iptables, part), id).unwrap();
        }
        let format = store.newer(BackendKind::Iptables).unwrap().map(|(_, format)| format);
        assert_eq!(format, Some(99));
        let parts = store.parts(BackendKind::Iptables).unwrap();
        assert!(parts.contains(&newer) && !parts.contains(&damaged), "{parts:?}");
        drop(store);
        assert!(is_recorded(&dir.0, record.id()));
        // A call that cannot read the boot's name, in a chroot without /proc say.
        drop(Store::open(&dir.0, "").unwrap());
        assert!(is_recorded(&dir.0, record.id()));
        let store = Store::open(&dir.0, "second").unwrap();
        assert!(!is_recorded(&dir.0, record.id()));
        assert_eq!(store.note("backend").unwrap(), None);
    }

    #[test]
    fn what_may_not_be_looked_at_is_not_taken_for_empty() {
        let dir = Dir::new("denied");
        assert!(!has_records(&dir.0).unwrap());
        fs::create_dir_all(dir.0.join("records")).unwrap();
        assert!(!has_records(&dir.0).unwrap());
        fs::write(record_path(&dir.0, "a"), "").unwrap();
        assert!(has_records(&dir.0).unwrap());
        fs::remove_dir_all(dir.0.join("records")).unwrap();
        // ELOOP stands for EACCES, which root does not meet.
        std::os::unix::fs::symlink("records", dir.0.join("records")).unwrap();
        let error = has_records(&dir.0).unwrap_err().to_string();
        assert!(error.contains("/records"), "{error}");
    }

    #[test]
    fn the_lock_excludes_and_is_released() {
        let dir = Dir::new("lock");
        let store = Store::open(&dir.0, "boot").unwrap();
        let path = dir.0.clone();
        let (sender, receiver) = mpsc::channel();
        let other = std::thread::spawn(move || {
            let store = Store::open(&path, "boot").unwrap();
            sender.send(()).unwrap();
            drop(store);
        });
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        drop(store);
        receiver.recv_timeout(Duration::from_secs(5)).unwrap();
        other.join().unwrap();
    }
}
