//! To a pod and back.

use std::collections::BTreeMap;

use portmap::model::Protocol;

use crate::packet::{ACK, KINDS, Kind, Packet, SYN};
use crate::rig::{ANY, At, OWNER, on_node};

#[test]
#[ignore = "privileged: loads BPF programs"]
fn packets_go_to_the_pod_and_answers_come_from_the_host() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for (number, kind) in KINDS.into_iter().enumerate() {
            let peer = rig.client(40000 + u16::try_from(number).unwrap());
            let call = Packet::new(kind, peer, rig.node(8080));
            rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
            let flow = rig.flow(&call.to(rig.pod(80))).unwrap();
            assert_eq!((flow.host, flow.flags, flow.owner), (rig.node(8080), ANY, OWNER));
            assert!(flow.last.unwrap() > 0);
            let answer = call.to(rig.pod(80)).turned();
            rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
            // And so does every other packet of both.
            rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        }
        let flows = u64::try_from(KINDS.len()).unwrap();
        let counts = rig.counts();
        assert_eq!(counts["forwarded"], 2 * flows);
        assert_eq!(counts["answered"], flows);
        assert_eq!(counts["newFlow"], flows);
        // Real ones only, of which three packets each were changed.
        assert_eq!(counts["sctpChecksum"], 3);
        assert_eq!(counts.len(), 4, "{counts:?}");
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn pods_and_gateways_reach_pods() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for host in [rig.node(8080), rig.second(8080), rig.gateway(8080)] {
            for kind in KINDS {
                let call = Packet::new(kind, rig.other_pod(40000), host);
                rig.becomes(At::PodIn, &call, &call.to(rig.pod(80)));
                let answer = call.to(rig.pod(80)).turned();
                // On its way in from the pod it stays what it is, and becomes the host's at the
                // link of the one that called.
                rig.stays(At::PodIn, &answer);
                rig.becomes(At::Out, &answer, &answer.from(host));
                rig.clear("pm_flows");
            }
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn traffic_is_counted_for_the_claim_where_the_plugin_asks_for_it() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim(rig.second(8080), rig.other_pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080)).sized(1000);
        let specific = call.to(rig.second(8080));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.becomes(
            At::UplinkIn,
            &call.with(Kind::Tcp(ACK)),
            &call.to(rig.pod(80)).with(Kind::Tcp(ACK)),
        );
        let answer = call.to(rig.pod(80)).turned().sized(10);
        rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
        rig.becomes(At::UplinkIn, &specific, &specific.to(rig.other_pod(80)));

        let length = |packet: &Packet| u64::try_from(packet.ip().len()).unwrap();
        let any = rig.traffic_of(rig.any(8080), Protocol::Tcp);
        assert_eq!(any, [1, 2, 2 * length(&call), 1, length(&answer)]);
        let specific = rig.traffic_of(rig.second(8080), Protocol::Tcp);
        assert_eq!(specific, [1, 1, length(&call), 0, 0]);
        assert_eq!(rig.traffic_of(rig.any(8080), Protocol::Udp), [0; 5]);

        rig.clear("pm_traffic");
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
        assert!(rig.entries("pm_traffic").is_empty());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_next_packet_follows_a_claim_to_its_new_owner() {
    on_node(|rig| {
        rig.claim_any(53, rig.pod(5353));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(53));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(5353)));
        rig.claim_any(53, rig.other_pod(5353));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.other_pod(5353)));
        // What the former owner still has to say comes from the address that was called.
        let late = call.to(rig.pod(5353)).turned();
        rig.becomes(At::Out, &late, &late.from(rig.node(53)));
        rig.unclaim(rig.any(53));
        rig.stays(At::UplinkIn, &call);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn an_address_s_own_claim_takes_the_next_packet() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        let next = call.with(Kind::Tcp(ACK));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.becomes(At::UplinkIn, &next, &next.to(rig.pod(80)));
        rig.claim(rig.node(8080), rig.other_pod(80));
        rig.becomes(At::UplinkIn, &next, &next.to(rig.other_pod(80)));
        rig.becomes(At::PodIn, &next, &next.to(rig.other_pod(80)));
        rig.unclaim(rig.node(8080));
        rig.becomes(At::UplinkIn, &next, &next.to(rig.pod(80)));
    });
}

/// hostPort and containerPort are one number as often as not.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_direct_connection_is_not_the_claim_s_of_its_number() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(8080));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.pod(8080));
        for packet in [&call, &call.with(Kind::Tcp(ACK)), &call.with(Kind::Tcp(ACK))] {
            rig.stays(At::UplinkIn, packet);
            rig.stays(At::Out, &packet.turned().with(Kind::Tcp(ACK)));
        }
        assert_eq!(rig.traffic_of(rig.any(8080), Protocol::Tcp), [0; 5]);
        assert_eq!(rig.counts(), BTreeMap::new());
        // What is noted of it is that it goes on.
        let last = |packet: &Packet| rig.flow(&packet.turned().turned()).unwrap().last.unwrap();
        let now = last(&call);
        for (at, packet) in [(At::UplinkIn, call.clone()), (At::Out, call.turned())] {
            rig.age_flow(Protocol::Tcp, rig.pod(8080), rig.client(40000), 100);
            rig.stays(at, &packet.with(Kind::Tcp(ACK)));
            assert!(last(&call) >= now, "{at:?}");
        }
        let by_node = call.from(rig.client(40001)).to(rig.node(8080));
        rig.becomes(At::UplinkIn, &by_node, &by_node.to(rig.pod(8080)));
        assert_eq!(rig.traffic_of(rig.any(8080), Protocol::Tcp)[..2], [1, 1]);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_udp_checksum_that_becomes_0_is_sent_as_ffff() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080));
        // The last two bytes make the checksum of what goes to the pod whatever one likes.
        let mut wanted = call.sized(2);
        wanted.payload = vec![0, 0];
        let transport = wanted.to(rig.pod(80)).transport();
        wanted.payload = transport[6..8].to_vec();
        let forwarded = wanted.to(rig.pod(80));
        assert_eq!(forwarded.transport()[6..8], [0xff, 0xff]);
        rig.becomes(At::UplinkIn, &wanted, &forwarded);
    });
}
