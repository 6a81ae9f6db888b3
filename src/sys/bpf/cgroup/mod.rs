//! Programs on the socket calls of a cgroup's processes, those of the cgroups below included.

mod detached;
mod root;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya_obj::generated::{BPF_F_ALLOW_MULTI, BPF_F_QUERY_EFFECTIVE, BPF_F_REPLACE};

use super::map::absent;
use super::program::{Program, SocketHook};
use super::syscall::{self, Attached, Target, number};

pub use root::{mounted_at, root, root_by};

/// An open directory of cgroup v2.
#[derive(Debug)]
pub struct Cgroup {
    dir: OwnedFd,
    name: String,
}

impl Cgroup {
    /// Opens a directory, which has to be of a cgroup v2 file system.
    ///
    /// # Errors
    ///
    /// What open(2) returns.
    pub fn open(path: &Path) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { dir: File::open(path)?.into(), name })
    }

    /// The name of the directory, for messages; "/" for the root.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A way to the directory, also if it is mounted nowhere.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/thread-self/fd/{}", self.dir.as_raw_fd()))
    }

    /// The cgroups directly below.
    ///
    /// # Errors
    ///
    /// What reading the directory returns.
    pub fn children(&self) -> io::Result<Vec<Self>> {
        let mut children = Vec::new();
        for entry in fs::read_dir(self.path())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                // One that is gone by now has no processes.
                children.extend(absent(Self::open(&entry.path()))?);
            }
        }
        Ok(children)
    }

    fn target(&self, hook: SocketHook) -> Target {
        Target { number: number(self.dir.as_fd()), attach_type: hook.attach_type() }
    }

    /// What is attached to this very cgroup.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns: `EINVAL` from a kernel without cgroup programs or without this hook,
    /// `EPERM` without `CAP_NET_ADMIN`. So do all below.
    pub fn query(&self, hook: SocketHook) -> io::Result<Attached> {
        syscall::query(self.target(hook), 0)
    }

    /// Ids of the programs that run for processes of this cgroup, those of the cgroups above
    /// included, in the order in which they run.
    pub fn effective(&self, hook: SocketHook) -> io::Result<Vec<u32>> {
        Ok(syscall::query(self.target(hook), BPF_F_QUERY_EFFECTIVE)?.programs)
    }

    /// Whether a program is attached to this very cgroup that allows no others beside it. Where
    /// programs are attached to a cgroup below, it does not run for that one's processes.
    pub fn is_reserved(&self, hook: SocketHook) -> io::Result<bool> {
        let attached = self.query(hook)?;
        Ok(!attached.programs.is_empty() && attached.flags & BPF_F_ALLOW_MULTI == 0)
    }

    /// Attaches a program beside others. It is an error, which says so, if one that is attached
    /// here or above does not allow others.
    pub fn attach(&self, hook: SocketHook, program: &Program) -> io::Result<()> {
        syscall::attach(self.target(hook), program.fd(), BPF_F_ALLOW_MULTI, None, 0)
            .map_err(|error| self.refused(hook, error))
    }

    /// Puts `new` in the place of `old`; no call is without one of the two. Before Linux 5.6 `new`
    /// comes last instead, and there is a moment in which both are attached. `ENOENT` if `old` is
    /// not attached.
    pub fn replace(&self, hook: SocketHook, old: &Program, new: &Program) -> io::Result<()> {
        let flags = BPF_F_ALLOW_MULTI | BPF_F_REPLACE;
        match syscall::attach(self.target(hook), new.fd(), flags, Some(old.fd()), 0) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.replace_in_two_steps(hook, old, new)
            }
            result => result.map_err(|error| self.refused(hook, error)),
        }
    }

    /// [`Cgroup::replace`] for a kernel that knows no such thing.
    pub fn replace_in_two_steps(
        &self,
        hook: SocketHook,
        old: &Program,
        new: &Program,
    ) -> io::Result<()> {
        if !self.query(hook)?.programs.contains(&old.id()) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        self.attach(hook, new)?;
        self.detach(hook, old).map(drop)
    }

    /// Detaches a program; says whether it was attached.
    pub fn detach(&self, hook: SocketHook, program: &Program) -> io::Result<bool> {
        Ok(absent(syscall::detach(self.target(hook), program.fd()))?.is_some())
    }

    /// The kernel refuses with `EPERM` also where another program leaves no room.
    fn refused(&self, hook: SocketHook, error: io::Error) -> io::Error {
        if error.kind() != io::ErrorKind::PermissionDenied {
            return error;
        }
        let place = match (self.query(hook), self.effective(hook)) {
            (Ok(here), _) if !here.programs.is_empty() => "it",
            (Ok(_), Ok(effective)) if !effective.is_empty() => "a cgroup above it",
            _ => return error,
        };
        io::Error::new(
            error.kind(),
            format!(
                "a program that allows no others beside it has the hook {hook:?} of the cgroup {}: it is attached to {place}, without BPF_F_ALLOW_MULTI",
                self.name
            ),
        )
    }
}
