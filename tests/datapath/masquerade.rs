//! masqAll: the pod sees an address of the node.

use std::net::SocketAddr;

use portmap::backend::ebpf::layout::claim_flags;
use portmap::model::Protocol;

use zerocopy::IntoBytes;

use crate::packet::{ACK, FIN, KINDS, Kind, Packet, RST, SYN, error, error_kinds};
use crate::rig::{At, CLOSED, GOES_ON, MASQUERADED, NEXT, NODE, OWNER, PEER_CLOSED, Rig, on_node};

fn claim(rig: &Rig, port: u16) {
    let source = rig.gateway(0).ip();
    rig.claim_with(rig.any(port), rig.pod(80), |claim| {
        claim.flags |= claim_flags::MASQUERADE;
        claim.source = source.into();
    });
}

/// Sends `call` in and out to the pod; returns what the pod sees.
#[track_caller]
fn masqueraded(rig: &Rig, call: &Packet, forwarded: &Packet) -> Packet {
    rig.becomes(At::UplinkIn, call, forwarded);
    let expected = forwarded.from(rig.gateway(0));
    let port = rig.with_new_port(At::Out, forwarded, &expected);
    expected.from(rig.gateway(port))
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_pod_sees_the_node_and_the_peer_sees_the_host() {
    on_node(|rig| {
        claim(rig, 8080);
        for (number, kind) in KINDS.into_iter().enumerate() {
            for port in [20000, 40000, 62000] {
                let peer = rig.client(port + u16::try_from(number).unwrap());
                let call = Packet::new(kind, peer, rig.node(8080));
                let forwarded = call.to(rig.pod(80));
                let seen = masqueraded(rig, &call, &forwarded);
                // A port that no socket of the node gets by itself: the peer's, or another.
                let chosen = seen.source.port();
                assert!(!(32768..61000).contains(&chosen) && chosen >= 1024, "{chosen}");
                assert_eq!(chosen == peer.port(), !(32768..61000).contains(&peer.port()));
                let flow = rig.flow(&seen).unwrap();
                assert_eq!(
                    (flow.peer, flow.flags & !GOES_ON, flow.owner),
                    (peer, MASQUERADED, OWNER)
                );
                // The same for the next packet.
                rig.becomes(At::Out, &forwarded, &seen);
                let answer = seen.turned();
                rig.becomes(At::PodIn, &answer, &answer.to(peer));
                rig.becomes(At::Out, &answer.to(peer), &call.turned());
            }
        }
        assert!(rig.count("masqueraded") > 0);
        assert_eq!(rig.count("nodeFlow"), 0);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn peers_with_the_same_port_are_told_apart() {
    on_node(|rig| {
        claim(rig, 8080);
        let first = Packet::new(Kind::Udp, rig.client(20000), rig.node(8080));
        let second = first.from(rig.other_pod(20000));
        let one = masqueraded(rig, &first, &first.to(rig.pod(80)));
        let two = masqueraded(rig, &second, &second.to(rig.pod(80)));
        assert_ne!(one.source, two.source);
        for (call, seen) in [(first, one), (second, two)] {
            let answer = seen.turned();
            rig.becomes(At::PodIn, &answer, &answer.to(call.source));
            rig.becomes(At::Out, &answer.to(call.source), &call.turned());
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_peer_with_another_port_is_masqueraded_by_it() {
    on_node(|rig| {
        claim(rig, 8080);
        claim(rig, 8081);
        let first = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        masqueraded(rig, &first, &first.to(rig.pod(80)));
        let second = first.to(rig.node(8081));
        let port = rig.with_new_port(At::UplinkIn, &second, &second.to(rig.pod(80)));
        let forwarded = second.between(rig.client(port), rig.pod(80));
        let seen = masqueraded(rig, &second, &forwarded);
        let answer = seen.turned();
        rig.becomes(At::PodIn, &answer, &answer.to(rig.client(port)));
        rig.becomes(At::Out, &answer.to(rig.client(port)), &second.turned());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn direct_connections_are_not_masqueraded() {
    on_node(|rig| {
        claim(rig, 8080);
        let direct = Packet::new(Kind::Udp, rig.client(20000), rig.pod(80));
        rig.stays(At::UplinkIn, &direct);
        rig.stays(At::Out, &direct);
        rig.stays(At::PodIn, &direct.turned());
        rig.stays(At::Out, &direct.turned());
        // Not even those that nobody has seen come in.
        rig.stays(At::Out, &direct.from(rig.other_pod(20000)));
        assert_eq!(rig.count("masqueraded"), 0);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_nodes_own_connections_keep_their_ports() {
    on_node(|rig| {
        claim(rig, 8080);
        let own = Packet::new(Kind::Udp, rig.gateway(20000), rig.pod(80));
        rig.stays(At::Own, &own);
        assert_eq!(rig.flow(&own).unwrap().flags, NODE | GOES_ON);
        let call = Packet::new(Kind::Udp, rig.client(20000), rig.node(8080));
        let seen = masqueraded(rig, &call, &call.to(rig.pod(80)));
        assert_ne!(seen.source.port(), 20000);
        rig.stays(At::PodIn, &own.turned());
        rig.becomes(At::PodIn, &seen.turned(), &seen.turned().to(rig.client(20000)));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn fragments_are_masqueraded_both_ways() {
    on_node(|rig| {
        claim(rig, 8080);
        let call = Packet::new(Kind::Udp, rig.client(20000), rig.node(8080)).sized(1000);
        let forwarded = call.to(rig.pod(80));
        let seen = forwarded.from(rig.gateway(20000));
        let answer = seen.turned();
        let back = answer.to(rig.client(20000));
        for (at, packet, expected) in [
            (At::UplinkIn, &call, &forwarded),
            (At::Out, &forwarded, &seen),
            (At::PodIn, &answer, &back),
            (At::Out, &back, &call.turned()),
        ] {
            for (frame, expected) in packet.fragments(400).iter().zip(expected.fragments(400)) {
                rig.gives(at, frame, NEXT, &expected);
            }
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn errors_are_masqueraded_both_ways() {
    on_node(|rig| {
        claim(rig, 8080);
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080));
        let forwarded = call.to(rig.pod(80));
        let seen = masqueraded(rig, &call, &forwarded);
        let kind = error_kinds(rig.is_v4())[0];
        let check = |at,
                     from: SocketAddr,
                     to: SocketAddr,
                     before: &Packet,
                     after: [SocketAddr; 2],
                     packet: &Packet| {
            let frame = error(from.ip(), to.ip(), kind, &before.quoted(20));
            let quoted = before.quoted_as(packet, 20);
            rig.gives(at, &frame, NEXT, &error(after[0].ip(), after[1].ip(), kind, &quoted));
        };
        // The pod's port is closed: in from the pod, out to the client.
        let (pod, gateway, client, node) = (rig.pod(0), rig.gateway(0), rig.client(0), rig.node(0));
        check(At::PodIn, pod, gateway, &seen, [pod, client], &forwarded);
        check(At::Out, pod, client, &forwarded, [node, client], &call);
        // The client's is: in from the client, out to the pod.
        check(At::UplinkIn, client, node, &call.turned(), [client, pod], &forwarded.turned());
        check(At::Out, client, pod, &forwarded.turned(), [gateway, pod], &seen.turned());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn ports_of_closed_connections_are_used_again() {
    on_node(|rig| {
        claim(rig, 8080);
        let call = Packet::new(Kind::Tcp(SYN), rig.client(20000), rig.node(8080));
        let seen = masqueraded(rig, &call, &call.to(rig.pod(80)));
        let forwarded = call.to(rig.pod(80));
        let [ack, fin] = [ACK, FIN | ACK].map(|flags| seen.turned().with(Kind::Tcp(flags)));
        // The pod has no more to say, but the client has: the port stays its own.
        rig.becomes(At::Out, &forwarded.with(ack.kind), &seen.with(ack.kind));
        rig.becomes(At::PodIn, &fin, &fin.to(call.source));
        let other = call.from(rig.other_pod(20000));
        let beside = masqueraded(rig, &other, &other.to(rig.pod(80)));
        assert_ne!(beside.source, seen.source);
        rig.becomes(At::Out, &forwarded.with(ack.kind), &seen.with(ack.kind));
        rig.becomes(At::PodIn, &ack, &ack.to(call.source));
        let third = call.from(rig.elsewhere(20000));
        rig.age_flow(Protocol::Tcp, rig.pod(80), seen.source, 61);
        let again = masqueraded(rig, &third, &third.to(rig.pod(80)));
        assert_eq!(again.source, seen.source);
        rig.becomes(At::PodIn, &again.turned(), &again.turned().to(third.source));
    });
}

/// Refused, and asked again.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_port_of_a_refused_connection_is_free_at_once() {
    on_node(|rig| {
        claim(rig, 8080);
        let call = Packet::new(Kind::Tcp(SYN), rig.client(20000), rig.node(8080));
        let seen = masqueraded(rig, &call, &call.to(rig.pod(80)));
        let refusal = seen.turned().with(Kind::Tcp(RST | ACK));
        rig.becomes(At::PodIn, &refusal, &refusal.to(call.source));
        let other = call.from(rig.other_pod(20000));
        let again = masqueraded(rig, &other, &other.to(rig.pod(80)));
        assert_eq!(again.source, seen.source);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn ports_are_free_when_they_are_scarce() {
    on_node(|rig| {
        claim(rig, 8080);
        let call = Packet::new(Kind::Tcp(ACK), rig.client(20000), rig.node(8080));
        masqueraded(rig, &call, &call.to(rig.pod(80)));
        // Connections of others have all ports.
        let (key, value) = rig
            .entries("pm_flows")
            .into_iter()
            .find(|(_, value)| u32::from(value[36]) & MASQUERADED != 0)
            .unwrap();
        let fill = |flags: u32, age: u32| {
            let mut value = value.clone();
            value[31] ^= 0x40;
            value[36..40].copy_from_slice(&(MASQUERADED | GOES_ON | flags).to_ne_bytes());
            let last = u32::from_ne_bytes(value[44..48].try_into().unwrap());
            value[44..48].copy_from_slice(&last.wrapping_sub(age).to_ne_bytes());
            for port in 1024..=u16::MAX {
                let mut key = key.clone();
                key[34..36].copy_from_slice(&port.to_be_bytes());
                rig.put("pm_flows", &key, &value);
            }
        };
        let mut peer = 21000;
        for (flags, age, free) in [
            (0, 0, false),
            (CLOSED, 0, true),
            (PEER_CLOSED, 0, false),
            (PEER_CLOSED, 61, true),
            (0, 86401, true),
        ] {
            fill(flags, age);
            peer += 1;
            let other = call.from(SocketAddr::new(call.source.ip(), peer));
            let forwarded = other.to(rig.pod(80));
            rig.becomes(At::UplinkIn, &other, &forwarded);
            let verdict = rig.trial(At::Out, &forwarded.frame()).verdict;
            assert_eq!(verdict == NEXT, free, "{flags} {age}");
        }
    });
}

/// An evicted choice must not end a connection.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_flow_keeps_its_port_when_the_choice_is_forgotten() {
    on_node(|rig| {
        claim(rig, 8080);
        for kind in [Kind::Tcp(ACK), Kind::Udp, Kind::Sctp(0)] {
            // A port of its own; one that is chosen; and one that is, because another peer had it.
            let calls = [rig.client(20000), rig.client(40000), rig.other_pod(20000)]
                .map(|peer| Packet::new(kind, peer, rig.node(8080)));
            let seen = calls.clone().map(|call| masqueraded(rig, &call, &call.to(rig.pod(80))));
            rig.clear("pm_remaps");
            // The port that the last one wanted is free by now.
            let first = portmap::backend::ebpf::layout::FlowKey::new(
                rig.pod(80),
                seen[0].source,
                protocol(kind),
            );
            assert!(rig.maps["pm_flows"].remove(first.as_bytes()).unwrap());
            for (call, seen) in calls.iter().zip(&seen).skip(1) {
                rig.becomes(At::Out, &call.to(rig.pod(80)), seen);
                rig.becomes(At::PodIn, &seen.turned(), &seen.turned().to(call.source));
            }
            rig.clear("pm_flows");
            rig.clear("pm_remaps");
        }
    });
}

/// The node, or kube-proxy for others, may call a pod from a port that stands for a client's.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn other_connections_of_the_node_are_told_from_masqueraded_ones() {
    on_node(|rig| {
        claim(rig, 8080);
        for (number, kind) in [Kind::Tcp(SYN), Kind::Udp, Kind::Sctp(1)].into_iter().enumerate() {
            let peer = rig.client(40000 + u16::try_from(number).unwrap());
            let call = Packet::new(kind, peer, rig.node(8080));
            let seen = masqueraded(rig, &call, &call.to(rig.pod(80)));
            for at in [At::Own, At::Out] {
                let own = seen.clone();
                let port = rig.with_new_port(at, &own, &own);
                assert_ne!(port, seen.source.port());
                let moved = own.from(rig.gateway(port));
                rig.becomes(at, &own, &moved);
                rig.becomes(At::PodIn, &moved.turned(), &own.turned());
            }
            rig.becomes(At::PodIn, &seen.turned(), &seen.turned().to(peer));
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn ports_are_chosen_beside_those_that_sockets_get() {
    on_node(|rig| {
        claim(rig, 8080);
        for (range, free) in [(1024..=60000, 60001..=u16::MAX), (10000..=u16::MAX, 1024..=9999)] {
            rig.configure(|config| config.keep_free(&range));
            for number in 0..100 {
                let peer = SocketAddr::new(rig.client(0).ip(), *range.end() - number);
                let call = Packet::new(Kind::Udp, peer, rig.node(8080));
                let port = masqueraded(rig, &call, &call.to(rig.pod(80))).source.port();
                assert!(free.contains(&port), "{port}");
            }
        }
    });
}

fn protocol(kind: Kind) -> Protocol {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    all.into_iter().find(|protocol| protocol.number() == kind.protocol()).unwrap()
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn nothing_is_dropped_before_all_ports_are_tried() {
    on_node(|rig| {
        claim(rig, 8080);
        // A port that is taken has a connection that is open.
        let call = Packet::new(Kind::Tcp(SYN), rig.client(20000), rig.node(8080));
        for number in 0..200 {
            let peer = SocketAddr::new(rig.client(0).ip(), 33000 + number);
            masqueraded(rig, &call.from(peer), &call.between(peer, rig.pod(80)));
        }
        let chosen: Vec<_> = rig.entries("pm_remaps");
        assert_eq!(chosen.len(), 200);
        assert_eq!(rig.count("dropNoPort"), 0);
        let traffic = rig.traffic_of(rig.any(8080), Protocol::Tcp);
        assert_eq!(traffic[0], 200);
    });
}
