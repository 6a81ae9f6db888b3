//! The directory as such: whether it can hold state, and what can be told of that without a lock.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};

use super::index::dir_of_backend;
use super::{MOVING, moving_name, record_path};
use crate::error::{Error, Result};
use crate::model::BackendKind;
use crate::sys::file::read_to_string;

/// Whether there is anything of a record, without a lock: for the calls that have nothing to do.
#[must_use]
pub fn is_recorded(dir: &Path, id: &str) -> bool {
    record_path(dir, id).exists()
        || MOVING.iter().any(|way| dir.join(moving_name(id, way)).exists())
}

/// Whether there is any record, without a lock: for those who only look, where opening would make the
/// directory.
pub fn has_records(dir: &Path) -> Result<bool> {
    let path = dir.join("records");
    match fs::read_dir(&path).map(|mut entries| entries.next().transpose()) {
        Ok(Ok(first)) => Ok(first.is_some()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(false)
        }
        Ok(Err(error)) | Err(error) => {
            Err(Error::io(format!("look for records in {}", path.display()), error))
        }
    }
}

/// Whether what is there is of another boot than `boot_id`, without a lock: the next call that changes
/// something discards it. Who cannot tell the boot, now or then, has not seen another one.
pub fn is_of_another_boot(dir: &Path, boot_id: &str) -> Result<bool> {
    let path = dir.join("boot");
    match fs::read_to_string(&path) {
        Ok(known) => Ok(is_another(&known, boot_id)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(false)
        }
        Err(error) => Err(Error::io(format!("read {}", path.display()), error)),
    }
}

/// Of two boots, as far as both are known.
pub(super) fn is_another(known: &str, boot_id: &str) -> bool {
    known != boot_id && !known.is_empty() && !boot_id.is_empty()
}

/// Whether some record has this backend, without a lock: for the calls that have nothing to do.
#[must_use]
pub fn uses_backend(dir: &Path, kind: BackendKind) -> bool {
    fs::read_dir(dir.join(dir_of_backend(kind))).is_ok_and(|mut entries| entries.next().is_some())
}

/// A note, without a lock and whenever it was made: a whole one, or none.
#[must_use]
pub fn note_of(dir: &Path, name: &str) -> Option<String> {
    read_to_string(&*dir.join("notes").join(name)).ok()
}

/// Whether records can be kept in `dir`, which is made if it is missing.
pub fn check_usable(dir: &Path) -> Result<()> {
    open_state_dir(dir)?;
    nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).map_err(|error| {
        Error::io(format!("write to the state directory {}", dir.display()), error.into())
    })
}

/// Opens the state directory, which is made if it is missing. It is root's alone, whatever the runtime's
/// umask: records become rules. One that others may write to is refused.
pub fn open_state_dir(dir: &Path) -> Result<File> {
    let create = || {
        let parent = dir.parent().unwrap_or(dir);
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }?;
        open_dir(dir)
    };
    let failed = |error| Error::io(format!("create the state directory {}", dir.display()), error);
    let opened = open_dir(dir).or_else(|_| create()).map_err(failed)?;
    let meta = opened.metadata().map_err(failed)?;
    refusal(dir, &meta).map_or(Ok(opened), |reason| Err(Error::Config(reason)))
}

/// Opens a directory in order to name what is in it, and for nothing else.
pub(super) fn open_dir(dir: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(File::from(open(dir, flags, Mode::empty())?))
}

/// Why a directory is not used for records, by its owner and mode.
#[must_use]
pub fn refusal(dir: &Path, meta: &fs::Metadata) -> Option<String> {
    let wrong = meta.mode() & 0o022 != 0 || meta.uid() != nix::unistd::geteuid().as_raw();
    wrong.then(|| {
        format!(
            "the state directory {} has owner {} and mode {:03o}: nobody but the owner, who must be user {}, may write to it",
            dir.display(),
            meta.uid(),
            meta.mode() & 0o777,
            nix::unistd::geteuid()
        )
    })
}
