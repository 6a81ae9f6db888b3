//! One call of a plugin: configuration, environment, and what the call cost.

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::rig::{self, DIR, POD_NETNS};
use crate::{Res, Variant, interrupt};

pub const NETWORK: &str = "bench";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Add,
    Check,
    Del,
    Version,
}

impl Verb {
    pub fn name(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Check => "CHECK",
            Verb::Del => "DEL",
            Verb::Version => "VERSION",
        }
    }
}

/// What a call is about.
#[derive(Debug, Clone)]
pub struct Attachment {
    pub id: String,
    /// The host's end of the pod's link.
    pub link: &'static str,
    pub address: Ipv4Addr,
    pub protocol: &'static str,
    /// (hostPort, containerPort)
    pub ports: Vec<(u16, u16)>,
}

impl Attachment {
    /// The attachment that is measured: `count` consecutive hostPorts.
    pub fn measured(count: u16) -> Self {
        Self {
            id: "5c1d6b2f8a3e4d7090b1c2d3e4f5a697".to_owned(),
            link: "pod-a",
            address: Ipv4Addr::new(10, 88, 0, 2),
            protocol: "tcp",
            ports: (0..count).map(|i| (8080 + i, 80 + i)).collect(),
        }
    }

    /// One of the others on the node: one port, a pod address of its own.
    pub fn other(index: u16) -> Self {
        let [high, low] = (index / 250 * 256 + index % 250 + 258).to_be_bytes();
        Self {
            id: format!("0the{index:06}"),
            link: "pod-a",
            address: Ipv4Addr::new(10, 88, high, low),
            protocol: "tcp",
            ports: vec![(20_000 + index, 80)],
        }
    }

    fn config(&self, backend: &str) -> Value {
        let mappings: Vec<Value> = self
            .ports
            .iter()
            .map(|(host, container)| {
                json!({"hostPort": host, "containerPort": container, "protocol": self.protocol})
            })
            .collect();
        json!({
            "cniVersion": "1.0.0",
            "name": NETWORK,
            "type": "portmap",
            "backend": backend,
            "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": mappings},
            "prevResult": {
                "cniVersion": "1.0.0",
                "interfaces": [
                    {"name": self.link, "mac": "02:00:00:00:00:01"},
                    {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": POD_NETNS},
                ],
                "ips": [{
                    "address": format!("{}/16", self.address),
                    "gateway": "10.88.0.1",
                    "interface": 1,
                }],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        })
    }
}

/// What one process, with the tools it started, has cost.
#[derive(Debug)]
pub struct Cost {
    pub wall_ms: f64,
    pub cpu_ms: f64,
    /// What it printed, if it failed.
    pub failure: Option<String>,
}

/// A call that can be repeated. It must be prepared and run on the rig.
pub struct Call {
    input: PathBuf,
    output: PathBuf,
    command: Command,
}

impl Call {
    pub fn new(binary: &Path, variant: Variant, verb: Verb, about: &Attachment) -> Res<Self> {
        let input = Path::new(DIR).join(format!("{}.{}.json", verb.name(), about.ports.len()));
        let config = match verb {
            Verb::Version => json!({"cniVersion": "1.0.0"}),
            _ => about.config(variant.backend()),
        };
        fs::write(&input, config.to_string())?;
        let mut command = Command::new(binary);
        command
            .env_clear()
            .env("PATH", rig::search_path(variant))
            .env("CNI_COMMAND", verb.name())
            .env("CNI_CONTAINERID", &about.id)
            .env("CNI_NETNS", POD_NETNS)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", "")
            .env("CNI_PATH", "/opt/cni/bin");
        Ok(Self { input, output: Path::new(DIR).join("output"), command })
    }

    /// Runs it and measures from before the process is made until it has been reaped.
    pub fn run(&mut self) -> Res<Cost> {
        interrupt::check()?;
        // Files, not pipes: reading from a pipe would be the benchmark's work, in the measured time.
        let output = File::create(&self.output)?;
        self.command.stdin(File::open(&self.input)?).stdout(output.try_clone()?).stderr(output);
        let start = Instant::now();
        let child = self
            .command
            .spawn()
            .map_err(|e| format!("{}: {e}", self.command.get_program().display()))?;
        let (status, usage) = reap(child.id())?;
        let wall_ms = start.elapsed().as_secs_f64() * 1e3;
        let failure = (status != 0).then(|| self.printed());
        Ok(Cost {
            wall_ms,
            cpu_ms: milliseconds(usage.ru_utime) + milliseconds(usage.ru_stime),
            failure,
        })
    }

    /// Runs it, and takes failure for an error of the benchmark.
    pub fn must(&mut self) -> Res<Cost> {
        let cost = self.run()?;
        match &cost.failure {
            None => Ok(cost),
            Some(text) => {
                let program = self.command.get_program().display();
                Err(format!("{program} failed: {text}").into())
            }
        }
    }

    /// The command with a pipe as its input, and what to write there.
    pub fn held(&mut self) -> Res<(&mut Command, Vec<u8>)> {
        let output = File::create(&self.output)?;
        self.command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output);
        Ok((&mut self.command, fs::read(&self.input)?))
    }

    fn printed(&self) -> String {
        let text = fs::read_to_string(&self.output).unwrap_or_default();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// `Child::wait` drops what the kernel knows about the process.
#[expect(unsafe_code, reason = "neither std nor nix has wait4")]
fn reap(pid: u32) -> io::Result<(i32, libc::rusage)> {
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    loop {
        // SAFETY: both pointers are to live values of the types that wait4 writes, and the pid is
        // that of a child which nobody else waits for.
        let reaped =
            unsafe { libc::wait4(pid.cast_signed(), &raw mut status, 0, usage.as_mut_ptr()) };
        if reaped >= 0 {
            // SAFETY: wait4 has filled it, and all zeroes would have been valid as well.
            return Ok((status, unsafe { usage.assume_init() }));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "CPU times of seconds fit in a double")]
fn milliseconds(time: libc::timeval) -> f64 {
    time.tv_sec as f64 * 1e3 + time.tv_usec as f64 / 1e3
}
