//! One file under its name as a whole: what is read is old or new, also after a kill or a crash.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Temporary files are called this and 16 hex digits. Runtimes look at neither: as a plugin nobody
/// names it, and as a configuration it has the wrong ending.
const TEMPORARY: &str = ".portmap-new.";

/// The extended attribute with a file's SELinux context.
const LABEL: &str = "security.selinux";

/// How often a name is chosen anew because somebody cleared the file away before it was locked.
const TRIES: usize = 10;

/// What a file is to be like.
#[derive(Debug, Clone)]
pub struct Like {
    pub mode: u32,
    /// User and group, if they are not the caller's.
    pub owner: Option<(u32, u32)>,
    /// With another label than the policy expects, SELinux keeps a runtime from using the file.
    pub label: Option<Vec<u8>>,
}

/// The label of a file; `None` without SELinux, or without the file.
pub fn label(path: &Path) -> Option<Vec<u8>> {
    xattr::get(path, LABEL).ok().flatten()
}

/// Puts `content` at `path`. Nobody ever writes to the file under its final name, so that there is no
/// "text file busy", neither for this nor for who starts it.
pub fn replace(
    path: &Path,
    content: &mut dyn Read,
    like: &Like,
    warn: &mut dyn FnMut(String),
) -> io::Result<()> {
    let dir = path.parent().unwrap_or(path);
    let temporary = Temporary::create(dir)?;
    let done = temporary.fill(content, like, warn).and_then(|()| fs::rename(&temporary.path, path));
    if done.is_err() {
        // The error of the write is the one to report.
        drop(fs::remove_file(&temporary.path));
    }
    done?;
    sync_directory(dir)
}

/// A file on its way, locked as long as its maker lives.
struct Temporary {
    path: PathBuf,
    _lock: File,
}

impl Temporary {
    fn create(dir: &Path) -> io::Result<Self> {
        for _ in 0..TRIES {
            let random = RandomState::new().build_hasher().finish();
            let path = dir.join(format!("{TEMPORARY}{random:016x}"));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                other => drop(other?),
            }
            // Until it is locked, it looks like a killed one's.
            let lock = match File::open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                other => other?,
            };
            if lock.try_lock().is_ok() && lock.metadata()?.nlink() > 0 {
                return Ok(Temporary { path, _lock: lock });
            }
        }
        Err(io::Error::other("temporary files are removed as fast as they are made"))
    }

    /// Closes the writing descriptor before the rename: a file that is open for writing cannot be run.
    fn fill(
        &self,
        content: &mut dyn Read,
        like: &Like,
        warn: &mut dyn FnMut(String),
    ) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(&self.path)?;
        io::copy(content, &mut file)?;
        if let Some((user, group)) = like.owner {
            let meta = file.metadata()?;
            if (meta.uid(), meta.gid()) != (user, group) {
                fchown(&file, Some(user), Some(group))?;
            }
        }
        // After the owner, whose change takes away bits of the mode.
        file.set_permissions(fs::Permissions::from_mode(like.mode))?;
        if let Some(wanted) = &like.label
            && label(&self.path).as_ref() != Some(wanted)
            && let Err(error) = xattr::set(&self.path, LABEL, wanted)
        {
            warn(format!("the SELinux label could not be kept: {error}"));
        }
        file.sync_all()
    }
}

/// Removes what killed runs left in a directory: files of our name that nobody has locked. What cannot
/// be removed is left for the next time.
pub fn clear_leftovers(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(TEMPORARY));
        if ours
            && let Ok(file) = File::open(entry.path())
            && file.try_lock().is_ok()
        {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// Makes a change of names survive a crash.
pub fn sync_directory(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        // Some network file systems refuse to sync a directory alone.
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            nix::unistd::sync();
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    const LIKE: Like = Like { mode: 0o640, owner: None, label: None };

    fn directory(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("portmap-place-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn leftovers_go_and_files_in_work_stay() {
        let dir = directory("leftovers");
        fs::write(dir.join(format!("{TEMPORARY}0000000000000000")), "half").unwrap();
        fs::write(dir.join(".portmap.conf"), "somebody's").unwrap();
        let working = Temporary::create(&dir).unwrap();
        clear_leftovers(&dir);
        let working_name = working.path.file_name().unwrap().to_str().unwrap();
        assert_eq!(names(&dir), [working_name, ".portmap.conf"]);
        drop(working);
        clear_leftovers(&dir);
        assert_eq!(names(&dir), [".portmap.conf"]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_failure_leaves_the_old_file_alone() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("gone"))
            }
        }
        let dir = directory("failure");
        let path = dir.join("file");
        let warn = &mut |text: String| panic!("{text}");
        replace(&path, &mut &b"old"[..], &LIKE, warn).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        assert!(replace(&path, &mut Failing, &LIKE, warn).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&dir), ["file"]);
        fs::remove_dir_all(dir).unwrap();
    }
}
