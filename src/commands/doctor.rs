//! `portmap doctor`: what is wrong with this node, and what to do about it.

use super::{CommandError, Terminal, Verdict};
use crate::doctor::gather::{Places, gather};
use crate::doctor::{Severity, examine, report};
use crate::sys::Host;
use crate::sys::progress::Progress;
use crate::usage::NAME_AND_VERSION;

/// Where to look, and how to report.
#[derive(Debug, Clone)]
pub struct Options {
    pub json: bool,
    pub places: Places,
}

/// Looks at everything and changes nothing.
///
/// # Errors
///
/// A report that cannot be written.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    let progress = Progress::begin("portmap doctor");
    let facts = gather(host, &options.places, &progress);
    drop(progress);
    let findings = examine(&facts);
    if options.json {
        writeln!(terminal.output, "{}", report::as_json(NAME_AND_VERSION, &findings))?;
    } else {
        write!(terminal.output, "{}", report::as_text(&findings, terminal.colour))?;
    }
    Ok(match report::verdict(&findings) {
        Severity::Fine => Verdict::Fine,
        Severity::Warning => Verdict::Warnings,
        Severity::Broken => Verdict::Broken,
    })
}
