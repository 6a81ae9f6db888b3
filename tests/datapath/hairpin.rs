//! A pod that calls its own hostPort.

use crate::packet::{ACK, KINDS, Kind, Packet, SYN};
use crate::rig::{At, HAIRPIN, REDIRECT, REMAPPED, on_node};

#[test]
#[ignore = "privileged: loads BPF programs"]
fn packets_turn_round_at_the_pods_link() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for (number, kind) in KINDS.into_iter().enumerate() {
            let peer = rig.pod(40000 + u16::try_from(number).unwrap());
            for host in [rig.node(8080), rig.second(8080), rig.gateway(8080)] {
                let call = Packet::new(kind, peer, host);
                let trial = rig.trial(At::PodIn, &call.frame());
                let at = trial.packet.len() - call.transport().len();
                let port = u16::from_be_bytes([trial.packet[at], trial.packet[at + 1]]);
                let seen = call.between(rig.dummy(port), rig.pod(80));
                // Every other packet of it goes the same way.
                rig.bounces(At::PodIn, &call, &seen);
                let flow = rig.flow(&seen).unwrap();
                assert_eq!((flow.host, flow.peer), (host, peer));
                assert_eq!(flow.flags & (HAIRPIN | REMAPPED), HAIRPIN | REMAPPED);
                let answer = seen.turned();
                rig.bounces(At::PodIn, &answer, &call.turned());
                // Both pass the link's egress on their way back.
                rig.stays(At::Bounced, &seen.bounced());
                rig.stays(At::Bounced, &call.turned().bounced());
                assert!(rig.flow(&call.turned().turned()).is_none());
            }
        }
        assert_eq!(rig.count("nodeFlow"), 0);
        assert_eq!(rig.count("remapped"), 0);
        assert!(rig.count("hairpin") > 0 && rig.count("answered") > 0);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn only_the_pod_itself_is_turned_round() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim_any(9090, rig.other_pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.pod(40000), rig.node(9090));
        rig.becomes(At::PodIn, &call, &call.to(rig.other_pod(80)));
        // A pod's address from outside is not the pod.
        let spoofed = call.to(rig.node(8080));
        rig.becomes(At::UplinkIn, &spoofed, &spoofed.to(rig.pod(80)));
        // And nobody can forge that away from the pod itself.
        let trial = rig.trial(At::PodIn, &spoofed.frame());
        assert_eq!(trial.verdict, REDIRECT);
        // Without a claim, nothing is.
        rig.stays(At::PodIn, &call.to(rig.node(1)));
        rig.stays(At::PodIn, &call.to(rig.elsewhere(8080)));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_hairpin_is_counted_for_its_claim() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.pod(40000), rig.node(8080));
        let seen = call.between(rig.dummy(40000), rig.pod(80));
        rig.bounces(At::PodIn, &call, &seen);
        rig.bounces(At::PodIn, &call.with(Kind::Tcp(ACK)), &seen.with(Kind::Tcp(ACK)));
        rig.bounces(At::PodIn, &seen.turned(), &call.turned());
        let length = u64::try_from(call.ip().len()).unwrap();
        let traffic = rig.traffic_of(rig.any(8080), portmap::model::Protocol::Tcp);
        assert_eq!(traffic, [1, 2, 2 * length, 1, length]);
    });
}

/// masqAll is for the pod's own calls as well: no other address is to be seen.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_masqueraded_hairpin_comes_from_the_node() {
    on_node(|rig| {
        let source = rig.gateway(0).ip();
        rig.claim_with(rig.any(8080), rig.pod(80), |claim| {
            claim.flags |= portmap::backend::ebpf::layout::claim_flags::MASQUERADE;
            claim.source = source.into();
        });
        // Not a port that the node's sockets get by themselves.
        for (own, kept) in [(20000, true), (40000, false)] {
            let call = Packet::new(Kind::Udp, rig.pod(own), rig.node(8080));
            let trial = rig.trial(At::PodIn, &call.frame());
            let at = trial.packet.len() - call.transport().len();
            let port = u16::from_be_bytes([trial.packet[at], trial.packet[at + 1]]);
            assert_eq!(port == own, kept);
            let seen = call.between(rig.gateway(port), rig.pod(80));
            rig.bounces(At::PodIn, &call, &seen);
            rig.stays(At::Bounced, &seen.bounced());
            rig.bounces(At::PodIn, &seen.turned(), &call.turned());
        }
        assert_eq!(rig.count("masqueraded"), 0);
    });
}

/// An evicted choice must not turn the pod's packets over to the node, whoever speaks next.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_hairpin_goes_on_when_the_choice_is_forgotten() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(ACK), rig.pod(40000), rig.node(8080));
        let seen = call.between(rig.dummy(40000), rig.pod(80));
        rig.bounces(At::PodIn, &call, &seen);
        rig.clear("pm_remaps");
        rig.bounces(At::PodIn, &seen.turned(), &call.turned());
        rig.stays(At::Bounced, &call.turned().bounced());
        assert_eq!(rig.count("nodeFlow"), 0);
        rig.bounces(At::PodIn, &call, &seen);
        rig.stays(At::Bounced, &seen.bounced());
        rig.bounces(At::PodIn, &seen.turned(), &call.turned());
    });
}
