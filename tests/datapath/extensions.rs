//! What stands between the IP header and the transport header.

use crate::packet::{
    AUTHENTICATION, DESTINATION, FRAGMENT, HOP_BY_HOP, KINDS, Kind, Packet, ROUTING, SYN, error,
    error_kinds,
};
use crate::rig::{At, NEXT, on_node};

/// Options in 8 times `units` bytes: padding (RFC 8200, 4.2).
fn options(number: u8, units: u8) -> (u8, Vec<u8>) {
    let length = usize::from(units) * 8;
    let mut bytes = vec![0, units - 1, 1, u8::try_from(length - 4).unwrap()];
    bytes.resize(length, 0);
    (number, bytes)
}

/// An authentication header has its length in units of 4 bytes, less 2 (RFC 4302).
fn authentication() -> (u8, Vec<u8>) {
    let mut bytes = vec![0, 4, 0, 0];
    bytes.resize(24, 9);
    (AUTHENTICATION, bytes)
}

fn routing(left: u8) -> (u8, Vec<u8>) {
    let mut bytes = vec![0, 2, 4, left];
    bytes.resize(24, 0);
    (ROUTING, bytes)
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn ipv6_extension_headers_are_passed_over() {
    on_node(|rig| {
        if rig.is_v4() {
            return;
        }
        rig.claim_any(8080, rig.pod(80));
        let sets = [
            vec![options(HOP_BY_HOP, 1)],
            vec![options(DESTINATION, 1)],
            vec![options(DESTINATION, 20)],
            vec![routing(0)],
            vec![authentication()],
            vec![options(HOP_BY_HOP, 2), options(DESTINATION, 3)],
            vec![options(HOP_BY_HOP, 1), routing(0), authentication(), options(DESTINATION, 1)],
            vec![options(HOP_BY_HOP, 1); 6],
        ];
        for (number, set) in sets.iter().enumerate() {
            for kind in KINDS {
                let peer = rig.client(40000 + u16::try_from(number).unwrap());
                let call = Packet::new(kind, peer, rig.node(8080)).with_extensions(set);
                rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
                let answer = call.to(rig.pod(80)).turned();
                rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
            }
            // And in what an error quotes.
            let peer = rig.client(40000 + u16::try_from(number).unwrap());
            let call = Packet::new(Kind::Udp, peer, rig.node(8080)).with_extensions(set);
            let (seen, sent) = (call.turned(), call.to(rig.pod(80)).turned());
            let kind = error_kinds(false)[0];
            let frame = error(rig.client(0).ip(), rig.node(0).ip(), kind, &seen.quoted(8));
            let expected =
                error(rig.client(0).ip(), rig.pod(0).ip(), kind, &seen.quoted_as(&sent, 8));
            rig.gives(At::UplinkIn, &frame, NEXT, &expected);
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn fragments_have_extension_headers_too() {
    on_node(|rig| {
        if rig.is_v4() {
            return;
        }
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080))
            .sized(1000)
            .with_extensions(&[options(HOP_BY_HOP, 1), routing(0)]);
        let expected = call.to(rig.pod(80)).fragments(400);
        for (frame, expected) in call.fragments(400).iter().zip(expected) {
            rig.gives(At::UplinkIn, frame, NEXT, &expected);
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn ipv6_headers_that_are_not_understood_pass() {
    on_node(|rig| {
        if rig.is_v4() {
            return;
        }
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        for set in [
            // Too many.
            vec![options(DESTINATION, 1); 7],
            // The destination is not the final one, which the checksum is for.
            vec![routing(1)],
            // ESP, mobility, HIP, shim6, no next header, and a number that is not assigned.
            vec![options(50, 1)],
            vec![options(135, 1)],
            vec![options(139, 1)],
            vec![options(140, 1)],
            vec![options(59, 1)],
            vec![options(200, 1)],
            // Longer than the packet.
            vec![(DESTINATION, vec![0, 255, 0, 0, 0, 0, 0, 0])],
            vec![(FRAGMENT, vec![0, 0, 0, 1]), (HOP_BY_HOP, vec![0; 2])],
        ] {
            let call = call.with_extensions(&set);
            rig.stays(At::UplinkIn, &call);
            rig.stays(At::PodIn, &call);
            rig.stays(At::Out, &call.to(rig.pod(80)).turned());
        }
        assert!(rig.entries("pm_flows").is_empty());
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn ipv4_options_are_passed_over() {
    on_node(|rig| {
        if !rig.is_v4() {
            return;
        }
        rig.claim_any(8080, rig.pod(80));
        for words in 1..=10 {
            for kind in KINDS {
                let mut call = Packet::new(kind, rig.client(40000 + words), rig.node(8080));
                // No operation (RFC 791).
                call.options = vec![1; usize::from(words) * 4];
                rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
                let answer = call.to(rig.pod(80)).turned();
                rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
                let mut long = call.sized(1000);
                long.kind = Kind::Udp;
                for (frame, expected) in
                    long.fragments(400).iter().zip(long.to(rig.pod(80)).fragments(400))
                {
                    rig.gives(At::UplinkIn, frame, NEXT, &expected);
                }
            }
        }
    });
}
