//! `BPF_PROG_TEST_RUN`: a program on one frame, over and over, with everything in the caches.

use std::net::{Ipv4Addr, SocketAddr};

use nix::net::if_::if_nametoindex;

use super::frame::{Transport, arp, frame};
use super::{Concern, Programs};
use crate::Res;
use crate::plan::Plan;
use crate::rate::HOSTPORT;
use crate::stats::median;

/// `TC_ACT_UNSPEC`: passed on.
const NEXT: u32 = u32::MAX;
/// Runs whose median is one measurement, where a run changes the frame and cannot be repeated by the
/// kernel: the next one would meet another frame.
const SINGLE_RUNS: usize = 500;
const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const POD: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
/// Behind the default route.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const PEER_PORT: u16 = 40_000;

/// A program and what it is tried on.
pub struct Case {
    pub program: &'static str,
    device: &'static str,
    pub packet: &'static str,
    pub concern: Concern,
    frame: Vec<u8>,
    /// The frame comes out changed.
    pub changes: bool,
}

/// The same for every node.
pub fn cases() -> Vec<Case> {
    let v4 = |ip: Ipv4Addr, port: u16| SocketAddr::from((ip, port));
    let (client, pod) = (v4(CLIENT, PEER_PORT), v4(POD, 80));
    let elsewhere = v4(ELSEWHERE, 443);
    let v6 = |text: &str, port: u16| SocketAddr::new(text.parse().unwrap_or(CLIENT.into()), port);
    let (near, far) = (v6("2001:db8::2", PEER_PORT), v6("2001:db8:1::9", 443));
    let others = [
        ("TCP", frame(Transport::Tcp, client, elsewhere)),
        ("UDP", frame(Transport::Udp, client, elsewhere)),
        ("ICMP", frame(Transport::Icmp, client, elsewhere)),
        ("TCP, IPv6", frame(Transport::Tcp, near, far)),
        ("UDP, IPv6", frame(Transport::Udp, near, far)),
    ];
    let same_port = frame(Transport::Tcp, client, v4(ELSEWHERE, HOSTPORT.1));
    let call = frame(Transport::Tcp, client, SocketAddr::from(HOSTPORT));
    let forwarded = frame(Transport::Tcp, client, pod);
    let reply = frame(Transport::Tcp, pod, client);

    let mut cases = Vec::new();
    for (program, device) in
        [("pm_uplink_in", "uplink"), ("pm_pod_in", "pod-a"), ("pm_out", "uplink")]
    {
        let mut add = |packet, concern, frame: &[u8], changes| {
            let frame = frame.to_vec();
            cases.push(Case { program, device, packet, concern, frame, changes });
        };
        add("ARP", Concern::Nothing, &arp(), false);
        for (name, frame) in &others {
            add(name, Concern::Others, frame, false);
        }
        add("TCP to elsewhere, port of a claim", Concern::SamePort, &same_port, false);
    }
    let mut ours = |program, device, packet, frame, changes| {
        cases.push(Case { program, device, packet, concern: Concern::Ours, frame, changes });
    };
    ours("pm_uplink_in", "uplink", "TCP to the hostPort", call, true);
    ours("pm_out", "pod-a", "the same to the pod", forwarded, false);
    ours("pm_pod_in", "pod-a", "the pod's reply", reply.clone(), false);
    ours("pm_out", "uplink", "the same to the client", reply, true);
    cases
}

/// Nanoseconds of each case, in the order of `cases`. To be run on the node.
pub fn round(programs: &Programs, cases: &[Case], plan: &Plan) -> Res<Vec<f64>> {
    // Makes the flow that the frames belong to.
    for case in cases.iter().filter(|case| case.concern == Concern::Ours) {
        run(programs, case, 1)?;
    }
    cases
        .iter()
        .map(|case| match case.changes {
            false => run(programs, case, plan.repeats),
            true => single(programs, case),
        })
        .collect()
}

/// One run, with the clock's own time in it.
pub fn single(programs: &Programs, case: &Case) -> Res<f64> {
    let runs = (0..SINGLE_RUNS).map(|_| run(programs, case, 1));
    Ok(median(&runs.collect::<Res<Vec<f64>>>()?))
}

fn run(programs: &Programs, case: &Case, repeat: u32) -> Res<f64> {
    let device = if_nametoindex(case.device)?;
    let trial = programs.get(case.program)?.test_run(&case.frame, device, 0, repeat)?;
    if trial.verdict != NEXT || (trial.packet != case.frame) != case.changes {
        return Err(format!(
            "{} on {}: verdict {:#x}, and the frame was {}: another one is measured than was meant",
            case.program,
            case.packet,
            trial.verdict,
            if trial.packet == case.frame { "left alone" } else { "changed" },
        )
        .into());
    }
    Ok(trial.nanoseconds.into())
}
