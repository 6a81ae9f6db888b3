//! `portmap list`: every hostPort of the node, whose it is, and whether it is where packets meet it.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::table::{Column, age, bytes, paragraph, table};
use super::{CommandError, LOCKING, LOOKING, Terminal, Verdict};
use crate::backend::{Counters, Leftover};
use crate::engine::{lock_to_look, survey};
use crate::inventory::{Attached, Entry, Inventory, State, owner, short_id};
use crate::model::{Claim, Forward};
use crate::record::Record;
use crate::sys::Host;
use crate::sys::progress::Progress;

/// How to show it.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    pub json: bool,
    pub state_dir: &'a Path,
    /// Columns of the terminal; `None`: it goes elsewhere, and nothing is left out.
    pub width: Option<usize>,
}

/// Reads everything, and changes nothing.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    let progress = Progress::begin("portmap list");
    progress.step(LOCKING);
    let engine = lock_to_look(host, options.state_dir)?;
    progress.step(LOOKING);
    let inventory = survey(host, engine.as_ref())?;
    drop((engine, progress));
    let (notes, now) = (host.take_warnings(), host.now());
    match options.json {
        true => writeln!(terminal.output, "{}", as_json(&inventory, &notes, now))?,
        false => {
            write!(terminal.output, "{}", as_text(&inventory, &notes, now, options.width))?;
        }
    }
    Ok(verdict(&inventory, &notes))
}

/// Fine is a node on which every claim is as recorded and everything could be read.
#[must_use]
pub fn verdict(inventory: &Inventory, notes: &[String]) -> Verdict {
    let records = inventory.records();
    let is_fine = |entry: &Entry| matches!(entry.state(), State::Active | State::Shadowed);
    match notes.is_empty() && inventory.entries(&records).iter().all(is_fine) {
        true => Verdict::Fine,
        false => Verdict::Warnings,
    }
}

const COLUMNS: [Column; 10] = [
    Column { title: "HOSTPORT", right: false, dispensable: 0, shortest: None },
    Column { title: "POD", right: false, dispensable: 0, shortest: Some(20) },
    Column { title: "TARGET", right: false, dispensable: 0, shortest: None },
    Column { title: "CONTAINER", right: false, dispensable: 5, shortest: None },
    Column { title: "NETWORK", right: false, dispensable: 6, shortest: None },
    Column { title: "BACKEND", right: false, dispensable: 2, shortest: None },
    Column { title: "AGE", right: true, dispensable: 1, shortest: None },
    Column { title: "PACKETS", right: true, dispensable: 3, shortest: None },
    Column { title: "BYTES", right: true, dispensable: 4, shortest: None },
    Column { title: "STATE", right: false, dispensable: 0, shortest: None },
];

