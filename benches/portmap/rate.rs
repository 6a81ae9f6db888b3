//! New TCP connections per second, through a hostPort and past it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::contest::{Contestant, Side, stand_in};
use crate::plan::Plan;
use crate::plugin::{Attachment, Verb};
use crate::preload::{self, How};
use crate::process::number;
use crate::rig::{Rig, on_new_thread, shell};
use crate::stats::{max, median, min};
use crate::traffic::{connections, serve_connections};
use crate::{Res, Variant, progress};

/// The node's address and the hostPort that was added last.
pub const HOSTPORT: (Ipv4Addr, u16) = (Ipv4Addr::new(198, 51, 100, 1), 8080);
/// A pod that has no hostPort, behind the same node.
pub const DIRECT: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 88, 0, 3), 80);

/// What is on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// No rules, and so no connection tracking.
    None,
    /// Empty NAT chains: what NAT costs whoever makes the rules.
    EmptyNat,
    Of(Side, Variant, u16),
}

pub struct Lane {
    pub rules: Rules,
    pub hostport: Vec<f64>,
    pub direct: Vec<f64>,
}

/// As for the processes, all nodes exist at the same time and take turns, the ones with one mapping
/// beside the ones with 10,000.
pub fn measure(contestants: &[Contestant], plan: &Plan) -> Res<Vec<Lane>> {
    let mut nodes = Vec::new();
    for rules in [Rules::None, Rules::EmptyNat] {
        let rig = Rig::new(Variant::IptablesNft)?;
        if rules == Rules::EmptyNat {
            rig.on(|| shell("iptables -t nat -A POSTROUTING -s 192.0.2.1 -j MASQUERADE"))?;
        }
        nodes.push(Node::new(rules, rig)?);
    }
    for contestant in contestants {
        for &mappings in &plan.mappings {
            progress(&format!("{contestant}: a node with {mappings} mappings"));
            let rig = Rig::new(contestant.variant)?;
            // On iptables both sides write the same rules, and only rules matter to a packet.
            let how = match contestant.variant.backend() {
                "iptables" => How::Copies,
                _ => preload::usual(contestant),
            };
            preload::raise(contestant, &rig, how, 0, mappings - 1)?;
            rig.on(|| contestant.call(Verb::Add, &Attachment::measured(1))?.must())?;
            let rules = Rules::Of(contestant.side, contestant.variant, mappings);
            nodes.push(Node::new(rules, rig)?);
        }
    }
    progress("connections");
    for round in 0..plan.rate_rounds {
        let count = nodes.len();
        for turn in 0..count {
            let turn = if round % 2 == 0 { turn } else { count - 1 - turn };
            nodes[(turn + round) % count].round(plan.rate_time)?;
        }
    }
    Ok(nodes.into_iter().map(|node| node.lane).collect())
}

struct Node {
    rig: Rig,
    lane: Lane,
}

impl Node {
    fn new(rules: Rules, rig: Rig) -> Res<Self> {
        serve_connections(&rig.pod_a, 80)?;
        serve_connections(&rig.pod_b, 80)?;
        // Ports come back at once, because every connection ends with a reset. A lost SYN shows
        // as a slow round, not as minutes of silence.
        on_new_thread(|| {
            rig.client.enter()?;
            shell(
                "echo '1024 65000' >/proc/sys/net/ipv4/ip_local_port_range
                 echo 2 >/proc/sys/net/ipv4/tcp_syn_retries",
            )
        })?;
        let node = Self { rig, lane: Lane { rules, hostport: Vec::new(), direct: Vec::new() } };
        let warm_up = Duration::from_millis(50);
        if matches!(rules, Rules::Of(..)) {
            node.connections(HOSTPORT, warm_up)?;
        }
        node.connections(DIRECT, warm_up)?;
        Ok(node)
    }

