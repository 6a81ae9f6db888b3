//! What the tables need around them: the machine, the sizes, and how the aims fared.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::contest::{Contestant, Side, stand_in};
use crate::plugin::Verb;
use crate::process::{self, Cell, mebibytes, number, ratio};
use crate::rate::{self, Lane};
use crate::stats::median;
use crate::{Plan, Variant};

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

/// What is aimed for, what was measured, and whether that is enough.
pub fn aims(cells: &[Cell], lanes: &[Lane], contestants: &[Contestant], plan: &Plan) -> String {
    let mut rows = Vec::new();
    let most = plan.others.last().copied().unwrap_or(0);
    let times = |variant, others, ports, verb| {
        let peer = stand_in(contestants, variant)
            .and_then(|v| process::find(cells, Side::Peer, v, others, ports, verb));
        let ours = process::find(cells, Side::Ours, variant, others, ports, verb);
        ratio(peer, ours)
    };
    let mark = |variant| match stand_in(contestants, variant) {
        Some(peer) if peer != variant => "†",
        _ => "",
    };
    for variant in [Variant::IptablesLegacy, Variant::IptablesNft] {
        for (ports, aim) in [(1, 5.0), (10, 10.0)] {
            for verb in [Verb::Add, Verb::Del] {
                // The worst of them: an aim that only a crowded node meets is not met.
                let worst = plan
                    .others
                    .iter()
                    .map(|n| times(variant, *n, ports, verb))
                    .fold(f64::NAN, f64::min);
                let what = format!("{variant} {} with {ports} port(s), times faster", verb.name());
                rows.push((what, aim, worst, worst >= aim));
            }
        }
    }
    for (verb, aim) in [(Verb::Add, 1.0), (Verb::Check, 10.0), (Verb::Del, 10.0)] {
        let value = [1, 10]
            .map(|ports| times(Variant::Nftables, most, ports, verb))
            .into_iter()
            .fold(f64::NAN, f64::min);
        let what = format!(
            "nftables {} with {most} others, times faster{}",
            verb.name(),
            mark(Variant::Nftables)
        );
        rows.push((what, aim, value, value >= aim));
    }
    for verb in [Verb::Add, Verb::Del] {
        let value = cells
            .iter()
            .filter(|c| c.side == Side::Ours && c.ports == 0 && c.verb == verb)
            .map(|c| median(&c.series.wall))
            .fold(f64::NAN, f64::max);
        let what = format!("{} without mappings, ms at most", verb.name());
        rows.push((what, 1.0, value, value < 1.0));
    }
    let lane =
        |n: Option<&u16>| n.and_then(|n| rate::find(lanes, Side::Ours, Variant::Nftables, *n));
    if let (Some(one), Some(many)) = (lane(plan.mappings.first()), lane(plan.mappings.last())) {
        let parts = [
            ("through a hostPort", &many.hostport, &one.hostport),
            ("direct", &many.direct, &one.direct),
        ];
        for (what, many, one) in parts {
            let value = median(many) / median(one);
            let most = plan.mappings.last().copied().unwrap_or(0);
            let what = format!("nftables connections {what}, {most} mappings to 1");
            rows.push((what, 0.9, value, value >= 0.9));
        }
    }
    let mut text = String::from("| aim | wanted | measured | |\n|---|--:|--:|---|\n");
    for (what, wanted, value, met) in rows {
        let verdict = match (value.is_nan(), met) {
            (true, _) => "not measured",
            (false, true) => "met",
            (false, false) => "**missed**",
        };
        text += &format!("| {what} | {wanted} | {} | {verdict} |\n", number(value, 2));
    }
    text
}
