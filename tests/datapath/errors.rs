//! ICMP errors: the quoted packet is turned into the one that its sender knows.

use std::net::SocketAddr;

use crate::packet::{ACK, FRAGMENT, Kind, Packet, SYN, bounced, error, error_kinds, sum};
use crate::rig::{At, NEXT, REDIRECT, Rig, on_node};

const KINDS: [Kind; 4] = [Kind::Tcp(SYN), Kind::Udp, Kind::UdpWithout, Kind::Sctp(0)];

/// `from` sends an error about `before` to `to`, and it becomes one about `after`.
#[track_caller]
fn translated(
    rig: &Rig,
    at: At,
    (from, to): (SocketAddr, SocketAddr),
    before: &Packet,
    (new_from, new_to): (SocketAddr, SocketAddr),
    after: &Packet,
) {
    for kind in error_kinds(rig.is_v4()) {
        for length in [8, 20, before.transport().len()] {
            let frame = error(from.ip(), to.ip(), *kind, &before.quoted(length));
            let expected =
                error(new_from.ip(), new_to.ip(), *kind, &before.quoted_as(after, length));
            match at {
                At::PodIn if rig.trial(at, &frame).verdict == REDIRECT => {
                    rig.gives(at, &frame, REDIRECT, &bounced(&expected));
                }
                _ => rig.gives(at, &frame, NEXT, &expected),
            }
        }
    }
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn errors_about_answers_reach_the_pod() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for kind in KINDS {
            let call = Packet::new(kind, rig.client(40000), rig.node(8080));
            let forwarded = call.to(rig.pod(80));
            rig.becomes(At::UplinkIn, &call, &forwarded);
            let (sent, seen) = (forwarded.turned(), call.turned());
            let after = (rig.client(0), rig.pod(0));
            // From the client itself, and from a router on the way.
            translated(rig, At::UplinkIn, (rig.client(0), rig.node(0)), &seen, after, &sent);
            let router = rig.elsewhere(0);
            let after = (router, rig.pod(0));
            translated(rig, At::UplinkIn, (router, rig.node(0)), &seen, after, &sent);
        }
        assert!(rig.count("icmpIn") > 0);
        // With and without a checksum, UDP is UDP.
        assert_eq!(rig.count("newFlow"), 3);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn errors_about_calls_reach_the_peer() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for kind in KINDS {
            let call = Packet::new(kind, rig.client(40000), rig.node(8080));
            let forwarded = call.to(rig.pod(80));
            rig.becomes(At::UplinkIn, &call, &forwarded);
            // From the pod, and from the node itself, as when the pod's link is narrower.
            let to = rig.client(0);
            translated(rig, At::Out, (rig.pod(0), to), &forwarded, (rig.node(0), to), &call);
            let gateway = rig.gateway(0);
            translated(rig, At::Out, (gateway, to), &forwarded, (gateway, to), &call);
        }
        assert!(rig.count("icmpOut") > 0);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn errors_of_a_peer_with_another_port_have_its_own_again() {
    on_node(|rig| {
        let (second, port) = rig.call_two_host_ports();
        let forwarded = second.between(rig.client(port), rig.pod(80));
        let (client, node, pod) = (rig.client(0), rig.node(0), rig.pod(0));
        translated(rig, At::Out, (pod, client), &forwarded, (node, client), &second);
        let (sent, seen) = (forwarded.turned(), second.turned());
        translated(rig, At::UplinkIn, (client, node), &seen, (client, pod), &sent);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn errors_turn_round_with_a_hairpin() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.pod(40000), rig.node(8080));
        let seen = call.between(rig.dummy(40000), rig.pod(80));
        rig.bounces(At::PodIn, &call, &seen);
        let (pod, dummy, node) = (rig.pod(0), rig.dummy(0), rig.node(0));
        // The server's end is closed, or the caller's.
        translated(rig, At::PodIn, (pod, dummy), &seen, (node, pod), &call);
        translated(rig, At::PodIn, (pod, node), &call.turned(), (dummy, pod), &seen.turned());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn errors_about_anything_else_pass() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(ACK), rig.client(40000), rig.node(8080));
        let kind = error_kinds(rig.is_v4())[0];
        let about = |packet: &Packet, length| {
            error(rig.client(0).ip(), rig.node(0).ip(), kind, &packet.quoted(length))
        };
        // No such flow yet: an error makes none.
        rig.passes(At::UplinkIn, &about(&call.turned(), 20));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        assert_eq!(rig.entries("pm_flows").len(), 1);
        // Another port of the host, another of the peer; too little of the header.
        for other in [call.to(rig.node(8081)), call.from(rig.client(40001))] {
            rig.passes(At::UplinkIn, &about(&other.turned(), 20));
        }
        for length in 0..8 {
            rig.passes(At::UplinkIn, &about(&call.turned(), length));
        }
        // Quoted fragments without ports.
        let fragment = call.turned().sized(100).fragments(48).remove(1);
        let frame = error(rig.client(0).ip(), rig.node(0).ip(), kind, &fragment[14..]);
        rig.passes(At::UplinkIn, &frame);
        // The first fragment of an error: its checksum is for more than there is.
        let mut frame = about(&call.turned(), 20);
        if rig.is_v4() {
            frame[20] |= 0x20;
            frame[24..26].copy_from_slice(&[0, 0]);
            let checksum = !sum(&frame[14..34], 0);
            frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        } else {
            let length = u16::from_be_bytes([frame[18], frame[19]]) + 8;
            frame[18..20].copy_from_slice(&length.to_be_bytes());
            frame[20] = FRAGMENT;
            frame.splice(54..54, [58, 0, 0, 1, 0, 0, 0, 7]);
        }
        rig.passes(At::UplinkIn, &frame);
        // An error about an error, and what is no error.
        let inner = about(&call.turned(), 20);
        let frame = error(rig.client(0).ip(), rig.node(0).ip(), kind, &inner[14..]);
        rig.passes(At::UplinkIn, &frame);
        for kind in [0, 5, 8, 128, 129, 133, 134, 135, 136, 137] {
            let quoted = call.turned().quoted(20);
            let frame = error(rig.client(0).ip(), rig.node(0).ip(), kind, &quoted);
            rig.passes(At::UplinkIn, &frame);
            rig.passes(At::PodIn, &frame);
            rig.passes(At::Out, &frame);
        }
        assert_eq!(rig.entries("pm_flows").len(), 1);
    });
}

