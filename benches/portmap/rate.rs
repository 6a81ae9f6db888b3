//! New TCP connections per second, through a hostPort and past it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{Backlog, listen, setsockopt, sockopt::Linger};
use serde_json::{Value, json};

use crate::contest::{Contestant, Side, stand_in};
use crate::plugin::{Attachment, Verb};
use crate::preload::{self, How};
use crate::process::number;
use crate::rig::{Netns, Rig, on_new_thread, shell};
use crate::stats::{max, median, min};
use crate::{Plan, Res, Variant, progress};

/// The node's address and the hostPort that was added last.
const HOSTPORT: (Ipv4Addr, u16) = (Ipv4Addr::new(198, 51, 100, 1), 8080);
/// A pod that has no hostPort, behind the same node.
const DIRECT: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 88, 0, 3), 80);

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
    rig: Rig,
}

/// As for the processes, all nodes exist at the same time and take turns, the ones with one mapping
/// beside the ones with 10,000.
pub fn measure(contestants: &[Contestant], plan: &Plan) -> Res<Vec<Lane>> {
    let mut lanes = Vec::new();
    for rules in [Rules::None, Rules::EmptyNat] {
        let rig = Rig::new(Variant::IptablesNft)?;
        if rules == Rules::EmptyNat {
            rig.on(|| shell("iptables -t nat -A POSTROUTING -s 192.0.2.1 -j MASQUERADE"))?;
        }
        lanes.push(Lane::new(rules, rig)?);
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
            lanes.push(Lane::new(rules, rig)?);
        }
    }
    progress("connections");
    for round in 0..plan.rate_rounds {
        let count = lanes.len();
        for turn in 0..count {
            let turn = if round % 2 == 0 { turn } else { count - 1 - turn };
            lanes[(turn + round) % count].round(plan.rate_time)?;
        }
    }
    Ok(lanes)
}

impl Lane {
    fn new(rules: Rules, rig: Rig) -> Res<Self> {
        serve(&rig.pod_a)?;
        serve(&rig.pod_b)?;
        // Ports come back at once, because every connection ends with a reset. A lost SYN shows
        // as a slow round, not as minutes of silence.
        on_new_thread(|| {
            rig.client.enter()?;
            shell(
                "echo '1024 65000' >/proc/sys/net/ipv4/ip_local_port_range
                 echo 2 >/proc/sys/net/ipv4/tcp_syn_retries",
            )
        })?;
        let lane = Self { rules, hostport: Vec::new(), direct: Vec::new(), rig };
        let warm_up = Duration::from_millis(50);
        if matches!(rules, Rules::Of(..)) {
            lane.connections(HOSTPORT, warm_up)?;
        }
        lane.connections(DIRECT, warm_up)?;
        Ok(lane)
    }

    fn round(&mut self, time: Duration) -> Res<()> {
        if matches!(self.rules, Rules::Of(..)) {
            self.hostport.push(self.connections(HOSTPORT, time)?);
        }
        self.direct.push(self.connections(DIRECT, time)?);
        Ok(())
    }

    fn connections(&self, to: (Ipv4Addr, u16), time: Duration) -> Res<f64> {
        on_new_thread(|| {
            self.rig.client.enter()?;
            connect_for(SocketAddr::from(to), time).map_err(|e| {
                format!("{:?}: connecting to {}:{}: {e}", self.rules, to.0, to.1).into()
            })
        })
    }
}

/// Opens and resets connections, one after the other, and returns how many per second.
fn connect_for(to: SocketAddr, time: Duration) -> Res<f64> {
    let reset = libc::linger { l_onoff: 1, l_linger: 0 };
    let start = Instant::now();
    let mut count = 0_u32;
    while start.elapsed() < time {
        let stream = TcpStream::connect(to)?;
        setsockopt(&stream, Linger, &reset)?;
        drop(stream);
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// Accepts connections in a pod until the process ends.
fn serve(pod: &Netns) -> Res<()> {
    let pod = pod.handle()?;
    let listener = on_new_thread(move || {
        pod.enter()?;
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80))?;
        // A full queue would cost the client a second per connection.
        listen(&listener, Backlog::new(4096)?)?;
        Ok(listener)
    })?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
        }
    });
    Ok(())
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
    text += "\n\n| backend | mappings | side | hostPort/s (min-max) | of that with 1 | direct/s (min-max) \
             | of that with 1 | hostPort ours/peer | direct ours/peer |\n\
             |---|--:|---|--:|--:|--:|--:|--:|--:|\n";
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
                "| {variant} | {mappings} | {} | {} | {} | {} | {} | {} | {} |\n",
                if side == Side::Ours { "ours" } else { "peer" },
                rate(&lane.hostport),
                number(of(&lane.hostport, one.map(|l| &l.hostport[..])), 2),
                rate(&lane.direct),
                number(of(&lane.direct, one.map(|l| &l.direct[..])), 2),
                against(of(&lane.hostport, peer.map(|l| &l.hostport[..]))),
                against(of(&lane.direct, peer.map(|l| &l.direct[..]))),
            );
        }
    }
    text
}

fn rate(rates: &[f64]) -> String {
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
