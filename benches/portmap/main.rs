//! Measures the plugin against upstream's, process by process and packet by packet.
//!
//! How to run it, and what the columns mean: `benches/README.md`.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark starts processes, reads the clock and prints its table"
)]

mod aims;
mod contest;
mod first;
mod flow;
mod interrupt;
mod memory;
mod packet;
mod plan;
mod plugin;
mod preload;
mod process;
mod rate;
mod report;
mod rig;
mod stats;
mod traffic;
mod udp;

use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use serde_json::json;

use plan::Plan;

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
    const ALL: [Self; 4] = [Self::IptablesLegacy, Self::IptablesNft, Self::Nftables, Self::Ebpf];

    /// The `backend` of the configuration.
    fn backend(self) -> &'static str {
        match self {
            Variant::IptablesLegacy | Variant::IptablesNft => "iptables",
            Variant::Nftables => "nftables",
            Variant::Ebpf => "ebpf",
        }
    }

    /// The program behind `iptables` and its kin on this variant's nodes.
    fn multi(self) -> Option<&'static str> {
        match self {
            Variant::IptablesLegacy => Some("xtables-legacy-multi"),
            Variant::IptablesNft | Variant::Nftables => Some("xtables-nft-multi"),
            Variant::Ebpf => None,
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
    /// The first ADD on a node, and ADD with a new pod link
    First,
    /// ADD and DEL with a UDP port beside many tracked flows
    Udp,
    /// New TCP connections per second
    Rate,
    /// Established connections, and connections of the node itself
    Flow,
    /// What the eBPF programs cost a packet
    Packet,
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
    /// These backends (default: all)
    #[arg(long, value_delimiter = ',', value_name = "BACKEND,...")]
    variant: Vec<Variant>,
    /// Also write every single measurement to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// `cargo bench` says so; `cargo test --all-targets` does not
    #[arg(long, hide = true)]
    bench: bool,
}

/// What was measured; empty what was not wanted.
#[derive(Default)]
pub struct Results {
    cells: Vec<process::Cell>,
    starts: first::Starts,
    udp: Vec<udp::Lane>,
    lanes: Vec<rate::Lane>,
    flows: Vec<flow::Lane>,
    packets: packet::Costs,
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

/// A copy, as on a node: a file that was written from end to end is in the page cache in large pieces,
/// what a linker has just written in single pages, of which a process has to map each by itself.
fn installed(binary: &Path) -> io::Result<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench");
    fs::create_dir_all(&dir)?;
    let copy = dir.join("portmap");
    // A process of an earlier run may still have it open.
    match fs::remove_file(&copy) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => fs::copy(binary, &copy)?,
    };
    Ok(copy)
}

fn run(options: &Options) -> Res<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err("network namespaces need root; benches/README.md says how to run it".into());
    }
    interrupt::watch()?;
    let plan = if options.quick { Plan::quick() } else { Plan::full() };
    // Threads that enter a mount namespace leave the working directory behind.
    let ours = fs::canonicalize(&options.ours)
        .and_then(|binary| installed(&binary))
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
        [] => &Variant::ALL,
        some => some,
    };
    let wanted = |section| options.only.is_empty() || options.only.contains(&section);
    let strangers = report::strangers();
    let (contestants, mut notes) = contest::enter(&ours, peer.as_deref(), variants)?;
    notes.extend(strangers);

    let machine = report::machine(&ours, peer.as_deref());
    println!("# portmap benchmark\n\n{machine}");
    for note in &notes {
        println!("* {note}");
    }
    let mut results = Results::default();
    if wanted(Section::Process) {
        results.cells = process::measure(&contestants, &plan)?;
        println!("\n## Whole process\n\n{}", process::table(&results.cells, &contestants));
        println!("{}", report::memory(&results.cells));
    }
    if wanted(Section::First) {
        results.starts = first::measure(&contestants, &plan)?;
        println!("## First ADD, and new pod links\n\n{}", first::table(&results.starts));
    }
    if wanted(Section::Udp) {
        results.udp = udp::measure(&contestants, &plan)?;
        println!("## UDP port, many tracked flows\n\n{}", udp::table(&results.udp, &contestants));
    }
    if wanted(Section::Rate) {
        results.lanes = rate::measure(&contestants, &plan)?;
        let table = rate::table(&results.lanes, &contestants, &plan);
        println!("## New TCP connections per second\n\n{table}");
    }
    if wanted(Section::Flow) {
        results.flows = flow::measure(&contestants, &plan)?;
        println!(
            "## Established connections, and the node's own\n\n{}",
            flow::table(&results.flows)
        );
    }
    if wanted(Section::Packet) {
        results.packets = packet::measure(&contestants, &plan)?;
        println!("## What a packet costs\n\n{}", packet::table(&results.packets));
    }
    let aims = aims::aims(&results, &contestants, &plan);
    println!("## Aims\n\n{}\nLoad at the end: {}.", aims::table(&aims), report::load());
    if let Some(path) = &options.json {
        let all = json!({
            "machine": machine,
            "notes": notes,
            "process": process::json(&results.cells),
            "first": first::json(&results.starts),
            "udp": udp::json(&results.udp),
            "rate": rate::json(&results.lanes),
            "flow": flow::json(&results.flows),
            "packet": packet::json(&results.packets),
            "aims": aims::json(&aims),
        });
        fs::write(path, format!("{all:#}\n"))
            .map_err(|e| format!("--json {}: {e}", path.display()))?;
    }
    Ok(())
}
