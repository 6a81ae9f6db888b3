//! SIGKILL at any stage: runtimes kill a plugin when the request that started it is cancelled. What
//! is left must be such that a later DEL, or a repeated ADD, ends clean, and other pods must not
//! notice.
//!
//! A tool that the plugin has started goes on after the plugin's death; it holds the inherited lock,
//! so that the next call waits for it.
//!
//! eBPF is also killed before every system call that changes something, one after the other
//! (`kill/boundaries.rs`), also of an upgrade (`kill/upgrade.rs`).
//!
//! Run as root: `cargo test --test kill -- --ignored`. `PORTMAP_KILL_SEED` repeats a sequence.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "kill/boundaries.rs"]
mod boundaries;
#[path = "support/raw.rs"]
mod raw;
mod support;
#[path = "kill/upgrade.rs"]
mod upgrade;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portmap::demo::listing;
use portmap::demo::plugin::{self, Attachment};
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::demo::traffic::{Call, Failure, Transport, reach};
use serde_json::{Value, json};
use support::{Node, PORTMAP, VARIANTS, Variant, attachment, ebpf, prev_result};

/// For each variant: calls that were still running when the signal came.
const KILLS: usize = 70;
/// Most calls end before their delay is over; this many tries are enough for any machine.
const TRIES: usize = 20 * KILLS;
const TIMEOUT: Duration = Duration::from_secs(5);
const LIVING: u16 = 8080;
const VICTIM: u16 = 9090;
/// What the victim has at first; another ADD asks for a part of it, or for others.
const FIRST: [u16; 2] = [VICTIM, VICTIM + 1];

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn seed() -> u64 {
    std::env::var("PORTMAP_KILL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(
        || {
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos().to_le_bytes()[..8]
                .iter()
                .fold(0, |seed, byte| seed << 8 | u64::from(*byte))
        },
    )
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Add,
    /// An ADD of an attachment that is there, with other ports.
    ReAdd,
    Del,
    /// What takes the programs away that outlive the last attachment.
    Flush,
}

impl Stage {
    fn of(variant: Variant) -> &'static [Stage] {
        match variant {
            Variant::Ebpf => &[Stage::Add, Stage::ReAdd, Stage::Del, Stage::Flush],
            _ => &[Stage::Add, Stage::ReAdd, Stage::Del],
        }
    }
}

struct Trial<'a> {
    lab: &'a Lab,
    node: &'a Node<'a>,
    random: Random,
    /// How long each stage takes undisturbed.
    usual: [Duration; 4],
    killed: usize,
    /// eBPF: each round begins without programs.
    bare: bool,
}

impl<'a> Trial<'a> {
    fn new(lab: &'a Lab, node: &'a Node<'a>, random: Random) -> Self {
        Trial { lab, node, random, usual: Default::default(), killed: 0, bare: false }
    }

    fn config(&self, pod: usize, ports: &[u16], container_port: u16) -> Value {
        let mappings: Vec<Value> = ports
            .iter()
            .flat_map(|port| {
                ["tcp", "udp"].map(
                    |protocol| json!({"hostPort": port, "containerPort": container_port, "protocol": protocol}),
                )
            })
            .collect();
        self.node.config(json!(mappings), prev_result(self.lab, pod, &self.node.cni_version))
    }

    fn key(&self, pod: usize) -> Attachment {
        attachment(&self.lab.pods[pod], &format!("c{pod}"))
    }

    /// Both families, so that a kill can come between their transactions.
    fn assert_answers(&self, pod: usize, port: u16) {
        for family in &self.lab.options.families {
            let call = Call::new(Transport::Tcp, self.lab.node_socket(*family, port), TIMEOUT);
            let reply = reach(&self.lab.client, call)
                .unwrap_or_else(|failure| panic!("{family} port {port}: {failure}"));
            assert_eq!(reply.server, self.lab.pods[pod].name, "{family} port {port}");
        }
    }

