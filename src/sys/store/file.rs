//! Reading directories and writing files so that a kill leaves the old or the new content.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::Path;

use crate::error::{Error, Result};

/// Names in a directory, without those that begin with a dot; none if there is no directory.
pub(super) fn entries(path: &Path) -> Result<impl Iterator<Item = Result<String>> + use<>> {
    let failed = |path: &Path, error| Error::io(format!("read {}", path.display()), error);
    let entries = match fs::read_dir(path) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(failed(path, error)),
    };
    let path = path.to_owned();
    let names = entries.into_iter().flatten().map(move |entry| {
        entry
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .map_err(|error| failed(&path, error))
    });
    Ok(names.filter(|name| name.as_ref().map_or(true, |name| !name.starts_with('.'))))
}

pub(super) fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
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

pub(super) fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    Ok(nix::unistd::fsync(file.as_fd())?)
}
