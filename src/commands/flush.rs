//! `portmap flush`: a node or a network without hostPorts, for decommissioning.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use super::{CHANGING, CommandError, LOCKING, Terminal, Verdict, all_done, failed_json, notes};
use crate::backend;
use crate::engine::{Engine, Flushed};
use crate::error::Result as EngineResult;
use crate::model::{BackendKind, Forward};
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

const WHAT: &str = "removing attachments";

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
    let engine = Engine::lock_at_home(host, options.state_dir)?;
    progress.step(CHANGING);
    let Flushed { removed, failed, unread } = engine.flush(options.network)?;
    drop(progress);
    if options.json {
        let list: Vec<_> = removed.iter().map(|record| json!(record.attachment)).collect();
        let failed_list = failed_json(&failed);
        let report =
            json!({ "removed": list, "failed": failed_list, "notes": host.take_warnings() });
        writeln!(terminal.output, "{report}")?;
        return all_done(WHAT, failed, unread);
    }
    for record in &removed {
        writeln!(terminal.output, "removed {}", describe(record))?;
    }
    let (what, whose) = (plural(removed.len()), options.network.unwrap_or("every network"));
    writeln!(terminal.output, "{what} of {whose} removed")?;
    notes(host, terminal)?;
    all_done(WHAT, failed, unread)
}

fn ask(host: &Host, options: &Options, terminal: &mut Terminal) -> Result<(), CommandError> {
    let engine = Engine::lock(host, options.state_dir)?;
    engine.must_be_at_home(options.state_dir)?;
    let (records, others): (Vec<Record>, Vec<Record>) =
        engine.store.all()?.0.into_iter().partition(|record| {
            options.network.is_none_or(|network| record.attachment.network == network)
        });
    for record in &records {
        writeln!(terminal.questions, "  {}", describe(record))?;
    }
    let mut what = plural(records.len());
    match unrecorded(&engine, options, &records, &others) {
        Ok(forwards) => {
            for forward in &forwards {
                let dir = options.state_dir.display();
                writeln!(terminal.questions, "  {forward} (ebpf), which has no record in {dir}")?;
            }
            match forwards.len() {
                0 => {}
                1 => what.push_str(" and 1 forward without a record"),
                number => what.push_str(&format!(" and {number} forwards without a record")),
            }
        }
        // Nobody knows of how many.
        Err(error) => {
            writeln!(terminal.questions, "  what eBPF forwards, which cannot be read: {error}")?;
            what.push_str(" and what eBPF forwards");
        }
    }
    drop(engine);
    if !terminal.interactive {
        return Err(CommandError::Refused(format!(
            "{what} would be removed: nobody is there to confirm it, repeat with --yes"
        )));
    }
    let question = format!("Remove {what}? Containers that run lose them.");
    match terminal.confirm(&question)? {
        true => Ok(()),
        false => Err(CommandError::Refused("nothing was removed".into())),
    }
}

/// What eBPF forwards for attachments of another state directory, if its programs would go: with the last
/// attachment of this one they go for all.
fn unrecorded(
    engine: &Engine,
    options: &Options,
    records: &[Record],
    others: &[Record],
) -> EngineResult<BTreeSet<Forward>> {
    let is_ebpf = |record: &&Record| record.backend == BackendKind::Ebpf;
    let own: Vec<Record> = records.iter().filter(is_ebpf).cloned().collect();
    let is_last = !others.iter().any(|record| is_ebpf(&record))
        && engine.store.newer(BackendKind::Ebpf)?.is_none();
    if !is_last || options.network.is_some() && own.is_empty() {
        return Ok(BTreeSet::new());
    }
    let leftovers = backend::of(BackendKind::Ebpf).leftovers(engine.host, &own)?;
    Ok(leftovers.into_iter().flat_map(|leftover| leftover.forwards).collect())
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
