//! The peak memory of the plugin itself.
//!
//! `wait4` reports the largest process among the plugin and its tools, and counts what the process
//! shared with the benchmark before it became the plugin. So the plugin is stopped at its exit and
//! asked (`VmHWM`) while its memory is still there.

use std::fs;
use std::io::Write as _;

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::Res;
use crate::plugin::Call;

/// Runs the call and returns its peak in KiB; nothing, where ptrace is not allowed or the process
/// ends in a thread that is not watched (Go).
pub fn peak(call: &mut Call) -> Res<Option<u64>> {
    let (command, input) = call.held()?;
    let mut child = command.spawn()?;
    let pid = Pid::from_raw(child.id().cast_signed());
    // It cannot end before it has read its configuration, which has not been written yet.
    let seized = ptrace::seize(pid, Options::PTRACE_O_TRACEEXIT).is_ok();
    if let Some(mut pipe) = child.stdin.take() {
        // VERSION need not read it, and may be gone.
        let _ = pipe.write_all(&input);
    }
    if !seized {
        child.wait()?;
        return Ok(None);
    }
    let mut peak = None;
    loop {
        match waitpid(pid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Ok(peak),
            WaitStatus::PtraceEvent(_, Signal::SIGTRAP, _) => {
                peak = high_water(pid).or(peak);
                ptrace::cont(pid, None)?;
            }
            // The end of a tool it started, say: the plugin shall see the signal.
            WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal)?,
            _ => ptrace::cont(pid, None)?,
        }
    }
}

fn high_water(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}
