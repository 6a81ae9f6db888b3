//! Peak memory of the plugin and of the tools it starts, and how many these are.
//!
//! `wait4` would count what a new process shares with its parent until it becomes another program,
//! which is the benchmark's memory and not the plugin's. So every process of the call is stopped
//! at its exit and asked (`VmHWM`) while its memory is still there.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;

use nix::errno::Errno;
use nix::libc::PTRACE_EVENT_EXIT;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::Res;
use crate::plugin::Call;

/// Peaks in KiB; zero is unknown.
#[derive(Debug, Default, Clone)]
pub struct Peak {
    /// The plugin alone.
    pub own: u64,
    /// The largest of the plugin and its tools.
    pub largest: u64,
    /// Processes that the plugin started, by number.
    pub tools: BTreeSet<u64>,
}

/// Runs the call. It is slowed down a lot, so nothing is timed.
pub fn peak(call: &mut Call) -> Res<Peak> {
    let (command, input) = call.held()?;
    let mut child = command.spawn()?;
    let plugin = Pid::from_raw(child.id().cast_signed());
    let options = Options::PTRACE_O_TRACEEXIT
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK;
    // It cannot do much before it has read its configuration, which has not been written yet.
    let seized = ptrace::seize(plugin, options).is_ok();
    if let Some(mut pipe) = child.stdin.take() {
        // VERSION need not read it, and may be gone.
        let _ = pipe.write_all(&input);
    }
    if !seized {
        child.wait()?;
        return Ok(Peak::default());
    }
    let mut peak = Peak::default();
    loop {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let (pid, signal) = match waitpid(None, Some(flags)) {
            // Nobody is left, neither the plugin nor a process that outlives it.
            Err(Errno::ECHILD) => return Ok(peak),
            Err(error) => return Err(error.into()),
            Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                if event == PTRACE_EVENT_EXIT {
                    peak.see(plugin, pid);
                }
                (pid, None)
            }
            // The end of a tool it started, say: the plugin shall see the signal.
            Ok(WaitStatus::Stopped(pid, signal)) => (pid, Some(signal)),
            Ok(_) => continue,
        };
        match ptrace::cont(pid, signal) {
            // Killed meanwhile, with the other threads of its process.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Peak {
    fn see(&mut self, plugin: Pid, task: Pid) {
        let Ok(status) = fs::read_to_string(format!("/proc/{task}/status")) else {
            return;
        };
        let field = |name| {
            let line = status.lines().find_map(|l| l.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let high = field("VmHWM:").unwrap_or(0);
        self.largest = self.largest.max(high);
        // Any thread of the plugin may be the one that is seen to exit.
        match field("Tgid:") {
            Some(process) if process != u64::try_from(plugin.as_raw()).unwrap_or(0) => {
                self.tools.insert(process);
            }
            _ => self.own = self.own.max(high),
        }
    }
}
