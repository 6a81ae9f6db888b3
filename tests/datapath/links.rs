//! What is below IP: VLANs, devices without frames, and pods behind a MAC address.

use std::net::SocketAddr;

use portmap::backend::ebpf::layout::claim_flags;
use portmap::backend::ebpf::loaded::OWN;

use crate::packet::{ACK, KINDS, Kind, Packet, SYN};
use crate::rig::{At, NEXT, on_node, on_node_with};

const MAC: [u8; 6] = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];

#[test]
#[ignore = "privileged: loads BPF programs"]
fn frames_for_a_macvlan_pod_have_its_address() {
    on_node(|rig| {
        rig.claim_with(rig.any(8080), rig.pod(80), |claim| {
            claim.flags |= claim_flags::MAC;
            claim.mac = MAC;
        });
        for kind in KINDS {
            let call = Packet::new(kind, rig.client(40000), rig.node(8080));
            let mut expected = call.to(rig.pod(80));
            expected.macs[..6].copy_from_slice(&MAC);
            rig.becomes(At::UplinkIn, &call, &expected);
            let answer = call.to(rig.pod(80)).turned();
            rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
        }
        let call = Packet::new(Kind::Udp, rig.client(40001), rig.node(8080)).sized(1000);
        let mut expected = call.to(rig.pod(80));
        expected.macs[..6].copy_from_slice(&MAC);
        for (frame, expected) in call.fragments(400).iter().zip(expected.fragments(400)) {
            rig.gives(At::UplinkIn, frame, NEXT, &expected);
        }
        // Calls of the pod's own address need it as much, the first packet and the others.
        let direct = Packet::new(Kind::Tcp(SYN), rig.client(40002), rig.pod(80));
        for call in [&direct, &direct.with(Kind::Tcp(ACK)), &direct.with(Kind::Tcp(ACK))] {
            let mut expected = call.clone();
            expected.macs[..6].copy_from_slice(&MAC);
            rig.becomes(At::UplinkIn, call, &expected);
        }
        // From another pod there is no such way: it goes through the stack as any other.
        let inside = Packet::new(Kind::Udp, rig.other_pod(40000), rig.node(8080));
        rig.becomes(At::PodIn, &inside, &inside.to(rig.pod(80)));
    });
}

/// These are tags behind the first, which the kernel has taken out of the frame before programs see it. A
/// test run has none of that kind: its context's `vlan_tci` must be 0. coexist::capture sends some.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn frames_of_vlans_and_other_protocols_pass() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        let frame = call.frame();
        for tag in [[0x81, 0], [0x88, 0xa8]] {
            let tagged = [&frame[..12], &tag, &[0, 5], &frame[12..]].concat();
            for at in [At::UplinkIn, At::PodIn, At::Out] {
                rig.passes(at, &tagged);
            }
        }
        // ARP, MPLS, PPPoE, LLDP, a length instead of a type; and the other IP.
        let other = if rig.is_v4() { [0x86, 0xdd] } else { [8, 0] };
        for ether_type in [[8, 6], [0x88, 0x47], [0x88, 0x64], [0x88, 0xcc], [0, 0x2e], other] {
            let mut frame = frame.clone();
            frame[12..14].copy_from_slice(&ether_type);
            for at in [At::UplinkIn, At::PodIn, At::Out] {
                rig.passes(at, &frame);
            }
        }
    });
}

/// A test run takes Ethernet frames alone. So these are packets whose bytes 12 and 13, a part of the
/// source address, are an EtherType, and whose first byte is not that of a multicast address.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn devices_without_frames_have_programs_of_their_own() {
    let programs = [At::UplinkInLayer3, At::OutLayer3, At::UplinkIn];
    on_node_with(OWN.object, &programs, |rig| {
        rig.claim_with(rig.any(8080), rig.pod(80), |claim| {
            // There is no frame to put it in.
            claim.flags |= claim_flags::MAC;
            claim.mac = MAC;
        });
        rig.claim_any(8081, rig.other_pod(80));
        let address = if rig.is_v4() { "8.0.1.2" } else { "fd00:1:86dd:1::2" };
        let peer = SocketAddr::new(address.parse().unwrap(), 40000);
        for kind in KINDS {
            let mut call = Packet::new(kind, peer, rig.node(8080));
            if rig.is_v4() {
                call.options = vec![1; 4];
                // Bytes 12 and 13 are in the place of the EtherType in both.
                assert_eq!(call.ip()[12..14], [8, 0]);
            }
            let expected = call.to(rig.pod(80));
            rig.gives(At::UplinkInLayer3, &call.ip(), NEXT, &expected.ip());
            rig.passes(At::UplinkInLayer3, &call.to(rig.node(1)).ip());
            // With an ordinary claim, before and after there is a flow.
            let expected = call.to(rig.other_pod(80));
            for _ in 0..2 {
                let call = call.to(rig.node(8081));
                rig.gives(At::UplinkInLayer3, &call.ip(), NEXT, &expected.ip());
            }
        }
        // The answer has the peer as its destination; its source is an address of that kind.
        let pod = SocketAddr::new(address.parse().unwrap(), 80);
        rig.claim_any(9090, pod);
        for kind in KINDS {
            let mut call = Packet::new(kind, rig.client(40000), rig.node(9090));
            if rig.is_v4() {
                call.options = vec![1; 4];
            }
            rig.becomes(At::UplinkIn, &call, &call.to(pod));
            let answer = call.to(pod).turned();
            rig.gives(At::OutLayer3, &answer.ip(), NEXT, &answer.from(rig.node(9090)).ip());
        }
    });
}
