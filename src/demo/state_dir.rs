//! Where the demonstration's plugin keeps its records, apart from the machine's.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

/// A directory for records that only this demonstration uses; removed at the end.
pub(super) struct StateDir {
    pub path: PathBuf,
}

impl StateDir {
    /// Makes it, for the owner's eyes only.
    pub fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("portmap-demo-{}", std::process::id()));
        // Not create_dir_all: a directory that somebody else has put there is not to be used.
        DirBuilder::new().mode(0o700).create(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("making {}: {error}", path.display()))
        })?;
        Ok(Self { path })
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.path).ok();
    }
}
