//! The lock of the state directory.

use std::fs::File;
use std::sync::mpsc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use rustix::fs::OFlags;

use super::file::Files;
use super::holder::holder;
use crate::error::{Error, Result};

/// How long a call waits for the node's lock. Below the two minutes after which the kubelet gives
/// up, so that the runtime gets an answer that says why.
pub(super) const LOCK_DEADLINE: Duration = Duration::from_secs(60);

/// Name of the file that is locked.
pub(super) const NAME: &str = "lock";

/// flock(2) with a deadline. A thread waits in the kernel, where the queue is fair; polling is not.
pub(super) fn lock(files: &Files, patience: Duration) -> Result<Flock<File>> {
    // Without O_CLOEXEC: a tool that is still changing the kernel when this process is killed keeps
    // the lock until it is done.
    let flags = OFlags::RDWR | OFlags::CREATE;
    let failed = |action, error| files.failed(action, NAME, error);
    let mut file =
        files.open_file(NAME, flags, 0o600).map_err(|error| failed("open the lock", error))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((unlocked, nix::errno::Errno::EWOULDBLOCK)) => file = unlocked,
        Err((_, error)) => return Err(failed("lock", error.into())),
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut waiting = file;
        let result = loop {
            match Flock::lock(waiting, FlockArg::LockExclusive) {
                Err((unlocked, nix::errno::Errno::EINTR)) => waiting = unlocked,
                Err((_, error)) => break Err(error),
                Ok(lock) => break Ok(lock),
            }
        };
        // The receiver is gone after its deadline; dropping the result unlocks.
        drop(sender.send(result));
    });
    match receiver.recv_timeout(patience) {
        Ok(Ok(lock)) => Ok(lock),
        Ok(Err(error)) => Err(failed("lock", error.into())),
        Err(_) => {
            let path = files.path(NAME);
            Err(Error::Busy { seconds: patience.as_secs(), holder: holder(&path), path })
        }
    }
}
