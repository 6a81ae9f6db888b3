//! Established TCP connections through a hostPort and past it, and connections that the node itself
//! opens. The two ends of an established connection share one processor (`traffic::pin`).

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::contest::{Contestant, Side};
use crate::packet::control;
use crate::plan::Plan;
use crate::plugin::{Attachment, Verb};
use crate::process::number;
use crate::rate::{DIRECT, HOSTPORT, rate};
use crate::rig::{Rig, on_new_thread};
use crate::stats::median;
use crate::traffic::{Exchanges, connections, pin, serve_connections, serve_exchanges};
use crate::{Res, Variant, progress};

/// Of the servers of established connections; those that only accept have 80.
const INSIDE: u16 = 81;
/// The mapping to it.
const HOSTPORT_OF_INSIDE: u16 = 8081;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Requests per second on one connection from outside.
    Requests,
    /// Bytes per second on it, to the pod and from it.
    Upload,
    Download,
    /// New connections per second from the node: to 127.0.0.1 and to the pod's address.
    FromNode,
}

impl What {
    pub const ALL: [Self; 4] = [Self::Requests, Self::Upload, Self::Download, Self::FromNode];

    pub fn name(self) -> &'static str {
        match self {
            What::Requests => "requests/s",
            What::Upload => "MB/s to the pod",
            What::Download => "MB/s from the pod",
            What::FromNode => "connections/s from the node",
        }
    }
}

/// What is on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// No rules, and so no connection tracking.
    None,
    /// Programs that do nothing, as filters of the devices that those of eBPF would be at: what the kernel takes
    /// to call any for a packet. There are none at sockets.
    Hooks,
    Of(Variant),
}

/// What was measured on one.
pub struct Lane {
    pub rules: Rules,
    /// In the order of [`What::ALL`]. Bytes are in millions.
    hostport: [Vec<f64>; 4],
    direct: [Vec<f64>; 4],
}

impl Lane {
    pub fn hostport(&self, what: What) -> &[f64] {
        &self.hostport[what as usize]
    }

    pub fn direct(&self, what: What) -> &[f64] {
        &self.direct[what as usize]
    }
}

/// Ours by nftables and eBPF, whichever takes part, beside a node without rules; with eBPF, beside one with
/// empty programs, too.
pub fn measure(contestants: &[Contestant], plan: &Plan) -> Res<Vec<Lane>> {
    progress("established connections, and the node's own");
    let mut nodes = vec![Node::new(Rules::None, None)?];
    for contestant in contestants.iter().filter(|c| c.side == Side::Ours) {
        let rules = Rules::Of(contestant.variant);
        match contestant.variant {
            Variant::Nftables => nodes.push(Node::new(rules, Some(contestant))?),
            Variant::Ebpf => {
                nodes.push(Node::new(Rules::Hooks, None)?);
                nodes.push(Node::new(rules, Some(contestant))?);
            }
            _ => {}
        }
    }
    for round in 0..=plan.flow_rounds {
        for what in What::ALL {
            let count = nodes.len();
            for turn in 0..count {
                let turn = if round % 2 == 0 { turn } else { count - 1 - turn };
                // Round 0 opens windows and fills caches.
                nodes[(turn + round) % count].round(what, round, plan)?;
            }
        }
    }
    Ok(nodes.into_iter().map(|node| node.lane).collect())
}

struct Node {
    rig: Rig,
    lane: Lane,
    hostport: Option<Exchanges>,
    direct: Exchanges,
}

impl Node {
    fn new(rules: Rules, contestant: Option<&Contestant>) -> Res<Self> {
        let rig = Rig::new(contestant.map_or(Variant::Nftables, |c| c.variant))?;
        if rules == Rules::Hooks {
            // Filters keep their programs.
            rig.on(control::attach)?;
        }
        for pod in [&rig.pod_a, &rig.pod_b] {
            serve_connections(pod, DIRECT.1)?;
            serve_exchanges(pod, INSIDE)?;
        }
        if let Some(contestant) = contestant {
            rig.on(|| contestant.call(Verb::Add, &Attachment::measured(2))?.must())?;
        }
        let open = |address: Ipv4Addr, port: u16| {
            on_new_thread(|| {
                rig.client.enter()?;
                Exchanges::open(SocketAddr::from((address, port)))
            })
        };
        let direct = open(DIRECT.0, INSIDE)?;
        let hostport = contestant.map(|_| open(HOSTPORT.0, HOSTPORT_OF_INSIDE)).transpose()?;
        let lane = Lane { rules, hostport: Default::default(), direct: Default::default() };
        Ok(Self { rig, lane, hostport, direct })
    }

