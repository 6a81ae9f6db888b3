//! Looking at the state without changing anything of it.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::Store;
use super::file::entries;
use super::holder::holder;
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
        match fs::metadata(dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Looked::Absent),
            Err(error) => return Err(Error::io(format!("look at {}", dir.display()), error)),
            Ok(_) => {}
        }
        let path = dir.join("lock");
        let held = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                return Err(Error::io(format!("open the lock {}", path.display()), error));
            }
            Ok(file) => match share(file) {
                Ok(Some(lock)) => Some(lock),
                Ok(None) => {
                    return Ok(Looked::Busy { holder: holder(&path), seconds: PATIENCE.as_secs() });
                }
                Err(error) => {
                    return Err(Error::io(format!("lock {}", path.display()), error.into()));
                }
            },
        };
        let store = Store {
            dir: dir.to_owned(),
            looked_up: RefCell::default(),
            alone: RefCell::default(),
            only_reads: true,
            _lock: held,
        };
        let boot = dir.join("boot");
        match fs::read_to_string(&boot) {
            // Who cannot tell the boot, now or then, has not seen another one.
            Ok(known) if known == boot_id || known.is_empty() || boot_id.is_empty() => {
                Ok(Looked::Store(store))
            }
            Ok(_) => {
                let names = entries(&dir.join("records"))?.collect::<Result<Vec<String>>>()?;
                let records = names.iter().filter(|name| name.ends_with(".json")).count();
                Ok(Looked::OtherBoot(records))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Looked::Store(store)),
            Err(error) => Err(Error::io(format!("read {}", boot.display()), error)),
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
        store.put(&one, None).unwrap();
        store.set_note("pending", Some("x")).unwrap();
        // What kills leave.
        fs::write(dir.join("records/b.in"), "half").unwrap();
        fs::create_dir_all(dir.join("index/ports/tcp-80")).unwrap();
        fs::write(dir.join("index/ports/tcp-80/gone"), "").unwrap();
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
        for left in ["records/b.in", "index/ports/tcp-80/gone", "notes/pending"] {
            assert!(dir.join(left).exists(), "{left}");
        }
        assert!(matches!(Store::look(&dir, "next").unwrap(), Looked::OtherBoot(1)));
        assert!(dir.join("records").exists());
        drop(store);
        fs::remove_dir_all(dir).unwrap();
    }
}
