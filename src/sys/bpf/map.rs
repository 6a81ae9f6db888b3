//! Maps. Keys and values are bytes here; what they mean is the backend's.

use std::collections::HashSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use aya_obj::generated::{BPF_ANY, BPF_NOEXIST, bpf_cmd};

use super::element::{Elements, Place};
use super::syscall;

/// Entries that the first batch asks for: room for more would be cleared, page by page, for the few that
/// most maps have.
const FIRST_BATCH: usize = 64;
/// Entries that any batch asks for at most. More save little: a batch of so many takes 0.2 ms.
const BATCH: usize = 4096;
/// How much is written in one.
const BYTES: usize = 256 * 1024;

/// `ENOTSUPP`, which is the kernel's own and has no name here: a type of map without batches.
const ENOTSUPP: i32 = 524;

/// What a map is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// The kernel keeps 15 bytes of it.
    pub name: String,
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Bytes.
    pub key_size: u32,
    /// Bytes; of one processor, in a per-CPU map.
    pub value_size: u32,
    pub max_entries: u32,
    /// `BPF_F_*` for `BPF_MAP_CREATE`.
    pub flags: u32,
}

impl Definition {
    /// Whether programs that were made for `self` can use a map that was made as `other`. The
    /// number of entries makes no difference to them.
    #[must_use]
    pub fn fits(&self, other: &Definition) -> bool {
        (self.kind, self.key_size, self.value_size)
            == (other.kind, other.key_size, other.value_size)
    }
}

/// An open map. It lives until nobody has it open or pinned, and no program uses it.
#[derive(Debug)]
pub struct Map {
    elements: Elements,
    definition: Definition,
    id: u32,
    batches: bool,
}

impl Map {
    /// Makes a map.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns: `EPERM` without the right to, and before Linux 5.11 also beyond
    /// `RLIMIT_MEMLOCK`; `ENOMEM`; `EINVAL` for what the kernel does not know.
    pub fn create(definition: &Definition) -> io::Result<Self> {
        Self::adopt(Elements::create(definition)?)
    }

    /// Opens a pinned map; `None` if there is no such name.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns.
    pub fn from_pin(path: &Path) -> io::Result<Option<Self>> {
        absent(syscall::open_pin(path))?.map(Self::adopt).transpose()
    }

    /// Opens a map by its id; `None` if it is gone. Needs `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns.
    pub fn from_id(id: u32) -> io::Result<Option<Self>> {
        absent(syscall::open_id(bpf_cmd::BPF_MAP_GET_FD_BY_ID, id))?.map(Self::adopt).transpose()
    }

    fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let (elements, info) = Elements::new(fd)?;
        let definition = Definition {
            name: syscall::text(&info.name),
            kind: info.type_,
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries,
            flags: info.map_flags,
        };
        Ok(Self { elements, definition, id: info.id, batches: true })
    }

    /// Does without the batch commands, as before Linux 5.6.
    #[must_use]
    pub fn without_batches(mut self) -> Self {
        self.batches = false;
        self
    }

    /// Gives the map a name in a bpffs; `EEXIST` if that is taken.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns. `EPERM` also for a name with a dot in it.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        syscall::pin(self.elements.fd(), path)
    }

    /// What the kernel says the map is made of.
    #[must_use]
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// The kernel's number for it, unique until the next boot.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The descriptor, for programs to refer to.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.elements.fd()
    }

    /// Length of what [`Map::get`] returns and [`Map::put`] takes: a value, or in a per-CPU map the
    /// values of all processors, each of [`Map::stride`] bytes.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell how many processors there may be.
    pub fn value_bytes(&self) -> io::Result<usize> {
        self.elements.value_size()
    }

    /// From the value of one processor to that of the next: the size of a value, rounded up to 8
    /// bytes. In other maps the size of the only value.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.elements.stride()
    }

    /// The value of a key, of [`Map::value_bytes`]; `None` if it is not there.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns; a key of the wrong length. So do all below.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.value_bytes()?];
        Ok(absent(self.elements.lookup(key, &mut value))?.map(|()| value))
    }

    /// Sets the value of a key. `E2BIG` if the map is full.
    pub fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.elements.update(key, value, BPF_ANY.into())
    }

    /// Sets the value of a key that has none; says whether it had none.
    pub fn put_new(&self, key: &[u8], value: &[u8]) -> io::Result<bool> {
        match self.elements.update(key, value, BPF_NOEXIST.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Sets the values of keys, one after the other. On an error those before the first that cannot be
    /// set are.
    pub fn put_all(&self, entries: &[(&[u8], &[u8])]) -> io::Result<()> {
        let (key_size, value_size) = (self.elements.key_size(), self.value_bytes()?);
        let fits =
            |(key, value): &(&[u8], &[u8])| (key.len(), value.len()) == (key_size, value_size);
        // Values of per-CPU maps are as long as there are processors.
        let most = (BYTES / value_size.max(1)).clamp(1, BATCH);
        let mut rest = entries;
        let batches = self.batches && entries.iter().all(fits);
        while batches && rest.len() > 1 {
            let some = &rest[..rest.len().min(most)];
            let (keys, values): (Vec<&[u8]>, Vec<&[u8]>) = some.iter().copied().unzip();
            let (put, result) = self.elements.update_batch(&keys.concat(), &values.concat());
            rest = &rest[put..];
            match result.as_ref().map_err(io::Error::raw_os_error) {
                Ok(()) => {}
                Err(Some(libc::EINVAL | ENOTSUPP)) => break,
                Err(_) => return result,
            }
        }
        rest.iter().try_for_each(|(key, value)| self.put(key, value))
    }

    /// Removes a key; says whether it was there.
    pub fn remove(&self, key: &[u8]) -> io::Result<bool> {
        Ok(absent(self.elements.delete(key))?.is_some())
    }

    /// Whether it has no entries.
    pub fn is_empty(&self) -> io::Result<bool> {
        let mut first = vec![0; self.elements.key_size()];
        Ok(absent(self.elements.next_key(None, &mut first))?.is_none())
    }

    /// All entries. Of those that come or go meanwhile, some; an entry may come twice.
    pub fn entries(&self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut entries = Vec::new();
        self.for_each(|key, value| entries.push((key.to_vec(), value.to_vec())))?;
        Ok(entries)
    }

    /// Calls `visit` with key and value of every entry, as [`Map::entries`].
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        if self.batches && self.for_each_batch(&mut visit)? {
            return Ok(());
        }
        let mut value = vec![0; self.value_bytes()?];
        for key in self.keys()? {
            if absent(self.elements.lookup(&key, &mut value))?.is_some() {
                visit(&key, &value);
            }
        }
        Ok(())
    }

    /// Says false if the kernel has no batches for this map, before `visit` was called.
    fn for_each_batch(&self, visit: &mut impl FnMut(&[u8], &[u8])) -> io::Result<bool> {
        let (key_size, value_size) = (self.elements.key_size(), self.value_bytes()?);
        let most = BATCH.min(self.definition.max_entries.max(1) as usize);
        let mut count = FIRST_BATCH.min(most);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut place = Place::default();
        let mut begun = false;
        loop {
            keys.resize(count * key_size, 0);
            values.resize(count * value_size, 0);
            let (came, result) =
                self.elements.lookup_batch(&mut place, count, &mut keys, &mut values);
            let entries = keys.chunks_exact(key_size).zip(values.chunks_exact(value_size));
            entries.take(came).for_each(|(key, value)| visit(key, value));
            match result.as_ref().map_err(io::Error::raw_os_error) {
                Ok(()) => {
                    begun = true;
                    count = (count * 8).min(most).max(count);
                }
                Err(Some(libc::ENOENT)) => return Ok(true),
                // More entries than were asked for have one hash.
                Err(Some(libc::ENOSPC)) => count *= 2,
                Err(Some(libc::EINVAL | ENOTSUPP)) if !begun => return Ok(false),
                Err(_) => return result.map(|()| true),
            }
        }
    }

    /// Whether the kernel has batches for this map.
    pub fn has_batches(&self) -> io::Result<bool> {
        self.for_each_batch(&mut |_, _| {})
    }

    /// All keys, one after the other. The kernel begins anew behind a key that is gone, so that a
    /// map which changes without end could be walked without end.
    fn keys(&self) -> io::Result<HashSet<Vec<u8>>> {
        let mut keys = HashSet::new();
        let mut last: Option<Vec<u8>> = None;
        for _ in 0..u64::from(self.definition.max_entries) * 4 + 1 {
            let mut next = vec![0; self.elements.key_size()];
            if absent(self.elements.next_key(last.as_deref(), &mut next))?.is_none() {
                break;
            }
            keys.insert(next.clone());
            last = Some(next);
        }
        Ok(keys)
    }

    /// Removes the entries for which `condition` (of key and value) holds; says how many were.
    pub fn remove_where(
        &self,
        mut condition: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> io::Result<usize> {
        let mut keys = Vec::new();
        self.for_each(|key, value| {
            if condition(key, value) {
                keys.extend_from_slice(key);
            }
        })?;
        self.remove_flat(&keys)
    }

    /// Removes keys, present or not; says how many were.
    pub fn remove_all<K: AsRef<[u8]>>(&self, keys: &[K]) -> io::Result<usize> {
        let size = self.elements.key_size();
        match keys.iter().find(|key| key.as_ref().len() != size) {
            Some(key) => self.remove(key.as_ref()).map(usize::from),
            None => {
                let flat: Vec<&[u8]> = keys.iter().map(AsRef::as_ref).collect();
                self.remove_flat(&flat.concat())
            }
        }
    }

    /// `keys`: one behind the other.
    fn remove_flat(&self, mut keys: &[u8]) -> io::Result<usize> {
        let size = self.elements.key_size();
        let mut removed = 0;
        while self.batches && !keys.is_empty() {
            let (went, result) = self.elements.delete_batch(keys);
            removed += went;
            keys = &keys[went * size..];
            match result.as_ref().map_err(io::Error::raw_os_error) {
                Ok(()) => {}
                // The next one is not there; those behind it have not been looked at.
                Err(Some(libc::ENOENT)) => keys = keys.get(size..).unwrap_or_default(),
                Err(Some(libc::EINVAL | ENOTSUPP)) => break,
                Err(_) => return result.map(|()| removed),
            }
        }
        for key in keys.chunks_exact(size) {
            removed += usize::from(self.remove(key)?);
        }
        Ok(removed)
    }

    /// Puts the entries of `from` into this map unless their keys are there already; says how many
    /// were put. Values keep as much of their beginning as both have room for: between two layouts,
    /// keys stay what they are and values change at their end only. Behind that they have what `rest`,
    /// which is a whole value, has there, or zeros where it is empty. A map that is full takes no more.
    pub fn take_over(&self, from: &Map, rest: &[u8]) -> io::Result<usize> {
        let ((to_stride, from_stride), mut value) =
            ((self.stride(), from.stride()), vec![0; self.value_bytes()?]);
        for value in value.chunks_exact_mut(to_stride).filter(|value| value.len() == rest.len()) {
            value.copy_from_slice(rest);
        }
        let common = self.definition.value_size.min(from.definition.value_size) as usize;
        let mut failure = Ok(());
        let mut taken = 0;
        from.for_each(|key, old| {
            if failure.is_err() {
                return;
            }
            for (new, old) in value.chunks_exact_mut(to_stride).zip(old.chunks_exact(from_stride)) {
                new[..common].copy_from_slice(&old[..common]);
            }
            match self.put_new(key, &value) {
                Ok(new) => taken += usize::from(new),
                Err(error) => failure = Err(error),
            }
        })?;
        match failure {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Ok(taken),
            failure => failure.map(|()| taken),
        }
    }
}

/// `None` for what does not exist.
pub(super) fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
