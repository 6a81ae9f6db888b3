//! The demonstration from ADD to the proof that nothing is left, in the order that people see it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::matrix::{self, Capabilities, Case, Place, Service};
use super::plugin::{self, Attachment, Output};
use super::report::{heading, proof, table};
use super::snapshot::{Snapshot, pins};
use super::state_dir::StateDir;
use super::topology::{Lab, Options, Shape};
use super::traffic::Transport;
use super::{DemoError, DemoOptions, LabError};

/// How long a call waits for its connection, and for its answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The `cniVersion`s that the main part can use, best first.
const CURRENT: [&str; 3] = ["1.1.0", "1.0.0", "0.4.0"];
/// The `cniVersion` of the lists that Cilium writes: its DEL has no `prevResult`.
const OLD: &str = "0.3.1";

/// What each pod serves: (hostPort, containerPort).
struct Ports {
    tcp: (u16, u16),
    udp: (u16, u16),
}

const PORTS: [Ports; 2] =
    [Ports { tcp: (8080, 80), udp: (5353, 53) }, Ports { tcp: (8081, 80), udp: (5354, 53) }];

/// A demonstration in progress.
struct Story<'a> {
    options: &'a DemoOptions,
    lab: Lab,
    state: StateDir,
    /// The `cniVersion` of the main part.
    version: &'static str,
    out: &'a mut dyn Write,
    all_held: bool,
}

/// Carries the demonstration out; true if all held.
pub(super) fn tell(options: &DemoOptions, out: &mut dyn Write) -> Result<bool, DemoError> {
    let (lab, note) = build()?;
    let state = StateDir::new()?;
    let mut story = Story { options, lab, state, version: CURRENT[0], out, all_held: true };
    story.introduce(note)?;
    let mut servers = Vec::new();
    for pod in &story.lab.pods {
        let (tcp, udp) = PORTS[0].inside();
        servers.push(pod.serve(&[tcp], &[udp])?);
    }
    let before = story.snapshot()?;
    story.version()?;
    story.add()?;
    let cases = story.cases();
    story.traffic(cases.clone())?;
    story.rules(&before)?;
    story.check_and_delete(&before, &cases)?;
    story.old_delete(&before, &cases)?;
    story.flush()?;
    story.conclude()
}

/// With delivery past the host stack where the kernel has what that takes, else without it and a
/// note that says why.
fn build() -> Result<(Lab, Option<String>), LabError> {
    let mut options = Options::new(Shape::Cilium);
    options.bypass = true;
    match Lab::build(options.clone()) {
        Ok(lab) => Ok((lab, None)),
        Err(LabError::NotPermitted) => Err(LabError::NotPermitted),
        Err(error) => {
            options.bypass = false;
            let lab = Lab::build(options)?;
            Ok((lab, Some(error.to_string())))
        }
    }
}