    fn round(&mut self, what: What, round: usize, plan: &Plan) -> Res<()> {
        let mut turns = [true, false];
        if round % 2 == 1 {
            turns.reverse();
        }
        for direct in turns {
            if !direct && self.hostport.is_none() {
                continue;
            }
            let value = self.turn(what, direct, plan)?;
            let lane = if direct { &mut self.lane.direct } else { &mut self.lane.hostport };
            if round > 0 {
                lane[what as usize].push(value);
            }
        }
        Ok(())
    }

    fn turn(&mut self, what: What, direct: bool, plan: &Plan) -> Res<f64> {
        let (volume, time) = (plan.volume, plan.rate_time);
        let connection = match &mut self.hostport {
            Some(hostport) if !direct => hostport,
            _ => &mut self.direct,
        };
        match what {
            What::Requests => on_one_processor(|| connection.requests(time)),
            What::Upload => on_one_processor(|| Ok(connection.upload(volume)? / 1e6)),
            What::Download => on_one_processor(|| Ok(connection.download(volume)? / 1e6)),
            What::FromNode => {
                let to = if direct { DIRECT } else { (Ipv4Addr::LOCALHOST, HOSTPORT.1) };
                self.rig.on(|| from_node(to, time))
            }
        }
    }
}

fn from_node(to: (Ipv4Addr, u16), time: Duration) -> Res<f64> {
    pin()?;
    connections(SocketAddr::from(to), time)
}

fn on_one_processor(work: impl FnOnce() -> Res<f64> + Send) -> Res<f64> {
    on_new_thread(|| {
        pin()?;
        work()
    })
}

/// The node without rules.
pub fn bare(lanes: &[Lane]) -> Option<&Lane> {
    lanes.iter().find(|lane| lane.rules == Rules::None)
}

/// Through a hostPort of `lane`, as a share of what a node without rules does directly.
pub fn share(lanes: &[Lane], lane: &Lane, what: What) -> f64 {
    bare(lanes).map_or(f64::NAN, |bare| median(lane.hostport(what)) / median(bare.direct(what)))
}

pub fn table(lanes: &[Lane]) -> String {
    let mut text = String::from(
        "| backend | what | hostPort (min-max) | direct (min-max) | hostPort/direct | direct without rules \
         | hostPort/that |\n|---|---|--:|--:|--:|--:|--:|\n",
    );
    for lane in lanes {
        let Rules::Of(backend) = lane.rules else { continue };
        for what in What::ALL {
            let (hostport, direct) = (lane.hostport(what), lane.direct(what));
            text += &format!(
                "| {backend} | {} | {} | {} | {} | {} | {} |\n",
                what.name(),
                rate(hostport),
                rate(direct),
                number(median(hostport) / median(direct), 2),
                bare(lanes).map_or_else(|| "-".to_owned(), |bare| rate(bare.direct(what))),
                number(share(lanes, lane, what), 2),
            );
        }
    }
    if let Some(hooks) = lanes.iter().find(|lane| lane.rules == Rules::Hooks) {
        let shares = [What::Requests, What::Upload, What::Download].map(|what| {
            let bare = bare(lanes).map_or(f64::NAN, |bare| median(bare.direct(what)));
            format!("{} {}", what.name(), number(median(hooks.direct(what)) / bare, 2))
        });
        text += &format!(
            "\nDirect with filters that do nothing where those of eBPF would be, of that without rules: {}.\n",
            shares.join(", ")
        );
    }
    text
}

pub fn json(lanes: &[Lane]) -> Value {
    let of = |lane: &Lane| {
        What::ALL.map(|what| {
            json!({
                "backend": match lane.rules {
                    Rules::None => "no rules".to_owned(),
                    Rules::Hooks => "empty programs".to_owned(),
                    Rules::Of(variant) => variant.to_string(),
                },
                "what": what.name(),
                "hostport": lane.hostport(what),
                "direct": lane.direct(what),
            })
        })
    };
    lanes.iter().flat_map(of).collect()
}
