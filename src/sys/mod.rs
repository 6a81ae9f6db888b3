//! The one module tree that touches the host: processes, files under the state directory, netlink,
//! sysctls and clocks. Everything outside of it is a function of its arguments.
#![allow(clippy::disallowed_methods, reason = "this is the tree that is allowed to")]

pub mod bpf;
pub mod command;
pub mod deadline;
mod directory;
mod file;
pub mod install;
pub mod iptables;
pub mod legacy;
pub mod namespace;
pub mod netlink;
pub mod nft;
pub mod process;
pub mod progress;
pub mod store;
pub mod survey;
pub mod sysctl;
pub mod terminal;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use crate::error::{Error, Result};
use crate::facts::{NodeFacts, SPECIAL_DEVICES};
use bpf::features::Features;
use bpf::numbers::Numbers;
use command::Tools;
use netlink::route::{Link, Route, RouteReader};

/// The node as a verb sees it.
pub struct Host {
    pub tools: Tools,
    warnings: Mutex<Vec<String>>,
    kernel: OnceLock<Features>,
    /// eBPF programs that are known to be loaded.
    programs: Mutex<Arc<Numbers>>,
    cilium: OnceLock<bool>,
    /// Of the iptables tools in PATH.
    variants: iptables::Variants,
    boot_id: OnceLock<String>,
    ephemeral: OnceLock<RangeInclusive<u16>>,
    /// One socket for all questions about devices and routes.
    routes: Mutex<Option<RouteReader>>,
    /// The devices as `node_facts` saw them last.
    links: Mutex<Option<Arc<Vec<Link>>>>,
}

impl Host {
    /// `path` is the PATH of the environment.
    #[must_use]
    pub fn new(path: Option<&OsStr>) -> Self {
        Host {
            tools: Tools::new(path),
            warnings: Mutex::default(),
            kernel: OnceLock::new(),
            programs: Mutex::default(),
            cilium: OnceLock::new(),
            variants: iptables::Variants::default(),
            boot_id: OnceLock::new(),
            ephemeral: OnceLock::new(),
            routes: Mutex::default(),
            links: Mutex::default(),
        }
    }