    fn assert_closed(&self, port: u16) {
        for family in &self.lab.options.families {
            let call = Call::new(Transport::Tcp, self.lab.node_socket(*family, port), TIMEOUT);
            let reply = reach(&self.lab.client, call);
            assert_eq!(reply, Err(Failure::Refused), "{family} port {port}");
        }
    }

    /// Starts a call and kills it after a delay; true if it was still running.
    fn kill(&mut self, mut command: Command, input: &str, usual: Duration) -> bool {
        let micros = u64::try_from(usual.as_micros()).unwrap();
        let delay = Duration::from_micros(self.random.below(micros));
        command.env("PATH", &self.node.path);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = self.lab.node.spawn(&mut command).unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        std::thread::sleep(delay);
        child.kill().unwrap();
        let killed = child.wait().unwrap().code().is_none();
        self.killed += usize::from(killed);
        killed
    }

    fn flush(&self) {
        let output = self.node.flush();
        assert!(output.success(), "{}{}", output.stdout, output.stderr);
    }

    /// One kill, and what a runtime does next.
    fn round(&mut self, stage: Stage, baseline: &[String]) {
        let first = self.config(0, &FIRST, 80);
        let second = match self.random.below(4) {
            0 => self.config(0, &FIRST[..1], 80),
            1 => self.config(0, &[VICTIM + 1, VICTIM + 2], 80),
            2 => self.config(0, &[VICTIM + 2], 80),
            _ => self.config(0, &FIRST, 81),
        };
        let key = self.key(0);
        let usual = self.usual[stage as usize];
        let (verb, config) = match stage {
            Stage::Add => ("ADD", &first),
            Stage::ReAdd => ("ADD", &second),
            Stage::Del | Stage::Flush => ("DEL", &first),
        };
        if self.bare {
            self.flush();
        }
        if stage != Stage::Add {
            self.node.ok("ADD", &first, &key);
        }
        let (command, input) = match stage {
            Stage::Flush => (self.node.flush_command(), String::new()),
            _ => (plugin::command(Path::new(PORTMAP), verb, &key), config.to_string()),
        };
        self.kill(command, &input, usual);
        if stage == Stage::Flush && !self.bare {
            // It has taken the neighbour's as well, or would have.
            self.node.ok("ADD", &self.config(1, &[LIVING], 80), &self.key(1));
        }
        // The same runtime tries again, its pod comes again with its old ports, or it gives up.
        match self.random.below(3) {
            0 => self.expect_whole(config, &key),
            1 => self.expect_whole(&first, &key),
            _ => {}
        }
        // As runtimes clean up after a failed ADD: nothing is known but the key and the mappings.
        let mut bare = first;
        bare.as_object_mut().unwrap().remove("prevResult");
        self.node.ok("DEL", &bare, &key);
        if self.bare {
            self.flush();
        }
        self.assert_unchanged(baseline);
        (VICTIM..VICTIM + 3).for_each(|port| self.assert_closed(port));
    }

    fn expect_whole(&self, config: &Value, key: &Attachment) {
        self.node.ok("ADD", config, key);
        self.node.ok("CHECK", config, key);
        let mappings = config["runtimeConfig"]["portMappings"].as_array().unwrap();
        for mapping in mappings.iter().filter(|mapping| mapping["protocol"] == "tcp") {
            self.assert_answers(0, u16::try_from(mapping["hostPort"].as_u64().unwrap()).unwrap());
        }
    }

