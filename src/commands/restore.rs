//! `portmap restore`: what a firewall's reload has taken away comes back.

use std::path::Path;

use serde_json::json;

use super::{CommandError, LOCKING, LOOKING, Terminal, Verdict, all_done, failed_json, notes};
use crate::engine::{Engine, Restored};
use crate::record::Record;
use crate::sys::Host;
use crate::sys::progress::Progress;

/// Where the records are, and how to report.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    pub json: bool,
    pub state_dir: &'a Path,
}

const WHAT: &str = "restoring hostPorts";

/// Compares, and repairs where something is wrong.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    let progress = Progress::begin("portmap restore");
    progress.step(LOCKING);
    let engine = Engine::lock_at_home(host, options.state_dir)?;
    progress.step(LOOKING);
    let Restored { attachments, repaired, dead, failed, unread } = engine.restore()?;
    drop(progress);
    if options.json {
        let name = |record: &Record| json!(record.attachment);
        let repaired: Vec<_> = repaired
            .iter()
            .map(|(record, problems)| json!({"attachment": name(record), "problems": problems}))
            .collect();
        let report = json!({
            "attachments": attachments,
            "repaired": repaired,
            "dead": dead.iter().map(name).collect::<Vec<_>>(),
            "failed": failed_json(&failed),
            "notes": host.take_warnings(),
        });
        writeln!(terminal.output, "{report}")?;
        return all_done(WHAT, failed, unread);
    }
    for (record, problems) in &repaired {
        writeln!(terminal.output, "repaired {}:", record.attachment)?;
        for problem in problems {
            writeln!(terminal.output, "  {problem}")?;
        }
    }
    for record in &dead {
        writeln!(
            terminal.output,
            "left alone {}: its network namespace {} is gone (`portmap gc` removes it)",
            record.attachment, record.netns
        )?;
    }
    let noun = if attachments == 1 { "attachment" } else { "attachments" };
    writeln!(terminal.output, "{attachments} {noun}, {} repaired", repaired.len())?;
    notes(host, terminal)?;
    all_done(WHAT, failed, unread)
}
