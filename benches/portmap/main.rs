//! Measures the plugin against upstream's, process by process and packet by packet.
//!
//! How to run it, and what the columns mean: `benches/README.md`.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark starts processes, reads the clock and prints its table"
)]

mod contest;
mod memory;
mod plugin;
mod preload;
mod process;
mod rate;
mod report;
mod rig;
mod stats;
mod udp;

use std::error::Error;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde_json::json;

type Res<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A backend, and for iptables which of its two implementations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    IptablesLegacy,
    IptablesNft,
    Nftables,
    Ebpf,
}

impl Variant {
    /// What stays inside a network namespace. eBPF does not: its socket hooks belong to the
    /// machine's root cgroup, so they would outlive the run, and it is measured on request only.
    const CONFINED: [Self; 3] = [Self::IptablesLegacy, Self::IptablesNft, Self::Nftables];

    /// The `backend` of the configuration.
    fn backend(self) -> &'static str {
        match self {
            Variant::IptablesLegacy | Variant::IptablesNft => "iptables",
            Variant::Nftables => "nftables",
            Variant::Ebpf => "ebpf",
        }
    }

    /// The program behind `iptables` and its kin on this variant's nodes.
    fn multi(self) -> &'static str {
        match self {
            Variant::IptablesLegacy => "xtables-legacy-multi",
            _ => "xtables-nft-multi",
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Variant::IptablesLegacy => "iptables-legacy",
            Variant::IptablesNft => "iptables-nft",
            Variant::Nftables => "nftables",
            Variant::Ebpf => "ebpf",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Times of ADD, CHECK, DEL and VERSION, and peak memory
    Process,
    /// ADD and DEL with a UDP port beside many tracked flows
    Udp,
    /// New TCP connections per second
    Rate,
}

#[derive(Debug, Parser)]
#[command(about = "Measures portmap against upstream's plugin; see benches/README.md")]
struct Options {
    /// Upstream's plugin, any version
    #[arg(long, value_name = "PATH", default_value = "/usr/lib/cni/portmap")]
    peer: PathBuf,
    /// The plugin to measure
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_BIN_EXE_portmap"))]
    ours: PathBuf,
    /// Measure ours alone
    #[arg(long)]
    no_peer: bool,
    /// A few minutes less: fewer rounds, 1,000 mappings at most
    #[arg(long)]
    quick: bool,
    /// Only these sections
    #[arg(long, value_delimiter = ',', value_name = "SECTION,...")]
    only: Vec<Section>,
    /// These backends (default: all but ebpf)
    #[arg(long, value_delimiter = ',', value_name = "BACKEND,...")]
    variant: Vec<Variant>,
    /// Also write every single measurement to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// `cargo bench` says so; `cargo test --all-targets` does not
    #[arg(long, hide = true)]
    bench: bool,
}

/// How much is measured.
pub struct Plan {
    /// Numbers of other mappings beside the measured calls, rising.
    pub others: Vec<u16>,
    pub rounds: usize,
    /// Rounds that are measured however long they take.
    pub min_rounds: usize,
    pub patience: Duration,
    /// Numbers of mappings for the connection rates, rising.
    pub mappings: Vec<u16>,
    pub rate_rounds: usize,
    pub rate_time: Duration,
    /// Conntrack entries beside the UDP calls.
    pub entries: u32,
}

impl Plan {
    fn full() -> Self {
        Self {
            others: vec![0, 1000, 5000],
            rounds: 15,
            min_rounds: 7,
            patience: process::PATIENCE,
            mappings: vec![1, 1000, 10_000],
            // Many short turns: a burst of load elsewhere spoils some of everybody's, which the
            // median forgives, and not one lane's whole share.
            rate_rounds: 35,
            rate_time: Duration::from_millis(140),
            entries: 100_000,
        }
    }

    fn quick() -> Self {
        Self {
            others: vec![0, 1000],
            rounds: 5,
            min_rounds: 3,
            patience: Duration::from_secs(10),
            mappings: vec![1, 1000],
            rate_rounds: 11,
            rate_time: Duration::from_millis(100),
            entries: 100_000,
        }
    }
}

/// Says on stderr what is being done, since some steps take a minute.
pub fn progress(what: &str) {
    eprintln!("... {what}");
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !options.bench {
        println!("This is a benchmark: `cargo bench` runs it, or the option --bench.");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("portmap benchmark: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Res<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err("network namespaces need root; benches/README.md says how to run it".into());
    }
    let plan = if options.quick { Plan::quick() } else { Plan::full() };
    // Threads that enter a mount namespace leave the working directory behind.
    let ours = fs::canonicalize(&options.ours)
        .map_err(|e| format!("--ours {}: {e}", options.ours.display()))?;
    let peer = match options.no_peer {
        true => None,
        false => Some(fs::canonicalize(&options.peer).map_err(|e| {
            format!(
                "--peer {}: {e} (apt-get install containernetworking-plugins, or --no-peer)",
                options.peer.display()
            )
        })?),
    };
    for (tool, package) in [("ip", "iproute2"), ("nft", "nftables"), ("sh", "dash")] {
        rig::find_tool(tool, package)?;
    }
    let variants = match &options.variant[..] {
        [] => &Variant::CONFINED,
        some => some,
    };
    let wanted = |section| options.only.is_empty() || options.only.contains(&section);
    let (contestants, notes) = contest::enter(&ours, peer.as_deref(), variants)?;

    let machine = report::machine(&ours, peer.as_deref());
    println!("# portmap benchmark\n\n{machine}");
    for note in &notes {
        println!("* {note}");
    }
    let mut cells = Vec::new();
    if wanted(Section::Process) {
        cells = process::measure(&contestants, &plan)?;
        println!("\n## Whole process\n\n{}", process::table(&cells, &contestants));
        println!("{}", report::memory(&cells));
    }
    let mut flows = Vec::new();
    if wanted(Section::Udp) {
        flows = udp::measure(&contestants, &plan)?;
        println!("## UDP port, many tracked flows\n\n{}", udp::table(&flows, &contestants));
    }
    let mut lanes = Vec::new();
    if wanted(Section::Rate) {
        lanes = rate::measure(&contestants, &plan)?;
        let table = rate::table(&lanes, &contestants, &plan);
        println!("## New TCP connections per second\n\n{table}");
    }
    let aims = report::aims(&cells, &lanes, &contestants, &plan);
    println!("## Aims\n\n{aims}\nLoad at the end: {}.", report::load());
    if let Some(path) = &options.json {
        let all = json!({
            "machine": machine,
            "notes": notes,
            "process": process::json(&cells),
            "udp": udp::json(&flows),
            "rate": rate::json(&lanes),
        });
        fs::write(path, format!("{all:#}\n"))
            .map_err(|e| format!("--json {}: {e}", path.display()))?;
    }
    Ok(())
}
