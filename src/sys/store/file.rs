//! Reading directories and writing files so that a kill leaves the old or the new content.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::error::{Error, Result};
use crate::sys::directory;

/// Names in a directory, without those that begin with a dot; none if there is no directory.
pub(super) fn entries(path: &Path) -> Result<impl Iterator<Item = Result<String>> + use<>> {
    let failed = |path: &Path, error| Error::io(format!("read {}", path.display()), error);
    let names = directory::names(path).map_err(|error| failed(path, error))?;
    let path = path.to_owned();
    let names =
        names.into_iter().flatten().map(move |name| name.map_err(|error| failed(&path, error)));
    Ok(names.filter(|name| name.as_ref().map_or(true, |name| !name.starts_with('.'))))
}

/// Makes an empty file if there is none, and its directory, and says whether that was missing.
/// mknod(2), because there is nothing to be done with a descriptor.
pub(super) fn touch(path: &Path) -> io::Result<bool> {
    let mode = Mode::from_bits_truncate(0o644);
    let make = || match mknod(path, SFlag::S_IFREG, mode, 0) {
        Err(Errno::EEXIST) => Ok(()),
        other => other.map_err(io::Error::from),
    };
    with_parent(path, make).map(|((), was_missing)| was_missing)
}

/// Makes a file in a directory, which is made first if it turns out to be missing. Says whether it was.
fn with_parent<T>(path: &Path, make: impl Fn() -> io::Result<T>) -> io::Result<(T, bool)> {
    match (make(), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == ErrorKind::NotFound => {
            fs::create_dir_all(parent)?;
            Ok((make()?, true))
        }
        (made, _) => Ok((made?, false)),
    }
}

pub(super) fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Old or new content, never half: temporary file, fsync, rename. The name of the temporary file is
/// fixed, since the lock admits one writer, so a kill leaves at most one behind.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_file_name(".tmp");
    let written = write_durably(&temporary, content).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The error of the write is the one to report.
        drop(fs::remove_file(&temporary));
    }
    written
}

/// Makes or overwrites a file, and its directory.
pub(super) fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let (mut file, _) = with_parent(path, || File::create(path))?;
    file.write_all(content)?;
    Ok(nix::unistd::fsync(file.as_fd())?)
}
