//! Whole-process times of ADD, CHECK, DEL and VERSION.

use std::time::Instant;

use serde_json::{Value, json};

use crate::contest::{Contestant, Side, stand_in};
use crate::plan::Plan;
use crate::plugin::{Attachment, Call, Cost, Verb};
use crate::rig::Rig;
use crate::stats::{Series, median, min};
use crate::{Res, Variant, memory, preload, progress};

pub struct Cell {
    pub side: Side,
    pub variant: Variant,
    pub others: u16,
    pub ports: u16,
    pub verb: Verb,
    pub series: Series,
    /// Where no tool is started: of calls with no other contestant's between them.
    pub in_row: Series,
}

/// How often a row's calls are timed.
const ROW: usize = 2;

/// All contestants stand side by side, each on a node of its own, and take turns call by call: what
/// else the machine does then hits all of them alike.
pub fn measure(contestants: &[Contestant], plan: &Plan) -> Res<Vec<Cell>> {
    let rigs = contestants.iter().map(|c| Rig::new(c.variant)).collect::<Res<Vec<_>>>()?;
    let pairs: Vec<(&Contestant, &Rig)> = contestants.iter().zip(&rigs).collect();
    let mut cells = Vec::new();
    let mut present = 0;
    for &others in &plan.others {
        for (contestant, rig) in &pairs {
            progress(&format!("{contestant}: {others} other mappings"));
            let how = preload::usual(contestant);
            preload::raise(contestant, rig, how, present, others)?;
        }
        present = others;
        // Without mappings nothing depends on what else is on the node; once shows it.
        let (verbs, ports): (&[Verb], &[u16]) = match others {
            0 => (&[Verb::Add, Verb::Check, Verb::Del, Verb::Version], &[0, 1, 10]),
            _ => (&[Verb::Add, Verb::Check, Verb::Del], &[1, 10]),
        };
        for &ports in ports {
            progress(&format!("calls with {ports} ports, {others} others"));
            let verbs = if ports == 0 { verbs } else { &verbs[..3] };
            cells.extend(group(&pairs, others, ports, verbs, plan)?);
        }
    }
    Ok(cells)
}

/// The calls of one contestant, with the series they fill.
struct Lane<'a> {
    contestant: &'a Contestant,
    rig: &'a Rig,
    calls: Vec<Measured>,
}

struct Measured {
    verb: Verb,
    call: Call,
    series: Series,
    in_row: Series,
}

fn group(
    pairs: &[(&Contestant, &Rig)],
    others: u16,
    ports: u16,
    verbs: &[Verb],
    plan: &Plan,
) -> Res<Vec<Cell>> {
    let about = Attachment::measured(ports);
    let mut lanes = Vec::new();
    for &(contestant, rig) in pairs {
        let calls = rig.on(|| {
            verbs
                .iter()
                .map(|&verb| {
                    let call = contestant.call(verb, &about)?;
                    let (series, in_row) = Default::default();
                    Ok(Measured { verb, call, series, in_row })
                })
                .collect::<Res<Vec<_>>>()
        })?;
        lanes.push(Lane { contestant, rig, calls });
    }
    let start = Instant::now();
    for round in 0..=plan.rounds {
        let tired = start.elapsed() > plan.patience && round > plan.min_rounds;
        if tired {
            break;
        }
        let count = lanes.len();
        for step in 0..verbs.len() {
            for turn in 0..count {
                // Nobody always goes first, nor always after the same other one.
                let turn = if round % 2 == 0 { turn } else { count - 1 - turn };
                // Round 0 warms caches and makes what stays for good (base chains).
                let lane = &mut lanes[(turn + round) % count];
                let cost = lane.step(step)?;
                if round > 0 {
                    lane.calls[step].series.push(cost);
                }
            }
        }
        for lane in lanes.iter_mut().filter(|lane| lane.contestant.variant == Variant::Ebpf) {
            lane.row(round > 0)?;
        }
    }
    let mut cells = Vec::new();
    for mut lane in lanes {
        lane.weigh()?;
        let (side, variant) = (lane.contestant.side, lane.contestant.variant);
        cells.extend(lane.calls.into_iter().map(|Measured { verb, series, in_row, .. }| Cell {
            side,
            variant,
            others,
            ports,
            verb,
            series,
            in_row,
        }));
    }
    Ok(cells)
}