/// The quoted packet may have been the first fragment of a larger one.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_quoted_first_fragment_is_not_a_fragment() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080)).sized(100);
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        let (seen, sent) = (call.turned(), call.to(rig.pod(80)).turned());
        let cut = |packet: &Packet| {
            let mut frame = packet.fragments(64).remove(0);
            // The transport checksum stays what it was.
            let at = frame.len() - 64 + packet.kind.checksum();
            frame[at..at + 2].copy_from_slice(&[1, 2]);
            frame.split_off(14)
        };
        let kind = error_kinds(rig.is_v4())[0];
        let frame = error(rig.client(0).ip(), rig.node(0).ip(), kind, &cut(&seen));
        let expected = error(rig.client(0).ip(), rig.pod(0).ip(), kind, &cut(&sent));
        rig.gives(At::UplinkIn, &frame, NEXT, &expected);
        assert!(rig.entries("pm_fragments").is_empty());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn errors_do_not_touch_flows() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        let forwarded = call.to(rig.pod(80));
        rig.becomes(At::UplinkIn, &call, &forwarded);
        let protocol = portmap::model::Protocol::Tcp;
        rig.age_flow(protocol, rig.pod(80), rig.client(40000), 60);
        let before = rig.flow(&forwarded);
        let kind = error_kinds(rig.is_v4())[0];
        let quoted = call.turned().quoted(8);
        let frame = error(rig.client(0).ip(), rig.node(0).ip(), kind, &quoted);
        assert_ne!(rig.trial(At::UplinkIn, &frame).packet, frame);
        assert_eq!(rig.flow(&forwarded), before);
    });
}
