//! `portmap gc`: what containers have left that went without a DEL.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::flush::describe;
use super::{CHANGING, CommandError, LOCKING, Terminal, Verdict, failed_json};
use crate::backend::{self, Leftover};
use crate::engine::{Collected, Engine, lock_to_look};
use crate::inventory::short_id;
use crate::model::BackendKind;
use crate::record::Record;
use crate::sys::Host;
use crate::sys::progress::Progress;
use crate::sys::store::{Damaged, Newer, has_records};

/// What to do, and how to report.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Only say what would go.
    pub dry_run: bool,
    pub json: bool,
    pub state_dir: &'a Path,
}

/// Removes, or says what would be removed.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    let progress = Progress::begin("portmap gc");
    progress.step(LOCKING);
    let engine = match options.dry_run {
        true => lock_to_look(host, options.state_dir)?,
        false if has_records(options.state_dir)? => {
            Some(Engine::lock_at_home(host, options.state_dir)?)
        }
        false => None,
    };
    progress.step(CHANGING);
    let mut collected = Collected::default();
    let mut records = Vec::new();
    if let Some(engine) = &engine {
        collected = engine.collect(options.dry_run)?;
        (records, _) = engine.store.all()?;
    }
    let leftovers = leftovers(host, &records);
    drop((engine, progress));
    let mut notes = host.take_warnings();
    notes.retain(|note| !is_of_record(note, &collected));
    match options.json {
        true => {
            let report = as_json(&collected, &leftovers, &notes, options.dry_run);
            writeln!(terminal.output, "{report}")?;
        }
        false => {
            let report = as_text(&collected, &leftovers, &notes, options.dry_run);
            write!(terminal.output, "{report}")?;
        }
    }
    Ok(verdict(&collected, &notes))
}

/// Fine is a node on which it is known of every attachment whether it lives, and those that do not are gone.
#[must_use]
pub fn verdict(collected: &Collected, notes: &[String]) -> Verdict {
    let Collected { removed: _, live: _, unseen, repaired: _, unclear, newer, failed } = collected;
    let is_known = unseen.is_empty() && unclear.is_empty() && newer.is_empty();
    match is_known && failed.is_empty() && notes.is_empty() {
        true => Verdict::Fine,
        false => Verdict::Warnings,
    }
}

/// Whether a note says what the report says of a record that cannot be read.
fn is_of_record(note: &str, collected: &Collected) -> bool {
    let damaged = collected.repaired.iter().chain(&collected.unclear).map(|damaged| &damaged.id);
    let mut ids = damaged.chain(collected.newer.iter().map(|newer| &newer.id));
    ids.any(|id| note.starts_with(&format!("record {id} ")))
}

/// What stays because nobody knows whether its container lives.
fn leftovers(host: &Host, records: &[Record]) -> Vec<Leftover> {
    let mut leftovers = Vec::new();
    for kind in BackendKind::ALL {
        let own: Vec<Record> =
            records.iter().filter(|record| record.backend == kind).cloned().collect();
        match backend::of(kind).leftovers(host, &own) {
            Ok(found) => leftovers.extend(found),
            Err(error) => host.warn(format!("what {kind} has cannot be read: {error}")),
        }
    }
    leftovers
}

/// What was done, or would be, line by line.
#[must_use]
pub fn as_text(
    collected: &Collected,
    leftovers: &[Leftover],
    notes: &[String],
    dry_run: bool,
) -> String {
    let mut text = String::new();
    let (remove, sum) = match dry_run {
        true => ("would remove", "would be removed"),
        false => ("removed", "removed"),
    };
    for record in &collected.removed {
        let _ = writeln!(
            text,
            "{remove} {}: its network namespace {} is gone",
            describe(record),
            record.netns
        );
    }
    for record in &collected.unseen {
        let _ = writeln!(
            text,
            "left {} alone: its network namespace {} cannot be looked for from here; run this where the runtime's namespaces are to be seen",
            describe(record),
            record.netns
        );
    }
    for Damaged { id, reason, netns, .. } in &collected.repaired {
        let netns = netns.as_deref().unwrap_or_default();
        let _ = writeln!(
            text,
            "{remove} the damaged record {id} ({reason}): its network namespace {netns} is gone"
        );
    }
    for Damaged { id, reason, .. } in &collected.unclear {
        let _ = writeln!(
            text,
            "left the damaged record {id} alone ({reason}): its container may be alive; its DEL removes it"
        );
    }
    for Newer { id, format } in &collected.newer {
        let _ = writeln!(
            text,
            "left the record {id} alone: its format {format} is a newer portmap's, which alone can tell whose it is"
        );
    }
    for leftover in leftovers {
        let _ = writeln!(
            text,
            "left {} alone: nobody knows whether its container is alive: {}",
            shown(leftover),
            leftover.explain()
        );
    }
    for (what, error) in &collected.failed {
        let details = error.details();
        let details = if details.is_empty() { details } else { format!(": {details}") };
        let _ = writeln!(text, "cannot remove {what}: {error}{details}");
    }
    let gone = collected.removed.len() + collected.repaired.len();
    let stay =
        collected.live + collected.unseen.len() + collected.unclear.len() + collected.newer.len();
    let _ = writeln!(text, "{gone} {sum}, {stay} stay");
    for note in notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

fn shown(leftover: &Leftover) -> String {
    match leftover.container_id.as_str() {
        "" => format!("{} ({})", leftover.object, leftover.place),
        id => format!("{} ({}) of container {}", leftover.object, leftover.place, short_id(id)),
    }
}

/// One object.
#[must_use]
pub fn as_json(
    collected: &Collected,
    leftovers: &[Leftover],
    notes: &[String],
    dry_run: bool,
) -> Value {
    let damaged = |list: &[Damaged]| -> Vec<Value> {
        list.iter()
            .map(|one| json!({"record": one.id, "reason": one.reason, "netns": one.netns}))
            .collect()
    };
    let newer = |Newer { id, format }: &Newer| json!({"record": id, "format": format});
    let shown = |record: &Record| {
        json!({
            "attachment": record.attachment,
            "netns": record.netns,
            "backend": record.backend,
            "claims": record.claims().iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    };
    json!({
        "dryRun": dry_run,
        "removed": collected.removed.iter().map(shown).collect::<Vec<_>>(),
        "live": collected.live,
        "unseen": collected.unseen.iter().map(shown).collect::<Vec<_>>(),
        "repaired": damaged(&collected.repaired),
        "unclear": damaged(&collected.unclear),
        "newer": collected.newer.iter().map(newer).collect::<Vec<_>>(),
        "unrecorded": leftovers.iter().map(|leftover| json!({
            "place": leftover.place,
            "object": leftover.object,
            "network": leftover.network,
            "containerID": leftover.container_id,
        })).collect::<Vec<_>>(),
        "failed": failed_json(&collected.failed),
        "notes": notes,
    })
}