impl Lane<'_> {
    fn step(&mut self, step: usize) -> Res<Cost> {
        let Measured { verb, call, .. } = &mut self.calls[step];
        let cost = self.rig.on(|| match verb {
            // Upstream 1.1.1 fails its CHECK of an IPv4-only pod; how long it took still counts.
            Verb::Check => call.run(),
            _ => call.must(),
        });
        cost.map_err(|e| format!("{}: {}: {e}", self.contestant, verb.name()).into())
    }

    /// All calls several times, of which the first finds the processor's caches full of others' things.
    fn row(&mut self, record: bool) -> Res<()> {
        for time in 0..=ROW {
            for step in 0..self.calls.len() {
                let cost = self.step(step)?;
                if record && time > 0 {
                    self.calls[step].in_row.push(cost);
                }
            }
        }
        Ok(())
    }

    fn weigh(&mut self) -> Res<()> {
        for Measured { call, series, .. } in &mut self.calls {
            series.peak = self.rig.on(|| memory::peak(call))?;
        }
        Ok(())
    }
}

pub fn find(
    cells: &[Cell],
    side: Side,
    variant: Variant,
    others: u16,
    ports: u16,
    verb: Verb,
) -> Option<&Cell> {
    let asked = (side, variant, others, ports, verb);
    cells.iter().find(|c| (c.side, c.variant, c.others, c.ports, c.verb) == asked)
}

/// How many times longer the peer takes; NaN where either is missing.
pub fn ratio(peer: Option<&Series>, ours: Option<&Series>) -> f64 {
    match (peer, ours) {
        (Some(peer), Some(ours)) => median(&peer.wall) / median(&ours.wall),
        _ => f64::NAN,
    }
}

pub fn table(cells: &[Cell], contestants: &[Contestant]) -> String {
    let mut text = String::from(
        "| backend | others | ports | verb | peer ms (min; cpu) | ours ms (min; cpu) | in a row \
         | peer/ours | peer MiB (own) | ours MiB (own) | rounds |\n\
         |---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let mut variants: Vec<Variant> = contestants.iter().map(|c| c.variant).collect();
    variants.dedup();
    let mut failures = Vec::new();
    for variant in variants {
        let peer_variant = stand_in(contestants, variant);
        let mark = if peer_variant == Some(variant) { "" } else { "†" };
        let mut seen = Vec::new();
        for cell in cells.iter().filter(|c| c.variant == variant) {
            let key = (cell.others, cell.ports, cell.verb);
            if seen.contains(&key) {
                continue;
            }
            seen.push(key);
            let get = |side, variant| find(cells, side, variant, key.0, key.1, key.2);
            let in_row = get(Side::Ours, variant).map(|cell| &cell.in_row);
            let ours = get(Side::Ours, variant).map(|cell| &cell.series);
            let peer = peer_variant.and_then(|v| get(Side::Peer, v)).map(|cell| &cell.series);
            for (name, series) in [("peer", peer), ("ours", ours)] {
                if let Some(why) = series.and_then(|s| s.failure.as_deref()) {
                    failures.push(format!("{name}: {why}"));
                }
            }
            text += &format!(
                "| {variant} | {} | {} | {} | {} | {} | {} | {}{mark} | {} | {} | {} |\n",
                cell.others,
                cell.ports,
                cell.verb.name(),
                times(peer),
                times(ours),
                times(in_row.filter(|series| !series.wall.is_empty())),
                number(ratio(peer, ours), 1),
                memory_of(peer),
                memory_of(ours),
                cell.series.wall.len(),
            );
        }
    }
    failures.sort();
    failures.dedup();
    for failure in failures {
        text += &format!("\n‡ exit status not 0: {failure}\n");
    }
    text
}

pub fn times(series: Option<&Series>) -> String {
    series.map_or_else(
        || "-".to_owned(),
        |s| {
            format!(
                "{} ({}; {}){}",
                number(median(&s.wall), 2),
                number(min(&s.wall), 2),
                number(median(&s.cpu), 2),
                if s.failed > 0 { " ‡" } else { "" }
            )
        },
    )
}

fn memory_of(series: Option<&Series>) -> String {
    series.map_or_else(
        || "-".to_owned(),
        |s| format!("{} ({})", mebibytes(s.peak.largest), mebibytes(s.peak.own)),
    )
}

#[expect(clippy::cast_precision_loss, reason = "memory sizes fit in a double")]
pub fn mebibytes(kib: u64) -> String {
    match kib {
        0 => "-".to_owned(),
        _ => format!("{:.1}", kib as f64 / 1024.0),
    }
}

/// A number, or a dash for what was not measured.
pub fn number(value: f64, digits: usize) -> String {
    if value.is_nan() { "-".to_owned() } else { format!("{value:.digits$}") }
}

pub fn json(cells: &[Cell]) -> Value {
    cells
        .iter()
        .map(|c| {
            json!({
                "side": format!("{:?}", c.side).to_lowercase(),
                "backend": c.variant.to_string(),
                "others": c.others,
                "ports": c.ports,
                "verb": c.verb.name(),
                "cost": c.series.json(),
                "in_row": c.in_row.json(),
            })
        })
        .collect()
}
