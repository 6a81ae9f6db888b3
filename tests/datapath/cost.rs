//! What packets cost that no hostPort concerns. Figures to look at, with
//! `cargo test --release --test datapath -- --ignored --nocapture cost`: nothing is asserted.

use crate::packet::{ACK, Kind, Packet, error};
use crate::rig::{At, Rig, on_node};

const TIMES: u32 = 50_000;
const ROUNDS: usize = 7;

/// The fastest of some rounds, in nanoseconds a packet.
fn nanoseconds(rig: &Rig, at: At, frame: &[u8]) -> u32 {
    let rounds = (0..ROUNDS).map(|_| rig.repeated(at, frame, TIMES).nanoseconds);
    rounds.min().unwrap_or_default()
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn cost_of_packets() {
    on_node(|rig| {
        for port in 0..1000 {
            rig.claim_any(20000 + port, rig.pod(80));
        }
        // A claim that changes nothing, so that every repetition finds the same packet.
        rig.claim_any(8080, rig.node(8080));
        let other = Packet::new(Kind::Tcp(ACK), rig.client(50000), rig.node(443)).sized(1000);
        let mut arp = other.frame();
        arp[12..14].copy_from_slice(&[8, 6]);
        let mut echo = error(rig.client(0).ip(), rig.node(0).ip(), 8, &[0; 56]);
        echo[14 + other.ip().len() - other.transport().len()] = if rig.is_v4() { 8 } else { 128 };
        let fragment = other.with(Kind::Udp).fragments(800).remove(1);
        let quoted = other.turned().quoted(8);
        let kind = if rig.is_v4() { 3 } else { 1 };
        let error = error(rig.client(0).ip(), rig.node(0).ip(), kind, &quoted);
        let claimed = other.to(rig.node(8080));
        for (what, frame) in [
            ("other protocol", arp),
            ("TCP", other.frame()),
            ("UDP", other.with(Kind::Udp).frame()),
            ("echo request", echo),
            ("later fragment", fragment),
            ("ICMP error", error),
            ("known port, no flow", other.from(rig.client(80)).frame()),
            ("claim, flow known", claimed.frame()),
        ] {
            let of = |at| nanoseconds(rig, at, &frame);
            println!(
                "{} {what:20} uplink {:4} ns, pod {:4} ns, out {:4} ns",
                if rig.is_v4() { "IPv4" } else { "IPv6" },
                of(At::UplinkIn),
                of(At::PodIn),
                of(At::Out),
            );
        }
    });
}
