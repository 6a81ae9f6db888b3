//! Looking at the state without changing anything of it.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::OFlags;

use super::directory::{is_another, open_dir};
use super::file::Files;
use super::holder::holder;
use super::{Store, lock};
use crate::error::{Error, Result};

/// How long somebody who only looks waits for the lock: most calls have it for milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

/// What a look at the directory came to.
pub enum Looked {
    /// Nobody has kept anything there.
    Absent,
    /// It is of another boot, with so many records: the next call discards them.
    OtherBoot(usize),
    /// Somebody has the lock and has not given it back: `process 12 (portmap)`, if /proc tells.
    Busy { holder: Option<String>, seconds: u64 },
    /// Opened, shared with other readers.
    Store(Store),
}

impl Store {
    /// Opens the directory for reading: nothing there is made, written or cleared away, and the lock
    /// keeps out those who would.
    pub fn look(dir: &Path, boot_id: &str) -> Result<Looked> {
        let files = match open_dir(dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Looked::Absent),
            Err(error) => return Err(Error::io(format!("look at {}", dir.display()), error)),
            Ok(opened) => Files::new(dir, opened),
        };
        let failed = |action, error| files.failed(action, lock::NAME, error);
        let held = match files.open_file(lock::NAME, OFlags::RDONLY | OFlags::CLOEXEC, 0) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(failed("open the lock", error)),
            Ok(file) => match share(file) {
                Ok(Some(lock)) => Some(lock),
                Ok(None) => {
                    let holder = holder(&files.path(lock::NAME));
                    return Ok(Looked::Busy { holder, seconds: PATIENCE.as_secs() });
                }
                Err(error) => return Err(failed("lock", error.into())),
            },
        };
        let store = Store { only_reads: true, ..Store::new(files, held) };
        match store.files.read_text("boot")? {
            Some(known) if is_another(&known, boot_id) => {
                let names: Vec<String> = store.files.names("records")?;
                let records = names.iter().filter(|name| name.ends_with(".json")).count();
                Ok(Looked::OtherBoot(records))
            }
            _ => Ok(Looked::Store(store)),
        }
    }
}

/// `None` if it was not to be had in time.
fn share(mut file: File) -> Result<Option<Flock<File>>, Errno> {
    let begin = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((unlocked, Errno::EWOULDBLOCK | Errno::EINTR)) => file = unlocked,
            Err((_, error)) => return Err(error),
        }
        if begin.elapsed() > PATIENCE {
            return Ok(None);
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::model::BackendKind;
    use crate::record::samples::record;

    #[test]
    fn a_look_changes_nothing_and_says_what_there_is() {
        let dir = std::env::temp_dir().join(format!("portmap-look-{}", std::process::id()));
        drop(fs::remove_dir_all(&dir));
        assert!(matches!(Store::look(&dir, "boot").unwrap(), Looked::Absent));
        assert!(!dir.exists());

        let one = record("a", &["10.0.0.2/24"], &["tcp 80 80"], BackendKind::Iptables, 1);
        let store = Store::open(&dir, "boot").unwrap();
        store.stage(&one).unwrap();
        store.put(&one, None).unwrap();
        store.set_note("pending", Some("x")).unwrap();
        // What kills leave.
        fs::write(dir.join("records/b.in"), "half").unwrap();
        let port = dir.join("index/ports/tcp-80");
        let line = format!("{}/gone", one.id());
        fs::remove_file(&port).unwrap();
        symlink(&line, &port).unwrap();
        let busy = Store::look(&dir, "boot").unwrap();
        let own = format!("process {} (", std::process::id());
        assert!(
            matches!(&busy, Looked::Busy { holder: Some(holder), seconds: 3 } if holder.starts_with(&own))
        );
        drop(store);

        let Looked::Store(store) = Store::look(&dir, "boot").unwrap() else { panic!("not opened") };
        assert_eq!(store.all().unwrap().0, [one]);
        store
            .sharing(&record("c", &[], &["tcp 80 80"], BackendKind::Iptables, 2).index_keys(), "")
            .unwrap();
        store.set_note("pending", None).unwrap();
        // Readers do not exclude each other.
        assert!(matches!(Store::look(&dir, "boot").unwrap(), Looked::Store(_)));
        for left in ["records/b.in", "notes/pending"] {
            assert!(dir.join(left).exists(), "{left}");
        }
        assert_eq!(fs::read_link(&port).unwrap().to_str(), Some(&*line));
        assert!(matches!(Store::look(&dir, "next").unwrap(), Looked::OtherBoot(1)));
        assert!(dir.join("records").exists());
        drop(store);
        fs::remove_dir_all(dir).unwrap();
    }
}
