//! What is aimed for, what was measured, and whether that is enough.

use serde_json::{Value, json};

use crate::contest::{Contestant, Side, stand_in};
use crate::flow::{self, What};
use crate::plan::Plan;
use crate::plugin::Verb;
use crate::process::{self, Cell, number, ratio};
use crate::rate::{self, Lane, Rules};
use crate::stats::{Series, median};
use crate::{Results, Variant};

/// What "equal" means between two measurements of throughput, which is their noise.
const EQUAL: f64 = 0.95;

pub struct Aim {
    what: String,
    wanted: Wanted,
    /// NaN: not measured.
    measured: f64,
}

#[derive(Clone, Copy)]
enum Wanted {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

impl Wanted {
    fn is_met(self, value: f64) -> bool {
        match self {
            Wanted::AtLeast(least) => value >= least,
            Wanted::AtMost(most) => value <= most,
            Wanted::Below(limit) => value < limit,
        }
    }

    fn text(self) -> String {
        match self {
            Wanted::AtLeast(least) => format!("at least {least}"),
            Wanted::AtMost(most) => format!("at most {most}"),
            Wanted::Below(limit) => format!("below {limit}"),
        }
    }
}

impl Aim {
    fn new(what: impl Into<String>, wanted: Wanted, measured: f64) -> Self {
        Self { what: what.into(), wanted, measured }
    }

    fn verdict(&self) -> &'static str {
        match (self.measured.is_nan(), self.wanted.is_met(self.measured)) {
            (true, _) => "not measured",
            (false, true) => "met",
            (false, false) => "**missed**",
        }
    }
}

/// Each with the worst of the figures that it is about: an aim that only a crowded node meets is not
/// met.
pub fn aims(results: &Results, contestants: &[Contestant], plan: &Plan) -> Vec<Aim> {
    let mut aims = against_the_peer(&results.cells, contestants, plan);
    aims.extend(of_calls(results));
    aims.extend(of_connections(&results.lanes, plan));
    aims.extend(of_flows(&results.flows));
    let (tried, counted) = results.packets.of_others();
    for (how, value) in [("tried alone", tried), ("counted in traffic", counted)] {
        let what = format!("ebpf, ns for a packet of others, {how}");
        aims.push(Aim::new(what, Wanted::Below(50.0), value));
    }
    aims
}

fn against_the_peer(cells: &[Cell], contestants: &[Contestant], plan: &Plan) -> Vec<Aim> {
    let most = plan.others.last().copied().unwrap_or(0);
    let times = |variant, others, ports, verb| {
        let peer = stand_in(contestants, variant)
            .and_then(|v| process::find(cells, Side::Peer, v, others, ports, verb));
        let ours = process::find(cells, Side::Ours, variant, others, ports, verb);
        ratio(peer.map(|cell| &cell.series), ours.map(|cell| &cell.series))
    };
    let mark = |variant| match stand_in(contestants, variant) {
        Some(peer) if peer != variant => "†",
        _ => "",
    };
    let mut aims = Vec::new();
    for variant in [Variant::IptablesLegacy, Variant::IptablesNft] {
        for (ports, aim) in [(1, 5.0), (10, 10.0)] {
            for verb in [Verb::Add, Verb::Del] {
                let worst =
                    least(plan.others.iter().map(|others| times(variant, *others, ports, verb)));
                let what = format!("{variant} {} with {ports} port(s), times faster", verb.name());
                aims.push(Aim::new(what, Wanted::AtLeast(aim), worst));
            }
        }
    }
    for (verb, aim) in [(Verb::Add, 1.0), (Verb::Check, 10.0), (Verb::Del, 10.0)] {
        let worst = least([1, 10].map(|ports| times(Variant::Nftables, most, ports, verb)));
        let (name, mark) = (verb.name(), mark(Variant::Nftables));
        let what = format!("nftables {name} with {most} others, times faster{mark}");
        aims.push(Aim::new(what, Wanted::AtLeast(aim), worst));
    }
    aims
}

