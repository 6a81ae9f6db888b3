//! What the eBPF programs cost a packet: tried alone, and counted by the kernel in real traffic.

pub mod control;
mod counted;
mod frame;
mod trial;

use std::collections::BTreeMap;

use portmap::sys::bpf::pins::Pins;
use portmap::sys::bpf::program::Program;
use serde_json::{Value, json};

use crate::contest::{Contestant, Side};
use crate::plan::Plan;
use crate::plugin::{Attachment, Verb};
use crate::preload::{self, How};
use crate::process::number;
use crate::rig::Rig;
use crate::stats::{median, min};
use crate::{Res, Variant, progress};
use counted::{CALLS, Counting, TRAFFIC, Talk};
use trial::Case;

/// What a packet has to do with hostPorts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concern {
    /// It is not even IP, or the program does nothing.
    Nothing,
    /// No claim has its ports: what almost all packets are.
    Others,
    /// A claim has its port, on another address.
    SamePort,
    Ours,
}

impl Concern {
    fn name(self) -> &'static str {
        match self {
            Concern::Nothing => "nothing",
            Concern::Others => "others",
            Concern::SamePort => "same port",
            Concern::Ours => "ours",
        }
    }
}

/// One row, with the figures of every node in the order of the numbers of claims.
pub struct Row {
    program: &'static str,
    packet: &'static str,
    concern: Concern,
    /// Every figure is of one run, with the clock's own time in it.
    single: bool,
    nanoseconds: Vec<Vec<f64>>,
}

/// Empty where eBPF does not take part.
#[derive(Default)]
pub struct Costs {
    claims: Vec<u16>,
    tried: Vec<Row>,
    counted: Vec<Row>,
}

/// The programs of one node, open.
pub struct Programs(BTreeMap<String, Program>);

impl Programs {
    /// To be called on the node.
    fn open() -> Res<Self> {
        let pins = Pins::open()?;
        let mut programs = BTreeMap::new();
        for revision in pins.list()?.revisions {
            for name in ["pm_uplink_in", "pm_pod_in", "pm_out", "pm_connect4"] {
                if let Some(program) = pins.program(&revision, name)? {
                    programs.insert(name.to_owned(), program);
                }
            }
        }
        programs.extend(control::attach()?);
        Ok(Self(programs))
    }

    fn get(&self, name: &str) -> Res<&Program> {
        self.0.get(name).ok_or_else(|| format!("the plugin has not loaded {name}").into())
    }
}

struct Node {
    rig: Rig,
    programs: Programs,
    talk: Talk,
}

/// Nodes with one claim and with many take turns.
pub fn measure(contestants: &[Contestant], plan: &Plan) -> Res<Costs> {
    let ours = |c: &&Contestant| c.side == Side::Ours && c.variant == Variant::Ebpf;
    let Some(contestant) = contestants.iter().find(ours) else {
        return Ok(Costs::default());
    };
    let mut claims: Vec<u16> =
        plan.mappings.first().into_iter().chain(plan.mappings.last()).copied().collect();
    claims.dedup();
    let mut nodes = Vec::new();
    for &mappings in &claims {
        progress(&format!("{contestant}: packets beside {mappings} mappings"));
        let rig = Rig::new(contestant.variant)?;
        preload::raise(contestant, &rig, How::Real, 0, mappings - 1)?;
        rig.on(|| contestant.call(Verb::Add, &Attachment::measured(1))?.must())?;
        let (programs, talk) = (rig.on(Programs::open)?, Talk::new(&rig)?);
        nodes.push(Node { rig, programs, talk });
    }
    let tried = tried(&nodes, plan)?;
    let counted = counted(&mut nodes, plan)?;
    Ok(Costs { claims, tried, counted })
}

fn tried(nodes: &[Node], plan: &Plan) -> Res<Vec<Row>> {
    let cases = trial::cases();
    let alone = cases.iter().find(|case| case.concern == Concern::Nothing);
    let empty = vec![Vec::new(); nodes.len()];
    let row = |case: &Case, single| Row {
        program: case.program,
        packet: case.packet,
        concern: case.concern,
        single,
        nanoseconds: empty.clone(),
    };
    let mut rows: Vec<Row> = cases.iter().map(|case| row(case, case.changes)).collect();
    // What the clock takes in a single run.
    rows.extend(alone.map(|case| row(case, true)));
    for round in 0..=plan.packet_rounds {
        for (index, node) in nodes.iter().enumerate() {
            let figures = node.rig.on(|| {
                let mut figures = trial::round(&node.programs, &cases, plan)?;
                if let Some(case) = alone {
                    figures.push(trial::single(&node.programs, case)?);
                }
                Ok(figures)
            })?;
            if round > 0 {
                push(&mut rows, index, figures);
            }
        }
    }
    Ok(rows)
}

