//! The iptables tools. Reading goes through the `iptables` crate; it is given no part in decisions,
//! because most of its functions take every failure for an empty answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use iptables::IPTables;

use super::command::ToolError;
use super::deadline::{self, Tree};
use super::netlink::nftables::NftReader;
use super::{Host, legacy};
use crate::backend::iptables::listing::Listing;
use crate::model::Family;

/// Seconds to wait for the xtables lock, which iptables-legacy has and which other tools may hold.
const WAIT_SECONDS: u64 = 15;
const XTABLES_LOCK: &str = "/run/xtables.lock";

/// Tells a lock that was not to be had, which is no reason to try another way, from a failure.
fn classify(tool: &str, status: Option<i32>, stderr: &str) -> ToolError {
    // "Another app is currently holding the xtables lock" (iptables 1.4.20 and later).
    if stderr.contains("holding the xtables lock") {
        return ToolError::Busy {
            tool: tool.to_owned(),
            lock: XTABLES_LOCK,
            seconds: WAIT_SECONDS,
        };
    }
    ToolError::Failed { tool: tool.to_owned(), status, stderr: stderr.trim().to_owned() }
}

fn tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

fn restore_tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-restore",
        Family::V6 => "ip6tables-restore",
    }
}

/// Sends `text` to iptables-restore: each table is one transaction. Empty text does nothing.
pub fn restore(host: &Host, family: Family, text: &str) -> Result<(), ToolError> {
    if text.is_empty() { Ok(()) } else { run_restore(host, restore_tool(family), text, &[]) }
}

/// As [`restore`], in the tables of one variant.
pub fn restore_in(
    host: &Host,
    which: Variant,
    family: Family,
    text: &str,
) -> Result<(), ToolError> {
    if text.is_empty() {
        return Ok(());
    }
    let names = [restore_tool(family), which.restore_tool(family)];
    match which.among(host, names) {
        Some(tool) => run_restore(host, tool, text, &[]),
        None => Err(ToolError::Missing { tool: names[1].to_owned() }),
    }
}

/// Has iptables-restore read `text` and change nothing.
pub fn test(host: &Host, family: Family, text: &str) -> Result<(), ToolError> {
    run_restore(host, restore_tool(family), text, &["--test"])
}

fn run_restore(host: &Host, tool: &str, text: &str, more: &[&str]) -> Result<(), ToolError> {
    let wait = WAIT_SECONDS.to_string();
    let args = [&["--noflush", "-w", &wait], more].concat();
    host.tools.run(tool, &args, text).map(drop).map_err(|error| match error {
        ToolError::Failed { tool, status, stderr } => {
            classify(&tool, status, &with_failed_line(&stderr, text))
        }
        other => other,
    })
}

/// The tool names the line that failed by its number alone.
fn with_failed_line(stderr: &str, text: &str) -> String {
    let number =
        stderr.split_once("line ").or_else(|| stderr.split_once("line: ")).and_then(|(_, rest)| {
            rest.trim_start().split(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok()
        });
    match number.and_then(|number| text.lines().nth(number.checked_sub(1)?)) {
        Some(line) => format!("{stderr} (the line is `{line}`)"),
        None => stderr.to_owned(),
    }
}

/// All chains of a table.
pub fn list(host: &Host, family: Family, table: &str) -> Result<Listing, ToolError> {
    execute(host, tool(family), table, "-S")
}

/// The variant of the tools in PATH; `None` if there are none or they do not tell.
pub fn used(host: &Host, family: Family) -> Option<Variant> {
    variant(host, tool(family))
}

/// Where a tool keeps its rules. Packets meet both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    Nft,
    Legacy,
}

impl Variant {
    pub const ALL: [Variant; 2] = [Variant::Nft, Variant::Legacy];

