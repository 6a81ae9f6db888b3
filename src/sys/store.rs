//! The state directory: records, their index, and the lock that guards them and the kernel.
//!
//! ```text
//! lock                          flock(2) of whoever changes anything
//! boot                          boot id for which the rest holds
//! records/<id>.json             one record per attachment
//! records/<id>.in, <id>.out     one on its way in or out: its index entries may still exist
//! index/<kind>/<key>/<id>       empty files: which records have this port, pod address, chain …
//! notes/<name>                  small facts, such as the backend that was found to work
//! ```
//!
//! The index always holds at least what the records say (it is written before a record and removed
//! after it), so a reader checks what it finds. What a kill in between leaves does no harm, and the
//! attachment's next call clears it away.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;

use crate::error::{Error, Result};
use crate::model::BackendKind;
use crate::record::{FORMAT, IndexKey, Part, Record};

/// Where state lives unless `stateDir` says otherwise.
pub const DEFAULT_DIR: &str = "/run/cni/portmap";

/// How long a call waits for the node's lock. Below the two minutes after which the kubelet gives
/// up, so that the runtime gets an answer that says why.
const LOCK_DEADLINE: Duration = Duration::from_secs(60);

/// Endings of the files of records on their way in and out.
const MOVING: [&str; 2] = ["in", "out"];

/// The state directory, locked until dropped.
pub struct Store {
    dir: PathBuf,
    _lock: Flock<File>,
}

/// A record's file as it was found.
#[derive(Debug)]
pub enum Found {
    None,
    Record(Box<Record>),
    /// Not readable as a record: cut off or damaged.
    Damaged(String),
    /// Written by a newer version of this plugin.
    Newer(u32),
}

impl Found {
    #[must_use]
    pub fn record(self) -> Option<Record> {
        match self {
            Found::Record(record) => Some(*record),
            _ => None,
        }
    }
}

/// Whether there is anything of a record, without a lock: for the calls that have nothing to do.
#[must_use]
pub fn is_recorded(dir: &Path, id: &str) -> bool {
    record_path(dir, id).exists() || MOVING.iter().any(|way| moving_path(dir, id, way).exists())
}

/// Whether records could be kept in `dir`, as far as can be told without writing.
pub fn check_usable(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|error| {
        Error::io(format!("create the state directory {}", dir.display()), error)
    })?;
    nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).map_err(|error| {
        Error::io(format!("write to the state directory {}", dir.display()), error.into())
    })
}

