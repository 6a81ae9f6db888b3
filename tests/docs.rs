//! What the documentation shows is what the commands say: the blocks of docs/operating.md that name a
//! golden file are that file. `UPDATE_GOLDEN=1 cargo test --test docs` writes them anew.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use clap::CommandFactory;
use portmap::backend::ebpf::layout::REASONS;
use portmap::conf::option_keys;
use portmap::usage::Cli;

const PAGE: &str = "docs/operating.md";
/// Before a block, with the rest of the line: the file that it shows.
const MARK: &str = "<!-- testdata/golden/commands/";

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The page with every block as its file is.
fn with_blocks(page: &str) -> (String, Vec<String>) {
    let (mut text, mut names) = (String::new(), Vec::new());
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        text.push_str(line);
        text.push('\n');
        let Some(name) = line.strip_prefix(MARK).and_then(|rest| rest.strip_suffix(" -->")) else {
            continue;
        };
        let fence = lines.next().unwrap();
        assert!(fence.starts_with("```"), "{name}: a block must follow, not {fence:?}");
        assert!(lines.any(|line| line == "```"), "{name}: the block does not end");
        let golden = read(&format!("testdata/golden/commands/{name}"));
        text.push_str(&format!("{fence}\n{}\n```\n", golden.trim_end()));
        names.push(name.to_owned());
    }
    (text, names)
}

#[test]
fn the_output_that_is_shown_is_golden() {
    let page = read(PAGE);
    let (expected, names) = with_blocks(&page);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE), &expected).unwrap();
    } else {
        assert_eq!(page, expected);
    }
    assert!(names.len() >= 8, "{names:?}");
}

#[test]
fn every_reason_that_packets_are_counted_by_is_explained() {
    let page = read(PAGE);
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    for reason in REASONS {
        let named = rows.iter().filter(|row| row.contains(&format!("`{reason}`")));
        assert_eq!(named.count(), 1, "{reason}");
    }
}

/// The statuses are part of the page.
#[test]
fn a_wrong_command_line_ends_with_status_2() {
    for arguments in [["completions", "tcsh"], ["man", "nosuch"], ["nosuch", "--json"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portmap"));
        let output = command.env_clear().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(output.stdout.is_empty() && output.stderr.starts_with(b"error: "), "{output:?}");
    }
}

#[test]
fn every_command_is_explained() {
    let (page, readme) = (read(PAGE), read("README.md"));
    for command in Cli::command().get_subcommands() {
        let name = format!("portmap {}", command.get_name());
        assert!(page.contains(&name), "{PAGE} does not tell of {name}");
        assert!(readme.contains(&format!("`{name}")), "README.md does not tell of {name}");
    }
}

/// A row of one of the README's tables: its first cell.
fn has_row(readme: &str, cell: &str) -> bool {
    readme.lines().any(|line| line.starts_with(&format!("| {cell} |")))
}

#[test]
fn every_option_and_every_code_is_in_a_table() {
    let readme = read("README.md");
    for key in option_keys() {
        let is_named = |line: &str| {
            let mut cells = line.split('|').skip(1);
            cells.next().is_some_and(|cell| cell.contains(&format!("`{key}`")))
        };
        assert!(readme.lines().any(is_named), "README.md has no row for {key}");
    }
    let errors = read("testdata/golden/errors.json");
    let code =
        |line: &str| line.trim().strip_prefix("\"code\": ")?.strip_suffix(',').map(String::from);
    let codes: BTreeSet<String> = errors.lines().filter_map(code).collect();
    assert!(codes.len() >= 12, "{codes:?}");
    for code in codes.iter().map(String::as_str).chain(["50", "999"]) {
        assert!(has_row(&readme, code), "README.md has no row for code {code}");
    }
}
