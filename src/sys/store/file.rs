//! The files of the state directory, written so that a kill leaves the old or the new content.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{
    Access, AtFlags, FileType, Mode, OFlags, accessat, fsync, linkat, mkdirat, mknodat, openat,
    readlinkat, renameat, symlinkat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Result};
use crate::sys::{directory, file};

/// The longest text for a symbolic link: XFS takes the shortest ones (`XFS_SYMLINK_MAXLEN`, 1024).
const LONGEST_LINK: usize = 1000;

/// The state directory, and its files by their names below it. It is open: its own path is walked once
/// and not for each of them.
pub(super) struct Files {
    path: PathBuf,
    dir: File,
}

impl Files {
    pub fn new(path: &Path, dir: File) -> Self {
        Files { path: path.to_owned(), dir }
    }

    pub fn root(&self) -> &Path {
        &self.path
    }

    /// The whole path of a file, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a file, and makes it and its directory if the flags say so.
    pub fn open_file(&self, name: &str, flags: OFlags, mode: u32) -> io::Result<File> {
        let mode = Mode::from_bits_truncate(mode);
        let open = || Ok(File::from(retry_on_intr(|| openat(&self.dir, name, flags, mode))?));
        match flags.contains(OFlags::CREATE) {
            true => self.with_parent(name, open).map(|(file, _)| file),
            false => open(),
        }
    }

    /// The content of a file, if it is there.
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match file::read_at(&self.dir, name) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a file is there, as far as can be told.
    pub fn exists(&self, name: &str) -> bool {
        accessat(&self.dir, name, Access::EXISTS, AtFlags::empty()).is_ok()
    }

    /// The content of a file of text, if it is there.
    pub fn read_text(&self, name: &str) -> Result<Option<String>> {
        self.read(name)
            .and_then(|content| content.map(file::text).transpose())
            .map_err(|error| self.failed("read", name, error))
    }

    /// Names in a directory, without those that begin with a dot; none if there is no directory.
    pub fn names<C: Default + Extend<String>>(&self, name: &str) -> Result<C> {
        let mut names = C::default();
        let keep = |name: &str| {
            names.extend([name.to_owned()]);
            None::<()>
        };
        self.find(name, keep)?;
        Ok(names)
    }

    /// Looks at the `names` in a directory until something is found out.
    pub fn find<T>(
        &self,
        name: &str,
        mut look: impl FnMut(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        directory::find_at(
            &self.dir,
            name,
            |name| {
                if name.starts_with('.') { None } else { look(name) }
            },
        )
        .map_err(|error| self.failed("read", name, error))
    }

    /// Makes a directory, and those above it, and says whether it was missing.
    pub fn make_dir(&self, name: &str) -> io::Result<bool> {
        let make = || match mkdirat(&self.dir, name, Mode::from_bits_truncate(0o777)) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(error) => Err(error.into()),
        };
        self.with_parent(name, make).map(|(made, _)| made)
    }

    /// Makes an empty file if there is none, and its directory, and says whether that was missing.
    /// mknod(2), because there is nothing to be done with a descriptor.
    pub fn touch(&self, name: &str) -> io::Result<bool> {
        let mode = Mode::from_bits_truncate(0o644);
        let make = || match mknodat(&self.dir, name, FileType::RegularFile, mode, 0) {
            Err(Errno::EXIST) => Ok(()),
            other => other.map_err(io::Error::from),
        };
        self.with_parent(name, make).map(|((), was_missing)| was_missing)
    }

    /// Makes something in a directory, which is made first if it turns out to be missing. Says whether
    /// it was.
    fn with_parent<T>(
        &self,
        name: &str,
        make: impl Fn() -> io::Result<T>,
    ) -> io::Result<(T, bool)> {
        match (make(), name.rsplit_once('/')) {
            (Err(error), Some((parent, _))) if error.kind() == ErrorKind::NotFound => {
                self.make_dir(parent)?;
                Ok((make()?, true))
            }
            (made, _) => Ok((made?, false)),
        }
    }

    /// Makes or overwrites a file, and its directory.
    pub fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let mut file = self.open_file(name, flags, 0o666)?;
        file.write_all(content)?;
        Ok(fsync(&file)?)
    }

    /// Old or new content, never half: temporary file, fsync, rename. The name of the temporary file is
    /// fixed, since the lock admits one writer, so a kill leaves at most one behind.
    pub fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let temporary = temporary(name);
        let written = self.write(&temporary, content).and_then(|()| self.rename(&temporary, name));
        if written.is_err() {
            // The error of the write is the one to report.
            drop(self.remove(&temporary));
        }
        written
    }

    /// Makes a file of one short line if there is none by the name, and its directory, and says whether there
    /// was none. It is a symbolic link to nowhere with the line for a target, as long as that is short enough:
    /// one system call makes it, reads it or removes it.
    pub fn make_line(&self, name: &str, line: &str) -> io::Result<bool> {
        let make = || match symlinkat(line, &self.dir, name) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(error) => Err(error.into()),
        };
        self.with_parent(name, make).map(|(made, _)| made)
    }

    /// What [`Files::make_line`] or [`Files::replace_line`] has written, if it is there.
    pub fn read_line(&self, name: &str) -> io::Result<Option<String>> {
        match readlinkat(&self.dir, name, Vec::new()) {
            Ok(line) => line.into_string().map(Some).map_err(io::Error::other),
            Err(Errno::NOENT) => Ok(None),
            // No link.
            Err(Errno::INVAL) => self.read(name)?.map(file::text).transpose(),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts another line in the place of one, at once.
    pub fn replace_line(&self, name: &str, line: &str) -> io::Result<()> {
        let temporary = temporary(name);
        // A kill may have left one, which would be followed or be in the way.
        self.remove(&temporary)?;
        if line.len() > LONGEST_LINK {
            return self.replace(name, line.as_bytes());
        }
        symlinkat(line, &self.dir, &temporary)?;
        self.rename(&temporary, name)
    }

    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.dir, from, &self.dir, to)?)
    }

    /// Gives a file another name beside the one that it has.
    pub fn link(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(linkat(&self.dir, from, &self.dir, to, AtFlags::empty())?)
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        ignore_absent(unlinkat(&self.dir, name, AtFlags::empty()).map_err(Into::into))
    }

    /// Removes a directory, if it is there and empty.
    pub fn remove_empty_dir(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.dir, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOENT | Errno::NOTEMPTY) => Ok(()),
            other => Ok(other?),
        }
    }

    /// An error that says what could not be done to a file.
    pub fn failed(&self, action: &str, name: &str, error: io::Error) -> Error {
        Error::io(format!("{action} {}", self.path(name).display()), error)
    }
}

fn temporary(name: &str) -> String {
    let dir = name.rfind('/').map_or("", |end| &name[..=end]);
    [dir, ".tmp"].concat()
}

pub(super) fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