fn of_calls(results: &Results) -> Vec<Aim> {
    let ours = || results.cells.iter().filter(|c| c.side == Side::Ours);
    let ebpf = || ours().filter(|c| c.variant == Variant::Ebpf && c.ports > 0);
    let wall = |series: &Series| median(&series.wall);
    let mut aims = Vec::new();
    for verb in [Verb::Add, Verb::Del] {
        let cells = ours().filter(|c| c.ports == 0 && c.verb == verb);
        let what = format!("{} without mappings, ms", verb.name());
        let worst = greatest(cells.map(|c| wall(&c.series)));
        aims.push(Aim::new(what, Wanted::Below(1.0), worst));
    }
    for ports in [1, 10] {
        for verb in [Verb::Add, Verb::Del] {
            let cells = ebpf().filter(|c| c.ports == ports && c.verb == verb);
            let [mut in_row, mut in_turns] = [f64::NAN; 2];
            for cell in cells {
                in_row = greatest([in_row, wall(&cell.in_row)]);
                in_turns = greatest([in_turns, wall(&cell.series)]);
            }
            for (how, worst) in [("in a row of calls", in_row), ("between others' calls", in_turns)]
            {
                let what =
                    format!("ebpf {} of {ports} port(s) beside any others, {how}, ms", verb.name());
                aims.push(Aim::new(what, Wanted::Below(1.0), worst));
            }
        }
    }
    for fresh in &results.starts.fresh {
        for (when, series) in [("in a row of calls", &fresh.in_row), ("after `ip`", &fresh.add)] {
            let what = format!("ebpf ADD with a new pod link beside {}, {when}, ms", fresh.links);
            aims.push(Aim::new(what, Wanted::Below(1.0), wall(series)));
        }
    }
    let first = results.starts.first.iter().find(|(variant, _)| *variant == Variant::Ebpf);
    let value = first.map_or(f64::NAN, |(_, series)| wall(series));
    aims.push(Aim::new("ebpf first ADD on a node, ms", Wanted::Below(100.0), value));
    let series = ebpf().map(|c| &c.series).chain(first.map(|(_, series)| series));
    let tools = greatest(series.map(|series| match series.peak.own {
        // Nobody watched.
        0 => f64::NAN,
        _ => f64::from(u32::try_from(series.peak.tools.len()).unwrap_or(u32::MAX)),
    }));
    aims.push(Aim::new("ebpf, processes started by a call", Wanted::AtMost(0.0), tools));
    aims
}

fn of_connections(lanes: &[Lane], plan: &Plan) -> Vec<Aim> {
    let find = |variant, mappings| rate::find(lanes, Side::Ours, variant, mappings);
    let (Some(&one), Some(&most)) = (plan.mappings.first(), plan.mappings.last()) else {
        return Vec::new();
    };
    let mut aims = Vec::new();
    for variant in [Variant::Nftables, Variant::Ebpf] {
        let part = |part: fn(&Lane) -> &[f64]| match (find(variant, one), find(variant, most)) {
            (Some(one), Some(many)) => median(part(many)) / median(part(one)),
            _ => f64::NAN,
        };
        for (name, value) in [
            ("through a hostPort", part(|lane| &lane.hostport)),
            ("direct", part(|lane| &lane.direct)),
        ] {
            let what = format!("{variant} connections {name}, {most} mappings to 1");
            aims.push(Aim::new(what, Wanted::AtLeast(0.9), value));
        }
    }
    let bare = lanes.iter().find(|lane| lane.rules == Rules::None);
    let worst = |base: &dyn Fn(u16) -> Option<f64>| {
        least(plan.mappings.iter().map(|&mappings| {
            let ebpf = find(Variant::Ebpf, mappings).map(|lane| median(&lane.hostport));
            ebpf.zip(base(mappings)).map_or(f64::NAN, |(ebpf, base)| ebpf / base)
        }))
    };
    aims.push(Aim::new(
        "ebpf connections through a hostPort, to direct ones without rules",
        Wanted::AtLeast(0.9),
        worst(&|_| bare.map(|lane| median(&lane.direct))),
    ));
    aims.push(Aim::new(
        "ebpf connections through a hostPort, to nftables",
        Wanted::AtLeast(1.0),
        worst(&|mappings| find(Variant::Nftables, mappings).map(|lane| median(&lane.hostport))),
    ));
    aims
}

fn of_flows(lanes: &[flow::Lane]) -> Vec<Aim> {
    let ebpf = lanes.iter().find(|lane| lane.rules == flow::Rules::Of(Variant::Ebpf));
    let aim = |what: What| {
        let value = ebpf.map_or(f64::NAN, |lane| flow::share(lanes, lane, what));
        let what = format!("ebpf {} by a hostPort, to direct without rules", what.name());
        Aim::new(what, Wanted::AtLeast(EQUAL), value)
    };
    What::ALL.map(aim).into()
}

/// NaN of nothing. What was not measured does not count.
fn least(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(f64::NAN, f64::min)
}

fn greatest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(f64::NAN, f64::max)
}

pub fn table(aims: &[Aim]) -> String {
    let mut text = String::from("| aim | wanted | measured | |\n|---|--:|--:|---|\n");
    for aim in aims {
        text += &format!(
            "| {} | {} | {} | {} |\n",
            aim.what,
            aim.wanted.text(),
            number(aim.measured, 2),
            aim.verdict()
        );
    }
    text
}

pub fn json(aims: &[Aim]) -> Value {
    aims.iter()
        .map(|aim| {
            json!({
                "aim": aim.what,
                "wanted": aim.wanted.text(),
                "measured": aim.measured,
                "verdict": aim.verdict(),
            })
        })
        .collect()
}
