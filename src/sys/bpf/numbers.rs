//! What a call knows of an earlier one's maps and programs: the kernel's numbers for them, and when the
//! directories with their names last changed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::name::Name;

/// How long a change of a directory has to be over before its time tells it from the next one: a tick of
/// the kernel's clock takes 10 ms at most (`CONFIG_HZ=100`).
const SETTLED: Duration = Duration::from_millis(100);

/// Which directory it is, and when a name came to it or went last. While that is the same, it has the
/// same names for the same maps and programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds since 1970.
    changed: (i64, i64),
}

impl Stamp {
    /// `None` if the last change is too new.
    pub(super) fn of(meta: &fs::Metadata) -> Option<Self> {
        let (seconds, nanoseconds) = (meta.ctime(), meta.ctime_nsec());
        let changed = Duration::new(seconds.try_into().ok()?, nanoseconds.try_into().ok()?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        now.checked_sub(changed).filter(|age| *age >= SETTLED)?;
        Some(Self { device: meta.dev(), inode: meta.ino(), changed: (seconds, nanoseconds) })
    }
}

/// The kernel's numbers for programs. A number is not used again until the next boot; another program
/// may get the name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    /// The object that they are from, by the name of its directory.
    pub revision: String,
    /// The number of the map of claims, without which they are not the ones at work.
    pub claims: u32,
    /// By name.
    pub programs: Arc<BTreeMap<Name, u32>>,
    /// Those of the maps that every call works on.
    #[serde(default)]
    pub maps: BTreeMap<Name, u32>,
    /// The directories when all of these had their names there.
    #[serde(default)]
    pub seen: Option<Seen>,
}

/// The directories when everything was there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The object, of whose maps none was missing, by the name of its directory.
    pub object: String,
    /// There were no maps of a newer layout.
    pub root: Stamp,
    pub maps: Stamp,
    pub programs: Stamp,
}
