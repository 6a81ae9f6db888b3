//! `portmap who`: who answers on a port, and everything that decides it.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use serde_json::{Value, json};

use super::list::{claim_json, owner_json};
use super::table::age;
use super::{CommandError, LOCKING, LOOKING, Terminal, Verdict};
use crate::engine::{lock_to_look, survey};
use crate::inventory::{Entry, State, owner, short_id};
use crate::model::{Family, Protocol};
use crate::sys::Host;
use crate::sys::progress::Progress;
use crate::who::{Answer, Evidence, Port, Rival, Turn, calls, first, judge};

/// What is asked, and how to answer.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    pub port: Port,
    /// The address that is called; `None`: any of the node.
    pub address: Option<IpAddr>,
    pub json: bool,
    pub state_dir: &'a Path,
}

/// Reads everything that has to do with the port, and changes nothing.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    let port = options.port;
    let protocols: Vec<Protocol> =
        port.protocol.map_or_else(|| Protocol::ALL.to_vec(), |protocol| vec![protocol]);
    let progress = Progress::begin("portmap who");
    progress.step(LOCKING);
    let engine = lock_to_look(host, options.state_dir)?;
    progress.step(LOOKING);
    let inventory = survey(host, engine.as_ref())?;
    let records = inventory.records();
    let mut entries = inventory.entries(&records);
    entries.retain(|entry| entry.holding.forward.claim.port == port.number);
    let calls = calls(port, options.address, &entries, &inventory.leftovers);
    let evidence = Evidence::read(host, port.number, &protocols, &calls)?;
    let mut answers = Vec::new();
    for call in calls {
        let way = engine
            .as_ref()
            .zip(first(&call, &entries))
            .map(|(engine, entry)| engine.path(entry.holding.record, &entry.holding.forward.claim));
        let steps = match way {
            Some(Ok(steps)) => steps,
            // The survey has said why.
            Some(Err(_)) | None => Vec::new(),
        };
        answers.extend(judge(call, &entries, &inventory.leftovers, &evidence, steps));
    }
    drop((engine, progress));
    let (notes, now) = (host.take_warnings(), host.now());
    match options.json {
        true => writeln!(terminal.output, "{}", as_json(&answers, &notes))?,
        false => write!(terminal.output, "{}", as_text(port, &answers, &notes, now))?,
    }
    Ok(verdict(&answers))
}

/// Fine is a hostPort that answers, and none that does not.
#[must_use]
pub fn verdict(answers: &[Answer]) -> Verdict {
    let hopeless = |answer: &Answer| !answer.answered && !answer.choices.is_empty();
    match answers.iter().any(|answer| answer.answered) && !answers.iter().any(hopeless) {
        true => Verdict::Fine,
        false => Verdict::Warnings,
    }
}

