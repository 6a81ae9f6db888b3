//! Fragments: only the first has ports.

use crate::packet::{DESTINATION, Kind, Packet, SYN};
use crate::rig::{At, NEXT, REDIRECT, on_node};

/// Datagrams that are in three pieces.
const SIZE: usize = 400;

#[test]
#[ignore = "privileged: loads BPF programs"]
fn all_fragments_go_the_way_of_the_first() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for kind in [Kind::Udp, Kind::UdpWithout, Kind::Tcp(SYN)] {
            let call = Packet::new(kind, rig.client(40000), rig.node(8080)).sized(1000);
            let answer = call.to(rig.pod(80)).turned();
            for (at, packet, expected) in [
                (At::UplinkIn, &call, call.to(rig.pod(80))),
                (At::Out, &answer, answer.from(rig.node(8080))),
            ] {
                let frames = packet.fragments(SIZE);
                assert_eq!(frames.len(), 3);
                // The last before the one in the middle.
                for index in [0, 2, 1] {
                    rig.gives(at, &frames[index], NEXT, &expected.fragments(SIZE)[index]);
                }
                // In the other direction, it is another datagram.
                let other = if at == At::Out { At::UplinkIn } else { At::Out };
                rig.passes(other, &frames[1]);
            }
            rig.clear("pm_fragments");
        }
        assert_eq!((rig.count("fragmentIn"), rig.count("fragmentOut")), (6, 6));
        // Later fragments are of no flow that is known, and counted by themselves alone.
        assert_eq!((rig.count("forwarded"), rig.count("answered")), (3, 3));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_later_fragment_before_the_first_passes() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080)).sized(1000);
        let expected = call.to(rig.pod(80)).fragments(SIZE);
        let frames = call.fragments(SIZE);
        rig.passes(At::UplinkIn, &frames[1]);
        rig.gives(At::UplinkIn, &frames[0], NEXT, &expected[0]);
        rig.gives(At::UplinkIn, &frames[2], NEXT, &expected[2]);
        // Of another datagram, and of another peer.
        let mut other = call.clone();
        other.id = 8;
        rig.passes(At::UplinkIn, &other.fragments(SIZE)[1]);
        rig.passes(At::UplinkIn, &call.from(rig.elsewhere(40000)).fragments(SIZE)[1]);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn numbers_of_datagrams_are_used_again() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080)).sized(1000);
        for (frame, expected) in
            call.fragments(SIZE).iter().zip(call.to(rig.pod(80)).fragments(SIZE))
        {
            rig.gives(At::UplinkIn, frame, NEXT, &expected);
        }
        // To a port of the node's own, by the same number.
        for frame in call.to(rig.node(53)).fragments(SIZE) {
            rig.passes(At::UplinkIn, &frame);
        }
        assert!(rig.entries("pm_fragments").is_empty());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn direct_connections_leave_no_trace_of_fragments() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let direct = Packet::new(Kind::Udp, rig.client(40000), rig.pod(80)).sized(1000);
        for frame in direct.fragments(SIZE) {
            rig.passes(At::UplinkIn, &frame);
        }
        for frame in direct.turned().fragments(SIZE) {
            rig.passes(At::Out, &frame);
        }
        assert!(rig.entries("pm_fragments").is_empty());
        assert!(rig.flow(&direct).is_some());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_first_fragment_without_the_whole_header_passes() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        // 8 bytes are enough for UDP's.
        for (kind, size) in [(Kind::Tcp(SYN), 16), (Kind::Sctp(0), 8)] {
            let call = Packet::new(kind, rig.client(40000), rig.node(8080));
            for frame in call.fragments(size) {
                rig.passes(At::UplinkIn, &frame);
            }
        }
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080));
        rig.gives(At::UplinkIn, &call.fragments(8)[0], NEXT, &call.to(rig.pod(80)).fragments(8)[0]);
    });
}

/// RFC 6946: an offset of 0 and nothing to follow.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn atomic_fragments_are_whole_packets() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Sctp(1), rig.client(40000), rig.node(8080));
        rig.gives(
            At::UplinkIn,
            &call.fragments(1000)[0],
            NEXT,
            &call.to(rig.pod(80)).fragments(1000)[0],
        );
        assert!(rig.entries("pm_fragments").is_empty());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn fragments_of_a_hairpin_are_bounced_both_ways() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.pod(40000), rig.node(8080)).sized(1000);
        let bounced = call.between(rig.dummy(40000), rig.pod(80)).bounced().fragments(SIZE);
        let frames = call.fragments(SIZE);
        rig.passes(At::PodIn, &frames[1]);
        for index in [0, 2, 1] {
            rig.gives(At::PodIn, &frames[index], REDIRECT, &bounced[index]);
        }
        let answer = call.between(rig.pod(80), rig.dummy(40000));
        let expected = answer.between(rig.node(8080), rig.pod(40000)).bounced().fragments(SIZE);
        for (frame, expected) in answer.fragments(SIZE).iter().zip(expected) {
            rig.gives(At::PodIn, frame, REDIRECT, &expected);
        }
    });
}

/// RFC 8200, 4.5: what the fragment headers say comes next need not be the same.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn ipv6_options_behind_the_fragment_header_are_read() {
    on_node(|rig| {
        if rig.is_v4() {
            return;
        }
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080)).sized(1000);
        // 8 bytes of options between fragment and transport header.
        let options = [17, 0, 1, 4, 0, 0, 0, 0];
        let insert = |mut frame: Vec<u8>| {
            frame.splice(14 + 48..14 + 48, options);
            frame[14 + 40] = DESTINATION;
            let length = u16::from_be_bytes([frame[18], frame[19]]) + 8;
            frame[18..20].copy_from_slice(&length.to_be_bytes());
            frame
        };
        let (frames, expected) = (call.fragments(SIZE), call.to(rig.pod(80)).fragments(SIZE));
        rig.gives(At::UplinkIn, &insert(frames[0].clone()), NEXT, &insert(expected[0].clone()));
        rig.gives(At::UplinkIn, &frames[1], NEXT, &expected[1]);
    });
}
