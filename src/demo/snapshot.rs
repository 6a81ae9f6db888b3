//! Everything on the laboratory's node that a backend may change, to be compared before and after.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::listing;
use super::netns::Netns;
use super::plugin;

/// Tools that list rules, with the arguments that make them list everything.
const TOOLS: [(&str, &[&str]); 5] = [
    ("iptables-save", &[]),
    ("ip6tables-save", &[]),
    ("iptables-legacy-save", &[]),
    ("ip6tables-legacy-save", &[]),
    ("nft", &["list", "ruleset"]),
];

/// Sysctls and rules of a node, and the records in a state directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Reduced listings by command line; tools that this machine lacks are absent.
    pub rules: BTreeMap<String, Vec<String>>,
    /// `route_localnet` by link.
    pub sysctls: BTreeMap<String, String>,
    /// Records in the state directory, and what their index has.
    pub records: Vec<PathBuf>,
}

impl Snapshot {
    /// Takes one. Changes nothing but the empty tables that `iptables-save` may make.
    pub fn take(node: &Netns, state_dir: &Path) -> io::Result<Self> {
        let mut rules = BTreeMap::new();
        for (tool, arguments) in TOOLS {
            let mut command = Command::new(tool);
            command.args(arguments).env("PATH", plugin::search_path());
            let output = match plugin::run(&mut command, b"", node) {
                Ok(output) => output,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            // A tool may be there and the kernel lack its half; then it has made no rules either.
            if output.success() {
                let lines = match tool {
                    "nft" => listing::nft(&output.stdout),
                    _ => listing::iptables(&output.stdout),
                };
                let name = [&[tool], arguments].concat().join(" ");
                rules.insert(name, lines);
            }
        }
        let mut records = Vec::new();
        for kind in ["records", "index"] {
            files_below(&state_dir.join(kind), &mut records)?;
        }
        Ok(Self { rules, sysctls: route_localnet(node)?, records })
    }

    /// What is here and was not in `before`, for people: one entry per tool with something new.
    #[must_use]
    pub fn added_rules(&self, before: &Snapshot) -> Vec<(String, Vec<String>)> {
        let mut shown: Vec<(String, Vec<String>)> = Vec::new();
        for (tool, _, new) in self.changes(before) {
            // On most machines iptables-save is one of the two variants under another name.
            if !new.is_empty() && shown.iter().all(|(_, other)| *other != new) {
                shown.push((tool, new));
            }
        }
        shown
    }

    /// Whether this node holds the same rules as `before`; else the lines that differ.
    pub fn same_rules(&self, before: &Snapshot) -> Result<(), String> {
        let mut differences = Vec::new();
        for (tool, lost, left) in self.changes(before) {
            differences.push(format!("{tool}:"));
            if lost.is_empty() && left.is_empty() {
                differences.push("  the same lines in another order or number".to_owned());
            }
            differences.extend(left.into_iter().map(|line| format!("  left: {line}")));
            differences.extend(lost.into_iter().map(|line| format!("  lost: {line}")));
        }
        none_or_lines(differences)
    }

    /// Per tool whose listing differs: the lines that went and the lines that came.
    fn changes(&self, before: &Snapshot) -> Vec<(String, Vec<String>, Vec<String>)> {
        let mut changes = Vec::new();
        let tools: BTreeSet<_> = before.rules.keys().chain(self.rules.keys()).collect();
        for tool in tools {
            let of = |snapshot: &Snapshot| snapshot.rules.get(tool).cloned().unwrap_or_default();
            let (mut old, mut new) = (of(before), of(self));
            if tool.starts_with("nft") && !changes.is_empty() {
                // What iptables-save has shown already, in nft's words. ("nft" sorts last.)
                old = listing::without_iptables_tables(&old);
                new = listing::without_iptables_tables(&new);
            }
            if old != new {
                let (lost, left) = (listing::added(&new, &old), listing::added(&old, &new));
                changes.push((tool.clone(), lost, left));
            }
        }
        changes
    }

    /// Whether every link's `route_localnet` is as it was in `before`.
    pub fn same_sysctls(&self, before: &Snapshot) -> Result<(), String> {
        let changed = self.sysctls.iter().filter_map(|(link, value)| {
            let old = before.sysctls.get(link)?;
            let text = || format!("route_localnet of {link} is {value}, was {old}");
            (old != value).then(text)
        });
        none_or_lines(changed.collect())
    }

    /// Whether the state directory holds no record.
    pub fn no_records(&self) -> Result<(), String> {
        let left = self.records.iter();
        none_or_lines(left.map(|path| format!("left: {}", path.display())).collect())
    }
}

/// The entries below the node's private bpffs: the programs and maps that an eBPF backend keeps for
/// the next call. The kernel's own two files are left out.
pub fn pins(node: &Netns) -> io::Result<Vec<PathBuf>> {
    let mut pins = Vec::new();
    // The mount is visible from inside only.
    node.run(|| files_below(Path::new("/sys/fs/bpf"), &mut pins))??;
    pins.retain(|path| path.extension().is_none_or(|extension| extension != "debug"));
    Ok(pins)
}

fn route_localnet(node: &Netns) -> io::Result<BTreeMap<String, String>> {
    let links: Vec<String> = node.run(|| {
        let links = std::fs::read_dir("/proc/sys/net/ipv4/conf")?;
        links
            .map(|link| Ok(link?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<_>>()
    })??;
    let mut values = BTreeMap::new();
    for link in links {
        let value = node.sysctl(&format!("ipv4/conf/{link}/route_localnet"))?;
        values.insert(link, value);
    }
    Ok(values)
}

fn files_below(directory: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files_below(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(())
}

fn none_or_lines(lines: Vec<String>) -> Result<(), String> {
    if lines.is_empty() { Ok(()) } else { Err(lines.join("\n")) }
}