/// `now` is in seconds since 1970.
#[must_use]
pub fn as_text(port: Port, answers: &[Answer], notes: &[String], now: u64) -> String {
    let mut text = String::new();
    for answer in answers {
        let separator = if text.is_empty() { "" } else { "\n" };
        let _ = writeln!(text, "{separator}{}", answer.call);
        let _ = writeln!(text, "  a connection from outside {}", answer.outside);
        let _ = writeln!(text, "  a connection of the node itself {}", answer.node);
        let claims = answer.choices.iter().map(|choice| claim_line(choice, now));
        section(&mut text, "claims", aligned(claims));
        section(
            &mut text,
            "on the way",
            aligned(answer.steps.iter().map(|step| {
                let missing = if step.found { "" } else { "  (missing)" };
                (step.place.clone(), format!("{}{missing}", step.what))
            })),
        );
        let others = answer.rivals.iter().map(rival_line);
        let processes = answer
            .processes
            .iter()
            .map(|process| ("a process".to_owned(), format!("{process} waits for it")));
        section(&mut text, "also there", aligned(others.chain(processes)));
    }
    if answers.is_empty() {
        let protocol = port.protocol.map(|protocol| format!("/{protocol}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "nobody: no hostPort, no Service, no published port and no process of this node has port {}{protocol}",
            port.number
        );
    }
    for note in notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

fn section(text: &mut String, title: &str, lines: impl Iterator<Item = String>) {
    for (index, line) in lines.enumerate() {
        if index == 0 {
            let _ = writeln!(text, "  {title}:");
        }
        let _ = writeln!(text, "    {line}");
    }
}

/// Two columns.
fn aligned(lines: impl Iterator<Item = (String, String)>) -> impl Iterator<Item = String> {
    let lines: Vec<(String, String)> = lines.collect();
    let wide = lines.iter().map(|(left, _)| left.chars().count()).max().unwrap_or_default();
    lines.into_iter().map(move |(left, right)| {
        let gap = " ".repeat(wide.saturating_sub(left.chars().count()));
        format!("{left}{gap}  {right}")
    })
}

fn claim_line(choice: &Entry, now: u64) -> (String, String) {
    let (record, forward) = (choice.holding.record, choice.holding.forward);
    let since = match record.time {
        0 => String::new(),
        time => format!(", since {}", age(now.saturating_sub(time))),
    };
    let by = choice.holding.shadowed_by.map(|by| format!(" by {}", owner(by)));
    let who = format!(
        "{forward}: {}, container {}, network {}, {}{since}",
        owner(record),
        short_id(&record.attachment.container_id),
        record.attachment.network,
        record.backend,
    );
    let by = by.filter(|_| choice.state() == State::Shadowed).unwrap_or_default();
    (format!("{}{by}", choice.state().name()), who)
}

fn turn_name(turn: Turn) -> &'static str {
    match turn {
        Turn::First => "before",
        Turn::Perhaps => "perhaps before",
        Turn::Behind => "behind",
    }
}

fn rival_line(rival: &Rival) -> (String, String) {
    let whose = match (rival.outside, rival.node) {
        (None, _) => " (connections of the node alone)",
        (_, None) => " (connections from outside alone)",
        _ => "",
    };
    let turn = rival.outside.or(rival.node).map_or("", turn_name);
    (turn.to_owned(), format!("{}{whose}: {}", rival.what, rival.place))
}

/// One object.
#[must_use]
pub fn as_json(answers: &[Answer], notes: &[String]) -> Value {
    let answers: Vec<Value> = answers.iter().map(answer_json).collect();
    json!({ "answers": answers, "notes": notes })
}

fn answer_json(answer: &Answer) -> Value {
    let mut value = claim_json(&answer.call);
    let claims = |choice: &Entry| {
        let (record, forward) = (choice.holding.record, choice.holding.forward);
        let mut value = claim_json(&forward.claim);
        value["owner"] = owner_json(record);
        value["podAddress"] = json!(forward.target.ip());
        value["podPort"] = json!(forward.target.port());
        value["backend"] = json!(record.backend);
        value["state"] = json!(choice.state().name());
        value["shadowedBy"] = choice.holding.shadowed_by.map(owner_json).unwrap_or_default();
        value
    };
    let turn = |turn: Option<Turn>| turn.map(turn_name);
    value["family"] = match answer.call.family {
        Family::V4 => "ipv4".into(),
        Family::V6 => "ipv6".into(),
    };
    value["hostPortAnswers"] = answer.answered.into();
    value["fromOutside"] = answer.outside.as_str().into();
    value["fromNode"] = answer.node.as_str().into();
    value["claims"] = answer.choices.iter().map(claims).collect();
    value["path"] = answer
        .steps
        .iter()
        .map(|step| json!({"place": step.place, "what": step.what, "found": step.found}))
        .collect();
    value["others"] = answer
        .rivals
        .iter()
        .map(|rival| {
            json!({
                "what": rival.what,
                "place": rival.place,
                "fromOutside": turn(rival.outside),
                "fromNode": turn(rival.node),
            })
        })
        .collect();
    value["processes"] = answer.processes.clone().into();
    value
}
