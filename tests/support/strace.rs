//! Runs of a command in which chosen system calls end otherwise than they would.

use std::process::Command;

use portmap::demo::netns::Netns;
use portmap::demo::plugin::{self, Output};

use super::Scratch;

/// What makes, moves, fills or removes files, and what speaks to the kernel: names with which strace
/// counts them, each for itself. Not every architecture has all.
pub const CHANGES: [&str; 15] = [
    "bpf",
    "sendto",
    "sendmsg",
    "write",
    "fsync",
    "mount",
    "?mkdir",
    "mkdirat",
    "?rename",
    "?renameat",
    "?link",
    "linkat",
    "?unlink",
    "unlinkat",
    "?rmdir",
];

/// Runs a command, and returns what strace says of its `calls`.
pub fn traced(inside: &Netns, command: &Command, input: &str, calls: &str) -> (Output, String) {
    run(inside, command, input, calls, &[])
}

/// Runs a command with `calls` (names, separated by commas) tampered with as strace's option `inject`
/// has it: `error=EPERM`, `signal=SIGKILL:when=3`. Threads count for themselves.
///
/// Also says whether there was a call to tamper with.
pub fn tampered(
    inside: &Netns,
    command: &Command,
    input: &str,
    calls: &str,
    how: &str,
) -> (Output, bool) {
    let inject = format!("inject={calls}:{how}");
    let (output, log) = run(inside, command, input, calls, &["-e", &inject]);
    (output, log.contains("(INJECTED)"))
}

fn run(
    inside: &Netns,
    command: &Command,
    input: &str,
    calls: &str,
    options: &[&str],
) -> (Output, String) {
    let scratch = Scratch::new();
    let log = scratch.0.join("strace");
    let mut traced = Command::new("strace");
    traced.args(["-f", "-qq", "-e", &format!("trace={calls}"), "-o"]).arg(&log);
    traced.args(options).env_clear();
    for (name, value) in command.get_envs() {
        let value = value.unwrap_or_default();
        match name == "PATH" {
            // Not that in which strace itself is found.
            true => traced.arg("-E").arg(format!("PATH={}", value.display())),
            false => traced.env(name, value),
        };
    }
    traced.arg(command.get_program()).args(command.get_args());
    traced.env("PATH", plugin::search_path());
    // It ends as its command ends, also by a signal.
    let output = plugin::run(&mut traced, input.as_bytes(), inside).unwrap();
    (output, std::fs::read_to_string(&log).expect("strace has not traced"))
}
