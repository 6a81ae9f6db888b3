//! Objects of other layouts, for tests of upgrades: they work as well.

use crate::packet::{Kind, Packet, SYN};
use crate::rig::{At, on_node_with};

const OLDER: &[u8] = include_bytes!("../../testdata/bpf/older.bpf.o");
const NEWER: &[u8] = include_bytes!("../../testdata/bpf/newer.bpf.o");

#[test]
#[ignore = "privileged: loads BPF programs"]
fn older_and_newer_objects_forward() {
    for (object, value_size) in [(OLDER, 44), (NEWER, 56)] {
        on_node_with(object, &[At::UplinkIn, At::PodIn, At::Out], |rig| {
            assert_eq!(rig.maps["pm_flows"].definition().value_size, value_size);
            rig.claim_any(8080, rig.pod(80));
            rig.claim_any(8081, rig.pod(80));
            for kind in [Kind::Tcp(SYN), Kind::Udp, Kind::Sctp(1)] {
                let call = Packet::new(kind, rig.client(40000), rig.node(8080));
                rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
                let answer = call.to(rig.pod(80)).turned();
                rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
                let second = call.to(rig.node(8081));
                let port = rig.with_new_port(At::UplinkIn, &second, &second.to(rig.pod(80)));
                let seen = second.between(rig.client(port), rig.pod(80));
                rig.becomes(At::Out, &seen.turned(), &second.turned());
                let call = Packet::new(kind, rig.pod(40000), rig.node(8080));
                rig.bounces(At::PodIn, &call, &call.between(rig.dummy(40000), rig.pod(80)));
            }
        });
    }
}