    /// Rules, sysctls and records, by this variant's tools alone: it is asked for often.
    fn state(&self) -> Vec<String> {
        let mut lines = match self.node.variant {
            // A kill between a qdisc and its first filter leaves an empty qdisc, which cannot be told
            // from somebody else's, and does nothing.
            Variant::Ebpf => {
                let mut lines = ebpf::state(&self.lab.node);
                lines.retain(|line| !line.ends_with(" clsact"));
                lines
            }
            Variant::Nftables => listing::nft(&self.node.shell("nft list ruleset")),
            _ => listing::iptables(&self.node.shell("iptables-save; ip6tables-save")),
        };
        let read = || {
            let links = std::fs::read_dir("/proc/sys/net/ipv4/conf").unwrap();
            let value = |path: std::path::PathBuf| {
                format!("{} {}", path.display(), std::fs::read_to_string(&path).unwrap())
            };
            links.map(|link| value(link.unwrap().path().join("route_localnet"))).collect::<Vec<_>>()
        };
        lines.extend(self.lab.node.run(read).unwrap());
        for kind in ["records", "index"] {
            let mut found = raw::files_below(&self.node.state_dir.join(kind));
            // What is written anew under this name: one at most is left, and the next takes its place.
            found.retain(|path| !path.ends_with(".tmp"));
            let name = |path: &PathBuf| {
                let target = std::fs::read_link(path).unwrap_or_default();
                format!("{} {}", path.display(), target.display())
            };
            let mut names: Vec<_> = found.iter().map(name).collect();
            names.sort();
            lines.extend(names);
        }
        lines
    }

    fn assert_unchanged(&self, baseline: &[String]) {
        let now = self.state();
        let only = |these: &[String], those: &[String]| {
            let lines: Vec<String> =
                these.iter().filter(|line| !those.contains(line)).cloned().collect();
            lines.join("\n")
        };
        let (left, lost) = (only(&now, baseline), only(baseline, &now));
        assert!(now == baseline, "left:\n{left}\nlost:\n{lost}");
    }

    /// The median of a few undisturbed runs.
    fn measure(&mut self) {
        let first = self.config(0, &FIRST, 80);
        let second = self.config(0, &[VICTIM + 1, VICTIM + 2], 80);
        let key = self.key(0);
        let mut runs: [Vec<Duration>; 4] = Default::default();
        for _ in 0..5 {
            if self.bare {
                self.flush();
            }
            runs[0].push(self.node.ok("ADD", &first, &key).took);
            runs[1].push(self.node.ok("ADD", &second, &key).took);
            runs[2].push(self.node.ok("DEL", &second, &key).took);
            if self.bare {
                runs[3].push(self.node.flush().took);
            }
        }
        if !self.bare {
            runs[3] = runs[2].clone();
        }
        self.usual = runs.map(|mut runs| {
            runs.sort();
            runs[runs.len() / 2]
        });
    }
}

/// Kills until there were enough kills; `living` says whether another pod has its mapping meanwhile.
fn kill_many(lab: &Lab, variant: Variant, seed: u64) {
    let node = Node::new(&lab.node, variant);
    let empty = node.snapshot();
    let random = Random(seed ^ variant as u64);
    let mut trial = Trial::new(lab, &node, random);
    let neighbour = trial.config(1, &[LIVING], 80);
    // First with nothing else, so that the shared part comes and goes with the victim.
    for (living, goal) in [(false, KILLS / 2), (true, KILLS)] {
        if living {
            node.ok("ADD", &neighbour, &trial.key(1));
        }
        trial.bare = !living && variant == Variant::Ebpf;
        trial.measure();
        let baseline = trial.state();
        let stages = Stage::of(variant);
        for tries in 0.. {
            if trial.killed >= goal {
                break;
            }
            assert!(tries < TRIES, "calls end before they can be killed");
            trial.round(stages[tries % stages.len()], &baseline);
            if living {
                trial.assert_answers(1, LIVING);
            }
        }
    }
    node.ok("CHECK", &neighbour, &trial.key(1));
    node.ok("DEL", &neighbour, &trial.key(1));
    node.assert_clean(&empty);
    assert!(trial.killed >= KILLS);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_kill_at_any_moment_is_healed_by_the_next_call() {
    let seed = seed();
    // Shown if the test fails.
    println!("PORTMAP_KILL_SEED={seed}");
    let lab = Lab::build(Options::new(Shape::Cilium)).unwrap();
    assert_eq!(lab.options.families.len(), 2, "a kill between two families cannot be tried");
    let servers: Vec<Servers> =
        lab.pods.iter().map(|pod| pod.serve(&[80, 81], &[]).unwrap()).collect();
    for variant in VARIANTS {
        println!("{variant:?}");
        kill_many(&lab, variant, seed);
    }
    drop(servers);
}