impl Store {
    /// Waits for the lock and opens the directory, which is made if it is missing. State of an
    /// earlier boot is discarded: the rules it describes are gone.
    pub fn open(dir: &Path, boot_id: &str) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|error| {
            Error::io(format!("create the state directory {}", dir.display()), error)
        })?;
        let store = Store { dir: dir.to_owned(), _lock: lock(&dir.join("lock"))? };
        let boot = store.dir.join("boot");
        match fs::read_to_string(&boot) {
            Ok(known) if known == boot_id => return Ok(store),
            Ok(_) => store.discard()?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(format!("read {}", boot.display()), error)),
        }
        write_atomically(&boot, boot_id.as_bytes())
            .map_err(|error| Error::io(format!("write {}", boot.display()), error))?;
        Ok(store)
    }

    fn discard(&self) -> Result<()> {
        for name in ["index", "notes", "records"] {
            let path = self.dir.join(name);
            ignore_absent(fs::remove_dir_all(&path))
                .map_err(|error| Error::io(format!("remove {}", path.display()), error))?;
        }
        Ok(())
    }

    /// The record called `id`.
    pub fn get(&self, id: &str) -> Result<Found> {
        let path = record_path(&self.dir, id);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::None),
            Err(error) => return Err(Error::io(format!("read record {}", path.display()), error)),
        };
        Ok(parse(&text))
    }

    /// Writes a record, durably and as a whole, and then takes back the index entries that only
    /// `replaced` had.
    pub fn put(&self, record: &Record, replaced: Option<&Record>) -> Result<()> {
        let id = record.id();
        self.clear_moving(&id)?;
        let path = record_path(&self.dir, &id);
        let [incoming, outgoing] = MOVING.map(|way| moving_path(&self.dir, &id, way));
        let failed = |error| Error::io(format!("write record {}", path.display()), error);
        let text = serde_json::to_vec(record)
            .map_err(|error| Error::Record { path: path.clone(), reason: error.to_string() })?;
        create_parent(&path).and_then(|()| write_durably(&incoming, &text)).map_err(failed)?;
        for key in record.index_keys() {
            self.index_add(&key, &id)?;
        }
        if replaced.is_some() {
            ignore_absent(fs::hard_link(&path, &outgoing)).map_err(failed)?;
        }
        fs::rename(&incoming, &path).map_err(failed)?;
        self.clear_moving(&id)
    }

    /// Removes a record and its index entries.
    pub fn remove(&self, record: &Record) -> Result<()> {
        let id = record.id();
        self.clear_moving(&id)?;
        let path = record_path(&self.dir, &id);
        let [_, outgoing] = MOVING.map(|way| moving_path(&self.dir, &id, way));
        ignore_absent(fs::rename(&path, &outgoing))
            .map_err(|error| Error::io(format!("remove record {}", path.display()), error))?;
        self.clear_moving(&id)
    }

    /// Removes a record that is on its way in or out, by now or since a kill, and those of its index
    /// entries that are not also the present record's.
    pub fn clear_moving(&self, id: &str) -> Result<()> {
        for way in MOVING {
            let path = moving_path(&self.dir, id, way);
            let failed = |error| Error::io(format!("remove {}", path.display()), error);
            let text = match fs::read(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            // One that was cut off has no index entries yet.
            if let Some(moving) = parse(&text).record() {
                let present = self.get(id)?.record();
                let kept = present.map(|record| record.index_keys()).unwrap_or_default();
                for key in moving.index_keys().difference(&kept) {
                    self.index_remove(key, id)?;
                }
            }
            ignore_absent(fs::remove_file(&path)).map_err(failed)?;
        }
        Ok(())
    }

    /// Removes a record's file alone: for one that cannot be read.
    pub fn remove_file(&self, id: &str) -> Result<()> {
        let path = record_path(&self.dir, id);
        ignore_absent(fs::remove_file(&path))
            .map_err(|error| Error::io(format!("remove record {}", path.display()), error))
    }

    /// Every record, oldest first, and what is wrong with the files that are none.
    pub fn all(&self) -> Result<(Vec<Record>, Vec<String>)> {
        let (mut records, mut problems) = (Vec::new(), Vec::new());
        for name in self.names(Path::new("records"))? {
            let Some(id) = name.strip_suffix(".json") else {
                if let Some((id, way)) = name.split_once('.')
                    && MOVING.contains(&way)
                {
                    self.clear_moving(id)?;
                }
                continue;
            };
            match self.get(id)? {
                Found::Record(record) => records.push(*record),
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

    /// Every other record that shares one of the keys, oldest first.
    pub fn sharing(&self, keys: &BTreeSet<IndexKey>, id: &str) -> Result<Vec<Record>> {
        let mut found = BTreeMap::new();
        for key in keys {
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

    /// Whether a record other than `id` has the key.
    pub fn has_other(&self, key: &IndexKey, id: &str) -> Result<bool> {
        for other in self.users(key)? {
            if other != id
                && self
                    .get(&other)?
                    .record()
                    .is_some_and(|record| record.index_keys().contains(key))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The parts of a backend that records need.
    pub fn parts(&self, backend: BackendKind) -> Result<BTreeSet<Part>> {
        let mut parts = BTreeSet::new();
        for name in self.names(&Path::new("index").join(format!("parts-{backend}")))? {
            if let Some(part) = Part::parse(&name)
                && self.has_other(&IndexKey::Part(backend, part), "")?
            {
                parts.insert(part);
            }
        }
        Ok(parts)
    }

    /// Notes that the kernel is being changed; true if an earlier change did not come to its end.
    /// Not synchronised: the note has to outlive this process, not the machine.
    pub fn begin_change(&self, backend: BackendKind) -> Result<bool> {
        let path = self.change_path(backend);
        let created = create_parent(&path).and_then(|()| File::create_new(&path));
        match created {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(true),
            Err(error) => Err(Error::io(format!("write {}", path.display()), error)),
        }
    }

    /// The kernel is as the records say.
    pub fn end_change(&self, backend: BackendKind) -> Result<()> {
        let path = self.change_path(backend);
        ignore_absent(fs::remove_file(&path))
            .map_err(|error| Error::io(format!("remove {}", path.display()), error))
    }

    fn change_path(&self, backend: BackendKind) -> PathBuf {
        self.dir.join("notes").join(format!("changing-{backend}"))
    }

    fn users(&self, key: &IndexKey) -> Result<Vec<String>> {
        let (kind, name) = key.path();
        self.names(&Path::new("index").join(kind).join(name))
    }

    fn names(&self, relative: &Path) -> Result<Vec<String>> {
        let path = self.dir.join(relative);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(format!("read {}", path.display()), error)),
        };
        entries
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .filter(|name| name.as_ref().map_or(true, |name| !name.starts_with('.')))
            .collect::<io::Result<_>>()
            .map_err(|error| Error::io(format!("read {}", path.display()), error))
    }

    fn index_add(&self, key: &IndexKey, id: &str) -> Result<()> {
        let (kind, name) = key.path();
        let dir = self.dir.join("index").join(kind).join(name);
        fs::create_dir_all(&dir)
            .and_then(|()| File::create(dir.join(id)).map(drop))
            .map_err(|error| Error::io(format!("write the index entry {}", dir.display()), error))
    }

    fn index_remove(&self, key: &IndexKey, id: &str) -> Result<()> {
        let (kind, name) = key.path();
        let dir = self.dir.join("index").join(kind).join(name);
        ignore_absent(fs::remove_file(dir.join(id))).map_err(|error| {
            Error::io(format!("remove the index entry {}", dir.display()), error)
        })?;
        match fs::remove_dir(&dir) {
            Err(error)
                if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) =>
            {
                Err(Error::io(format!("remove the index entry {}", dir.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// A note, if it was made since boot.
    pub fn note(&self, name: &str) -> Result<Option<String>> {
        let path = self.dir.join("notes").join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("read {}", path.display()), error)),
        }
    }

    /// Makes a note, or removes it.
    pub fn set_note(&self, name: &str, text: Option<&str>) -> Result<()> {
        let path = self.dir.join("notes").join(name);
        let result = match text {
            Some(text) => {
                create_parent(&path).and_then(|()| write_atomically(&path, text.as_bytes()))
            }
            None => ignore_absent(fs::remove_file(&path)),
        };
        result.map_err(|error| Error::io(format!("write {}", path.display()), error))
    }
}

fn record_path(dir: &Path, id: &str) -> PathBuf {
    dir.join("records").join(format!("{id}.json"))
}

fn moving_path(dir: &Path, id: &str, way: &str) -> PathBuf {
    dir.join("records").join(format!("{id}.{way}"))
}

fn parse(text: &[u8]) -> Found {
    #[derive(serde::Deserialize)]
    struct Format {
        format: u32,
    }
    match serde_json::from_slice::<Format>(text) {
        Ok(Format { format }) if format > FORMAT => return Found::Newer(format),
        Ok(_) => {}
        Err(error) => return Found::Damaged(error.to_string()),
    }
    match serde_json::from_slice(text) {
        Ok(record) => Found::Record(Box::new(record)),
        Err(error) => Found::Damaged(error.to_string()),
    }
}

/// flock(2) with a deadline. A thread waits in the kernel, where the queue is fair; polling is not.
fn lock(path: &Path) -> Result<Flock<File>> {
    // Without O_CLOEXEC: a tool that is still changing the kernel when this process is killed keeps
    // the lock until it is done.
    let flags = OFlag::O_RDWR | OFlag::O_CREAT;
    let file = nix::fcntl::open(path, flags, Mode::from_bits_truncate(0o600))
        .map_err(|error| Error::io(format!("open the lock {}", path.display()), error.into()))?;
    let mut file = File::from(file);
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((unlocked, nix::errno::Errno::EWOULDBLOCK)) => file = unlocked,
        Err((_, error)) => return Err(Error::io(format!("lock {}", path.display()), error.into())),
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut waiting = file;
        let result = loop {
            match Flock::lock(waiting, FlockArg::LockExclusive) {
                Err((unlocked, nix::errno::Errno::EINTR)) => waiting = unlocked,
                Err((_, error)) => break Err(error),
                Ok(lock) => break Ok(lock),
            }
        };
        // The receiver is gone after its deadline; dropping the result unlocks.
        drop(sender.send(result));
    });
    match receiver.recv_timeout(LOCK_DEADLINE) {
        Ok(Ok(lock)) => Ok(lock),
        Ok(Err(error)) => Err(Error::io(format!("lock {}", path.display()), error.into())),
        Err(_) => Err(Error::Busy { path: path.to_owned(), seconds: LOCK_DEADLINE.as_secs() }),
    }
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Old or new content, never half: temporary file, fsync, rename. The name of the temporary file is
/// fixed, since the lock admits one writer, so a kill leaves at most one behind.
fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_file_name(".tmp");
    let written = write_durably(&temporary, content).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The error of the write is the one to report.
        drop(fs::remove_file(&temporary));
    }
    written
}

fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    Ok(nix::unistd::fsync(file.as_fd())?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
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

    #[test]
    fn records_and_index_come_and_go_together() {
        let dir = Dir::new("index");
        let store = Store::open(&dir.0, "boot").unwrap();
        let before = dir.files();
        let old =
            record("a", &["10.0.0.2/24"], &["tcp 80 80", "udp 53 53"], BackendKind::Iptables, 1);
        let new = record("b", &["10.0.0.3/24"], &["tcp 80 81"], BackendKind::Iptables, 2);
        store.put(&old, None).unwrap();
        store.put(&new, None).unwrap();
        let port = BTreeSet::from([IndexKey::Port("tcp-80".into())]);
        assert_eq!(store.sharing(&port, &new.id()).unwrap(), [old.clone()]);
        assert_eq!(store.sharing(&port, "").unwrap(), [old.clone(), new.clone()]);
        assert!(store.has_other(&IndexKey::Backend(BackendKind::Iptables), &new.id()).unwrap());
        assert!(
            store
                .parts(BackendKind::Iptables)
                .unwrap()
                .contains(&Part::Base(crate::model::Family::V4))
        );

        let moved = record("b", &["10.0.0.3/24"], &["tcp 81 81"], BackendKind::Iptables, 3);
        store.put(&moved, Some(&new)).unwrap();
        assert_eq!(store.sharing(&port, "").unwrap(), [old.clone()]);
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
        let key = IndexKey::Port("tcp-80".into());
        store.index_add(&key, "gone").unwrap();
        assert!(!store.has_other(&key, "").unwrap());
        assert_eq!(store.sharing(&BTreeSet::from([key.clone()]), "").unwrap(), []);
        assert_eq!(store.users(&key).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_reboot_discards_and_newer_formats_are_told_apart() {
        let dir = Dir::new("boot");
        let record = record("a", &["10.0.0.2/24"], &["tcp 80 80"], BackendKind::Iptables, 1);
        let store = Store::open(&dir.0, "first").unwrap();
        store.put(&record, None).unwrap();
        store.set_note("backend", Some("iptables")).unwrap();
        let path = record_path(&dir.0, "newer");
        fs::write(path, r#"{"format":99,"shape":"unknown"}"#).unwrap();
        fs::write(record_path(&dir.0, "half"), r#"{"format":1,"netw"#).unwrap();
        assert!(matches!(store.get("newer").unwrap(), Found::Newer(99)));
        assert!(matches!(store.get("half").unwrap(), Found::Damaged(_)));
        assert_eq!(store.all().unwrap().1.len(), 2);
        drop(store);
        assert!(is_recorded(&dir.0, &record.id()));
        let store = Store::open(&dir.0, "second").unwrap();
        assert!(!is_recorded(&dir.0, &record.id()));
        assert_eq!(store.note("backend").unwrap(), None);
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
