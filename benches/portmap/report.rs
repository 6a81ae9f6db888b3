//! What the tables need around them: the machine and the sizes.

use std::fs;
use std::path::Path;
use std::process::Command;

use portmap::sys::bpf::cgroup;
use portmap::sys::bpf::program::{Program, SocketHook};

use crate::contest::Side;
use crate::process::{Cell, mebibytes};

pub fn machine(ours: &Path, peer: Option<&Path>) -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown processor", |l| l.trim_start_matches([':', '\t', ' ']));
    let mut text = format!(
        "Kernel {}, {cores} cores ({model}), load {}; {}; {}.\n",
        kernel.trim(),
        load(),
        said("iptables", &["--version"]),
        said("nft", &["--version"]),
    );
    for (name, path) in [("ours", Some(ours)), ("peer", peer)] {
        let Some(path) = path else { continue };
        let size = fs::metadata(path).map_or(0, |m| m.len());
        let about = [said(path, &[]), package(path)].concat();
        text += &format!("* {name}: {} ({about}), {size} bytes\n", path.display());
    }
    text
}

/// The package and version a file is from: Debian's build does not know its own version.
fn package(path: &Path) -> String {
    let script = "dpkg-query --show \"$(dpkg --search \"$0\" | cut -d: -f1)\"";
    Command::new("sh")
        .args(["-c", script])
        .arg(path)
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| {
            let text = String::from_utf8_lossy(&output.stdout).trim().replace('\t', " ");
            format!("; package {text}")
        })
        .unwrap_or_default()
}

/// The one-minute load average: whoever reads the numbers must know how quiet the machine was.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

/// The first line that a program prints; a plugin without `CNI_COMMAND` introduces itself.
fn said(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> String {
    let output = Command::new(&program)
        .args(args)
        .env_remove("CNI_COMMAND")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(std::process::Stdio::null())
        .output();
    let Ok(output) = output else {
        return format!("no {}", program.as_ref().display());
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().next().unwrap_or("says nothing").to_owned()
}

/// Other nodes' programs at the sockets of the machine. ADD has to tell them from its own, and every
/// `connect` of the machine runs them.
pub fn strangers() -> Option<String> {
    let attached = cgroup::root().and_then(|root| root.query(SocketHook::Connect4)).ok()?.programs;
    let is_ours = |id: &u32| {
        let program = Program::from_id(*id).ok().flatten();
        program.is_some_and(|program| program.name().starts_with("pm_"))
    };
    match attached.iter().filter(|id| is_ours(id)).count() {
        0 => None,
        count => Some(format!(
            "{count} other node(s) with eBPF share the machine's root cgroup, which makes ebpf slower; \
             see \"What is left\" in benches/README.md"
        )),
    }
}

/// The peak of our own process, and of the largest tool it started.
pub fn memory(cells: &[Cell]) -> String {
    let ours = || cells.iter().filter(|c| c.side == Side::Ours);
    let own = ours().map(|c| c.series.peak.own).max().unwrap_or(0);
    let largest = ours().map(|c| c.series.peak.largest).max().unwrap_or(0);
    format!(
        "Peak memory of ours: {} MiB the plugin itself, {} MiB the largest process with its tools.\n",
        mebibytes(own),
        mebibytes(largest),
    )
}
