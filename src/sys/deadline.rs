//! The end of tools that take too long, whoever has started them.

use std::fs;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, gettid};

/// How long it is waited for what was killed. The kernel ends a process in the middle of a system call
/// only when that allows it (state D).
const GRACE: Duration = Duration::from_secs(2);
/// How often it is looked whether a process has stopped, and how long after each look it is waited.
const LOOKS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(1);

/// Which processes are a tool's.
#[derive(Debug, Clone, Copy)]
pub enum Tree {
    /// This process group, which nothing else is in: it ends as a whole, also what runs on after a
    /// wrapper that is gone.
    Group(Pid),
    /// Whatever the work itself starts, where the starter gives it no group of its own, and what comes of
    /// that.
    Descendants,
}

/// Has `work` wait for a tool. At the deadline all the tool's processes are killed: they have the node's
/// lock, which every other call waits for. `None`: there was no result in time.
///
/// The work has a thread of its own, with the namespaces of the caller's: what it starts are the
/// children of that thread, and what the kernel does not let go of keeps nobody else.
///
/// # Errors
///
/// There is no thread to be had.
pub fn run<T: Send + 'static>(
    deadline: Duration,
    tree: Tree,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Option<T>> {
    let (begin, begun) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    thread::Builder::new().spawn(move || {
        // The receivers are there until the deadline; after it nobody wants the result.
        let _ = begin.send(gettid());
        drop(end.send(work()));
    })?;
    match ended.recv_timeout(deadline) {
        Ok(result) => return Ok(Some(result)),
        Err(RecvTimeoutError::Disconnected) => {
            return Err(io::Error::other("the thread that waited for it has ended"));
        }
        Err(RecvTimeoutError::Timeout) => {}
    }
    // A number stands for another process only after the kernel has used all others: it takes the next
    // one each time. What is gone is not there to be killed, and all is well.
    match tree {
        Tree::Group(leader) => {
            let _ = killpg(leader, Signal::SIGKILL);
        }
        Tree::Descendants => {
            if let Ok(thread) = begun.try_recv() {
                kill_all(&children(&format!("/proc/self/task/{thread}/children")));
            }
        }
    }
    drop(ended.recv_timeout(GRACE));
    Ok(None)
}

/// Kills these and all that they have started. Each is stopped before its children are read, so that no
/// more come; a child of one that is killed first would be init's, and nothing would lead to it.
fn kill_all(roots: &[Pid]) {
    let mut found = roots.to_vec();
    let mut known = 0;
    while let Some(pid) = found.get(known).copied() {
        known += 1;
        if kill(pid, Signal::SIGSTOP).is_err() {
            continue;
        }
        for _ in 0..LOOKS {
            if !is_running(pid) {
                break;
            }
            thread::sleep(PAUSE);
        }
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for thread in threads {
            found.extend(children(&thread.path().join("children").to_string_lossy()));
        }
    }
    for pid in found {
        let _ = kill(pid, Signal::SIGKILL);
    }
}

/// What a thread has started and not waited for (CONFIG_PROC_CHILDREN, which distributions set; without
/// it, and in a /proc of other numbers than this process's, nothing is found).
fn children(path: &str) -> Vec<Pid> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).map(Pid::from_raw).collect()
}

/// Whether it can still start others: neither stopped (T) nor dead (Z, X) nor gone. The name of the
/// program, which may hold anything, is in parentheses before the state (proc_pid_stat(5)).
fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'T' | 't' | 'Z' | 'X'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::ffi::OsStr;
    use std::fs::File;
    use std::io::Read;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::sys::command::{ToolError, Tools};

    const SOON: Duration = Duration::from_millis(200);

    /// Commands that take a minute, and tell if nobody has ended them.
    struct Slow {
        /// Has an end when no process has the other one, which all of them inherit, as tools do the
        /// node's lock.
        inherited: File,
        survived: PathBuf,
        script: String,
    }

    impl Slow {
        /// Has `started` start a shell with `script`, in which SLOW is such a command.
        fn start(name: &str, script: &str, started: impl FnOnce(&str)) -> Self {
            let file = format!("portmap-deadline-{}-{name}", std::process::id());
            let survived = std::env::temp_dir().join(file);
            let slow = format!("{{ sleep 60; echo >{}; }}", survived.display());
            // Without O_CLOEXEC, which the standard library sets.
            let (inherited, other) = nix::unistd::pipe().unwrap();
            let slow = Slow {
                inherited: File::from(inherited),
                survived,
                script: script.replace("SLOW", &slow),
            };
            started(&slow.script);
            drop(other);
            slow
        }

        fn ends(mut self) {
            self.inherited.read_to_end(&mut Vec::new()).unwrap();
            let survived = self.survived.exists();
            drop(fs::remove_file(&self.survived));
            assert!(!survived, "{}", self.script);
        }
    }

    #[test]
    fn a_tool_ends_with_all_that_it_has_started() {
        let mut tools = Tools::new(Some(OsStr::new("/usr/bin:/bin")));
        tools.deadline = SOON;
        // The last one leaves a process that nobody waits for, and that has its outputs.
        for (name, script) in [
            ("itself", "exec sleep 60"),
            ("wrapper", "(SLOW); true"),
            ("orphan", "(SLOW) & exit 0"),
        ] {
            let slow = Slow::start(name, script, |script| {
                let error = tools.run("sh", &["-c", script], "").unwrap_err();
                assert!(matches!(error, ToolError::Hung { .. }), "{script}: {error}");
            });
            slow.ends();
        }
    }

    #[test]
    fn so_does_what_somebody_else_starts() {
        for (name, script) in [
            ("descendants", "(SLOW; true) & (SLOW); wait"),
            ("session", "setsid sh -c '(SLOW); true'; true"),
        ] {
            let slow = Slow::start(name, script, |script| {
                let script = script.to_owned();
                let work = move || Command::new("sh").args(["-c", &script]).output().map(drop);
                assert!(run(SOON, Tree::Descendants, work).unwrap().is_none());
            });
            slow.ends();
        }
    }

    #[test]
    fn other_children_live_on() {
        let mut other = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let work = || Command::new("sleep").arg("60").status().map(drop);
        assert!(run(SOON, Tree::Descendants, work).unwrap().is_none());
        drop(other.stdin.take());
        assert!(other.wait().unwrap().success());
    }

    #[test]
    fn what_is_done_in_time_has_its_result() {
        let done = run(Duration::from_secs(600), Tree::Descendants, || 1).unwrap();
        assert_eq!(done, Some(1));
    }
}
