//! A node to measure on: network namespaces for the node, two pods and a client, and a mount
//! namespace with a `/run` of its own.
//!
//! Nothing has a name outside this process: namespaces are held by file descriptors, files live
//! on a tmpfs inside the mount namespace. Whatever ends the benchmark (an error, Ctrl-C, SIGKILL)
//! thereby removes everything, and the host's `/run/xtables.lock`, records and rules are neither
//! seen nor touched.
//!
//! Except for programs of the eBPF backend at sockets: they are attached to the machine's root cgroup,
//! and a rig takes its own away when it is dropped.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::{Res, Variant, interrupt};

/// Files of the benchmark, on the tmpfs of the rig.
pub const DIR: &str = "/run/portmap-bench";
/// Where the mount namespace of a rig shows the namespace of the pod that gets the hostPorts.
pub const POD_NETNS: &str = "/run/netns/pod-a";
const BPFFS: &str = "/sys/fs/bpf";
/// The plugin that clears eBPF nodes, whichever is measured.
const PORTMAP: &str = env!("CARGO_BIN_EXE_portmap");

const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
const TOOLS: [&str; 6] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
];

/// A network namespace.
pub struct Netns(File);

impl Netns {
    pub fn new() -> Res<Self> {
        on_new_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|e| format!("new network namespace: {e} (run as root)"))?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?))
        })
    }

    /// Moves the calling thread here; its children follow it.
    pub fn enter(&self) -> Res<()> {
        Ok(setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }

    /// A second handle, for a thread that outlives the rig.
    pub fn handle(&self) -> Res<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

/// A node with two pods and a client outside.
pub struct Rig {
    variant: Variant,
    node: Netns,
    mounts: File,
    pub pod_a: Netns,
    pub pod_b: Netns,
    pub client: Netns,
}

impl Rig {
    pub fn new(variant: Variant) -> Res<Self> {
        let (pod_a, pod_b, client) = (Netns::new()?, Netns::new()?, Netns::new()?);
        let (node, mounts) = on_new_thread(|| {
            let flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
            unshare(flags).map_err(|e| format!("new namespaces: {e} (run as root)"))?;
            private_run(variant)?;
            for (name, netns) in [("pod-a", &pod_a), ("pod-b", &pod_b), ("client", &client)] {
                show(netns, &Path::new("/run/netns").join(name))?;
            }
            shell(TOPOLOGY)?;
            let node = Netns(File::open("/proc/thread-self/ns/net")?);
            Ok((node, File::open("/proc/thread-self/ns/mnt")?))
        })?;
        Ok(Self { variant, node, mounts, pod_a, pod_b, client })
    }

    /// Another `/run` and other tools on the same node.
    pub fn beside(&self, variant: Variant) -> Res<Self> {
        let mounts = on_new_thread(|| {
            self.node.enter()?;
            unshare(CloneFlags::CLONE_NEWNS)?;
            private_run(variant)?;
            for (name, netns) in self.others() {
                show(netns, &Path::new("/run/netns").join(name))?;
            }
            Ok(File::open("/proc/thread-self/ns/mnt")?)
        })?;
        Ok(Self {
            variant,
            node: self.node.handle()?,
            mounts,
            pod_a: self.pod_a.handle()?,
            pod_b: self.pod_b.handle()?,
            client: self.client.handle()?,
        })
    }

    fn others(&self) -> [(&'static str, &Netns); 3] {
        [("pod-a", &self.pod_a), ("pod-b", &self.pod_b), ("client", &self.client)]
    }

    /// Runs `work` on a thread that is on this node.
    pub fn on<T: Send>(&self, work: impl FnOnce() -> Res<T> + Send) -> Res<T> {
        on_new_thread(|| {
            self.enter()?;
            work()
        })
    }

    fn enter(&self) -> Res<()> {
        // A thread that shares its root directory with others may not change mounts.
        unshare(CloneFlags::CLONE_FS)?;
        setns(self.mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
        self.node.enter()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.variant != Variant::Ebpf {
            return;
        }
        // Also after an interruption.
        let flushed = in_thread(|| {
            self.enter()?;
            run(Command::new(PORTMAP).args(["flush", "--all", "--yes"]))
        });
        if let Err(error) = flushed {
            eprintln!("portmap benchmark: see \"What is left\" in benches/README.md: {error}");
        }
    }
}

/// Pods hang on point-to-point links with routes of /32, as the `ptp` plugin makes them. The
/// route to 10.88.0.0/16 is for the other mappings: plugins look up the device of each pod. The
/// uplink is known by the default route.
const TOPOLOGY: &str = "
ip link set lo up
for pod in a:2 b:3; do
    name=pod-${pod%:*} address=10.88.0.${pod#*:}
    ip link add $name type veth peer name eth0 netns /run/netns/$name
    ip link set $name up
    ip address add 10.88.0.1/32 dev $name
    ip route add $address/32 dev $name src 10.88.0.1
    ip -n $name link set lo up
    ip -n $name address add $address/16 dev eth0
    ip -n $name link set eth0 up
    ip -n $name route add default via 10.88.0.1
done
ip route add 10.88.0.0/16 dev pod-a src 10.88.0.1
ip link add uplink type veth peer name eth0 netns /run/netns/client
ip address add 198.51.100.1/24 dev uplink
ip link set uplink up
ip -n client address add 198.51.100.2/24 dev eth0
ip -n client link set eth0 up
ip -n client route add default via 198.51.100.1
ip route add default via 198.51.100.2
echo 1 >/proc/sys/net/ipv4/ip_forward
";

/// Replaces `/run` by an empty one and puts the tools of one variant first in `PATH`.
fn private_run(variant: Variant) -> Res<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    // Pins of one rig must not be seen by another. Only the eBPF backend makes any.
    let mounted = mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none);
    if variant == Variant::Ebpf {
        mounted.map_err(|e| format!("mounting a bpffs: {e}"))?;
    }
    let bin = Path::new(DIR).join("bin");
    fs::create_dir_all(&bin)?;
    fs::create_dir_all("/run/netns")?;
    if let Some(multi) = variant.multi() {
        let multi = find_tool(multi, "iptables")?;
        for tool in TOOLS {
            symlink(&multi, bin.join(tool))?;
        }
    }
    Ok(())
}

/// Gives a namespace a path, as container runtimes do.
fn show(netns: &Netns, path: &Path) -> Res<()> {
    use std::os::fd::AsRawFd;
    File::create(path)?;
    let source = format!("/proc/thread-self/fd/{}", netns.0.as_raw_fd());
    let none = None::<&str>;
    mount(Some(source.as_str()), path, none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// The `PATH` of plugins on a rig. With eBPF there is no tool in it.
pub fn search_path(variant: Variant) -> String {
    match variant {
        Variant::Ebpf => format!("{DIR}/bin"),
        _ => format!("{DIR}/bin:{SYSTEM_PATH}"),
    }
}

/// Finds a tool, or says which Debian package has it.
pub fn find_tool(name: &str, package: &str) -> Res<PathBuf> {
    SYSTEM_PATH
        .split(':')
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.exists())
        .ok_or_else(|| {
            format!("{name} is missing: apt-get install {package} (or leave it out: --variant)")
                .into()
        })
}

/// Runs a script where the calling thread is, and returns what it printed.
pub fn shell(script: &str) -> Res<String> {
    run(Command::new("sh").args(["-euc", script]))
}

/// Runs a command with a text as its input, and returns what it printed.
pub fn feed(program: &str, args: &[&str], input: &str) -> Res<String> {
    // A file, because whoever writes a large input to a pipe must read the output meanwhile.
    let path = Path::new(DIR).join("input");
    fs::write(&path, input)?;
    run(Command::new(program).args(args).stdin(File::open(&path)?))
}

fn run(command: &mut Command) -> Res<String> {
    let output = command
        .env("PATH", format!("{DIR}/bin:{SYSTEM_PATH}"))
        .env("LC_ALL", "C")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let program = command.get_program().display();
        return Err(format!("{program}: {}: {}", output.status, text.trim()).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Namespaces belong to a thread: a thread of its own keeps the rest of the process where it is.
pub fn on_new_thread<T: Send>(work: impl FnOnce() -> Res<T> + Send) -> Res<T> {
    interrupt::check()?;
    in_thread(work)
}

fn in_thread<T: Send>(work: impl FnOnce() -> Res<T> + Send) -> Res<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err("a thread of the benchmark panicked".into()))
}
