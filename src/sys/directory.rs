//! Reading directories.

use std::io;
use std::path::Path;

use rustix::fs::{Dir, Mode, OFlags, open};
use rustix::io::Errno;

/// The names in a directory, in the order of the file system and read as far as they are asked for;
/// `None` if there is no such directory.
///
/// Not `std::fs::read_dir`: musl's `opendir` asks the kernel for memory, and returns it, for each one.
///
/// # Errors
///
/// What open(2) and getdents64(2) return.
pub fn names(path: &Path) -> io::Result<Option<impl Iterator<Item = io::Result<String>> + use<>>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = match open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        dir => Dir::new(dir?)?,
    };
    let name = |entry: Result<rustix::fs::DirEntry, Errno>| match entry {
        Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => None,
        Ok(entry) => Some(Ok(entry.file_name().to_string_lossy().into_owned())),
        Err(error) => Some(Err(error.into())),
    };
    Ok(Some(dir.filter_map(name)))
}