    fn round(&mut self, time: Duration) -> Res<()> {
        if matches!(self.lane.rules, Rules::Of(..)) {
            self.lane.hostport.push(self.connections(HOSTPORT, time)?);
        }
        self.lane.direct.push(self.connections(DIRECT, time)?);
        Ok(())
    }

    fn connections(&self, to: (Ipv4Addr, u16), time: Duration) -> Res<f64> {
        on_new_thread(|| {
            self.rig.client.enter()?;
            connections(SocketAddr::from(to), time)
                .map_err(|e| format!("{:?}: {e}", self.lane.rules).into())
        })
    }
}

pub fn find(lanes: &[Lane], side: Side, variant: Variant, mappings: u16) -> Option<&Lane> {
    lanes.iter().find(|l| l.rules == Rules::Of(side, variant, mappings))
}

pub fn table(lanes: &[Lane], contestants: &[Contestant], plan: &Plan) -> String {
    let mut text = String::new();
    for lane in lanes {
        let name = match lane.rules {
            Rules::None => "no rules, no connection tracking",
            Rules::EmptyNat => "NAT without mappings",
            Rules::Of(..) => continue,
        };
        text += &format!("Direct, {name}: {}/s. ", rate(&lane.direct));
    }
    text += "\n\n| backend | mappings | side | hostPort/s (min-max) | of that with 1 | of direct without rules \
             | direct/s (min-max) | of that with 1 | hostPort ours/peer | direct ours/peer |\n\
             |---|--:|---|--:|--:|--:|--:|--:|--:|--:|\n";
    let bare = lanes.iter().find(|lane| lane.rules == Rules::None);
    for contestant in contestants {
        let (side, variant) = (contestant.side, contestant.variant);
        let one = plan.mappings.first().and_then(|n| find(lanes, side, variant, *n));
        for &mappings in &plan.mappings {
            let Some(lane) = find(lanes, side, variant, mappings) else {
                continue;
            };
            let peer_variant = stand_in(contestants, variant);
            let mark = if peer_variant == Some(variant) { "" } else { "†" };
            let peer = match side {
                Side::Ours => peer_variant.and_then(|v| find(lanes, Side::Peer, v, mappings)),
                Side::Peer => None,
            };
            let of = |rates: &[f64], base: Option<&[f64]>| {
                base.map_or(f64::NAN, |base| median(rates) / median(base))
            };
            let against = |value: f64| match value.is_nan() {
                true => "-".to_owned(),
                false => format!("{value:.2}{mark}"),
            };
            text += &format!(
                "| {variant} | {mappings} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
                if side == Side::Ours { "ours" } else { "peer" },
                rate(&lane.hostport),
                number(of(&lane.hostport, one.map(|l| &l.hostport[..])), 2),
                number(of(&lane.hostport, bare.map(|l| &l.direct[..])), 2),
                rate(&lane.direct),
                number(of(&lane.direct, one.map(|l| &l.direct[..])), 2),
                against(of(&lane.hostport, peer.map(|l| &l.hostport[..]))),
                against(of(&lane.direct, peer.map(|l| &l.direct[..]))),
            );
        }
    }
    text
}

/// Median, least and greatest.
pub fn rate(rates: &[f64]) -> String {
    format!("{:.0} ({:.0}-{:.0})", median(rates), min(rates), max(rates))
}

pub fn json(lanes: &[Lane]) -> Value {
    lanes
        .iter()
        .map(|l| {
            let (side, backend, mappings) = match l.rules {
                Rules::None => ("none", "no rules".to_owned(), 0),
                Rules::EmptyNat => ("none", "empty NAT".to_owned(), 0),
                Rules::Of(Side::Ours, variant, n) => ("ours", variant.to_string(), n),
                Rules::Of(Side::Peer, variant, n) => ("peer", variant.to_string(), n),
            };
            json!({
                "side": side,
                "backend": backend,
                "mappings": mappings,
                "hostport_per_s": l.hostport,
                "direct_per_s": l.direct,
            })
        })
        .collect()
}
