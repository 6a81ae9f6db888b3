//! The kernel's own answers, each test in a network namespace of its own, cross-checked with the
//! tools that people use.
//!
//! Run with `cargo test --test netlink -- --ignored`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking"
)]

mod conntrack;
mod nftables;
mod route;
mod socket_diag;

use std::io::Write;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};

/// Runs `test` in a new network namespace with `lo` up. Only the thread enters it, and with it the
/// processes that it starts.
///
/// The thread has a table of descriptors of its own as well. Otherwise a process that another test
/// starts holds this one's sockets from fork to exec: a listener that is closed still listens.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_FILES).expect("root is needed");
        run("ip link set lo up");
        test();
    });
    thread.join().expect("the test failed");
}

/// Runs a command of words without spaces; a missing tool is a failure.
fn run(command: &str) -> String {
    fed(command, "")
}

fn fed(command: &str, input: &str) -> String {
    let mut words = command.split_whitespace();
    let mut child = Command::new(words.next().unwrap())
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
