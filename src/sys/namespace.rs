//! Network namespaces: whose one is, and one to try things in.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use serde::{Deserialize, Serialize};

use super::Host;
use super::store::note_of;
use crate::record::{Record, View};

/// Inode of the PID namespace that the system was booted with: PROC_PID_INIT_INO of linux/proc_ns.h,
/// since Linux 3.8.
const INITIAL_PIDS: u64 = 0xEFFF_FFFC;

/// Device and inode of a namespace file: equal for equal namespaces.
fn identity(path: &str) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// What is known of a network namespace that a runtime has named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It exists, or nobody has named one.
    Lives,
    Gone,
    /// This process must not look, or sees other processes or another file system than the runtime: in a
    /// container without the node's /run/netns not even the directory is there, while all of them live.
    Unknown,
}

/// Name of the note with the namespaces of an earlier call.
const NOTE: &str = "namespaces";

/// `STATX_MNT_ID_UNIQUE` of linux/stat.h, since Linux 6.8.
const UNIQUE_MOUNT: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The namespaces of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    /// The device that files of namespaces are on.
    nsfs: u64,
    /// Inodes.
    network: u64,
    mounts: u64,
}

/// What tells that two calls have the same namespaces. The kernel does not use these numbers again before
/// the next boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Signs {
    boot: String,
    /// The network namespace's cookie.
    cookie: u64,
    /// The mount that is the root of this process: it is in one mount namespace.
    root: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    signs: Signs,
    own: Own,
}

impl Own {
    /// `None` if /proc does not show them.
    #[must_use]
    pub fn by_proc() -> Option<Self> {
        let (nsfs, network) = identity("/proc/self/ns/net").ok()?;
        Some(Self { nsfs, network, mounts: inode_of_own("mnt")? })
    }

    /// What the path of a network namespace leads to, as this process sees it.
    #[must_use]
    pub fn view(&self, path: &str) -> Option<View> {
        let netns = identity(path).ok().filter(|(device, _)| *device == self.nsfs);
        let is_below_proc = is_below_proc(path);
        Some(View {
            pids: if is_below_proc { Some(inode_of_own("pid")?) } else { None },
            mounts: self.mounts,
            node: self.network,
            netns: netns.map(|(_, inode)| inode),
            dir: directory(path).filter(|_| !is_below_proc),
        })
    }
}

/// The namespaces of this process, as an earlier call has noted them in a state directory or as /proc shows
/// them: that costs a thirtieth of an ADD, because the kernel makes these files anew for every process.
pub struct Recalled {
    /// `None` if /proc does not show them.
    pub own: Option<Own>,
    news: Option<Noted>,
}

impl Recalled {
    #[must_use]
    pub fn of(host: &Host, state_dir: &Path) -> Self {
        let signs = Signs::of(host);
        let noted = note_of(state_dir, NOTE);
        let noted = noted.and_then(|text| serde_json::from_str::<Noted>(&text).ok());
        if let Some(noted) = noted.filter(|noted| Some(&noted.signs) == signs.as_ref()) {
            return Self { own: Some(noted.own), news: None };
        }
        let own = Own::by_proc();
        Self { own, news: signs.zip(own).map(|(signs, own)| Noted { signs, own }) }
    }

    /// What the next call may go by, if that is not noted.
    #[must_use]
    pub fn note(&self) -> Option<(&'static str, String)> {
        let text = serde_json::to_string(self.news.as_ref()?).ok()?;
        Some((NOTE, text))
    }
}

impl Signs {
    /// `None` where one of them is not told.
    fn of(host: &Host) -> Option<Self> {
        let root = statx(CWD, "/", AtFlags::empty(), UNIQUE_MOUNT).ok()?;
        let root = (root.stx_mask & UNIQUE_MOUNT.bits() != 0).then_some(root.stx_mnt_id)?;
        let boot = host.boot_id().to_owned();
        let cookie = host.netns_cookie().ok()??;
        (!boot.is_empty()).then_some(Self { boot, cookie, root })
    }
}

/// Whether a path leads to the network namespace of this process.
#[must_use]
pub fn is_own(path: &str) -> bool {
    let own = identity("/proc/self/ns/net");
    identity(path).is_ok_and(|found| own.is_ok_and(|own| own == found))
}