    /// As people and distributions call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Variant::Nft => "iptables-nft",
            Variant::Legacy => "iptables-legacy",
        }
    }

    /// Names that its tool may have.
    fn tools(self, family: Family) -> [&'static str; 2] {
        match (self, family) {
            (Variant::Nft, Family::V4) => ["iptables", "iptables-nft"],
            (Variant::Legacy, Family::V4) => ["iptables", "iptables-legacy"],
            (Variant::Nft, Family::V6) => ["ip6tables", "ip6tables-nft"],
            (Variant::Legacy, Family::V6) => ["ip6tables", "ip6tables-legacy"],
        }
    }

    fn restore_tool(self, family: Family) -> &'static str {
        match (self, family) {
            (Variant::Nft, Family::V4) => "iptables-nft-restore",
            (Variant::Legacy, Family::V4) => "iptables-legacy-restore",
            (Variant::Nft, Family::V6) => "ip6tables-nft-restore",
            (Variant::Legacy, Family::V6) => "ip6tables-legacy-restore",
        }
    }

    /// The first of the tools that is of this variant.
    fn among(self, host: &Host, tools: [&'static str; 2]) -> Option<&'static str> {
        tools.into_iter().find(|tool| variant(host, tool) == Some(self))
    }
}

/// What tools whose names do not tell have said of themselves.
#[derive(Debug, Default)]
pub struct Variants(Mutex<BTreeMap<String, Option<Variant>>>);

/// Which one a tool is; `None` if it is not installed or does not tell.
fn variant(host: &Host, tool: &str) -> Option<Variant> {
    let program = host.tools.find(tool)?.canonicalize().ok()?;
    if let Some(named) = of_program(&program.file_name()?.to_string_lossy()) {
        return Some(named);
    }
    // A copy, or a script that chooses among others (k3s, kubernetes-sigs/iptables-wrappers).
    let mut known = host.variants.0.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(said) = known.get(tool) {
        return *said;
    }
    let said = host.tools.run(tool, &["--version"], "").ok().and_then(|text| of_version(&text));
    known.insert(tool.to_owned(), said);
    said
}

/// By the file that all tools of a variant are links to: xtables-nft-multi, xtables-legacy-multi, and
/// xtables-multi before iptables 1.8.
fn of_program(name: &str) -> Option<Variant> {
    if name.contains("nft") {
        return Some(Variant::Nft);
    }
    ["legacy", "xtables-multi"].iter().any(|part| name.contains(part)).then_some(Variant::Legacy)
}

/// By what `--version` prints: since iptables 1.8 the variant follows the number.
fn of_version(text: &str) -> Option<Variant> {
    if text.contains("(nf_tables)") {
        return Some(Variant::Nft);
    }
    let before_1_8 = text.contains(" v1.") && !text.contains('(');
    (before_1_8 || text.contains("(legacy)")).then_some(Variant::Legacy)
}

/// The table nat of each variant that has one in this network namespace. Where none is, no tool is
/// started: it might make one.
pub fn nat_tables(host: &Host, family: Family) -> Vec<(Variant, Result<Listing, ToolError>)> {
    let table = |which| Some((which, table_in(host, which, family, "nat")?));
    Variant::ALL.into_iter().filter_map(table).collect()
}

/// A table of one variant, if it is there.
pub fn table_in(
    host: &Host,
    which: Variant,
    family: Family,
    table: &str,
) -> Option<Result<Listing, ToolError>> {
    let there = match which {
        Variant::Nft => NftReader::open()
            .and_then(|mut nft| nft.table_exists(family.into(), table))
            .unwrap_or(false),
        Variant::Legacy => legacy_tables(family).is_some_and(|names| names.contains(table)),
    };
    there.then(|| {
        let names = which.tools(family);
        match which.among(host, names) {
            Some(tool) => execute(host, tool, table, "-S"),
            None => Err(ToolError::Missing { tool: names[1].to_owned() }),
        }
    })
}

/// The one that the tools in PATH are not; `None` if those are not known.
pub fn other_variant(host: &Host, family: Family) -> Option<Variant> {
    used(host, family).map(|used| match used {
        Variant::Nft => Variant::Legacy,
        Variant::Legacy => Variant::Nft,
    })
}

/// The tables that iptables-legacy has in the kernel; `None` if that cannot be read.
fn legacy_tables(family: Family) -> Option<BTreeSet<String>> {
    Some(legacy::tables(family).ok()?.into_iter().collect())
}

/// Some chains of a table; those that do not exist are left out. iptables-nft reads a chain by itself
/// much faster than the table (0.2 against 56 ms at 1,000 chains); iptables-legacy cannot.
pub fn list_chains(
    host: &Host,
    family: Family,
    table: &str,
    chains: &[&str],
) -> Result<Listing, ToolError> {
    if used(host, family) != Some(Variant::Nft) {
        return list(host, family, table);
    }
    let mut listing = Listing::default();
    for chain in chains {
        match execute(host, tool(family), table, &format!("-S {chain}")) {
            Ok(found) => listing.chains.extend(found.chains),
            // Of a chain that does not exist (exit status 1 since iptables 1.8).
            Err(ToolError::Failed { status: Some(1), .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listing)
}

/// Whether a chain is known, without a process, not to exist. Of iptables-legacy the kernel tells that
/// only where nobody uses the whole table.
pub fn lacks_chain(host: &Host, family: Family, table: &str, chain: &str) -> bool {
    match used(host, family) {
        Some(Variant::Nft) => {
            let find = |mut nft: NftReader| nft.chain(family.into(), table, chain);
            NftReader::open().and_then(find).is_ok_and(|found| found.is_none())
        }
        Some(Variant::Legacy) => legacy_tables(family).is_some_and(|names| !names.contains(table)),
        None => false,
    }
}

fn execute(
    host: &Host,
    tool: &'static str,
    table: &str,
    command: &str,
) -> Result<Listing, ToolError> {
    if host.tools.find(tool).is_none() {
        return Err(ToolError::Missing { tool: tool.to_owned() });
    }
    // Without the crate's own `--wait`, which has no limit.
    let crate_tool = IPTables { cmd: tool, has_check: true, has_wait: false, is_numeric: false };
    let (table, command) = (table.to_owned(), format!("-w {WAIT_SECONDS} {command}"));
    let start = |source| ToolError::Start { tool: tool.to_owned(), source };
    // The crate starts it in the process group of the plugin.
    let output = deadline::run(host.tools.deadline, Tree::Descendants, move || {
        crate_tool
            .execute(&table, &command)
            .map_err(|error| std::io::Error::other(error.to_string()))
    })
    .map_err(start)?
    .ok_or_else(|| host.tools.hung(tool))?
    .map_err(start)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(classify(tool, output.status.code(), &stderr));
    }
    Ok(Listing::parse(&String::from_utf8_lossy(&output.stdout)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// One that sleeps and then says nothing would be taken for a table without chains.
    #[test]
    fn a_tool_that_hangs_has_no_listing() {
        let file = format!("portmap-hung-iptables-{}", std::process::id());
        let path = std::env::temp_dir().join(file);
        // Another process writes it: what this one has open, those that other tests start have too.
        let write = "printf '#!/bin/sh\\nsleep 60\\n' >\"$1\" && chmod 755 \"$1\"";
        let mut shell = std::process::Command::new("sh");
        assert!(shell.args(["-c", write, "sh"]).arg(&path).status().unwrap().success());
        let mut host = Host::new(Some("/usr/bin".as_ref()));
        host.tools.deadline = std::time::Duration::from_millis(200);
        // By its whole path: the crate looks into PATH.
        let tool = path.to_str().unwrap().to_owned().leak();
        let result = execute(&host, tool, "nat", "-S");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(result, Err(ToolError::Hung { .. })), "{result:?}");
    }

    #[test]
    fn variants_are_told_by_program_and_by_version() {
        use Variant::{Legacy, Nft};
        for (name, variant) in [
            ("xtables-nft-multi", Some(Nft)),
            ("xtables-legacy-multi", Some(Legacy)),
            ("xtables-multi", Some(Legacy)),
            ("iptables", None),
            ("iptables-detect.sh", None),
        ] {
            assert_eq!(of_program(name), variant, "{name}");
        }
        for (text, variant) in [
            ("iptables v1.8.9 (nf_tables)\n", Some(Nft)),
            ("ip6tables-restore v1.8.7 (legacy)\n", Some(Legacy)),
            ("iptables v1.6.1\n", Some(Legacy)),
            ("iptables v1.9.0 (something else)\n", None),
            ("", None),
        ] {
            assert_eq!(of_version(text), variant, "{text}");
        }
    }

    #[test]
    fn the_failed_line_is_shown() {
        let text = "*nat\n-C OUTPUT -j X\nCOMMIT\n";
        for stderr in ["iptables-restore: line 2 failed", "Error occurred at line: 2"] {
            assert_eq!(
                with_failed_line(stderr, text),
                format!("{stderr} (the line is `-C OUTPUT -j X`)")
            );
        }
        assert_eq!(with_failed_line("line 99", text), "line 99");
        assert_eq!(with_failed_line("Permission denied", text), "Permission denied");
    }
}
