//! SCTP's checksum covers the ports, but not the addresses.

use crate::packet::{Kind, Packet, SCTP_ABORT, SCTP_DATA, SCTP_INIT, SCTP_SHUTDOWN_COMPLETE};
use crate::rig::{At, CLOSED, on_node};

#[test]
#[ignore = "privileged: loads BPF programs"]
fn checksums_are_right_for_packets_of_every_length() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Sctp(SCTP_DATA), rig.client(40000), rig.node(8080));
        // Up to what a test run takes in one piece.
        for length in (0..600).chain([1000, 1200, 1448, 1449, 2047, 2048, 3000]) {
            let call = call.sized(length);
            rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
            let answer = call.to(rig.pod(80)).turned();
            rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
        }
        assert_eq!(rig.count("sctpChecksum"), rig.count("forwarded") + rig.count("answered"));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn equal_ports_need_no_new_checksum() {
    on_node(|rig| {
        rig.claim_any(3868, rig.pod(3868));
        let mut call = Packet::new(Kind::Sctp(SCTP_INIT), rig.client(40000), rig.node(3868));
        call.payload = vec![1, 2, 3, 4];
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(3868)));
        let answer = call.to(rig.pod(3868)).turned();
        rig.becomes(At::Out, &answer, &answer.from(rig.node(3868)));
        assert_eq!(rig.count("sctpChecksum"), 0);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_wrong_checksum_stays_wrong() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Sctp(SCTP_DATA), rig.client(40000), rig.node(8080));
        let (mut frame, mut expected) = (call.frame(), call.to(rig.pod(80)).frame());
        let at = frame.len() - call.transport().len() + call.kind.checksum();
        frame[at] ^= 0x10;
        expected[at] ^= 0x10;
        rig.gives(At::UplinkIn, &frame, crate::rig::NEXT, &expected);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn abort_and_shutdown_complete_close_a_flow() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Sctp(SCTP_INIT), rig.client(40000), rig.node(8080));
        let is_closed = || rig.flow(&call.to(rig.pod(80))).unwrap().flags & CLOSED != 0;
        for last in [SCTP_ABORT, SCTP_SHUTDOWN_COMPLETE] {
            rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
            let data = call.with(Kind::Sctp(SCTP_DATA));
            rig.becomes(At::UplinkIn, &data, &data.to(rig.pod(80)));
            assert!(!is_closed());
            let answer = call.with(Kind::Sctp(last)).to(rig.pod(80)).turned();
            rig.becomes(At::Out, &answer, &answer.from(rig.node(8080)));
            assert!(is_closed());
        }
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        assert!(!is_closed());
    });
}

/// The checksum of a fragment's packet depends on a length that only the last fragment has.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn fragments_pass_untouched_unless_the_ports_are_equal() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim_any(3868, rig.pod(3868));
        let call = Packet::new(Kind::Sctp(SCTP_DATA), rig.client(40000), rig.node(8080)).sized(100);
        for frame in call.fragments(48) {
            rig.passes(At::UplinkIn, &frame);
        }
        assert_eq!(rig.count("sctpFragment"), 1);
        let same = call.to(rig.node(3868));
        for (frame, expected) in same.fragments(48).iter().zip(same.to(rig.pod(3868)).fragments(48))
        {
            rig.gives(At::UplinkIn, frame, crate::rig::NEXT, &expected);
        }
    });
}
