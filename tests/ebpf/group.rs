//! Cgroups below the root, for processes that are to be in one.

use std::path::{Path, PathBuf};

/// A cgroup that goes with its owner, unless somebody else has made it.
pub struct Group {
    path: PathBuf,
    made: bool,
}

impl Group {
    /// One directly below the root, made if it is not there.
    pub fn new(name: &str) -> Self {
        let places = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let root = places.into_iter().find(|dir| dir.join("cgroup.controllers").exists());
        let path = root.expect("cgroup v2 is mounted nowhere").join(name);
        let made = match std::fs::create_dir(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            other => other.map(|()| true).unwrap(),
        };
        Group { path, made }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes that have ended leave it in a while.
        while self.made
            && let Err(error) = std::fs::remove_dir(&self.path)
        {
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{error}");
            std::thread::yield_now();
        }
    }
}
