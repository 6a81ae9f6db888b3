//! Where the root of cgroup v2 is: below it are all processes of the node, so what is attached there
//! is attached for good.
//!
//! Neither is it mounted at the same place everywhere, nor everywhere at all, and in a cgroup
//! namespace of its own a process is shown another directory as the root. The real one has inode 1
//! and, since it cannot be made threaded, no `cgroup.type`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use super::{Cgroup, detached};

/// Where systemd mounts it, alone and beside version 1. On a node with a thousand mounts, a list of
/// them takes longer to get than everything else here.
const USUAL: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Opens the root of cgroup v2.
///
/// In a cgroup namespace of its own the process looks through that of process 1. If that shows no
/// more, the root of the namespace is taken where the network namespace is not the machine's first
/// one either: a node in a container, all of whose processes are below it.
///
/// # Errors
///
/// A message that says why there is none.
pub fn root() -> io::Result<Cgroup> {
    root_by(Path::new("/proc/1/ns/cgroup"))
}

/// [`root`], with the cgroup namespace of the process that stands for process 1.
///
/// # Errors
///
/// As [`root`].
pub fn root_by(init: &Path) -> io::Result<Cgroup> {
    if let Some(dir) = USUAL.iter().find_map(|point| open_root(Path::new(point))) {
        return Ok(named(dir));
    }
    let mountinfo = fs::read("/proc/thread-self/mountinfo")?;
    if let Some(dir) = mount_points(&mountinfo).iter().find_map(|point| open_root(point)) {
        return Ok(named(dir));
    }
    let visible = mounted()?;
    if is_root(&visible)? {
        return Ok(named(visible));
    }
    let refused = |reason: String| {
        io::Error::new(
            io::ErrorKind::Unsupported,
            format!("this process is in a cgroup namespace of its own, and {reason}"),
        )
    };
    let seen_by_init = std::thread::scope(|scope| {
        let look = || {
            let namespace = File::open(init).map_err(|error| {
                format!("{} cannot be opened to leave it: {error}", init.display())
            })?;
            setns(namespace, CloneFlags::CLONE_NEWCGROUP)
                .map_err(|error| format!("cannot leave it (CAP_SYS_ADMIN): {error}"))?;
            mounted().map_err(|error| error.to_string())
        };
        scope.spawn(look).join().unwrap_or_else(|_| Err("looking elsewhere failed".into()))
    })
    .map_err(refused)?;
    if is_root(&seen_by_init)? {
        return Ok(named(seen_by_init));
    }
    if inode(&seen_by_init)? != inode(&visible)? {
        return Err(refused("process 1 is in another one".into()));
    }
    if in_first_network_namespace() {
        return Err(refused(
            "so is process 1, while the network namespace is the machine's: processes that it is to work for are not below".into(),
        ));
    }
    Ok(named(visible))
}

/// Where the root is mounted in this mount namespace, if it is.
#[must_use]
pub fn mounted_at() -> Option<PathBuf> {
    let mountinfo = fs::read("/proc/thread-self/mountinfo").unwrap_or_default();
    mount_points(&mountinfo).into_iter().find(|point| open_root(point).is_some())
}

/// Opens a directory if it is the root; it need not be what is said to be mounted there.
fn open_root(path: &Path) -> Option<OwnedFd> {
    let dir = OwnedFd::from(File::open(path).ok()?);
    is_root(&dir).unwrap_or(false).then_some(dir)
}

fn named(dir: OwnedFd) -> Cgroup {
    Cgroup { dir, name: "/".into() }
}

fn mounted() -> io::Result<OwnedFd> {
    detached::mount().map_err(|error| {
        let reason = match error.raw_os_error() {
            Some(libc::ENODEV) => "this kernel has no cgroup v2".to_owned(),
            Some(libc::ENOSYS) => {
                "cgroup v2 is mounted nowhere, and this kernel (before 5.2) cannot open it without"
                    .to_owned()
            }
            _ => format!("cannot mount cgroup v2 (CAP_SYS_ADMIN): {error}"),
        };
        io::Error::new(error.kind(), reason)
    })
}

fn is_root(dir: &OwnedFd) -> io::Result<bool> {
    Ok(fstatfs(dir)?.filesystem_type() == CGROUP2_SUPER_MAGIC
        && inode(dir)? == 1
        && nix::unistd::faccessat(
            dir.as_fd(),
            "cgroup.type",
            nix::unistd::AccessFlags::F_OK,
            nix::fcntl::AtFlags::empty(),
        ) == Err(nix::errno::Errno::ENOENT))
}

fn inode(dir: &OwnedFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(dir)?.st_ino)
}

/// Whether the network namespace of this thread is the one that the machine has booted with: only
/// that one has the sysctls of the queues that all share (`net_core_table`).
fn in_first_network_namespace() -> bool {
    Path::new("/proc/sys/net/core/netdev_max_backlog").exists()
}

/// Where `mountinfo` (proc_pid_mountinfo(5)) has cgroup v2 file systems, the newest mount first,
/// since it covers those before it at the same place.
fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let point = |line: &[u8]| {
        // A number of optional fields ends with a hyphen, behind which the type stands.
        let mut fields = line.split(|byte| *byte == b' ');
        let point = fields.nth(4)?;
        fields.find(|field| *field == b"-")?;
        (fields.next()? == b"cgroup2").then(|| unescaped(point))
    };
    mountinfo.split(|byte| *byte == b'\n').rev().filter_map(point).collect()
}

/// Blanks, line breaks and backslashes are written as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let octal = behind
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &behind[3..] } else { behind };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(mountinfo: &str) -> Vec<String> {
        let points = mount_points(mountinfo.as_bytes());
        points.iter().map(|point| point.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn cgroup_v2_alone() {
        let text = "\
            25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n\
            35 25 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n\
            36 25 0:31 / /sys/fs/bpf rw,nosuid shared:10 - bpf bpf rw,mode=700\n";
        assert_eq!(found(text), ["/sys/fs/cgroup"]);
    }

    #[test]
    fn hybrid() {
        let text = "\
            35 25 0:30 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755\n\
            36 35 0:31 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n\
            37 35 0:32 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,name=systemd\n";
        assert_eq!(found(text), ["/sys/fs/cgroup/unified"]);
    }

    #[test]
    fn version_1_alone() {
        let text = "\
            35 25 0:30 / /sys/fs/cgroup rw - tmpfs cgroup2 rw\n\
            37 35 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert!(found(text).is_empty());
        assert!(found("").is_empty());
    }

    /// In a private cgroup namespace: its own mount, and the machine's as far as it can be seen.
    #[test]
    fn private_namespaces_and_bind_mounts() {
        let text = "\
            41 31 0:38 /../.. /host/sys/fs/cgroup rw master:4 - cgroup2 cgroup2 rw\n\
            42 31 0:38 /kubepods /mnt/one\\040group rw shared:1 master:2 propagate_from:3 - cgroup2 none rw\n\
            43 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n\
            44 31 0:39 / /data rw - ext4 /dev/sda1 rw\n\
            broken line\n";
        assert_eq!(found(text), ["/sys/fs/cgroup", "/mnt/one group", "/host/sys/fs/cgroup"]);
    }

    #[test]
    fn escapes() {
        assert_eq!(unescaped(b"/a\\134b\\012"), PathBuf::from("/a\\b\n"));
        assert_eq!(unescaped(b"/a\\9\\"), PathBuf::from("/a\\9\\"));
    }
}
