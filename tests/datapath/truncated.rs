//! Packets that end too early: they pass as they are.

use crate::packet::{ACK, DESTINATION, HOP_BY_HOP, Kind, Packet, SYN, error, error_kinds};
use crate::rig::{At, LEAST, NEXT, Rig, on_node};

/// Frames that are changed as a whole, and at which program.
fn samples(rig: &Rig) -> Vec<(At, Vec<u8>)> {
    let mut samples = Vec::new();
    for kind in [Kind::Tcp(SYN), Kind::Udp, Kind::UdpWithout, Kind::Sctp(1), Kind::SctpWithout] {
        let mut call = Packet::new(kind, rig.client(40000), rig.node(8080)).sized(5);
        samples.push((At::UplinkIn, call.frame()));
        samples.push((At::PodIn, call.frame()));
        samples.push((At::PodIn, call.from(rig.pod(40000)).frame()));
        samples.push((At::Out, call.to(rig.pod(80)).turned().frame()));
        if rig.is_v4() {
            call.options = vec![1; 12];
        } else {
            let padding = vec![0, 0, 1, 4, 0, 0, 0, 0];
            call.extensions = vec![(HOP_BY_HOP, padding.clone()), (DESTINATION, padding)];
        }
        samples.push((At::UplinkIn, call.frame()));
    }
    let call = Packet::new(Kind::Tcp(ACK), rig.client(40000), rig.node(8080));
    for kind in error_kinds(rig.is_v4()) {
        let quoted = call.turned().quoted(8);
        let frame = error(rig.client(0).ip(), rig.node(0).ip(), *kind, &quoted);
        samples.push((At::UplinkIn, frame));
    }
    let long = Packet::new(Kind::Udp, rig.client(40002), rig.node(8080)).sized(100);
    samples.push((At::UplinkIn, long.fragments(64).remove(0)));
    samples
}

fn prepare(rig: &Rig) {
    rig.claim_any(8080, rig.pod(80));
    let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
    for kind in [Kind::Tcp(SYN), Kind::Udp, Kind::Sctp(1)] {
        rig.becomes(At::UplinkIn, &call.with(kind), &call.with(kind).to(rig.pod(80)));
    }
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn frames_of_every_length_pass_unless_they_are_whole() {
    on_node(|rig| {
        prepare(rig);
        for (at, frame) in samples(rig) {
            assert_ne!(rig.trial(at, &frame).packet, frame, "{at:?}");
            // Newer kernels try nothing without a whole IP header.
            for length in LEAST..frame.len() {
                rig.passes(at, &frame[..length]);
            }
            // Padding behind the packet stays.
            let padded = [frame.as_slice(), &[0; 9]].concat();
            let trial = rig.trial(at, &padded);
            assert_ne!(trial.packet, padded);
            assert_eq!(trial.packet[frame.len()..], [0; 9]);
            assert_eq!(trial.packet[..frame.len()], rig.trial(at, &frame).packet);
        }
        assert_eq!(rig.count("dropRewrite"), 0);
    });
}

/// The IP header says that the packet ends within the frame.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn packets_without_their_headers_pass() {
    on_node(|rig| {
        prepare(rig);
        for (at, frame) in samples(rig) {
            let place = if rig.is_v4() { 16 } else { 18 };
            let whole = u16::from_be_bytes([frame[place], frame[place + 1]]);
            let mut changed = 0;
            for length in 0..whole {
                let mut frame = frame.clone();
                frame[place..place + 2].copy_from_slice(&length.to_be_bytes());
                let trial = rig.trial(at, &frame);
                let behind = 14 + usize::from(length) + if rig.is_v4() { 0 } else { 40 };
                assert_eq!(trial.packet[behind..], frame[behind..], "{at:?} {length}");
                if trial.packet == frame {
                    // Once there is enough of it, there is.
                    assert_eq!(changed, 0, "{at:?} {length}");
                    assert_eq!(trial.verdict, NEXT);
                } else {
                    changed += 1;
                }
            }
        }
        assert_eq!(rig.count("dropRewrite"), 0);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn broken_ip_headers_pass() {
    on_node(|rig| {
        prepare(rig);
        for (at, frame) in samples(rig) {
            for first in 0..=u8::MAX {
                if rig.is_v4() && first == frame[14] || !rig.is_v4() && first >> 4 == 6 {
                    continue;
                }
                // Other versions; lengths that put the transport header elsewhere are tried with
                // random packets.
                if rig.is_v4() && first >> 4 == 4 && first & 15 >= 5 {
                    continue;
                }
                let mut frame = frame.clone();
                frame[14] = first;
                rig.passes(at, &frame);
            }
        }
    });
}
