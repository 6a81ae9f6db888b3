//! `portmap flush`: a node or a network without hostPorts, for decommissioning.

use std::path::Path;

use serde_json::json;

use super::{CHANGING, CommandError, LOCKING, Terminal, Verdict, notes};
use crate::engine::Engine;
use crate::record::Record;
use crate::sys::Host;
use crate::sys::progress::Progress;

/// What to remove, and how to say it.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// `None`: the attachments of every network, and what outlives them.
    pub network: Option<&'a str>,
    /// Without asking.
    pub yes: bool,
    pub json: bool,
    pub state_dir: &'a Path,
}

/// Removes attachments; containers that still run lose their hostPorts.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    if !options.yes {
        ask(host, options, terminal)?;
    }
    let progress = Progress::begin("portmap flush");
    progress.step(LOCKING);
    let engine = Engine::lock_to_change(host, options.state_dir)?;
    progress.step(CHANGING);
    let removed = engine.flush(options.network)?;
    drop(progress);
    if options.json {
        let list: Vec<_> = removed.iter().map(|record| json!(record.attachment)).collect();
        writeln!(terminal.output, "{}", json!({ "removed": list, "notes": host.take_warnings() }))?;
        return Ok(Verdict::Fine);
    }
    for record in &removed {
        writeln!(terminal.output, "removed {}", describe(record))?;
    }
    let (what, whose) = (plural(removed.len()), options.network.unwrap_or("every network"));
    writeln!(terminal.output, "{what} of {whose} removed")?;
    notes(host, terminal)?;
    Ok(Verdict::Fine)
}

fn ask(host: &Host, options: &Options, terminal: &mut Terminal) -> Result<(), CommandError> {
    let (mut records, _) = Engine::lock(host, options.state_dir)?.store.all()?;
    records.retain(|record| {
        options.network.is_none_or(|network| record.attachment.network == network)
    });
    for record in &records {
        writeln!(terminal.questions, "  {}", describe(record))?;
    }
    if !terminal.interactive {
        return Err(CommandError::Refused(format!(
            "{} would be removed: nobody is there to confirm it, repeat with --yes",
            plural(records.len())
        )));
    }
    let question = format!("Remove {}? Containers that run lose them.", plural(records.len()));
    match terminal.confirm(&question)? {
        true => Ok(()),
        false => Err(CommandError::Refused("nothing was removed".into())),
    }
}

fn plural(count: usize) -> String {
    match count {
        1 => "the hostPorts of 1 attachment".into(),
        count => format!("the hostPorts of {count} attachments"),
    }
}

pub(crate) fn describe(record: &Record) -> String {
    let pod = &record.pod;
    let who = if pod.name.is_empty() {
        record.attachment.container_id.clone()
    } else {
        format!("{}/{}", pod.namespace, pod.name)
    };
    let claims: Vec<String> =
        record.claims().iter().map(std::string::ToString::to_string).collect();
    format!("{who} on {} ({}): {}", record.attachment.network, record.backend, claims.join(", "))
}
