//! Flows that could be taken for others.

use portmap::model::Protocol;

use crate::packet::{ACK, FIN, Kind, Packet, RST, SYN};
use crate::rig::{At, CLOSED, GOES_ON, NODE, REMAPPED, SHOT, on_node};

const SYN_ACK: Kind = Kind::Tcp(SYN | ACK);

#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_nodes_own_connections_from_a_claimed_port_stay_its_own() {
    on_node(|rig| {
        rig.claim_any(40000, rig.pod(80));
        for kind in [Kind::Tcp(SYN), Kind::Udp, Kind::Sctp(1)] {
            for at in [At::UplinkIn, At::PodIn] {
                // Or a pod's that it masquerades.
                for (out, flags) in [(At::Own, NODE | GOES_ON), (At::Out, NODE)] {
                    let peer =
                        if at == At::UplinkIn { rig.client(443) } else { rig.other_pod(443) };
                    let own = Packet::new(kind, rig.node(40000), peer);
                    rig.stays(out, &own);
                    assert_eq!(rig.flow(&own.turned()).unwrap().flags, flags);
                    rig.stays(at, &own.turned());
                    // Any other peer of the same port is still forwarded.
                    let call = Packet::new(kind, rig.client(444), rig.node(40000));
                    rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
                    rig.clear("pm_flows");
                }
            }
        }
        assert_eq!(rig.count("nodeFlow"), 24);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn only_addresses_of_the_node_make_connections_of_its_own() {
    on_node(|rig| {
        rig.claim_any(40000, rig.pod(80));
        // A pod's connection from the same port, which nobody masquerades.
        let own = Packet::new(Kind::Udp, rig.other_pod(40000), rig.client(443));
        rig.stays(At::Out, &own);
        assert!(rig.flow(&own.turned()).is_none());
        // Broadcast addresses are listed too.
        rig.list_address(rig.elsewhere(0).ip(), 0);
        let odd = own.from(rig.elsewhere(40000));
        rig.stays(At::Out, &odd);
        assert!(rig.flow(&odd.turned()).is_none());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn answers_that_have_the_hosts_address_are_not_the_nodes_own() {
    on_node(|rig| {
        let (second, port) = rig.call_two_host_ports();
        let call = second.to(rig.node(8080));
        // They pass a second device of ours.
        rig.stays(At::Out, &call.turned());
        rig.stays(At::Out, &second.turned());
        assert_eq!(rig.count("nodeFlow"), 0);
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.becomes(At::UplinkIn, &second, &second.between(rig.client(port), rig.pod(80)));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_new_call_follows_a_connection_of_the_nodes_own() {
    on_node(|rig| {
        rig.claim_any(40000, rig.pod(80));
        let own = Packet::new(Kind::Tcp(SYN), rig.node(40000), rig.client(443));
        rig.stays(At::Own, &own);
        let call = own.turned().with(Kind::Tcp(SYN));
        // The connection is open: even a SYN is for the node.
        rig.stays(At::UplinkIn, &call);
        rig.stays(At::Own, &own.with(Kind::Tcp(FIN | ACK)));
        assert_eq!(rig.flow(&call).unwrap().flags, NODE | CLOSED | GOES_ON);
        // What comes late is still the node's, and the other half of the connection.
        rig.stays(At::UplinkIn, &call.with(Kind::Tcp(ACK)));
        rig.stays(At::UplinkIn, &call.with(SYN_ACK));
        rig.stays(At::UplinkIn, &call);
        rig.stays(At::Own, &own.with(Kind::Tcp(FIN | ACK)));
        rig.age_flow(Protocol::Tcp, rig.node(40000), rig.client(443), 61);
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.becomes(
            At::UplinkIn,
            &call.with(Kind::Tcp(ACK)),
            &call.to(rig.pod(80)).with(Kind::Tcp(ACK)),
        );

        // And one that has long been silent makes room.
        rig.clear("pm_flows");
        let own = Packet::new(Kind::Udp, rig.node(40000), rig.client(443));
        rig.stays(At::Own, &own);
        rig.age_flow(Protocol::Udp, rig.node(40000), rig.client(443), 301);
        let call = own.turned();
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
    });
}

/// An agent of the node that has become a pod with its port, and whose peers go on sending.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_peer_alone_does_not_keep_a_connection_of_the_nodes_own() {
    on_node(|rig| {
        rig.claim_any(8301, rig.pod(8301));
        // The node's process, or another pod that it masquerades.
        for out in [At::Own, At::Out] {
            rig.clear("pm_flows");
            let own = Packet::new(Kind::Udp, rig.node(8301), rig.client(8301));
            let probe = own.turned();
            let later = |seconds| {
                rig.age_flow(Protocol::Udp, rig.node(8301), rig.client(8301), seconds);
            };
            rig.stays(out, &own);
            rig.stays(At::UplinkIn, &probe);
            // While its owner sends now and then, it is the owner's.
            for _ in 0..3 {
                later(200);
                rig.stays(At::UplinkIn, &probe);
                rig.stays(out, &own);
            }
            later(200);
            rig.stays(At::UplinkIn, &probe);
            later(101);
            rig.becomes(At::UplinkIn, &probe, &probe.to(rig.pod(8301)));
        }
    });
}

/// As when the node refused a connection before the port was claimed.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_reset_of_the_nodes_own_begins_no_connection() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        rig.stays(At::Own, &call.turned().with(Kind::Tcp(RST | ACK)));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_connection_of_the_nodes_own_follows_a_closed_call() {
    on_node(|rig| {
        rig.claim_any(40000, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(443), rig.node(40000));
        let forwarded = call.to(rig.pod(80));
        rig.becomes(At::UplinkIn, &call, &forwarded);
        let answer = forwarded.turned().with(Kind::Tcp(RST));
        rig.becomes(At::Out, &answer, &answer.from(rig.node(40000)));
        let own = Packet::new(Kind::Tcp(SYN), rig.node(40000), rig.client(443));
        rig.stays(At::Own, &own);
        assert!(rig.flow(&forwarded).is_none());
        rig.stays(At::UplinkIn, &own.turned());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn direct_connections_to_the_pod_stay_direct() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for kind in [Kind::Tcp(SYN), Kind::Udp, Kind::Sctp(1)] {
            let call = Packet::new(kind, rig.client(40000), rig.node(8080));
            rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
            // From the port of a call that goes on: another one stands for it.
            let direct = call.to(rig.pod(80));
            let port = rig.with_new_port(At::UplinkIn, &direct, &direct);
            let seen = direct.from(rig.client(port));
            assert_eq!(rig.flow(&seen).unwrap().flags, REMAPPED);
            rig.becomes(At::UplinkIn, &direct, &seen);
            rig.becomes(At::Out, &seen.turned(), &direct.turned());
            rig.becomes(At::Out, &direct.turned(), &call.turned());
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn direct_connections_are_known_from_the_first_packet() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let direct = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.pod(80));
        rig.stays(At::UplinkIn, &direct);
        let flow = rig.flow(&direct).unwrap();
        assert_eq!((flow.host, flow.flags), (rig.pod(80), 0));
        rig.stays(At::Out, &direct.turned());
        // A call from the same port gets another one.
        let call = direct.to(rig.node(8080));
        let port = rig.with_new_port(At::UplinkIn, &call, &direct);
        rig.becomes(At::Out, &direct.from(rig.client(port)).turned(), &call.turned());
        rig.stays(At::Out, &direct.turned());
        // They are no traffic of the hostPort.
        assert_eq!(rig.traffic_of(rig.any(8080), Protocol::Tcp)[1], 1);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_port_is_used_again_after_the_connection() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        let direct = call.to(rig.pod(80));
        rig.becomes(At::UplinkIn, &call, &direct);
        for closing in [FIN | ACK, RST] {
            let last = direct.turned().with(Kind::Tcp(closing));
            rig.becomes(At::Out, &last, &last.from(rig.node(8080)));
            assert!(rig.flow(&direct).unwrap().flags & CLOSED != 0);
            // The rest of the old connection goes its way.
            let rest = call.with(Kind::Tcp(FIN | ACK));
            rig.becomes(At::UplinkIn, &rest, &rest.to(rig.pod(80)));
            // A direct connection, and then a call again.
            rig.stays(At::UplinkIn, &direct);
            assert_eq!(rig.flow(&direct).unwrap().flags, 0);
            rig.stays(At::Out, &direct.turned());
            rig.stays(At::Out, &direct.turned().with(Kind::Tcp(RST)));
            rig.becomes(At::UplinkIn, &call, &direct);
        }
        assert_eq!(rig.count("remapped"), 0);
    });
}

/// A pod that has said its last may still listen: only what begins a connection takes the entry over.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_half_closed_connection_is_not_taken_over() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        let direct = call.to(rig.pod(80));
        rig.becomes(At::UplinkIn, &call, &direct);
        let last = direct.turned().with(Kind::Tcp(FIN | ACK));
        rig.becomes(At::Out, &last, &last.from(rig.node(8080)));
        let other = direct.with(Kind::Tcp(ACK));
        rig.with_new_port(At::UplinkIn, &other, &other);
        assert_eq!(rig.flow(&direct).unwrap().host, rig.node(8080));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_silent_flow_makes_room() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for (kind, protocol, packets, limit) in [
            (Kind::Udp, Protocol::Udp, 1, 30),
            (Kind::Udp, Protocol::Udp, 2, 300),
            // Nobody has answered it, or nobody wanted the answer.
            (Kind::Tcp(SYN), Protocol::Tcp, 2, 120),
            (Kind::Sctp(1), Protocol::Sctp, 2, 120),
            (Kind::Tcp(ACK), Protocol::Tcp, 1, 86400),
            (Kind::Sctp(0), Protocol::Sctp, 1, 86400),
        ] {
            rig.clear("pm_flows");
            let call = Packet::new(kind, rig.client(40000), rig.node(8080));
            let direct = call.to(rig.pod(80));
            for _ in 0..packets {
                rig.becomes(At::UplinkIn, &call, &direct);
            }
            rig.age_flow(protocol, rig.pod(80), rig.client(40000), limit - 10);
            rig.with_new_port(At::UplinkIn, &direct, &direct);
            rig.clear("pm_remaps");
            rig.age_flow(protocol, rig.pod(80), rig.client(40000), 20);
            rig.stays(At::UplinkIn, &direct);
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn one_port_calls_two_hostports_of_one_pod() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim_any(8081, rig.pod(80));
        for kind in [Kind::Tcp(SYN), Kind::Udp, Kind::Sctp(1)] {
            let first = Packet::new(kind, rig.client(40000), rig.node(8080));
            rig.becomes(At::UplinkIn, &first, &first.to(rig.pod(80)));
            // By another port, and by another address.
            for host in [rig.node(8081), rig.second(8080)] {
                let call = first.to(host);
                let port = rig.with_new_port(At::UplinkIn, &call, &call.to(rig.pod(80)));
                assert!(!(32768..61000).contains(&port) && port >= 1024, "{port}");
                let seen = call.between(rig.client(port), rig.pod(80));
                rig.becomes(At::UplinkIn, &call, &seen);
                rig.becomes(At::Out, &seen.turned(), &call.turned());
            }
            rig.becomes(At::UplinkIn, &first, &first.to(rig.pod(80)));
            rig.becomes(At::Out, &first.to(rig.pod(80)).turned(), &first.turned());
        }
        assert_eq!(rig.count("remapped"), 6);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_replaced_port_outlives_the_flow_that_took_the_first() {
    on_node(|rig| {
        let (second, port) = rig.call_two_host_ports();
        let forwarded = second.between(rig.client(port), rig.pod(80));
        // The first one is evicted.
        let flows = rig.entries("pm_flows");
        for (key, value) in &flows {
            if value[36] & 1 == 0 {
                assert!(rig.maps["pm_flows"].remove(key).unwrap());
            }
        }
        assert_eq!(rig.entries("pm_flows").len(), flows.len() - 1);
        rig.becomes(At::UplinkIn, &second, &forwarded);
        rig.becomes(At::Out, &forwarded.turned(), &second.turned());
        // Evicted itself, it begins anew.
        rig.clear("pm_flows");
        rig.becomes(At::UplinkIn, &second, &second.to(rig.pod(80)));
    });
}

/// The two maps evict their entries on their own.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_replaced_port_that_has_become_another_peers_is_not_used() {
    on_node(|rig| {
        let (second, before) = rig.call_two_host_ports();
        // Bytes of `struct flow`: host, peer, and the ports of both.
        let another = [(0, 3), (16, 3), (32, 1), (34, 1)];
        for (at, bytes) in another {
            let (key, mut value) = rig
                .entries("pm_flows")
                .into_iter()
                .find(|(key, _)| key[34..36] == before.to_be_bytes())
                .unwrap();
            let whole = value.clone();
            value[at + bytes - 1] ^= 0x40;
            rig.put("pm_flows", &key, &value);
            let after = rig.with_new_port(At::UplinkIn, &second, &second.to(rig.pod(80)));
            assert_ne!(before, after);
            // Back to the first port.
            rig.put("pm_flows", &key, &whole);
            let remaps = rig.entries("pm_remaps");
            rig.put("pm_remaps", &remaps[0].0, &[&before.to_be_bytes()[..], &[0, 0]].concat());
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn without_a_free_port_a_packet_is_dropped_and_counted() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim_any(8081, rig.pod(80));
        let first = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080));
        rig.becomes(At::UplinkIn, &first, &first.to(rig.pod(80)));
        // All of them.
        let (key, value) = rig.entries("pm_flows").remove(0);
        for port in 1024..=u16::MAX {
            let mut key = key.clone();
            key[34..36].copy_from_slice(&port.to_be_bytes());
            rig.maps["pm_flows"].put(&key, &value).unwrap();
        }
        let second = first.to(rig.node(8081));
        rig.gives(At::UplinkIn, &second.frame(), crate::rig::SHOT, &second.frame());
        assert_eq!(rig.count("dropNoPort"), 1);
        // Flows that are known do not mind.
        rig.becomes(At::UplinkIn, &first, &first.to(rig.pod(80)));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn an_evicted_flow_comes_back_with_the_next_packet() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        let data = call.with(Kind::Tcp(ACK));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.clear("pm_flows");
        rig.becomes(At::UplinkIn, &data, &data.to(rig.pod(80)));
        let answer = data.to(rig.pod(80)).turned();
        rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
        // Without one, an answer is nobody's.
        rig.clear("pm_flows");
        rig.stays(At::Out, &answer);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn answers_to_the_nodes_own_calls_at_the_pod_are_no_flows() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        // As connect4 makes them: from the node to the pod.
        let own = Packet::new(SYN_ACK, rig.gateway(40000), rig.pod(80));
        rig.stays(At::Own, &own);
        rig.stays(At::PodIn, &own.turned());
        assert!(rig.entries("pm_flows").is_empty());
        // From a claimed port, they are.
        let own = own.from(rig.gateway(8080));
        rig.stays(At::Own, &own);
        rig.stays(At::PodIn, &own.turned());
    });
}

/// The plugin may not have seen the address yet.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_new_address_of_the_node_makes_connections_of_its_own() {
    on_node(|rig| {
        rig.claim_any(40000, rig.pod(80));
        rig.clear("pm_addresses");
        for kind in [Kind::Udp, Kind::Tcp(SYN)] {
            let own = Packet::new(kind, rig.node(40000), rig.client(443));
            rig.stays(At::Own, &own);
            rig.stays(At::UplinkIn, &own.turned());
            // What is forwarded may be anybody's.
            let other = own.from(rig.other_pod(40000));
            rig.stays(At::Out, &other);
            assert!(rig.flow(&other.turned()).is_none());
        }
    });
}

/// Processors read the clock one after the other.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_packet_of_just_now_is_not_of_long_ago() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080));
        let direct = call.to(rig.pod(80));
        rig.becomes(At::UplinkIn, &call, &direct);
        rig.age_flow(Protocol::Udp, rig.pod(80), rig.client(40000), 2_u32.wrapping_neg());
        let port = rig.with_new_port(At::UplinkIn, &direct, &direct);
        assert_ne!(port, 40000);
    });
}

/// Two calls of one port, one of which had its port replaced: it stays that way in mid-stream, also
/// when the choice is evicted and its own port is free.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_replaced_port_is_found_again() {
    on_node(|rig| {
        let (second, port) = rig.call_two_host_ports();
        let forwarded = second.between(rig.client(port), rig.pod(80));
        rig.clear("pm_remaps");
        rig.becomes(At::UplinkIn, &second, &forwarded);
        rig.becomes(At::Out, &forwarded.turned(), &second.turned());
        assert_eq!(rig.count("remapped"), 1);
    });
}

