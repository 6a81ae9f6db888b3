//! Runs of a command in which chosen system calls end otherwise than they would.

use std::process::Command;

use portmap::demo::netns::Netns;
use portmap::demo::plugin::{self, Output};

/// What makes, moves, fills or removes files, and what speaks to the kernel.
pub const CHANGES: &str = "bpf,sendto,sendmsg,write,fsync,mount,rename,renameat,renameat2,link,linkat,\
                           unlink,unlinkat,mkdir,mkdirat,rmdir";

/// Runs a command with `calls` (names, separated by commas) tampered with as strace's option `inject`
/// has it: `error=EPERM`, `signal=SIGKILL:when=3`. Threads count for themselves.
pub fn tampered(inside: &Netns, command: &Command, input: &str, calls: &str, how: &str) -> Output {
    let mut traced = Command::new("strace");
    traced.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
    traced.args(["-e", &format!("inject={calls}:{how}")]).env_clear();
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
    plugin::run(&mut traced, input.as_bytes(), inside).unwrap()
}
