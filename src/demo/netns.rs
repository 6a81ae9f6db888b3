//! Throw-away network namespaces, held by a file descriptor and nothing else.
//!
//! No name in `/run/netns`, no bind mount and no process keeps them: when the descriptor and the
//! sockets made inside are closed, the kernel takes the namespace and its links away, also after a
//! SIGKILL of this process.

use std::fs::File;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chroot, fchdir};

use super::LabError;
use crate::sys::namespace::keep_mounts_private;

/// Where pinned eBPF objects live; one mount is shared by every network namespace of the machine.
const BPFFS: &str = "/sys/fs/bpf";

/// How long the kernel may take to make an address usable.
const READY: Duration = Duration::from_secs(10);

/// A network namespace, with a private mount namespace where pins must not reach the real node.
#[derive(Debug)]
pub struct Netns {
    name: String,
    net: OwnedFd,
    mounts: Option<Mounts>,
}

/// A mount namespace, and the root directory in it of who made it: in a chroot that is not the namespace's own.
#[derive(Debug)]
struct Mounts {
    namespace: OwnedFd,
    root: OwnedFd,
}

impl Netns {
    /// Makes a namespace; `name` is used in messages only. The loopback link exists and is down.
    pub fn new(name: &str) -> Result<Self, LabError> {
        Self::make(name, false)
    }

    /// Makes a namespace whose processes also see a bpffs of their own at `/sys/fs/bpf`, which is
    /// empty and vanishes with the namespace. The rest of the file system is the machine's.
    pub fn with_private_bpffs(name: &str) -> Result<Self, LabError> {
        Self::make(name, true)
    }

    fn make(name: &str, private_bpffs: bool) -> Result<Self, LabError> {
        // A thread of its own: unshare(2) moves only the calling thread, and the rest of the
        // process must stay where it is.
        let made = in_thread(|| {
            let private_bpffs = private_bpffs && Path::new(BPFFS).is_dir();
            // CLONE_NEWNS implies CLONE_FS here, so that this thread no longer shares its root
            // and working directory with the others (the kernel insists on that).
            let mut flags = CloneFlags::CLONE_NEWNET;
            flags.set(CloneFlags::CLONE_NEWNS, private_bpffs);
            unshare(flags)?;
            let mounts = if private_bpffs {
                keep_mounts_private(Path::new(BPFFS))?;
                mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)?;
                let namespace = File::open("/proc/thread-self/ns/mnt")?.into();
                Some(Mounts { namespace, root: File::open("/")?.into() })
            } else {
                None
            };
            let net = File::open("/proc/thread-self/ns/net")?.into();
            Ok::<_, io::Error>((net, mounts))
        });
        let (net, mounts) =
            made.and_then(|made| made).map_err(|error| LabError::namespace(name, error))?;
        Ok(Self { name: name.to_owned(), net, mounts })
    }

    /// The name given at creation.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path that names this namespace to other processes (a `CNI_NETNS`), for as long as this
    /// process lives: the kernel opens `/proc/<pid>/fd/<n>` of an nsfs descriptor as the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.net.as_raw_fd()))
    }

    /// The descriptor's number, for netlink attributes such as `IFLA_NET_NS_FD`.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.net.as_raw_fd()
    }

    /// Runs `work` in a fresh thread inside the namespace and waits for it. A socket made by `work`
    /// belongs to the namespace for good and may be used from any thread afterwards.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        in_thread(|| {
            setns(&self.net, CloneFlags::CLONE_NEWNET)?;
            if let Some(mounts) = &self.mounts {
                // setns(2) refuses a thread that shares its root directory with others.
                unshare(CloneFlags::CLONE_FS)?;
                setns(&mounts.namespace, CloneFlags::CLONE_NEWNS)?;
                // setns(2) has moved it to the root of the namespace.
                fchdir(&mounts.root)?;
                chroot(".")?;
            }
            Ok(work())
        })?
    }

    /// Starts a process inside the namespace: a child inherits the namespaces of the *thread* that
    /// forks it.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())?
    }

    /// Waits until an address of this namespace can be used. An IPv6 address gets its route from a work queue
    /// of the kernel (`addrconf_dad_work`), also without a search for others that have it.
    pub fn wait_for_address(&self, ip: IpAddr) -> Result<(), LabError> {
        let is_local = || UdpSocket::bind((ip, 0)).and_then(|socket| socket.connect((ip, 9)));
        let deadline = Instant::now() + READY;
        while let Err(source) = self.run(is_local).and_then(|is_local| is_local) {
            if Instant::now() > deadline {
                let step = format!("{}: waiting for its address {ip}", self.name);
                return Err(LabError::Step { step, source });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Reads `/proc/sys/net/<key>`, without the final newline.
    pub fn sysctl(&self, key: &str) -> io::Result<String> {
        // The kernel shows /proc/sys/net of the namespace of the thread that opens the file.
        let text = self.run(|| std::fs::read_to_string(Path::new("/proc/sys/net").join(key)))??;
        Ok(text.trim_end().to_owned())
    }

    /// Writes `/proc/sys/net/<key>`.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<(), LabError> {
        self.run(|| std::fs::write(Path::new("/proc/sys/net").join(key), value))
            .and_then(|written| written)
            .map_err(|source| LabError::Step {
                step: format!("{}: setting net/{key} to {value}", self.name),
                source,
            })
    }
}

/// Runs `work` in a thread of its own and waits for it; a panic (a failed assertion in a test) goes
/// on in the caller.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        thread.join().or_else(|payload| std::panic::resume_unwind(payload))
    })
}