    /// Notes something that the operator should know and that is no reason to fail; it goes to
    /// stderr, which runtimes show when a call succeeds.
    pub fn warn(&self, text: impl Into<String>) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text.into());
    }

    /// The warnings so far.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What eBPF can do on this kernel; tried out if nobody has said it.
    pub fn kernel(&self) -> Result<&Features> {
        if let Some(features) = self.kernel.get() {
            return Ok(features);
        }
        let features = Features::probe().map_err(|error| Error::io("use eBPF", error))?;
        Ok(self.kernel.get_or_init(|| features))
    }

    /// Whether `kernel` answers without trying.
    #[must_use]
    pub fn knows_kernel(&self) -> bool {
        self.kernel.get().is_some()
    }

    /// Takes over what was found out earlier.
    pub fn remember_kernel(&self, features: Features) {
        // The first one stays, which is right as well.
        drop(self.kernel.set(features));
    }

    /// The numbers of eBPF programs, as somebody has found them; they may be others by now.
    pub fn programs(&self) -> Arc<Numbers> {
        Arc::clone(&self.programs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over what was found.
    pub fn remember_programs(&self, numbers: Numbers) {
        *self.programs.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(numbers);
    }

    /// Whether Cilium runs here. Its agent pins its maps in the node's bpffs, all of them under this
    /// name, and leaves them there when it restarts.
    #[must_use]
    pub fn has_cilium(&self) -> bool {
        *self.cilium.get_or_init(|| {
            let globals = std::fs::read_dir("/sys/fs/bpf/tc/globals").into_iter().flatten();
            let named = |entry: std::fs::DirEntry| {
                entry.file_name().to_str().is_some_and(|name| name.starts_with("cilium_"))
            };
            std::path::Path::new("/sys/fs/bpf/cilium").exists() || globals.flatten().any(named)
        })
    }

    /// Identifies this boot of the kernel; empty where /proc does not tell.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        self.boot_id.get_or_init(|| {
            file::read_to_string("/proc/sys/kernel/random/boot_id")
                .map(|id| id.trim().to_owned())
                .unwrap_or_default()
        })
    }

    /// Nanoseconds since boot, which only ever grow.
    #[must_use]
    pub fn since_boot(&self) -> u64 {
        nanoseconds(ClockId::CLOCK_BOOTTIME)
    }

    /// The ports that sockets get by themselves; Linux's default where /proc does not tell.
    #[must_use]
    pub fn ephemeral_ports(&self) -> &RangeInclusive<u16> {
        self.ephemeral.get_or_init(|| {
            let text = sysctl::read(&["net", "ipv4", "ip_local_port_range"]).unwrap_or_default();
            let mut bounds = text.split_whitespace().filter_map(|word| word.parse().ok());
            bounds.next().unwrap_or(32768)..=bounds.next().unwrap_or(60999)
        })
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn now(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map(|time| time.as_secs()).unwrap_or_default()
    }

    /// Major and minor version of the running kernel.
    #[must_use]
    pub fn kernel_version(&self) -> Option<(u32, u32)> {
        let name = nix::sys::utsname::uname().ok()?;
        let mut numbers = name.release().to_str()?.split(['.', '-']).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// Which files the tools of all backends are, so that a remembered choice can be told to be stale.
    #[must_use]
    pub fn tools_fingerprint(&self) -> String {
        use std::os::unix::fs::MetadataExt;
        let describe = |tool: &&str| {
            let path = self.tools.find(tool)?;
            let meta = path.metadata().ok()?;
            Some(format!("{} {} {}", path.display(), meta.ino(), meta.mtime()))
        };
        ["iptables-restore", "ip6tables-restore", "nft"]
            .iter()
            .filter_map(describe)
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// Asks the kernel for addresses and devices of this network namespace.
    pub fn node_facts(&self) -> Result<NodeFacts> {
        self.ask(
            || "read the node's devices, addresses and routes (netlink)".into(),
            |reader| {
                let links = reader.links()?;
                let facts = NodeFacts::new(&links, &reader.addresses()?, &reader.default_routes()?);
                *self.links.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(links));
                Ok(facts)
            },
        )
    }

    /// [`Host::node_facts`] without the devices that lead out: who does not ask for these needs no list of
    /// all devices, of which a node has as many as pods.
    pub fn node_addresses(&self) -> Result<NodeFacts> {
        self.ask(
            || "read the node's addresses (netlink)".into(),
            |reader| {
                let special = reader.indices(SPECIAL_DEVICES)?;
                Ok(NodeFacts::of_addresses(&reader.addresses()?, special))
            },
        )
    }

    /// The cookie of the node's network namespace, as far as the kernel tells it.
    pub fn netns_cookie(&self) -> Result<Option<u64>> {
        self.ask(
            || "find the cookie of the network namespace".into(),
            |reader| reader.netns_cookie(),
        )
    }

    /// The devices as `node_facts` saw them last, or as they are.
    pub fn links(&self) -> Result<Arc<Vec<Link>>> {
        match self.links.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(links) => Ok(links),
            None => Ok(Arc::new(self.list_links()?)),
        }
    }

    fn list_links(&self) -> Result<Vec<Link>> {
        self.ask(|| "list the node's devices (netlink)".into(), RouteReader::links)
    }

    /// Indices of the devices that there are now.
    pub fn devices_now(&self) -> Result<BTreeSet<u32>> {
        Ok(self.list_links()?.iter().map(|link| link.index).collect())
    }

    /// Indices of the devices at the other ends of a pod's links; none where its network namespace is not
    /// to be entered. One that lies in a third namespace has a number that says nothing here.
    #[must_use]
    pub fn links_of_pod(&self, netns: &str) -> BTreeSet<u32> {
        let list = || RouteReader::open().and_then(|mut reader| reader.links());
        let links = namespace::in_netns(netns, list).unwrap_or_else(|_| Ok(Vec::new()));
        links.unwrap_or_default().iter().filter_map(|link| link.peer).collect()
    }

    /// The address that the node itself would call an address from.
    pub fn source_towards(&self, ip: std::net::IpAddr) -> Result<Option<std::net::IpAddr>> {
        Ok(self.route_to(ip)?.and_then(|route| route.source))
    }

    /// Whether a route alone makes an address that the node has not got one of its own (`ip route add
    /// local`). Where Services' addresses are bound to the node, they are of this kind as well.
    #[must_use]
    pub fn is_local_by_route(&self, facts: &NodeFacts, ip: std::net::IpAddr) -> bool {
        !facts.is_local(&ip)
            && !facts.foreign.contains(&ip)
            && self.route_to(ip).is_ok_and(|route| route.is_some_and(|route| route.local))
    }

    /// Name of the device that leads to an address.
    pub fn device_towards(&self, ip: std::net::IpAddr) -> Result<Option<String>> {
        let Some(route) = self.route_to(ip)? else {
            return Ok(None);
        };
        let links = self.links()?;
        let known = links.iter().find(|link| link.index == route.device);
        Ok(known.map(|link| link.name.clone()))
    }

    fn route_to(&self, ip: std::net::IpAddr) -> Result<Option<Route>> {
        self.ask(|| format!("find the route to {ip} (netlink)"), |reader| reader.route_to(ip))
    }

    /// `action` completes "cannot …".
    fn ask<T>(
        &self,
        action: impl FnOnce() -> String,
        question: impl FnOnce(&mut RouteReader) -> std::io::Result<T>,
    ) -> Result<T> {
        let mut socket = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match &mut *socket {
            Some(reader) => question(reader),
            None => RouteReader::open().and_then(|reader| question(socket.insert(reader))),
        };
        answer.map_err(|error| Error::io(action(), error))
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, the clock that eBPF programs read.
#[must_use]
pub fn monotonic() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock)
        .ok()
        .and_then(|time| {
            let seconds = u64::try_from(time.tv_sec()).ok()?;
            seconds.checked_mul(1_000_000_000)?.checked_add(u64::try_from(time.tv_nsec()).ok()?)
        })
        .unwrap_or_default()
}
