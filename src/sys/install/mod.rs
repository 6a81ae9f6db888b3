//! The files of an installation: the binary among a runtime's plugins, and the list that names it.

pub mod events;
mod place;

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statvfs::{FsFlags, statvfs};
use rustix::thread::CapabilitySet;

use crate::conflist::cache::Cached;
use crate::conflist::files::{drop_in_directory, is_drop_in};
use crate::conflist::{DropIn, PLUGIN};
use crate::error::{Error, Result};
use place::Like;

/// Where runtimes look for plugins unless they are told otherwise.
pub const DEFAULT_BIN_DIR: &str = "/opt/cni/bin";

/// The running program. The kernel keeps it readable under this name whatever becomes of its file.
const SELF: &str = "/proc/self/exe";

/// Enough of a file's metadata to see that it was changed.
pub type Stamp = (u64, u64, u64, i64, i64, u32);

/// What was at the binary's place before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    Nothing,
    /// This very program, ready to run.
    Same,
    Other,
}

/// Puts the running program into `dir`, which is made if it is missing: old or new file at any
/// moment, a running old one goes on. `warn` hears of what could not be kept and is no reason to fail.
pub fn install_binary(dir: &Path, warn: &mut dyn FnMut(String)) -> Result<Before> {
    let path = dir.join(PLUGIN);
    fs::create_dir_all(dir).map_err(|error| explain("create", dir, error))?;
    place::clear_leftovers(dir);
    let before = look(&path).map_err(|error| explain("read", &path, error))?;
    if before == Before::Same {
        return Ok(before);
    }
    if path.is_dir() {
        return Err(Error::io(format!("write {}", path.display()), Errno::EISDIR.into()));
    }
    let flags = statvfs(dir).map_err(|error| explain("look at", dir, error.into()))?.flags();
    if flags.contains(FsFlags::ST_NOEXEC) {
        return Err(Error::Config(format!(
            "nothing can be run from {}: it is on a file system that is mounted noexec; choose another directory with --dest",
            dir.display()
        )));
    }
    let mut own = File::open(SELF).map_err(|error| Error::io(format!("read {SELF}"), error))?;
    let like = Like { mode: 0o755, owner: None, label: place::label(&path) };
    place::replace(&path, &mut own, &like, warn).map_err(|error| explain("write", &path, error))?;
    Ok(before)
}

/// What is at the binary's place now.
pub fn look(path: &Path) -> io::Result<Before> {
    let Some(mut there) = ignore_absent(File::open(path))? else {
        return Ok(Before::Nothing);
    };
    let meta = there.metadata()?;
    let runs = meta.is_file() && meta.permissions().mode() & 0o555 == 0o555;
    Ok(if runs && is_own(&mut there)? { Before::Same } else { Before::Other })
}

/// Whether a file has the bytes of the running program.
fn is_own(there: &mut File) -> io::Result<bool> {
    let mut own = File::open(SELF)?;
    Ok(there.metadata()?.len() == own.metadata()?.len() && equal(&mut own, there)?)
}

/// Whether the file from which this program was started has become another one, or is gone.
#[must_use]
pub fn is_outdated() -> bool {
    let Ok(path) = fs::read_link(SELF) else { return false };
    !File::open(path).and_then(|mut there| is_own(&mut there)).unwrap_or(false)
}

fn equal(left: &mut File, right: &mut File) -> io::Result<bool> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    loop {
        for (file, part) in [(&mut *left, &mut a), (&mut *right, &mut b)] {
            part.clear();
            file.take(1 << 16).read_to_end(part)?;
        }
        if a != b || a.is_empty() {
            return Ok(a == b);
        }
    }
}

/// Whether runtimes can start what is there, whoever's it is.
#[must_use]
pub fn can_be_run(path: &Path) -> bool {
    let executable = fs::metadata(path)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    executable && statvfs(path).is_ok_and(|found| !found.flags().contains(FsFlags::ST_NOEXEC))
}

/// Changes whenever the file at `path` does; `None` if there is none.
#[must_use]
pub fn stamp(path: &Path) -> Option<Stamp> {
    let meta = fs::metadata(path).ok()?;
    Some((
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime_nsec() ^ meta.mtime(),
        meta.ctime() << 30 | meta.ctime_nsec(),
        meta.mode(),
    ))
}

/// Removes a file, durably. Returns whether there was one.
pub fn remove(path: &Path) -> Result<bool> {
    let failed = |error| explain("remove", path, error);
    let dir = path.parent().unwrap_or(path);
    place::clear_leftovers(dir);
    if ignore_absent(fs::remove_file(path)).map_err(failed)?.is_none() {
        return Ok(false);
    }
    place::sync_directory(dir).map_err(failed)?;
    Ok(true)
}

/// All names in a directory, hidden ones too; none if there is no directory.
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let failed = |error| explain("read", dir, error);
    let Some(entries) = ignore_absent(fs::read_dir(dir)).map_err(failed)? else {
        return Ok(Vec::new());
    };
    entries
        .map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// The drop-ins of the list at `path`, as libcni reads them: `path` may be a link, and they are beside that.
