//! What is sent in another's name: it must not take over anybody's connection.

use portmap::backend::ebpf::layout::claim_flags;
use portmap::model::Protocol;

use crate::packet::{ACK, FIN, Kind, Packet, RST, SCTP_ABORT, SCTP_DATA, SCTP_INIT, SYN};
use crate::rig::{At, CLOSED, GOES_ON, NODE, PEER_CLOSED, on_node};

/// What opens a connection, goes on in it, and ends it.
const STREAMS: [[Kind; 3]; 3] = [
    [Kind::Tcp(SYN), Kind::Tcp(ACK), Kind::Tcp(RST)],
    [Kind::Tcp(SYN), Kind::Tcp(ACK), Kind::Tcp(FIN | ACK)],
    [Kind::Sctp(SCTP_INIT), Kind::Sctp(SCTP_DATA), Kind::Sctp(SCTP_ABORT)],
];

/// The pod ignores an end whose numbers are not right.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn an_end_in_a_peers_name_does_not_end_its_flow() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for [opening, data, closing] in STREAMS {
            rig.clear("pm_flows");
            rig.clear("pm_remaps");
            let call = Packet::new(opening, rig.client(5000), rig.node(8080));
            let forwarded = call.to(rig.pod(80));
            rig.becomes(At::UplinkIn, &call, &forwarded);
            rig.becomes(At::UplinkIn, &call.with(data), &forwarded.with(data));
            rig.becomes(At::UplinkIn, &call.with(closing), &forwarded.with(closing));
            assert_eq!(rig.flow(&call.to(rig.pod(80))).unwrap().flags & CLOSED, 0);
            // The same port calls another address of the node, and the pod itself.
            let other = call.to(rig.second(8080));
            let port = rig.with_new_port(At::UplinkIn, &other, &forwarded);
            assert_ne!(port, 5000);
            rig.with_new_port(At::UplinkIn, &forwarded, &forwarded);
            // The connection goes on.
            let answer = forwarded.turned().with(data);
            rig.becomes(At::UplinkIn, &call.with(data), &forwarded.with(data));
            rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
            assert_eq!(rig.flow(&forwarded).unwrap().flags & PEER_CLOSED, 0);
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn an_end_in_a_peers_name_does_not_end_the_nodes_own() {
    on_node(|rig| {
        rig.claim_any(40000, rig.pod(80));
        for [opening, data, closing] in STREAMS {
            rig.clear("pm_flows");
            let own = Packet::new(opening, rig.node(40000), rig.client(443));
            let answer = own.turned();
            rig.stays(At::Own, &own);
            rig.stays(At::UplinkIn, &answer.with(data));
            rig.stays(At::UplinkIn, &answer.with(closing));
            rig.stays(At::UplinkIn, &answer.with(opening));
            rig.stays(At::UplinkIn, &answer.with(data));
            assert!(rig.flow(&own.between(rig.client(443), rig.pod(80))).is_none());
        }
    });
}

/// It came in by the device that it leaves by: no pod is there.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn an_end_in_the_pods_name_does_not_end_a_flow() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for [opening, _, closing] in STREAMS {
            rig.clear("pm_flows");
            let call = Packet::new(opening, rig.client(5000), rig.node(8080));
            let forwarded = call.to(rig.pod(80));
            rig.becomes(At::UplinkIn, &call, &forwarded);
            let end = forwarded.turned().with(closing);
            rig.becomes(At::Through, &end, &end.from(rig.node(8080)));
            assert_eq!(rig.flow(&forwarded).unwrap().flags & CLOSED, 0);
            rig.becomes(At::Out, &end, &end.from(rig.node(8080)));
            assert_eq!(rig.flow(&forwarded).unwrap().flags & CLOSED, CLOSED);
        }
    });
}

/// Who sends first must not get the node's answers.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_nodes_own_goes_before_what_came_in_its_peers_name() {
    on_node(|rig| {
        rig.claim_any(40000, rig.pod(80));
        for kind in [Kind::Udp, Kind::Tcp(SYN), Kind::Sctp(SCTP_INIT)] {
            rig.clear("pm_flows");
            rig.clear("pm_remaps");
            let query = Packet::new(kind, rig.node(40000), rig.client(53));
            let answer = query.turned();
            let forged = answer.with(kind);
            rig.becomes(At::UplinkIn, &forged, &forged.to(rig.pod(80)));
            rig.stays(At::Own, &query);
            assert_eq!(rig.flow(&forged.to(rig.pod(80))), None);
            rig.stays(At::UplinkIn, &answer);
            // Also by the port that another call in its name has taken.
            rig.clear("pm_flows");
            let first = forged.to(rig.second(40000));
            rig.becomes(At::UplinkIn, &first, &first.to(rig.pod(80)));
            rig.with_new_port(At::UplinkIn, &forged, &forged.to(rig.pod(80)));
            rig.stays(At::Own, &query);
            rig.stays(At::UplinkIn, &answer);
        }
    });
}

/// Answers of macvlan and ipvlan pods have passed no device of the node before they leave it.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn answers_of_pods_at_the_uplink_are_not_the_nodes_own() {
    on_node(|rig| {
        rig.claim_with(rig.any(8080), rig.pod(80), |claim| {
            claim.flags |= claim_flags::MAC;
            claim.mac = [2, 0, 0, 0, 0, 1];
        });
        let call = Packet::new(Kind::Udp, rig.client(5000), rig.node(8080));
        let forwarded = call.to(rig.pod(80));
        rig.becomes(At::UplinkIn, &call, &forwarded);
        rig.becomes(At::Own, &forwarded.turned(), &call.turned());
        // A second device.
        rig.stays(At::Own, &call.turned());
        rig.becomes(At::UplinkIn, &call, &forwarded);
        assert_eq!(rig.count("nodeFlow"), 0);
    });
}

/// A pod may send what it likes: a call in the node's name keeps the peer's port for a while only.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_call_in_the_nodes_name_that_nobody_answers_is_forgotten() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        for (kind, protocol, limit) in
            [(Kind::Udp, Protocol::Udp, 30), (Kind::Tcp(SYN), Protocol::Tcp, 120)]
        {
            let forged = Packet::new(kind, rig.node(8080), rig.client(5000));
            let call = forged.turned().with(kind);
            rig.stays(At::Out, &forged);
            rig.age_flow(protocol, rig.node(8080), rig.client(5000), limit + 1);
            rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
            // A masqueraded pod's connection stays, once it is answered.
            rig.clear("pm_flows");
            rig.stays(At::Out, &forged);
            rig.stays(At::UplinkIn, &forged.turned());
            assert_eq!(rig.flow(&forged.turned()).unwrap().flags, NODE | GOES_ON);
            rig.age_flow(protocol, rig.node(8080), rig.client(5000), limit + 1);
            rig.stays(At::UplinkIn, &forged.turned());
            rig.clear("pm_flows");
        }
    });
}