fn is_below_proc(path: &str) -> bool {
    Path::new(path).starts_with("/proc")
}

/// Device and inode of the directory that a path is in, if there is one.
fn directory(path: &str) -> Option<(u64, u64)> {
    let meta = fs::metadata(Path::new(path).parent()?).ok()?;
    meta.is_dir().then(|| (meta.dev(), meta.ino()))
}

impl View {
    /// Whether the path led to the network namespace of this process.
    #[must_use]
    pub fn is_of_node(&self) -> bool {
        self.netns == Some(self.node)
    }
}

/// The network namespace of this process, by inode.
#[must_use]
pub fn own() -> Option<u64> {
    inode_of_own("net")
}

fn inode_of_own(kind: &str) -> Option<u64> {
    // What the link says, `net:[4026531840]`: to follow it costs the kernel an inode and twice the time.
    let link = fs::read_link(format!("/proc/self/ns/{kind}")).ok()?;
    let inode = link.to_str()?.strip_prefix(kind)?.strip_prefix(":[")?.strip_suffix(']')?;
    inode.parse().ok()
}

/// Looks for the network namespace of a record; one without a path counts as alive.
#[must_use]
pub fn life(record: &Record) -> Life {
    life_at(&record.netns, record.view)
}

/// Looks for the network namespace of a path that was given in `view`.
#[must_use]
pub fn life_at(path: &str, view: Option<View>) -> Life {
    if path.is_empty() {
        return Life::Lives;
    }
    let is_below_proc = is_below_proc(path);
    // A directory below /proc goes with its process, and other PID namespaces have other numbers. Where
    // nobody has noted which one is meant, it is the node's.
    let sees_processes = || {
        let known = view.map_or(Some(INITIAL_PIDS), |view| view.pids);
        known.is_some() && inode_of_own("pid") == known
    };
    // What is mounted over a plain file in one mount namespace need not be in another.
    let sees_mounts = || view.is_none_or(|view| inode_of_own("mnt") == Some(view.mounts));
    // A container may have another directory of that name; the node's own may also be mounted into one.
    let sees_directory = || {
        directory(path)
            .is_some_and(|found| view.is_some_and(|view| view.dir == Some(found)) || sees_mounts())
    };
    let gone_if = |in_sight: bool| if in_sight { Life::Gone } else { Life::Unknown };
    match (identity(path), identity("/proc/self/ns/net")) {
        // Namespaces are files of nsfs, all on the device of our own.
        (Ok((device, inode)), Ok((nsfs, _))) if device == nsfs => {
            match view.and_then(|view| view.netns) {
                Some(known) if known != inode => {
                    gone_if(if is_below_proc { sees_processes() } else { sees_mounts() })
                }
                _ => Life::Lives,
            }
        }
        // What remains of `ip netns` after a crash or a reboot is a plain file.
        (Ok(_), Ok(_)) => gone_if(sees_mounts()),
        (Err(error), _) if is_absent(&error) => gone_if(match is_below_proc {
            true => sees_processes(),
            false => sees_directory(),
        }),
        _ => Life::Unknown,
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
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

/// Runs `action` in the network namespace of a path; other threads keep theirs. The error says why it is
/// not to be entered.
pub fn in_netns<T: Send>(path: &str, action: impl FnOnce() -> T + Send) -> Result<T, String> {
    in_scratch(|| {
        let enter = |netns: fs::File| setns(netns, CloneFlags::CLONE_NEWNET).map_err(Into::into);
        let entered: io::Result<()> = fs::File::open(path).and_then(enter);
        entered.map_err(|error| format!("{path}: {error}"))?;
        Ok(action())
    })
}

/// Runs `action` in a mount namespace of its own: nobody else sees what it mounts at `target`.
pub fn in_scratch_mounts<T: Send>(
    target: &Path,
    action: impl FnOnce() -> T + Send,
) -> Result<T, String> {
    in_scratch(|| {
        unshare(CloneFlags::CLONE_NEWNS)
            .map_err(io::Error::from)
            .and_then(|()| keep_mounts_private(target))
            .map_err(|error| format!("no mount namespace to try it in (CAP_SYS_ADMIN): {error}"))?;
        Ok(action())
    })
}

/// Keeps what is mounted at `target` from now on within the mount namespace of the calling thread. A new
/// mount namespace still hands it on to the one that it was copied from, where that has shared mounts, as
/// systemd makes them.
///
/// # Errors
///
/// What mount(2) returns.
pub fn keep_mounts_private(target: &Path) -> io::Result<()> {
    let none = None::<&str>;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    // EINVAL: no mount point, which in a chroot the root need not be. What is mounted goes the ways of the mount
    // that holds `target`.
    let dirs = std::iter::once(Path::new("/")).chain(target.ancestors());
    let mut tried = dirs.map(|dir| mount(none, dir, none, flags, none));
    let done = tried.find(|made| *made != Err(Errno::EINVAL));
    done.unwrap_or(Err(Errno::EINVAL)).map_err(io::Error::from)
}

fn in_scratch<T: Send>(action: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        scope.spawn(action).join().unwrap_or_else(|_| Err("the trial ended unexpectedly".into()))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn view(path: &str) -> Option<View> {
        Own::by_proc()?.view(path)
    }

    #[test]
    fn only_what_could_be_seen_is_gone() {
        for (path, known) in [
            ("", Life::Lives),
            ("/proc/self/ns/net", Life::Lives),
            ("/proc/self/ns/no-such", Life::Gone),
            ("/proc/4194305/ns/net", Life::Gone),
            ("/etc/no-such-namespace", Life::Gone),
            // A plain file, as `ip netns` leaves it.
            ("/etc/passwd", Life::Gone),
            ("/no-such-directory/namespace", Life::Unknown),
            // ENAMETOOLONG stands for whatever else keeps this process from looking.
            (&format!("/etc/{}", "x".repeat(300)), Life::Unknown),
        ] {
            assert_eq!(life_at(path, view(path)), known, "{path}");
        }
    }

    #[test]
    fn what_was_named_in_other_namespaces_is_not_looked_for_in_these() {
        let other = |path| {
            let view = view(path).unwrap();
            let pids = view.pids.map(|inode| inode + 1);
            Some(View { pids, mounts: view.mounts + 1, ..view })
        };
        // Another directory of that name, and one that nobody has noted.
        let absent = "/etc/no-such-namespace";
        for dir in [directory("/"), None] {
            let moved = other(absent).map(|view| View { dir, ..view });
            assert_eq!(life_at(absent, moved), Life::Unknown);
            let here = view(absent).map(|view| View { dir, ..view });
            assert_eq!(life_at(absent, here), Life::Gone);
        }
        for (path, known) in [
            ("/proc/4194305/ns/net", Life::Unknown),
            ("/etc/passwd", Life::Unknown),
            ("/etc/no-such-namespace", Life::Gone),
            ("/proc/self/ns/net", Life::Lives),
        ] {
            assert_eq!(life_at(path, other(path)), known, "{path}");
        }
        // Nobody has noted anything.
        let is_initial = inode_of_own("pid") == Some(INITIAL_PIDS);
        let known = if is_initial { Life::Gone } else { Life::Unknown };
        assert_eq!(life_at("/proc/4194305/ns/net", None), known);
    }

    /// A process's number is used again, and so is a name.
    #[test]
    fn another_namespace_of_the_same_path_is_not_meant() {
        let path = "/proc/self/ns/net";
        let known = view(path).unwrap();
        assert_eq!(known.netns, inode_of_own("net"));
        assert_eq!(view("/etc/passwd").unwrap().netns, None);
        let other = View { netns: known.netns.map(|inode| inode + 1), ..known };
        assert_eq!(life_at(path, Some(other)), Life::Gone);
        let elsewhere = View { pids: other.pids.map(|inode| inode + 1), ..other };
        assert_eq!(life_at(path, Some(elsewhere)), Life::Unknown);
        assert_eq!(life_at(path, Some(View { pids: None, ..other })), Life::Unknown);
        assert_eq!(life_at(path, Some(View { netns: None, ..other })), Life::Lives);
    }
}