pub fn drop_ins(path: &Path, text: &str) -> Result<Vec<DropIn>> {
    let Some(name) = drop_in_directory(text) else { return Ok(Vec::new()) };
    let dir = path.with_file_name(name);
    let mut names = names(&dir)?;
    names.retain(|name| is_drop_in(name));
    names.sort_unstable();
    let mut drop_ins = Vec::new();
    for path in names.into_iter().map(|name| dir.join(name)) {
        let failed = |error| explain("read", &path, error);
        if fs::symlink_metadata(&path).map_err(failed)?.is_dir() {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(failed)?;
        drop_ins.push(DropIn { path, text });
    }
    Ok(drop_ins)
}

/// The files of a directory in which libcni has cached attachments that are `wanted`, by name.
pub fn cached(dir: &Path, wanted: impl Fn(&Cached) -> bool) -> Result<Vec<PathBuf>> {
    let mut names = names(dir)?;
    names.sort_unstable();
    let mut found = Vec::new();
    for path in names.into_iter().map(|name| dir.join(name)) {
        let file = match fs::read(&path) {
            Ok(file) => file,
            // A DEL takes its file away.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::IsADirectory) => {
                continue;
            }
            Err(error) => return Err(explain("read", &path, error)),
        };
        if Cached::parse(&file).is_some_and(|cached| wanted(&cached)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// A configuration as it was read.
#[derive(Debug, Clone)]
pub struct ListFile {
    /// Where it really is: what names a link keeps the link.
    pub path: PathBuf,
    pub text: String,
    pub drop_ins: Vec<DropIn>,
    like: Like,
}

impl ListFile {
    /// `None` if there is no file.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let failed = |error| explain("read", path, error);
        let Some(real) = ignore_absent(fs::canonicalize(path)).map_err(failed)? else {
            return Ok(None);
        };
        let Some(mut file) = ignore_absent(File::open(&real)).map_err(failed)? else {
            return Ok(None);
        };
        let meta = file.metadata().map_err(failed)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;
        let like = Like {
            mode: meta.mode() & 0o7777,
            owner: Some((meta.uid(), meta.gid())),
            label: place::label(&real),
        };
        let drop_ins = drop_ins(path, &text)?;
        Ok(Some(ListFile { path: real, text, drop_ins, like }))
    }

    /// Puts `text` in place of the file, with its owner, mode and label.
    pub fn replace(&self, text: &str, warn: &mut dyn FnMut(String)) -> Result<()> {
        let failed = |error| explain("write", &self.path, error);
        let now = fs::read_to_string(&self.path).map_err(failed)?;
        if now != self.text {
            return Err(Error::Config(format!(
                "{} was changed by somebody else just now: try again",
                self.path.display()
            )));
        }
        self.put(&self.path, text, warn)
    }

    /// Writes `text` beside the file under another name, unless that is what is there.
    pub fn put_beside(
        &self,
        name: &str,
        text: &str,
        warn: &mut dyn FnMut(String),
    ) -> Result<PathBuf> {
        let path = self.path.with_file_name(name);
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            return Ok(path);
        }
        self.put(&path, text, warn)?;
        Ok(path)
    }

    fn put(&self, path: &Path, text: &str, warn: &mut dyn FnMut(String)) -> Result<()> {
        place::clear_leftovers(path.parent().unwrap_or(path));
        place::replace(path, &mut text.as_bytes(), &self.like, warn)
            .map_err(|error| explain("write", path, error))
    }
}

fn ignore_absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// From what the system answered to what a person can do about it.
fn explain(what: &str, path: &Path, error: io::Error) -> Error {
    let hint = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EROFS) => {
            ": it is on a read-only file system; choose a writable directory in which the runtime looks, \
             with --dest for plugins and --conf-dir or --conflist for configurations"
        }
        Some(Errno::EACCES | Errno::EPERM) => &rights(path),
        Some(Errno::ENOSPC | Errno::EDQUOT) => ": the file system is full; nothing was changed",
        Some(Errno::EBUSY) => {
            ": the file itself is mounted, and only a file in a mounted directory can be replaced; mount the directory"
        }
        Some(Errno::ENOTDIR | Errno::EEXIST) => ": a part of the path is a file",
        _ => "",
    };
    Error::io(format!("{what} {}{hint}", path.display()), error)
}

/// What this process lacks to change a file. Without capabilities root is one user of many
/// (capabilities(7)).
fn rights(path: &Path) -> String {
    if !nix::unistd::geteuid().is_root() {
        return ": this user may not; run it as root (in a container with the directory of the host mounted)"
            .to_owned();
    }
    let effective = rustix::thread::capabilities(None).map(|sets| sets.effective);
    let lacking: Vec<&str> = [
        (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
        (CapabilitySet::CHOWN, "CAP_CHOWN"),
        (CapabilitySet::FOWNER, "CAP_FOWNER"),
    ]
    .into_iter()
    .filter(|(capability, _)| effective.is_ok_and(|effective| !effective.contains(*capability)))
    .map(|(_, name)| name)
    .collect();
    if lacking.is_empty() {
        return ": root may not either; look for an immutable file (lsattr) and for a security module (SELinux, AppArmor)"
            .to_owned();
    }
    let there = path.ancestors().find_map(|path| Some((path, fs::metadata(path).ok()?)));
    let owner = there.map_or_else(String::new, |(path, meta)| {
        format!("{} belongs to user {}, and ", path.display(), meta.uid())
    });
    format!(": {owner}root needs {} here", lacking.join(", "))
}
