//! Cgroups below the root, for processes that are to be in one.

use std::path::{Path, PathBuf};

/// A cgroup that goes with its owner.
pub struct Group(PathBuf);

impl Group {
    /// Makes it directly below the root.
    pub fn new(name: &str) -> Self {
        let places = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let root = places.into_iter().find(|dir| dir.join("cgroup.controllers").exists());
        let path = root.expect("cgroup v2 is mounted nowhere").join(name);
        std::fs::create_dir(&path).unwrap();
        Group(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes that have ended leave it in a while.
        while let Err(error) = std::fs::remove_dir(&self.0) {
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{error}");
            std::thread::yield_now();
        }
    }
}
