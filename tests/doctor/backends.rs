//! Which backends work.

use std::ffi::OsStr;

use portmap::sys::Host;

use crate::rig::{LIST, Rig, lab};
use crate::support::Variant;

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_backend_that_the_list_asks_for_and_that_is_not_there() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::IptablesNft);
    assert!(rig.doctor().of("choice").is_empty());
    rig.write_list(
        &LIST.replace(r#""type": "portmap","#, r#""type": "portmap", "backend": "nftables","#),
    );
    let said = rig.doctor();
    let choice = said.only("choice");
    assert_eq!((said.status, &choice["severity"]), (Some(2), &"broken".into()));
    assert!(choice["fix"].as_str().unwrap().contains(r#""backend": "iptables""#), "{choice}");
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_objection_leaves_auto_without_a_backend() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Ebpf);
    assert!(rig.doctor().of("choice").is_empty());
    // As the AWS VPC CNI has it.
    rig.node.shell("ip rule add fwmark 0x80/0x80 lookup main");
    let said = rig.doctor();
    let choice = said.only("choice");
    assert_eq!((said.status, &choice["found"]), (Some(2), &"auto finds no backend".into()));
    assert!(choice["fix"].as_str().unwrap().starts_with(r#"set "backend": "ebpf""#), "{choice}");
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_choice_that_no_longer_works_is_forgotten_by_the_command_that_is_named() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::IptablesNft);
    rig.add(0);
    let fingerprint = Host::new(Some(OsStr::new(&rig.node.path))).tools_fingerprint();
    let note = rig.node.state_dir.join("notes/backend");
    std::fs::write(&note, format!("iptables\n{fingerprint}")).unwrap();
    assert_eq!(rig.doctor().checks(), []);
    std::fs::write(&note, format!("nftables\n{fingerprint}")).unwrap();
    let said = rig.doctor();
    assert_eq!(said.only("remembered")["severity"], "broken");
    rig.follow(said.only("remembered"));
    assert_eq!(rig.doctor().checks(), []);
    // Pods with an IPv6 address have a choice of their own.
    let note = rig.node.state_dir.join("notes/backend-ipv6");
    std::fs::write(&note, format!("nftables\n{fingerprint}")).unwrap();
    let said = rig.doctor();
    assert!(said.only("remembered")["fix"].to_string().contains("backend-ipv6"));
    rig.follow(said.only("remembered"));
    assert!(!note.exists());
    assert_eq!(rig.doctor().checks(), []);
}