fn counted(nodes: &mut [Node], plan: &Plan) -> Res<Vec<Row>> {
    let counting = Counting::start()?;
    let empty = vec![Vec::new(); nodes.len()];
    let met = TRAFFIC.iter().flat_map(|traffic| {
        traffic.programs.iter().map(|program| (*program, traffic.name, traffic.concern))
    });
    let mut rows: Vec<Row> = met
        .map(|(program, packet, concern)| Row {
            program,
            packet,
            concern: if program.starts_with("empty_") { Concern::Nothing } else { concern },
            single: false,
            nanoseconds: empty.clone(),
        })
        .collect();
    for round in 0..=plan.packet_rounds {
        for (index, node) in nodes.iter_mut().enumerate() {
            let mut figures = Vec::new();
            for traffic in &TRAFFIC {
                let Node { rig, programs, talk } = &mut *node;
                figures.extend(talk.round(rig, programs, traffic, &counting, plan.rate_time)?);
            }
            if round > 0 {
                push(&mut rows, index, figures);
            }
        }
    }
    Ok(rows)
}

fn push(rows: &mut [Row], node: usize, figures: Vec<f64>) {
    for (row, figure) in rows.iter_mut().zip(figures) {
        row.nanoseconds[node].push(figure);
    }
}

impl Costs {
    /// What packets of others cost on average, on the node where that is more: tried, and counted
    /// beyond an empty program. NaN if it was not measured.
    pub fn of_others(&self) -> (f64, f64) {
        let worst = |figure: &dyn Fn(usize) -> f64| {
            (0..self.claims.len()).map(figure).fold(f64::NAN, f64::max)
        };
        (
            worst(&|node| average(&self.tried, Concern::Others, node)),
            worst(&|node| {
                average(&self.counted, Concern::Others, node)
                    - average(&self.counted, Concern::Nothing, node)
            }),
        )
    }
}

/// Over programs and kinds of packets. Calls are none.
#[expect(clippy::cast_precision_loss, reason = "a few rows")]
fn average(rows: &[Row], concern: Concern, node: usize) -> f64 {
    let of_packets =
        |row: &&Row| row.concern == concern && !row.single && !CALLS.contains(&row.program);
    let figures: Vec<f64> =
        rows.iter().filter(of_packets).map(|row| median(&row.nanoseconds[node])).collect();
    figures.iter().sum::<f64>() / figures.len() as f64
}

pub fn table(costs: &Costs) -> String {
    let mut text = String::new();
    for (how, rows) in [("BPF_PROG_TEST_RUN", &costs.tried), ("bpf_stats", &costs.counted)] {
        text += &format!("| {how}: program | packet | whose |");
        for claims in &costs.claims {
            text += &format!(" ns, {claims} claim(s) (min) |");
        }
        text += "\n|---|---|---|";
        text += &"--:|".repeat(costs.claims.len());
        text += "\n";
        for row in rows {
            let mark = if row.single { " §" } else { "" };
            text += &format!("| {} | {}{mark} | {} |", row.program, row.packet, row.concern.name());
            for figures in &row.nanoseconds {
                text += &format!(" {} ({}) |", number(median(figures), 0), number(min(figures), 0));
            }
            text += "\n";
        }
        text += "\n";
    }
    let (tried, counted) = costs.of_others();
    text += &format!(
        "Packets of others on average: {} ns tried, {} ns counted (beyond an empty program).\n\n\
         § one run at a time, with the clock's own time in it.\n",
        number(tried, 0),
        number(counted, 0),
    );
    text
}

pub fn json(costs: &Costs) -> Value {
    let rows = |rows: &[Row]| -> Value {
        rows.iter()
            .map(|row| {
                json!({
                    "program": row.program,
                    "packet": row.packet,
                    "whose": row.concern.name(),
                    "single": row.single,
                    "ns": row.nanoseconds,
                })
            })
            .collect()
    };
    json!({"claims": costs.claims, "tried": rows(&costs.tried), "counted": rows(&costs.counted)})
}
