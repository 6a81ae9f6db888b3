//! What the privileged tests share: variants of a node's tools, a node with state, one pod's calls.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test program uses a part, and says by a panic that it failed"
)]

pub mod bare;
pub mod ebpf;
pub mod ending;
pub mod entries;
pub mod foreign;
pub mod golden;
pub mod programs;
pub mod strace;
pub mod versions;

use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use portmap::demo::netns::Netns;
use portmap::demo::plugin::{self, Attachment, Output};
use portmap::demo::snapshot::{Snapshot, pins};
use portmap::demo::topology::{Lab, Pod};
use portmap::sys::bpf::features::Features;
use serde_json::{Value, json};

/// The binary under test.
pub const PORTMAP: &str = env!("CARGO_BIN_EXE_portmap");
/// Upstream's plugin, of Debian's package containernetworking-plugins (1.1.1).
pub const UPSTREAM: &str = "/usr/lib/cni/portmap";
/// A network namespace that has gone, by a path that says so everywhere. /run/netns would not: where nobody
/// has made a namespace it is missing itself, so that nothing is known of what it would hold.
pub const GONE_NETNS: &str = "/proc/1/nowhere";

/// What a node has to forward with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    IptablesNft,
    IptablesLegacy,
    Nftables,
    /// No tool at all.
    Ebpf,
}

pub const VARIANTS: [Variant; 4] =
    [Variant::IptablesNft, Variant::IptablesLegacy, Variant::Nftables, Variant::Ebpf];
/// Those that forward by rules of netfilter.
pub const RULES: [Variant; 3] = [Variant::IptablesNft, Variant::IptablesLegacy, Variant::Nftables];
pub const IPTABLES: [Variant; 2] = [Variant::IptablesNft, Variant::IptablesLegacy];

impl Variant {
    /// The `backend` option that names it.
    pub fn backend(self) -> &'static str {
        match self {
            Variant::IptablesNft | Variant::IptablesLegacy => "iptables",
            Variant::Nftables => "nftables",
            Variant::Ebpf => "ebpf",
        }
    }

    /// Tools by name and the program behind each.
    fn tools(self) -> Vec<(String, &'static str)> {
        let multi = match self {
            Variant::Nftables => return vec![("nft".into(), "/usr/sbin/nft")],
            Variant::Ebpf => return Vec::new(),
            Variant::IptablesNft => "/usr/sbin/xtables-nft-multi",
            Variant::IptablesLegacy => "/usr/sbin/xtables-legacy-multi",
        };
        ["iptables", "ip6tables"]
            .iter()
            .flat_map(|tool| {
                ["", "-save", "-restore"].map(|suffix| (format!("{tool}{suffix}"), multi))
            })
            .collect()
    }

    /// Makes a directory that holds this variant's tools and no others, to be a node's PATH.
    pub fn path(self, below: &Path) -> PathBuf {
        let dir = below.join(format!("{self:?}"));
        std::fs::create_dir_all(&dir).unwrap();
        for (name, program) in self.tools() {
            assert!(
                Path::new(program).exists(),
                "{program} is missing: install iptables and nftables"
            );
            match symlink(program, dir.join(name)) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                other => other.unwrap(),
            }
        }
        dir
    }
}