/// While another version's programs are replaced: answers that nobody can put right yet are sent again.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn answers_by_unknown_connections_are_held_for_a_while() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim_any(8053, rig.pod(53));
        let now = u32::try_from(portmap::sys::monotonic() >> 30).unwrap();
        let answer = Packet::new(Kind::Tcp(ACK), rig.pod(80), rig.client(40000));
        let verdict = |at: At, packet: &Packet| rig.trial(at, &packet.frame()).verdict;
        rig.configure(|config| config.hold_until = now + 30);
        for at in [At::Out, At::PodIn] {
            assert_eq!(verdict(at, &answer), SHOT, "{at:?}");
            // UDP is not sent again, and other ports and senders are nobody's.
            rig.stays(at, &Packet::new(Kind::Udp, rig.pod(53), rig.client(40000)));
            rig.stays(at, &answer.from(rig.pod(8080)));
            rig.stays(at, &answer.from(rig.other_pod(80)));
        }
        assert_eq!(rig.count("held"), 2);
        // So are those that call a hostPort by a connection that is known from the other side.
        let call = Packet::new(Kind::Tcp(SYN), rig.pod(80), rig.node(8053));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(53)));
        assert_eq!(verdict(At::PodIn, &call.with(Kind::Tcp(ACK))), SHOT);
        // Known ones go on, and after a while all do.
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40001), rig.node(8080));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        let known = call.to(rig.pod(80)).turned().with(Kind::Tcp(ACK));
        rig.becomes(At::Out, &known, &known.from(rig.node(8080)));
        rig.configure(|config| config.hold_until = now);
        rig.stays(At::Out, &answer);
        rig.stays(At::PodIn, &answer);
    });
}
