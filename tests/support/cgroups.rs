//! Cgroups of the tests' own.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "each test program uses a part, and says by a panic that it failed"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use portmap::sys::bpf::cgroup::Cgroup;

/// Where this machine has cgroup v2.
pub fn mounted() -> &'static Path {
    let places = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
    places.into_iter().find(|dir| dir.join("cgroup.controllers").exists()).unwrap()
}

/// A cgroup at the root's, which takes those below and what is attached to them along.
pub struct Group(pub PathBuf);

impl Group {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = mounted().join(format!("portmap-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Group(path)
    }

    /// Makes a cgroup below.
    pub fn below(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub fn open(&self) -> Cgroup {
        Cgroup::open(&self.0).unwrap()
    }

    /// All cgroups below, in order.
    pub fn tree(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut todo = vec![self.0.clone()];
        while let Some(dir) = todo.pop() {
            let entries = fs::read_dir(&dir).unwrap().map(Result::unwrap);
            let below: Vec<PathBuf> = entries
                .filter(|entry| entry.file_type().unwrap().is_dir())
                .map(|entry| entry.path())
                .collect();
            found.extend(below.clone());
            todo.extend(below);
        }
        found.sort();
        found
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for path in self.tree().iter().rev().chain([&self.0]) {
            // Processes that were killed leave it in a while.
            while let Err(error) = fs::remove_dir(path) {
                assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{error}");
                std::thread::yield_now();
            }
        }
    }
}