impl Story<'_> {
    fn introduce(&mut self, note: Option<String>) -> io::Result<()> {
        heading(self.out, "A node wired as Cilium does it, in namespaces of its own")?;
        for family in self.lab.options.families.clone() {
            let lab = &self.lab;
            writeln!(
                self.out,
                "  {family}: client {}, node {} and {}, {}",
                lab.client_address(family),
                lab.node_address(family),
                lab.second_node_address(family),
                lab.pods
                    .iter()
                    .filter_map(|pod| Some(format!("{} {}", pod.name, pod.address(family)?)))
                    .collect::<Vec<_>>()
                    .join(", "),
            )?;
        }
        match note {
            None => writeln!(
                self.out,
                "  Packets between pods go past the node's IP stack, as with eBPF (cilium#9784)."
            ),
            Some(reason) => writeln!(
                self.out,
                "  Packets between pods go through the node's IP stack ({reason})."
            ),
        }
    }

    fn snapshot(&self) -> io::Result<Snapshot> {
        Snapshot::take(&self.lab.node, &self.state.path)
    }

    fn proof(&mut self, what: &str, held: Result<(), String>) -> io::Result<()> {
        self.all_held &= proof(self.out, what, &held)?;
        Ok(())
    }

    /// The configuration that libcni would hand to the plugin for one pod.
    fn config(&self, pod: usize, version: &str) -> Value {
        let ports = &PORTS[pod];
        let mapping = |(host, inside): (u16, u16), protocol: &str| json!({"hostPort": host, "containerPort": inside, "protocol": protocol});
        let mut config = json!({
            "cniVersion": version,
            "name": "portmap",
            "type": "portmap",
            "capabilities": {"portMappings": true},
            "stateDir": self.state.path,
            "runtimeConfig": {
                "portMappings": [mapping(ports.tcp, "tcp"), mapping(ports.udp, "udp")],
            },
            "prevResult": self.lab.prev_result(&self.lab.pods[pod], version),
        });
        if let Some(backend) = &self.options.backend {
            config["backend"] = json!(backend);
        }
        config
    }

    fn attachment(&self, pod: usize) -> Attachment {
        let pod = &self.lab.pods[pod];
        Attachment::of(pod, &format!("demo-{}", pod.name))
    }

    fn invoke(&self, verb: &str, config: &Value, attachment: &Attachment) -> io::Result<Output> {
        let plugin = &self.options.plugin;
        plugin::invoke(plugin, verb, config, attachment, &self.lab.node).map_err(|error| {
            io::Error::new(error.kind(), format!("running {}: {error}", plugin.display()))
        })
    }

    /// Runs a verb and proves that it succeeded.
    fn verb(
        &mut self,
        verb: &str,
        what: &str,
        config: &Value,
        attachment: &Attachment,
    ) -> io::Result<Output> {
        let output = self.invoke(verb, config, attachment)?;
        let held = if output.success() { Ok(()) } else { Err(output.reason()) };
        let took = output.took.as_secs_f64() * 1000.0;
        self.proof(&format!("{verb} {what} ({took:.1} ms)"), held)?;
        for line in output.stderr.lines().filter(|_| output.success()) {
            writeln!(self.out, "          stderr: {line}")?;
        }
        Ok(output)
    }

    /// Asks which versions the plugin speaks, as some runtimes do before every call.
    fn version(&mut self) -> io::Result<()> {
        heading(self.out, "VERSION and ADD")?;
        let config = json!({"cniVersion": CURRENT[0]});
        let output = self.verb("VERSION", "is answered", &config, &self.attachment(0))?;
        let answer: Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        let spoken = |version: &&&str| {
            let versions = answer["supportedVersions"].as_array();
            versions.is_some_and(|versions| versions.contains(&json!(version)))
        };
        let held = match CURRENT.iter().find(spoken) {
            Some(version) => {
                self.version = version;
                Ok(())
            }
            None => Err(format!("it answered {}", output.stdout.trim())),
        };
        self.proof(&format!("     speaks {}", self.version), held)
    }

    fn add(&mut self) -> io::Result<()> {
        for (pod, Ports { tcp, udp }) in PORTS.iter().enumerate() {
            let what = format!(
                "{}: tcp {} to {}, udp {} to {}",
                self.lab.pods[pod].name, tcp.0, tcp.1, udp.0, udp.1
            );
            let config = self.config(pod, self.version);
            let output = self.verb("ADD", &what, &config, &self.attachment(pod))?;
            let result: Result<Value, _> = serde_json::from_str(&output.stdout);
            let held = match result {
                Ok(result) if result == config["prevResult"] => Ok(()),
                Ok(result) => Err(format!("result: {result}")),
                Err(error) => Err(format!("stdout is not one JSON object: {error}")),
            };
            self.proof("     and hands the previous result on", held)?;
        }
        Ok(())
    }

    /// Every path to pod-a's hostPorts; the outside client's to pod-b's.
    fn cases(&self) -> Vec<Case> {
        let service = |pod, transport, host_port| Service { pod, transport, host_port };
        let services = |pod: usize| {
            let Ports { tcp, udp } = &PORTS[pod];
            [service(pod, Transport::Tcp, tcp.0), service(pod, Transport::Udp, udp.0)]
        };
        let capabilities = Capabilities {
            localhost_v6: match self.options.backend.as_deref() {
                None | Some("auto") => None,
                Some(backend) => Some(backend == "ebpf"),
            },
        };
        let mut cases = matrix::cases(&self.lab, &services(0), capabilities);
        let mut others = matrix::cases(&self.lab, &services(1), capabilities);
        others.retain(|case| case.from == Place::Client);
        cases.extend(others);
        cases
    }

    fn traffic(&mut self, cases: Vec<Case>) -> io::Result<()> {
        heading(self.out, "Connections to the hostPorts")?;
        let outcomes = matrix::run(&self.lab, cases, TIMEOUT);
        table(self.out, &outcomes)?;
        self.all_held &= outcomes.iter().all(|outcome| outcome.ok);
        Ok(())
    }

    fn rules(&mut self, before: &Snapshot) -> io::Result<()> {
        heading(self.out, "What the plugin made in the kernel")?;
        let now = self.snapshot()?;
        for (tool, lines) in now.added_rules(before) {
            writeln!(self.out, "  {tool}:")?;
            for line in lines {
                writeln!(self.out, "    {line}")?;
            }
        }
        for (link, value) in &now.sysctls {
            if before.sysctls.get(link) != Some(value) {
                writeln!(self.out, "  net.ipv4.conf.{link}.route_localnet = {value}")?;
            }
        }
        for pin in pins(&self.lab.node)? {
            writeln!(self.out, "  {}", pin.display())?;
        }
        Ok(())
    }

    fn check_and_delete(&mut self, before: &Snapshot, cases: &[Case]) -> io::Result<()> {
        heading(self.out, "CHECK and DEL")?;
        for verb in ["CHECK", "DEL"] {
            for pod in 0..PORTS.len() {
                let name = self.lab.pods[pod].name.clone();
                let config = self.config(pod, self.version);
                self.verb(verb, &name, &config, &self.attachment(pod))?;
            }
        }
        let config = self.config(0, self.version);
        self.verb("DEL", "pod-a once more", &config, &self.attachment(0))?;
        self.nothing_left(before, cases)
    }

    fn old_delete(&mut self, before: &Snapshot, cases: &[Case]) -> io::Result<()> {
        heading(
            self.out,
            "A list of version 0.3.1, as Cilium writes it: DEL gets no previous result",
        )?;
        let mut attachment = self.attachment(0);
        let mut config = self.config(0, OLD);
        self.verb("ADD", "pod-a", &config, &attachment)?;
        let reached = matrix::run(&self.lab, first(cases), TIMEOUT);
        let held = match reached.iter().find(|outcome| !outcome.ok) {
            None => Ok(()),
            Some(outcome) => Err(format!("{}: {:?}", outcome.case.path, outcome.result)),
        };
        self.proof("     and the outside client reaches it", held)?;
        if let Some(fields) = config.as_object_mut() {
            fields.remove("prevResult");
            fields.remove("runtimeConfig");
        }
        attachment.netns = PathBuf::new();
        let what = "pod-a without previous result, port mappings and namespace";
        self.verb("DEL", what, &config, &attachment)?;
        self.nothing_left(before, cases)
    }

    fn nothing_left(&mut self, before: &Snapshot, cases: &[Case]) -> io::Result<()> {
        let now = self.snapshot()?;
        let tools: Vec<_> = before.rules.keys().map(String::as_str).collect();
        let what = match tools.as_slice() {
            [] => "no tool to list rules with; nothing compared".to_owned(),
            tools => format!("the rules are those from before ADD ({})", tools.join(", ")),
        };
        self.proof(&what, now.same_rules(before))?;
        self.proof("route_localnet is as before", now.same_sysctls(before))?;
        self.proof("no record is left", now.no_records())?;
        let outcomes = matrix::run_refused(&self.lab, matrix::unmapped(cases), TIMEOUT);
        let what = format!("the hostPorts are closed ({} calls)", outcomes.len());
        let open = outcomes.iter().filter(|outcome| !outcome.ok);
        let open: Vec<_> = open
            .map(|outcome| {
                let result = match &outcome.result {
                    Ok(reply) => format!("reached {}", reply.server),
                    Err(failure) => failure.to_string(),
                };
                format!("{}, {}: {result}", outcome.case.path, outcome.case.target)
            })
            .collect();
        let held = if open.is_empty() { Ok(()) } else { Err(open.join("\n")) };
        self.proof(&what, held)
    }

    /// eBPF programs and maps stay loaded for the next pod; decommissioning a node removes them.
    fn flush(&mut self) -> io::Result<()> {
        if pins(&self.lab.node)?.is_empty() {
            return Ok(());
        }
        heading(self.out, "flush")?;
        let output = flush(self.options, &self.state, &self.lab)?;
        let held = if output.success() { Ok(()) } else { Err(output.reason()) };
        self.proof("flush --all takes away what outlives the last pod", held)?;
        let left: Vec<String> =
            pins(&self.lab.node)?.iter().map(|pin| pin.display().to_string()).collect();
        let held = if left.is_empty() { Ok(()) } else { Err(left.join("\n")) };
        self.proof("no program and no map is left", held)
    }

    fn conclude(&mut self) -> Result<bool, DemoError> {
        let verdict =
            if self.all_held { "All held." } else { "Not all held: see the lines marked FAILED." };
        writeln!(self.out, "\n{verdict}")?;
        Ok(self.all_held)
    }
}

impl Drop for Story<'_> {
    /// However the demonstration ended: programs at the root cgroup are the machine's, and do not go
    /// with the node's namespaces.
    fn drop(&mut self) {
        if pins(&self.lab.node).is_ok_and(|pins| !pins.is_empty()) {
            drop(flush(self.options, &self.state, &self.lab));
        }
    }
}

fn flush(options: &DemoOptions, state: &StateDir, lab: &Lab) -> io::Result<Output> {
    let mut command = Command::new(&options.plugin);
    command.args(["flush", "--all", "--yes", "--state-dir"]).arg(&state.path);
    plugin::run(&mut command, b"", &lab.node)
}

impl Ports {
    /// The ports that the pods' servers listen on; the same in every pod, so that a call that ends
    /// in the wrong pod is answered, and noticed.
    fn inside(&self) -> (u16, u16) {
        (self.tcp.1, self.udp.1)
    }
}

/// The first case: one call is enough to see that a mapping is there.
fn first(cases: &[Case]) -> Vec<Case> {
    cases.iter().take(1).cloned().collect()
}