/// The table, and below it whatever deserves attention. `now` is in seconds since 1970.
#[must_use]
pub fn as_text(inventory: &Inventory, notes: &[String], now: u64, width: Option<usize>) -> String {
    let records = inventory.records();
    let entries = inventory.entries(&records);
    let mut rows: Vec<Vec<String>> = entries.iter().map(|entry| row(entry, now)).collect();
    for leftover in &inventory.leftovers {
        rows.extend(leftover.forwards.iter().map(|forward| strange_row(leftover, forward)));
    }
    let fits = |text: &String| {
        width.is_none_or(|width| text.lines().all(|line| line.chars().count() <= width))
    };
    let (mut text, mut shadows) = (String::new(), String::new());
    match table(&COLUMNS, &rows, None).filter(fits) {
        _ if rows.is_empty() => text.push_str("no hostPorts on this node\n"),
        Some(whole) => text = whole,
        None => {
            // By whom is said below.
            for (row, entry) in rows.iter_mut().zip(&entries) {
                if let Some(state) = row.last_mut() {
                    entry.state().name().clone_into(state);
                }
            }
            let narrow = || rows.iter().map(|row| block(row, width.unwrap_or(80))).collect();
            text = table(&COLUMNS, &rows, width).unwrap_or_else(narrow);
            shadows = entries.iter().filter_map(shadow).collect();
        }
    }
    let remarks = shadows + &remarks(inventory);
    if !remarks.is_empty() && !rows.is_empty() {
        text.push('\n');
    }
    text.push_str(&remarks);
    for note in notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

/// Who stands before a claim.
fn shadow(entry: &Entry) -> Option<String> {
    let by = entry.holding.shadowed_by.filter(|_| entry.state() == State::Shadowed)?;
    let (claim, record) = (entry.holding.forward.claim, entry.holding.record);
    Some(format!("{claim} of {}: shadowed by {}\n", owner(record), owner(by)))
}

fn row(entry: &Entry, now: u64) -> Vec<String> {
    let (record, Forward { claim, target }) = (entry.holding.record, entry.holding.forward);
    let of_both = |number: &dyn Fn(&Counters) -> (u64, u64), show: fn(u64) -> String| {
        entry.counters.map_or_else(
            || "-".to_owned(),
            |counters| {
                let (inward, outward) = number(counters);
                format!("{}/{}", show(inward), show(outward))
            },
        )
    };
    let mut state = entry.state().name().to_owned();
    if let (State::Shadowed, Some(by)) = (entry.state(), entry.holding.shadowed_by) {
        state = format!("shadowed by {}", owner(by));
    }
    vec![
        claim.to_string(),
        owner(record),
        target.to_string(),
        short_id(&record.attachment.container_id),
        record.attachment.network.clone(),
        record.backend.to_string(),
        age_of(record, now).map_or_else(|| "-".to_owned(), age),
        of_both(&|counters| (counters.packets_in, counters.packets_out), |number| {
            number.to_string()
        }),
        of_both(&|counters| (counters.bytes_in, counters.bytes_out), bytes),
        state,
    ]
}

/// What has no record has no pod's name, and nobody knows since when it is there.
fn strange_row(leftover: &Leftover, forward: &Forward) -> Vec<String> {
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    vec![
        forward.claim.to_string(),
        or_dash(short_id(&leftover.container_id)),
        forward.target.to_string(),
        or_dash(short_id(&leftover.container_id)),
        or_dash(leftover.network.clone()),
        leftover.place.clone(),
        "-".into(),
        "-".into(),
        "-".into(),
        "no record".into(),
    ]
}

/// One row on several lines.
fn block(row: &[String], width: usize) -> String {
    let cell = |index: usize| row.get(index).cloned().unwrap_or_default();
    let words = [cell(0), cell(9), cell(1), format!("-> {}", cell(2)), cell(5), cell(6)];
    paragraph(&words, width)
}

fn age_of(record: &Record, now: u64) -> Option<u64> {
    (record.time > 0).then(|| now.saturating_sub(record.time))
}

/// What is wrong, with the next step. Attachments that lack the same are named together: what a reload of
/// the firewall took, it took from all.
fn remarks(inventory: &Inventory) -> String {
    const SHOWN: usize = 3;
    let shown = |attached: &Attached| {
        let problems = attached.problems.as_deref().unwrap_or_default();
        (problems.iter().take(SHOWN).cloned().collect::<Vec<_>>(), problems.len())
    };
    let mut text = String::new();
    let mut broken: Vec<(&Attached, Vec<String>)> = Vec::new();
    for attached in &inventory.attached {
        let record = &attached.record;
        let who =
            format!("{} on {} ({})", owner(record), record.attachment.network, record.backend);
        if !attached.alive {
            let netns = &record.netns;
            let _ = writeln!(
                text,
                "{who}: its network namespace {netns} is gone; portmap gc removes it"
            );
        } else if attached.problems.as_ref().is_some_and(|problems| !problems.is_empty()) {
            match broken.iter_mut().find(|(first, _)| shown(first) == shown(attached)) {
                Some((_, names)) => names.push(who),
                None => broken.push((attached, vec![who])),
            }
        }
    }
    for (attached, names) in broken {
        let names = names.join(", ");
        let _ =
            writeln!(text, "{names}: not in the kernel as recorded; portmap restore puts it back");
        let (problems, all) = shown(attached);
        for problem in &problems {
            let _ = writeln!(text, "  {problem}");
        }
        if all > SHOWN {
            let _ = writeln!(text, "  and {} more (portmap list --json)", all - SHOWN);
        }
    }
    for leftover in &inventory.leftovers {
        let who = match leftover.container_id.as_str() {
            "" => "something".to_owned(),
            id => format!("container {}", short_id(id)),
        };
        let _ = writeln!(
            text,
            "{who}: {} ({}) without a record: {}",
            leftover.object,
            leftover.place,
            leftover.explain()
        );
    }
    text
}

/// One object. Addresses of any are `0.0.0.0` and `::`.
#[must_use]
pub fn as_json(inventory: &Inventory, notes: &[String], now: u64) -> Value {
    let records = inventory.records();
    let claims: Vec<Value> =
        inventory.entries(&records).iter().map(|entry| entry_json(entry, now)).collect();
    let unrecorded: Vec<Value> = inventory.leftovers.iter().map(leftover_json).collect();
    let packets = (!inventory.packets.is_empty()).then_some(&inventory.packets);
    json!({ "claims": claims, "unrecorded": unrecorded, "packets": packets, "notes": notes })
}

pub(super) fn claim_json(claim: &Claim) -> Value {
    let any = match claim.family {
        crate::model::Family::V4 => "0.0.0.0".to_owned(),
        crate::model::Family::V6 => "::".to_owned(),
    };
    json!({
        "protocol": claim.protocol.name(),
        "hostAddress": claim.address.map_or(any, |ip| ip.to_string()),
        "hostPort": claim.port,
    })
}

/// Who somebody is, for people and for scripts.
pub(super) fn owner_json(record: &Record) -> Value {
    let pod = &record.pod;
    let named = json!({"namespace": pod.namespace, "name": pod.name, "uid": pod.uid});
    json!({
        "attachment": record.attachment,
        "pod": if pod.name.is_empty() { Value::Null } else { named },
    })
}

fn entry_json(entry: &Entry, now: u64) -> Value {
    let (record, Forward { claim, target }) = (entry.holding.record, entry.holding.forward);
    let mut value = claim_json(&claim);
    let more = json!({
        "owner": owner_json(record),
        "podAddress": target.ip(),
        "podPort": target.port(),
        "backend": record.backend,
        "state": entry.state().name(),
        "shadowedBy": entry.holding.shadowed_by.map(owner_json),
        "inKernel": entry.attached.problems.as_ref().map(Vec::is_empty),
        "problems": entry.attached.problems.as_deref().unwrap_or_default(),
        "netns": record.netns,
        "alive": entry.attached.alive,
        "time": record.time,
        "ageSeconds": age_of(record, now),
        "counters": entry.counters.map(|counters| json!({
            "connections": counters.connections,
            "packetsIn": counters.packets_in,
            "bytesIn": counters.bytes_in,
            "packetsOut": counters.packets_out,
            "bytesOut": counters.bytes_out,
        })),
    });
    if let (Value::Object(all), Value::Object(more)) = (&mut value, more) {
        all.extend(more);
    }
    value
}

fn leftover_json(leftover: &Leftover) -> Value {
    let forwards: Vec<Value> = leftover
        .forwards
        .iter()
        .map(|Forward { claim, target }| {
            let mut value = claim_json(claim);
            value["podAddress"] = json!(target.ip());
            value["podPort"] = json!(target.port());
            value
        })
        .collect();
    json!({
        "place": leftover.place,
        "object": leftover.object,
        "network": leftover.network,
        "containerID": leftover.container_id,
        "forwards": forwards,
    })
}
