//! Running a tool: input from memory, both outputs captured, an error that carries its stderr.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::deadline::{self, Tree};
use crate::error::Error;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

/// How long a tool may take. The longest transactions measured, 10,000 attachments at once, take
/// seconds; the kubelet gives up after two minutes.
const DEADLINE: Duration = Duration::from_secs(40);

/// Where tools are looked for: the absolute directories of PATH, in order.
#[derive(Debug, Clone)]
pub struct Tools {
    path: OsString,
    /// How long each run of one may take.
    pub deadline: Duration,
}

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("{tool} is not installed (not in PATH)")]
    Missing { tool: String },
    #[error("{tool} cannot be started: {source}")]
    Start { tool: String, source: io::Error },
    /// Another program has held the lock that the tool needs.
    #[error("{tool} has waited for {lock} for {seconds} s")]
    Busy { tool: String, lock: &'static str, seconds: u64 },
    #[error("{tool} was ended after {seconds} s without a result")]
    Hung { tool: String, seconds: u64 },
    #[error("{tool} {}: {stderr}", describe(*status))]
    Failed {
        tool: String,
        /// Exit status; `None` if a signal ended it.
        status: Option<i32>,
        stderr: String,
    },
}

fn describe(status: Option<i32>) -> String {
    status.map_or_else(
        || "was ended by a signal".to_owned(),
        |code| format!("exited with status {code}"),
    )
}

impl ToolError {
    /// The error of a verb: `what` says what could not be done.
    #[must_use]
    pub fn into_error(self, what: String) -> Error {
        let tool = match &self {
            ToolError::Busy { lock, seconds, .. } => {
                return Error::Busy { path: lock.into(), seconds: *seconds, holder: None };
            }
            ToolError::Missing { tool }
            | ToolError::Start { tool, .. }
            | ToolError::Hung { tool, .. }
            | ToolError::Failed { tool, .. } => tool.clone(),
        };
        Error::Tool { what, tool, details: self.to_string() }
    }

    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, ToolError::Missing { .. })
    }
}

impl Tools {
    /// `path` is the PATH of the environment. Relative and empty entries, which mean the current
    /// directory, are left out: the runtime's is arbitrary.
    #[must_use]
    pub fn new(path: Option<&OsStr>) -> Self {
        Tools { path: path.unwrap_or_default().to_owned(), deadline: DEADLINE }
    }

    /// The first executable file called `tool`.
    #[must_use]
    pub fn find(&self, tool: &str) -> Option<PathBuf> {
        let directories = std::env::split_paths(&self.path).filter(|dir| dir.is_absolute());
        directories.map(|dir| dir.join(tool)).find(|path| {
            path.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
    }

    /// Runs `tool` with `input` on its stdin and returns its stdout. The child inherits the node's
    /// lock, so that a change which outlives a killed plugin is still waited for.
    pub fn run(&self, tool: &str, args: &[&str], input: &str) -> Result<String, ToolError> {
        let path = self.find(tool).ok_or_else(|| ToolError::Missing { tool: tool.to_owned() })?;
        let start = |source| ToolError::Start { tool: tool.to_owned(), source };
        let child = Command::new(path)
            .args(args)
            .env("LC_ALL", "C")
            .stdin(memory_file(input).map_err(start)?)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(start)?;
        let group = Tree::Group(Pid::from_raw(child.id().cast_signed()));
        let output = deadline::run(self.deadline, group, || child.wait_with_output())
            .map_err(start)?
            .ok_or_else(|| self.hung(tool))?
            .map_err(start)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(ToolError::Failed {
            tool: tool.to_owned(),
            status: output.status.code(),
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// What became of a tool that the deadline has ended.
    pub(super) fn hung(&self, tool: &str) -> ToolError {
        ToolError::Hung { tool: tool.to_owned(), seconds: self.deadline.as_secs() }
    }
}

/// Input as a file instead of a pipe: a tool that writes much before it has read all cannot block.
fn memory_file(input: &str) -> io::Result<Stdio> {
    let mut file = File::from(memfd_create(c"portmap-input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(input.as_bytes())?;
    file.rewind()?;
    Ok(Stdio::from(file))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_stderr_are_kept_apart() {
        let tools = Tools::new(Some(OsStr::new("/usr/bin:/bin")));
        assert_eq!(tools.run("cat", &[], "text\n").unwrap(), "text\n");
        let error = tools.run("sh", &["-c", "echo out; echo why >&2; exit 3"], "").unwrap_err();
        assert_eq!(error.to_string(), "sh exited with status 3: why");
        let error = tools.run("sh", &["-c", "kill -9 $$"], "").unwrap_err();
        assert!(error.to_string().contains("signal"), "{error}");
    }

    #[test]
    fn an_empty_path_holds_no_tools() {
        for path in [None, Some(OsStr::new("")), Some(OsStr::new(".:bin:"))] {
            let error = Tools::new(path).run("sh", &[], "").unwrap_err();
            assert!(error.is_missing(), "{error}");
        }
    }
}
