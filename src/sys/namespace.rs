//! Network namespaces: whose one is, and one to try things in.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Device and inode of a namespace file: equal for equal namespaces.
fn identity(path: &str) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Whether `path` is the network namespace of this process. A path that is none of any is not.
#[must_use]
pub fn is_own(path: &str) -> bool {
    matches!((identity(path), identity("/proc/self/ns/net")), (Ok(theirs), Ok(own)) if theirs == own)
}

/// Whether `path` is some network namespace that still exists. What remains of `ip netns` after a
/// crash or a reboot is a plain file; namespaces are files of nsfs, all on the device of our own.
#[must_use]
pub fn exists(path: &str) -> bool {
    !path.is_empty()
        && matches!((identity(path), identity("/proc/self/ns/net")), (Ok((theirs, _)), Ok((own, _))) if theirs == own)
}

/// Runs `action` in a network namespace of its own, which is gone afterwards. Other threads keep
/// theirs: unshare(2) changes the calling thread alone. The error says why there is none.
pub fn in_scratch_netns<T: Send>(action: impl FnOnce() -> T + Send) -> Result<T, String> {
    in_scratch(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| {
            format!("no network namespace to try it in (CAP_SYS_ADMIN): {error}")
        })?;
        Ok(action())
    })
}

/// Runs `action` in a mount namespace of its own: nobody else sees what it mounts.
pub fn in_scratch_mounts<T: Send>(action: impl FnOnce() -> T + Send) -> Result<T, String> {
    in_scratch(|| {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
            .map_err(|error| format!("no mount namespace to try it in (CAP_SYS_ADMIN): {error}"))?;
        Ok(action())
    })
}

fn in_scratch<T: Send>(action: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        scope.spawn(action).join().unwrap_or_else(|_| Err("the trial ended unexpectedly".into()))
    })
}