/// A directory that goes with its owner.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let dir =
            std::env::temp_dir().join(format!("portmap-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A laboratory node on which runtimes call the plugin.
pub struct Node<'a> {
    pub netns: &'a Netns,
    pub variant: Variant,
    /// PATH of every call.
    pub path: PathBuf,
    pub state_dir: PathBuf,
    /// Name of the network configuration.
    pub network: String,
    pub cni_version: String,
    scratch: Scratch,
}

impl<'a> Node<'a> {
    pub fn new(netns: &'a Netns, variant: Variant) -> Self {
        // A flush of the machine's own would take it out of service.
        let device = || std::fs::metadata("/sys/fs/bpf").unwrap().dev();
        assert!(
            variant != Variant::Ebpf || netns.run(device).unwrap() != device(),
            "the namespace has no bpffs of its own"
        );
        let scratch = Scratch::new();
        Node {
            netns,
            variant,
            path: variant.path(&scratch.0),
            state_dir: scratch.0.join("state"),
            network: "portmap".into(),
            cni_version: "1.0.0".into(),
            scratch,
        }
    }

    /// A configuration with mappings and, unless null, a previous result.
    pub fn config(&self, mappings: Value, prev_result: Value) -> Value {
        let mut config = json!({
            "cniVersion": self.cni_version,
            "name": self.network,
            "type": "portmap",
            "backend": self.variant.backend(),
            "stateDir": self.state_dir,
            "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": mappings},
        });
        if !prev_result.is_null() {
            config["prevResult"] = prev_result;
        }
        config
    }

    /// Says of the kernel what is not so, before the first call would find it out.
    pub fn pretend(&self, change: impl FnOnce(&mut Features)) {
        let mut features = Features::probe().unwrap();
        change(&mut features);
        let notes = self.state_dir.join("notes");
        std::fs::create_dir_all(&notes).unwrap();
        let note = json!({"features": features});
        std::fs::write(notes.join("kernel"), note.to_string()).unwrap();
    }

    /// What calls take the kernel for.
    pub fn pretended(&self) -> Option<Features> {
        let note = std::fs::read(self.state_dir.join("notes/kernel")).ok()?;
        let mut note: Value = serde_json::from_slice(&note).unwrap();
        Some(serde_json::from_value(note["features"].take()).unwrap())
    }

    /// Calls a plugin inside the node, with the variant's tools in PATH.
    pub fn call(
        &self,
        plugin: &str,
        verb: &str,
        config: &Value,
        attachment: &Attachment,
    ) -> Output {
        let mut command = plugin::command(Path::new(plugin), verb, attachment);
        command.env("PATH", &self.path);
        plugin::run(&mut command, config.to_string().as_bytes(), self.netns).unwrap()
    }

    /// Calls the plugin under test and fails the test unless it succeeds.
    pub fn ok(&self, verb: &str, config: &Value, attachment: &Attachment) -> Output {
        let output = self.call(PORTMAP, verb, config, attachment);
        assert!(output.success(), "{:?} {verb}: {}", self.variant, output.reason());
        output
    }

    /// Calls the plugin under test and returns code and text of the error it must report.
    pub fn fails(&self, verb: &str, config: &Value, attachment: &Attachment) -> (u64, String) {
        let output = self.call(PORTMAP, verb, config, attachment);
        assert!(!output.success(), "{:?} {verb} should fail: {}", self.variant, output.stdout);
        let error: Value = serde_json::from_str(&output.stdout).unwrap();
        (error["code"].as_u64().unwrap(), output.reason())
    }

    /// Takes away what outlives the last attachment. Programs at the root cgroup are not the
    /// namespace's, and would outlive the test.
    pub fn flush(&self) -> Output {
        plugin::run(&mut self.flush_command(), b"", self.netns).unwrap()
    }

    /// `portmap restore`, which must succeed.
    pub fn restore(&self, json: bool) -> Output {
        let mut command = std::process::Command::new(PORTMAP);
        command.env_clear().env("PATH", &self.path).args(["restore", "--state-dir"]);
        command.arg(&self.state_dir).args(json.then_some("--json"));
        let output = plugin::run(&mut command, b"", self.netns).unwrap();
        assert!(output.success(), "{:?} {} {}", self.variant, output.stdout, output.stderr);
        output
    }

    pub fn flush_command(&self) -> std::process::Command {
        let mut command = std::process::Command::new(PORTMAP);
        command.env_clear().args(["flush", "--all", "--yes", "--state-dir"]).arg(&self.state_dir);
        command
    }

    /// Runs a command line by the shell inside the node, with all tools, and returns its stdout.
    pub fn shell(&self, script: &str) -> String {
        let mut command = std::process::Command::new("sh");
        command
            .args(["-ec", script])
            .env("PATH", format!("{}:{}", self.path.display(), plugin::search_path()));
        let output = plugin::run(&mut command, b"", self.netns).unwrap();
        assert!(output.success(), "{script}: {} {}", output.stdout, output.stderr);
        output.stdout
    }

    /// Takes everything away that the plugin has made in the kernel.
    pub fn damage(&self) {
        self.shell(match self.variant {
            Variant::IptablesNft | Variant::IptablesLegacy => {
                "for t in iptables ip6tables; do $t -t nat -F; $t -t nat -X; done"
            }
            Variant::Nftables => "nft flush ruleset",
            Variant::Ebpf => "rm -r /sys/fs/bpf/portmap",
        });
    }

    /// Names of the records that there are.
    pub fn records(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.state_dir.join("records")).into_iter().flatten();
        let mut names: Vec<String> =
            names.map(|name| name.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Rules, sysctls and records, to be compared before and after.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::take(self.netns, &self.state_dir).unwrap()
    }

    /// Fails the test unless rules and sysctls are those of `before` and no record is left.
    pub fn assert_clean(&self, before: &Snapshot) {
        let now = self.snapshot();
        now.same_rules(before)
            .unwrap_or_else(|lines| panic!("{:?}: rules differ:\n{lines}", self.variant));
        now.same_sysctls(before)
            .unwrap_or_else(|lines| panic!("{:?}: sysctls differ:\n{lines}", self.variant));
        now.no_records()
            .unwrap_or_else(|lines| panic!("{:?}: records are left:\n{lines}", self.variant));
        if self.variant == Variant::Ebpf {
            let left = entries::entries(self.netns);
            assert_eq!(left, entries::Entries::default(), "map entries are left");
        }
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        // Where the tools of a variant do not work, eBPF may have been chosen instead.
        let device = || std::fs::metadata("/sys/fs/bpf/portmap").map(|meta| meta.dev()).ok();
        let used = self.netns.run(device).is_ok_and(|own| own.is_some() && own != device());
        if self.variant != Variant::Ebpf && !used {
            return;
        }
        let output = self.flush();
        if !std::thread::panicking() {
            assert!(output.success(), "flush: {} {}", output.stdout, output.stderr);
            assert_eq!(pins(self.netns).unwrap(), Vec::<PathBuf>::new(), "pins are left");
            assert_eq!(ebpf::at_sockets(self.netns), Vec::<String>::new(), "programs are left");
        }
    }
}

/// Content of every file below a directory, or where a link leads, by its path.
pub fn files_of(dir: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let mut files = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_of(&path));
            continue;
        }
        let content = match std::fs::read_link(&path) {
            Ok(target) => target.into_os_string().into_vec(),
            Err(_) => std::fs::read(&path).unwrap(),
        };
        files.insert(path, content);
    }
    files
}

/// An attachment of a laboratory pod by another container ID than its name.
pub fn attachment(pod: &Pod, container_id: &str) -> Attachment {
    Attachment::of(pod, container_id)
}

/// prevResult of a laboratory pod.
pub fn prev_result(lab: &Lab, pod: usize, cni_version: &str) -> Value {
    lab.prev_result(&lab.pods[pod], cni_version)
}
