//! What people run on a node, one file per command. Each works on the same engine, records and lock
//! as the verbs.

pub mod check_config;
pub mod doctor;
pub mod flush;
pub mod gc;
pub mod install;
pub mod list;
pub mod restore;
mod table;
pub mod uninstall;
pub mod watch;
pub mod who;

use std::io::{self, BufRead, Write};

use serde_json::{Value, json};

use crate::error::Error;
use crate::sys::Host;

/// What people are told that a command is at if they have to wait for it.
const LOCKING: &str = "waiting for the node's lock, which calls of the runtime have";
const LOOKING: &str = "comparing the records with the kernel";
const CHANGING: &str = "changing what is in the kernel";

/// The person at the other end.
pub struct Terminal<'a> {
    pub input: &'a mut dyn BufRead,
    /// The report, and nothing else: a program may read it.
    pub output: &'a mut dyn Write,
    /// What is asked, and what somebody has to know to answer.
    pub questions: &'a mut dyn Write,
    /// Whether somebody can answer.
    pub interactive: bool,
    /// Whether the output is shown by a terminal, to somebody who wants colours.
    pub colour: bool,
}

impl Terminal<'_> {
    /// Asks; anything but `y` or `yes` is a no.
    fn confirm(&mut self, question: &str) -> io::Result<bool> {
        write!(self.questions, "{question} [y/N] ")?;
        self.questions.flush()?;
        let mut answer = String::new();
        self.input.read_line(&mut answer)?;
        Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
    }
}

/// How a command ended, for the exit status: scripts can rely on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Status 0.
    Fine,
    /// Status 1: done, and something deserves attention; or not done.
    Warnings,
    /// Status 2: hostPorts do not work.
    Broken,
}

/// What could not be done, and why.
pub type Failed = (String, Error);

/// Fine if nothing has failed, and every record could be read.
fn all_done(
    what: &'static str,
    failed: Vec<Failed>,
    unread: usize,
) -> Result<Verdict, CommandError> {
    match (failed.is_empty(), unread) {
        (true, 0) => Ok(Verdict::Fine),
        (true, _) => Ok(Verdict::Warnings),
        (false, _) => Err(CommandError::Partly { what, failed }),
    }
}

fn failed_json(failed: &[Failed]) -> Vec<Value> {
    let one = |(what, error): &Failed| json!({"what": what, "error": error.to_string(), "details": error.details()});
    failed.iter().map(one).collect()
}

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Engine(#[from] Error),
    #[error("cannot write the report")]
    Output(#[from] io::Error),
    #[error("{0}")]
    Refused(String),
    /// The report says what has been done all the same.
    #[error("{what}: {} of the steps failed", failed.len())]
    Partly { what: &'static str, failed: Vec<Failed> },
}

impl CommandError {
    /// The message with its cause on further lines.
    #[must_use]
    pub fn report(&self) -> String {
        let details = match self {
            CommandError::Engine(error) => error.details(),
            CommandError::Output(error) => error.to_string(),
            CommandError::Refused(_) => String::new(),
            CommandError::Partly { failed, .. } => {
                let line = |(what, error): &Failed| match error.details() {
                    details if details.is_empty() => format!("{what}: {error}"),
                    details => format!("{what}: {error}: {details}"),
                };
                failed.iter().map(line).collect::<Vec<_>>().join("\n")
            }
        };
        match details.is_empty() {
            true => self.to_string(),
            false => format!("{self}\n{details}"),
        }
    }
}

/// Prints what the host noted on the way.
fn notes(host: &Host, terminal: &mut Terminal) -> io::Result<()> {
    for note in host.take_warnings() {
        writeln!(terminal.output, "note: {note}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_named_and_the_status_tells() {
        assert!(matches!(all_done("removing attachments", Vec::new(), 0), Ok(Verdict::Fine)));
        assert!(matches!(all_done("removing attachments", Vec::new(), 1), Ok(Verdict::Warnings)));
        let error = |what: &str| (what.to_owned(), Error::Drift("no chain".into()));
        let all = all_done("removing attachments", vec![error("a"), error("b")], 1);
        let report = all.map_or_else(|error| error.report(), |_| String::new());
        assert_eq!(report, "removing attachments: 2 of the steps failed\na: no chain\nb: no chain");
        let json = failed_json(&[error("a")]);
        assert_eq!(json, [json!({"what": "a", "error": "no chain", "details": ""})]);
    }
}
