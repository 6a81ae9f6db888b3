//! The first ADD on a node, which makes everything that stays, and ADD for a pod whose link is new.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::contest::{Contestant, Side};
use crate::plan::Plan;
use crate::plugin::{Attachment, Verb};
use crate::process::{mebibytes, times};
use crate::rig::{Rig, shell};
use crate::stats::Series;
use crate::{Res, Variant, memory, progress};

#[derive(Default)]
pub struct Starts {
    /// First ADDs, each on a node of its own.
    pub first: Vec<(Variant, Series)>,
    pub fresh: Vec<Fresh>,
}

/// A pod appears, gets a hostPort, gives it back and vanishes. Only eBPF has anything to do with links.
pub struct Fresh {
    /// Pod links beside the new one.
    pub links: u16,
    /// Right after the processes that made the link.
    pub add: Series,
    pub del: Series,
    /// A call that does nothing, in the place of ADD: what starting a process takes then.
    pub version: Series,
    /// ADD in a row of calls, as all others are measured: right after DELs of two other attachments.
    pub in_row: Series,
}

/// Ours alone.
pub fn measure(contestants: &[Contestant], plan: &Plan) -> Res<Starts> {
    let ours: Vec<&Contestant> = contestants.iter().filter(|c| c.side == Side::Ours).collect();
    progress("first ADDs");
    let first = first(&ours, plan)?;
    let mut fresh = Vec::new();
    if let Some(contestant) = ours.iter().find(|c| c.variant == Variant::Ebpf) {
        for &links in &plan.links {
            progress(&format!("{contestant}: new links beside {links}"));
            fresh.push(new_links(contestant, links, plan.rounds)?);
        }
    }
    Ok(Starts { first, fresh })
}

fn first(ours: &[&Contestant], plan: &Plan) -> Res<Vec<(Variant, Series)>> {
    let mut all: Vec<_> = ours.iter().map(|c| (c.variant, Series::default())).collect();
    for round in 0..=plan.first_rounds {
        for turn in 0..ours.len() {
            let turn = if round % 2 == 0 { turn } else { ours.len() - 1 - turn };
            let rig = Rig::new(ours[turn].variant)?;
            let about = Attachment::measured(1);
            let cost = rig.on(|| ours[turn].call(Verb::Add, &about)?.must())?;
            // As everywhere, the first round is not counted: the files come from the disk.
            if round > 0 {
                all[turn].1.push(cost);
            }
        }
    }
    for (contestant, (_, series)) in ours.iter().zip(&mut all) {
        let rig = Rig::new(contestant.variant)?;
        let about = Attachment::measured(1);
        series.peak = rig.on(|| memory::peak(&mut contestant.call(Verb::Add, &about)?))?;
    }
    Ok(all)
}

/// The processor is idle while `ip` waits for the kernel, which makes whatever comes next slower.
const NEW_LINK: &str = "
ip link add pod-new type veth peer name eth-new netns /run/netns/pod-b
ip address add 10.88.0.1/32 dev pod-new
ip link set pod-new up
ip route add 10.88.250.2/32 dev pod-new src 10.88.0.1
";

/// Attachments that come and go before the one with the new link.
const OTHERS: [u16; 2] = [1, 2];

fn new_links(contestant: &Contestant, links: u16, rounds: usize) -> Res<Fresh> {
    let rig = Rig::new(contestant.variant)?;
    let about = Attachment {
        id: "7e1f0c9d".repeat(4),
        link: "pod-new",
        address: Ipv4Addr::new(10, 88, 250, 2),
        ..Attachment::measured(1)
    };
    rig.on(|| {
        for index in 0..links {
            shell(&format!(
                "ip link add pod-{index} type veth peer name eth-{index} netns /run/netns/pod-b
                 ip link set pod-{index} up"
            ))?;
        }
        let resident = Attachment::other(0);
        contestant.call(Verb::Add, &resident)?.must()?;
        let mut add = contestant.call(Verb::Add, &about)?;
        let mut del = contestant.call(Verb::Del, &about)?;
        let mut version = contestant.call(Verb::Version, &about)?;
        let call_others = |verb: Verb| -> Res<()> {
            OTHERS.into_iter().try_for_each(|other| {
                contestant.call(verb, &Attachment::other(other))?.must().map(drop)
            })
        };
        let empty = Series::default;
        let mut fresh =
            Fresh { links, add: empty(), del: empty(), version: empty(), in_row: empty() };
        for round in 0..=rounds {
            shell(NEW_LINK)?;
            let started = version.must()?;
            shell("ip link del pod-new")?;
            shell(NEW_LINK)?;
            let (added, deleted) = (add.must()?, del.must()?);
            shell("ip link del pod-new")?;
            // An ADD of these would hook the link.
            call_others(Verb::Add)?;
            shell(NEW_LINK)?;
            call_others(Verb::Del)?;
            let in_row = add.must()?;
            del.must()?;
            shell("ip link del pod-new")?;
            if round > 0 {
                fresh.in_row.push(in_row);
                fresh.add.push(added);
                fresh.del.push(deleted);
                fresh.version.push(started);
            }
        }
        Ok(fresh)
    })
}

pub fn table(starts: &Starts) -> String {
    let mut text = String::from(
        "| backend | first ADD ms (min; cpu) | MiB | processes started | rounds |\n|---|--:|--:|--:|--:|\n",
    );
    for (variant, series) in &starts.first {
        text += &format!(
            "| {variant} | {} | {} | {} | {} |\n",
            times(Some(series)),
            mebibytes(series.peak.largest),
            series.peak.tools.len(),
            series.wall.len(),
        );
    }
    text += "\n| eBPF, other pod links | ADD in a row ms (min; cpu) | VERSION after `ip` ms (min; cpu) | ADD after `ip` ms (min; cpu) | DEL ms (min; cpu) |\n|--:|--:|--:|--:|--:|\n";
    for fresh in &starts.fresh {
        text += &format!(
            "| {} | {} | {} | {} | {} |\n",
            fresh.links,
            times(Some(&fresh.in_row)),
            times(Some(&fresh.version)),
            times(Some(&fresh.add)),
            times(Some(&fresh.del))
        );
    }
    text
}

pub fn json(starts: &Starts) -> Value {
    let first = starts
        .first
        .iter()
        .map(|(variant, series)| json!({"backend": variant.to_string(), "cost": series.json()}));
    let fresh = starts.fresh.iter().map(|fresh| {
        json!({
            "links": fresh.links,
            "in_row": fresh.in_row.json(),
            "version": fresh.version.json(),
            "add": fresh.add.json(),
            "del": fresh.del.json(),
        })
    });
    json!({"first": first.collect::<Vec<_>>(), "new_link": fresh.collect::<Vec<_>>()})
}
