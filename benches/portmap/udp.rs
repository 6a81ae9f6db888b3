//! ADD and DEL with a UDP port on a node that tracks many flows: both must forget the flows of
//! that port, and only those.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};

use serde_json::{Value, json};

use crate::contest::{Contestant, Side, stand_in};
use crate::plan::Plan;
use crate::plugin::{Attachment, Call, Verb};
use crate::process::{number, ratio, times};
use crate::rig::{Rig, shell};
use crate::stats::Series;
use crate::{Res, Variant, progress};

const SYSCTL: &str = "/proc/sys/net/netfilter";

pub struct Lane {
    pub side: Side,
    pub variant: Variant,
    /// Entries at the start; none, or as many as were asked for.
    pub entries: u32,
    pub add: Series,
    pub del: Series,
}

/// Here all share one node: the kernel keeps the flows of all namespaces in one table, and whoever
/// looks for flows walks it all, so that flows on one node slow the calls on another.
pub fn measure(contestants: &[Contestant], plan: &Plan) -> Res<Vec<Lane>> {
    let about = Attachment { protocol: "udp", ..Attachment::measured(1) };
    let node = Rig::new(Variant::IptablesNft)?;
    let mut teams = Vec::new();
    for contestant in contestants {
        let rig = node.beside(contestant.variant)?;
        let calls = rig.on(|| {
            let mut calls =
                [contestant.call(Verb::Add, &about)?, contestant.call(Verb::Del, &about)?];
            // Whatever the first ADD of a node makes for good is not this section's matter.
            for call in &mut calls {
                call.must()?;
            }
            Ok(calls)
        })?;
        teams.push((rig, calls));
    }
    let mut lanes = Vec::new();
    for wanted in [0, plan.entries] {
        progress(&format!("UDP calls beside {wanted} conntrack entries"));
        let entries = node.on(|| fill(wanted))?;
        let first = lanes.len();
        lanes.extend(contestants.iter().map(|contestant| Lane {
            side: contestant.side,
            variant: contestant.variant,
            entries,
            add: Series::default(),
            del: Series::default(),
        }));
        turns(&mut teams, &mut lanes[first..], plan.rounds)?;
    }
    Ok(lanes)
}

fn turns(teams: &mut [(Rig, [Call; 2])], lanes: &mut [Lane], rounds: usize) -> Res<()> {
    let count = teams.len();
    for round in 0..rounds {
        for turn in 0..count {
            let turn = if round % 2 == 0 { turn } else { count - 1 - turn };
            let index = (turn + round) % count;
            let (rig, [add, del]) = &mut teams[index];
            lanes[index].add.push(rig.on(|| add.must())?);
            lanes[index].del.push(rig.on(|| del.must())?);
        }
    }
    Ok(())
}

impl Lane {
    fn series(&self, verb: Verb) -> &Series {
        match verb {
            Verb::Add => &self.add,
            _ => &self.del,
        }
    }
}

/// Sends one datagram to each of many addresses, as a busy resolver does, and returns how many
/// entries there are then.
fn fill(wanted: u32) -> Res<u32> {
    if wanted == 0 {
        return Ok(0);
    }
    // The limit is the machine's, and cannot be raised from a network namespace.
    let limit = read("nf_conntrack_max")?;
    let wanted = wanted.min(limit / 10 * 9);
    fs::write(format!("{SYSCTL}/nf_conntrack_udp_timeout"), "3600")?;
    // A rule that asks for the state switches tracking on, whatever the backend needs. The pod
    // drops the datagrams, so that nothing answers and no second entry appears.
    shell(
        "nft add table ip bench
         nft 'add chain ip bench track { type filter hook output priority 0; }'
         nft add rule ip bench track ct state invalid counter
         ip -n pod-a route add blackhole 198.18.0.0/15
         ip route add 198.18.0.0/15 via 10.88.0.2 dev pod-a",
    )?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let network = u32::from(Ipv4Addr::new(198, 18, 0, 0));
    for host in 0..wanted {
        socket.send_to(b"?", (Ipv4Addr::from(network + host), 53))?;
    }
    let entries = read("nf_conntrack_count")?;
    if entries < wanted / 100 * 99 {
        return Err(format!("only {entries} of {wanted} conntrack entries appeared").into());
    }
    Ok(entries)
}

fn read(name: &str) -> Res<u32> {
    let path = format!("{SYSCTL}/{name}");
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    Ok(text.trim().parse()?)
}

pub fn table(lanes: &[Lane], contestants: &[Contestant]) -> String {
    let mut text = String::from(
        "| backend | conntrack entries | verb | peer ms (min; cpu) | ours ms (min; cpu) | peer/ours |\n\
         |---|--:|---|--:|--:|--:|\n",
    );
    let find = |side, variant, full| {
        lanes.iter().find(|l| l.side == side && l.variant == variant && (l.entries > 0) == full)
    };
    for contestant in contestants.iter().filter(|c| c.side == Side::Ours) {
        let variant = contestant.variant;
        let peer_variant = stand_in(contestants, variant);
        let mark = if peer_variant == Some(variant) { "" } else { "†" };
        for full in [false, true] {
            let ours = find(Side::Ours, variant, full);
            let peer = peer_variant.and_then(|v| find(Side::Peer, v, full));
            let entries = ours.map_or(0, |l| l.entries);
            for verb in [Verb::Add, Verb::Del] {
                let (peer, ours) = (peer.map(|l| l.series(verb)), ours.map(|l| l.series(verb)));
                text += &format!(
                    "| {variant} | {} | {} | {} | {} | {}{mark} |\n",
                    entries,
                    verb.name(),
                    times(peer),
                    times(ours),
                    number(ratio(peer, ours), 1),
                );
            }
        }
    }
    text
}

pub fn json(lanes: &[Lane]) -> Value {
    lanes
        .iter()
        .map(|l| {
            json!({
                "side": format!("{:?}", l.side).to_lowercase(),
                "backend": l.variant.to_string(),
                "entries": l.entries,
                "add": l.add.json(),
                "del": l.del.json(),
            })
        })
        .collect()
}
