//! `portmap list`, `who`, `gc` and `flush`: what they say of a node, on every backend, and that looking
//! changes nothing. Golden texts need no root: `UPDATE_GOLDEN=1 cargo test --test see` writes them anew.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

mod flush;
mod gc;
mod golden;
mod list;
#[path = "../support/mod.rs"]
mod support;
mod who;

use std::path::Path;
use std::process::Command;

use portmap::demo::plugin::{self, Attachment, Output};
use portmap::demo::topology::{Lab, Options, Shape};
use serde_json::{Value, json};

use support::{GONE_NETNS, Node, PORTMAP, attachment, files_of, prev_result};

fn lab(pods: usize) -> Lab {
    Lab::build(Options { pods, ..Options::new(Shape::Ptp) }).unwrap()
}

/// Runs a command of the binary inside the node, with a PATH.
fn run_with(node: &Node, path: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(PORTMAP);
    command.env_clear().env("PATH", path).args(arguments).arg("--state-dir").arg(&node.state_dir);
    plugin::run(&mut command, b"", node.netns).unwrap()
}

fn run(node: &Node, arguments: &[&str]) -> Output {
    run_with(node, &node.path, arguments)
}

/// What a command reports with `--json`, with its exit status.
#[track_caller]
fn report(node: &Node, arguments: &[&str]) -> (Value, i32) {
    let output = run(node, &[arguments, &["--json"]].concat());
    let value = serde_json::from_str(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {} {}", output.stdout, output.stderr));
    (value, output.status.unwrap())
}

/// Runs something, and fails the test if rules, sysctls, records or files of the state are others
/// afterwards.
#[track_caller]
fn changes_nothing<T>(node: &Node, look: impl FnOnce() -> T) -> T {
    let before = (node.snapshot(), files_of(&node.state_dir));
    let seen = look();
    let after = (node.snapshot(), files_of(&node.state_dir));
    assert!(before == after, "{:?}: looking has changed something", node.variant);
    seen
}

/// A pod with one mapping to its port 80.
fn add(node: &Node, lab: &Lab, pod: usize, port: u16) -> (Value, Attachment) {
    let mappings = json!([{"hostPort": port, "containerPort": 80}]);
    let config = node.config(mappings, prev_result(lab, pod, "1.0.0"));
    let attachment = attachment(&lab.pods[pod], &format!("container-{pod}"));
    node.ok("ADD", &config, &attachment);
    (config, attachment)
}

/// A pod whose network namespace is not there any more, for ports that it shares with nobody.
fn add_dead(node: &Node, lab: &Lab, pod: usize, port: u16) {
    let mappings = json!([{"hostPort": port, "containerPort": 80}]);
    let config = node.config(mappings, prev_result(lab, pod, "1.0.0"));
    let mut gone = attachment(&lab.pods[pod], &format!("container-{pod}"));
    gone.netns = GONE_NETNS.into();
    node.ok("ADD", &config, &gone);
}

/// Who is not root must not be told that there is nothing.
#[test]
fn records_that_cannot_be_looked_for_are_an_error() {
    let dir = std::env::temp_dir().join(format!("portmap-see-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    // ELOOP stands for EACCES, which root does not meet.
    std::os::unix::fs::symlink("records", dir.join("records")).unwrap();
    for arguments in [&["list"][..], &["who", "80"], &["gc"], &["gc", "--dry-run"]] {
        let mut command = Command::new(PORTMAP);
        let output = command.args(arguments).arg("--state-dir").arg(&dir).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]), "{said}");
        assert!(said.contains("look for records in"), "{arguments:?}: {said}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}
