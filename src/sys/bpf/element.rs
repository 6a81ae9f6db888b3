//! bpf(2) on the elements of a map.
//!
//! The kernel knows how long a map's keys and values are and asks nobody. So what it says of them
//! when the map is opened is kept beside the descriptor, and every slice is held against it.
#![allow(unsafe_code, reason = "bpf(2) reads and writes memory through addresses in bpf_attr")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_map_info, bpf_map_type};

use super::map::Definition;
use super::syscall::{address, address_mut, bpf, bpf_fd, empty, kernel_name, map_info, number};
use crate::sys::file;

/// A descriptor of a map, and the sizes of what goes through it.
#[derive(Debug)]
pub(super) struct Elements {
    fd: OwnedFd,
    key_size: usize,
    /// As far as it is known: see [`Elements::value_size`].
    value_size: OnceLock<usize>,
    /// From one processor's value to the next, in a per-CPU map.
    stride: usize,
}

impl Elements {
    /// Makes a map.
    pub fn create(definition: &Definition) -> io::Result<OwnedFd> {
        let mut attr = empty();
        // BPF_MAP_CREATE: __bindgen_anon_1.
        attr.__bindgen_anon_1.map_type = definition.kind;
        attr.__bindgen_anon_1.key_size = definition.key_size;
        attr.__bindgen_anon_1.value_size = definition.value_size;
        attr.__bindgen_anon_1.max_entries = definition.max_entries;
        attr.__bindgen_anon_1.map_flags = definition.flags;
        attr.__bindgen_anon_1.map_name = kernel_name(&definition.name);
        // SAFETY: no addresses.
        unsafe { bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr) }
    }

    /// Takes a descriptor and asks what it is.
    pub fn new(fd: OwnedFd) -> io::Result<(Self, bpf_map_info)> {
        let info = map_info(fd.as_fd())?;
        let (key_size, stride) = (info.key_size as usize, info.value_size as usize);
        let (value_size, stride) = match is_per_cpu(info.type_) {
            true => (OnceLock::new(), stride.next_multiple_of(8)),
            false => (OnceLock::from(stride), stride),
        };
        Ok((Self { fd, key_size, value_size, stride }, info))
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn key_size(&self) -> usize {
        self.key_size
    }

    /// Bytes of a value; of all processors', each a multiple of 8 bytes, in a per-CPU map. How many of them
    /// there are is asked when somebody wants a value of one: few calls do.
    pub fn value_size(&self) -> io::Result<usize> {
        if let Some(size) = self.value_size.get() {
            return Ok(*size);
        }
        let size = self.stride * possible_cpus()?;
        Ok(*self.value_size.get_or_init(|| size))
    }

    /// From the value of one processor to that of the next: a multiple of 8 bytes. In other maps the size of
    /// the only value.
    pub fn stride(&self) -> usize {
        self.stride
    }

    fn check(&self, keys: &[u8], values: Option<&[u8]>, count: usize) -> io::Result<()> {
        let key_size = self.key_size;
        let value_size = values.map(|_| self.value_size()).transpose()?;
        let fits = keys.len() == key_size * count
            && values.map(<[u8]>::len) == value_size.map(|size| size * count);
        fits.then_some(()).ok_or_else(|| {
            let values = value_size.map(|size| format!(" and values {size}"));
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("keys of this map have {key_size} bytes{}", values.unwrap_or_default()),
            )
        })
    }

    /// BPF_MAP_*_ELEM and BPF_MAP_GET_NEXT_KEY: __bindgen_anon_2.
    fn attr(&self, key: u64, value: u64, flags: u64) -> bpf_attr {
        let mut attr = empty();
        attr.__bindgen_anon_2.map_fd = number(self.fd.as_fd());
        attr.__bindgen_anon_2.key = key;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value;
        attr.__bindgen_anon_2.flags = flags;
        attr
    }

    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<()> {
        self.check(key, Some(value), 1)?;
        let mut attr = self.attr(address(key), address_mut(value), 0);
        // SAFETY: both lengths are the map's.
        unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) }.map(drop)
    }

    /// `flags`: `BPF_ANY`, `BPF_NOEXIST` (fails with `EEXIST`) or `BPF_EXIST`.
    pub fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        self.check(key, Some(value), 1)?;
        let mut attr = self.attr(address(key), address(value), flags);
        // SAFETY: both lengths are the map's.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        self.check(key, None, 1)?;
        let mut attr = self.attr(address(key), 0, 0);
        // SAFETY: the length is the map's.
        unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) }.map(drop)
    }

    /// The key behind `key`; the first one for `None` and for a key that is not there. `ENOENT` at
    /// the end.
    pub fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<()> {
        self.check(next, None, 1)?;
        key.map_or(Ok(()), |key| self.check(key, None, 1))?;
        let mut attr = self.attr(key.map_or(0, address), address_mut(next), 0);
        // SAFETY: both lengths are the map's.
        unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) }.map(drop)
    }

    /// Copies `count` entries from where `place` says, and moves that. Returns how many came; the
    /// error may be `ENOENT` with some at the end, and is `ENOSPC` if `count` are too few to hold
    /// the entries of one hash. Linux 5.6.
    pub fn lookup_batch(
        &self,
        place: &mut Place,
        count: usize,
        keys: &mut [u8],
        values: &mut [u8],
    ) -> (usize, io::Result<()>) {
        if let Err(error) = self.check(keys, Some(values), count) {
            return (0, Err(error));
        }
        place.token.resize(self.key_size.max(8), 0);
        let mut attr = empty();
        attr.batch.in_batch = if place.begun { address(&place.token) } else { 0 };
        attr.batch.out_batch = address_mut(&mut place.token);
        attr.batch.keys = address_mut(keys);
        attr.batch.values = address_mut(values);
        attr.batch.count = count as u32;
        attr.batch.map_fd = number(self.fd.as_fd());
        // SAFETY: keys and values have room for `count`. The token is as long as a key, or as the
        // number of a bucket if that is longer; the kernel reads it before it writes it.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) };
        let (came, done) = self.counted(&attr, count, &result);
        place.begun |= done;
        (came, result.map(drop))
    }

    /// Updates as many entries as there are keys, with `BPF_ANY`. Returns how many were before the
    /// error. Linux 5.6.
    pub fn update_batch(&self, keys: &[u8], values: &[u8]) -> (usize, io::Result<()>) {
        let count = keys.len() / self.key_size.max(1);
        if let Err(error) = self.check(keys, Some(values), count) {
            return (0, Err(error));
        }
        let mut attr = empty();
        attr.batch.keys = address(keys);
        attr.batch.values = address(values);
        attr.batch.count = count as u32;
        attr.batch.map_fd = number(self.fd.as_fd());
        // SAFETY: `keys` and `values` have `count` of them.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) };
        (self.counted(&attr, count, &result).0, result.map(drop))
    }

    /// Deletes entries. Returns how many went before the error. Linux 5.6.
    pub fn delete_batch(&self, keys: &[u8]) -> (usize, io::Result<()>) {
        let count = keys.len() / self.key_size.max(1);
        if let Err(error) = self.check(keys, None, count) {
            return (0, Err(error));
        }
        let mut attr = empty();
        attr.batch.keys = address(keys);
        attr.batch.count = count as u32;
        attr.batch.map_fd = number(self.fd.as_fd());
        // SAFETY: `keys` has `count` of them.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut attr) };
        (self.counted(&attr, count, &result).0, result.map(drop))
    }

    /// How many entries a command has dealt with, and whether it dealt with any at all: one that
    /// the kernel does not know leaves the count as it was.
    fn counted(&self, attr: &bpf_attr, asked: usize, result: &io::Result<i32>) -> (usize, bool) {
        // SAFETY: an integer, whether the kernel wrote it or not.
        let count = (unsafe { attr.batch.count } as usize).min(asked);
        match result {
            Ok(_) => (count, true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => (count, true),
            Err(_) => (0, false),
        }
    }
}

/// How far a series of [`Elements::lookup_batch`] has come.
#[derive(Debug, Default)]
pub(super) struct Place {
    token: Vec<u8>,
    begun: bool,
}

fn is_per_cpu(kind: u32) -> bool {
    [
        bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH,
        bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY,
        bpf_map_type::BPF_MAP_TYPE_LRU_PERCPU_HASH,
    ]
    .iter()
    .any(|per_cpu| *per_cpu as u32 == kind)
}

/// How many processors this kernel may ever have: so many values an entry of a per-CPU map has.
fn possible_cpus() -> io::Result<usize> {
    let path = "/sys/devices/system/cpu/possible";
    count_cpus(file::read_to_string(path)?.trim()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{path} does not list processors"))
    })
}

/// `list`: numbers and ranges, "0-3,8".
fn count_cpus(list: &str) -> Option<usize> {
    list.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted() {
        assert_eq!(count_cpus("0"), Some(1));
        assert_eq!(count_cpus("0-7"), Some(8));
        assert_eq!(count_cpus("0-3,8,10-11"), Some(7));
        for broken in ["", "a", "3-1", "0-", "0,,1"] {
            assert_eq!(count_cpus(broken), None, "{broken}");
        }
    }
}
