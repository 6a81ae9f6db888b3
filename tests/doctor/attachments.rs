//! Records and what the kernel has of them.

use serde_json::{Value, json};

use crate::rig::{Rig, lab};
use crate::support::{GONE_NETNS, UPSTREAM, VARIANTS, Variant, attachment, prev_result};

/// What takes everything away that the plugin has made in the kernel.
fn damage(variant: Variant) -> &'static str {
    match variant {
        Variant::IptablesNft | Variant::IptablesLegacy => "iptables -t nat -F CNI-HOSTPORT-DNAT",
        Variant::Nftables => "nft flush chain inet portmap prerouting",
        Variant::Ebpf => "rm -r /sys/fs/bpf/portmap",
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn rules_that_are_missing_are_found_and_put_back() {
    for variant in VARIANTS {
        let lab = lab(1);
        let rig = Rig::new(&lab, variant);
        rig.add(0);
        assert_eq!(rig.doctor().checks(), [], "{variant:?}");
        rig.node.shell(damage(variant));
        let said = rig.doctor();
        assert_eq!(
            (said.status, &said.only("rules")["severity"]),
            (Some(2), &"broken".into()),
            "{variant:?}"
        );
        rig.follow(said.only("rules"));
        assert_eq!(rig.doctor().checks(), [], "{variant:?}");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn records_of_pods_that_are_gone_and_records_that_are_damaged() {
    for variant in VARIANTS {
        let lab = lab(2);
        let rig = Rig::new(&lab, variant);
        rig.add(0);
        let mut gone = attachment(&lab.pods[1], "gone");
        gone.netns = GONE_NETNS.into();
        let mappings = json!([{"hostPort": 9090, "containerPort": 80}]);
        let config = rig.node.config(mappings, prev_result(&lab, 1, "1.0.0"));
        rig.node.ok("ADD", &config, &gone);
        let said = rig.doctor();
        let stale = said.only("stale");
        assert!(stale["found"].as_str().unwrap().contains(GONE_NETNS), "{variant:?}: {stale}");
        assert!(stale["fix"].as_str().unwrap().starts_with("portmap gc --state-dir "), "{stale}");
        assert_eq!(said.checks(), [("stale".into(), "warning".into())], "{variant:?}");
        rig.node.ok("DEL", &config, &gone);
        assert_eq!(rig.doctor().checks(), [], "{variant:?}");
    }
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Nftables);
    let (config, pod) = rig.add(0);
    let records = rig.node.state_dir.join("records");
    let record = std::fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, &text[..text.len() / 2]).unwrap();
    // What one of them has made is not nobody's.
    let unread = "not looked for: 1 record cannot be read";
    for (text, words) in
        [(&text[..text.len() / 2], "is damaged"), (r#"{"format": 99}"#, "newer portmap")]
    {
        std::fs::write(&record, text).unwrap();
        let said = rig.doctor();
        assert!(said.only("record")["found"].as_str().unwrap().contains(words), "{:#}", said.json);
        assert!(said.only("orphan")["found"].as_str().unwrap().ends_with(unread));
    }
    // What the finding says of a damaged one.
    std::fs::write(&record, &text[..text.len() / 2]).unwrap();
    rig.node.ok("DEL", &config, &pod);
    assert_eq!(rig.doctor().checks(), []);
}

/// The record goes, and its rules stay: what a lost state directory comes to.
fn lose_record(rig: &Rig, container_id: &str) {
    for entry in std::fs::read_dir(rig.node.state_dir.join("records")).unwrap() {
        let path = entry.unwrap().path();
        if std::fs::read_to_string(&path).unwrap().contains(container_id) {
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn rules_without_a_record_are_found_and_the_command_removes_them() {
    for variant in VARIANTS {
        for others in [false, true] {
            let lab = lab(2);
            let rig = Rig::new(&lab, variant);
            rig.add(0);
            if others {
                rig.add(1);
            }
            assert_eq!(rig.doctor().checks(), [], "{variant:?}");
            lose_record(&rig, "container-0");
            let said = rig.doctor();
            let orphans = said.of("orphan");
            assert!(!orphans.is_empty(), "{variant:?} {others}: {:#}", said.json);
            let checks = said.checks();
            assert!(
                checks.iter().all(|(check, _)| ["orphan", "guard"].contains(&check.as_str())),
                "{variant:?} {others}: {:#}",
                said.json
            );
            orphans.iter().for_each(|orphan| rig.follow(orphan));
            let left = rig.doctor();
            assert!(left.of("orphan").is_empty(), "{variant:?} {others}: {:#}", left.json);
            assert!(left.of("rules").is_empty(), "{variant:?} {others}: {:#}", left.json);
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_another_state_directory_has_records_of_is_not_without_one() {
    for variant in VARIANTS {
        let lab = lab(1);
        let mut rig = Rig::new(&lab, variant);
        rig.add(0);
        // The list names the directory that has the records; this looks at one that has none.
        let elsewhere = rig.node.state_dir.clone();
        rig.node.state_dir = elsewhere.with_extension("empty");
        let said = rig.doctor();
        let found = said.only("orphan");
        let end = format!("10-pods.conflist keeps records in {}", elsewhere.display());
        assert!(found["found"].as_str().unwrap().ends_with(&end), "{variant:?}: {:#}", said.json);
        // In the directories that this has looked at.
        let conf_dir = format!("--conf-dir {}", rig.conf_dir.display());
        let end = format!("{conf_dir} --state-dir {}", elsewhere.display());
        assert!(found["fix"].as_str().unwrap().ends_with(&end), "{found}");
        rig.node.state_dir = elsewhere;
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_upstreams_plugin_has_left_is_found_and_removed() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::IptablesNft);
    assert_eq!(rig.doctor().checks(), []);
    let mappings = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
    let config = rig.node.config(mappings, prev_result(&lab, 0, "1.0.0"));
    let pod = attachment(&lab.pods[0], "upstreams");
    let output = rig.node.call(UPSTREAM, "ADD", &config, &pod);
    assert!(output.success(), "{}", output.reason());
    let said = rig.doctor();
    let orphans: Vec<Value> = said.of("orphan").into_iter().cloned().collect();
    let found = orphans[0]["found"].as_str().unwrap();
    assert!(found.contains("of container upstreams on network portmap forwards tcp"), "{found}");
    orphans.iter().for_each(|orphan| rig.follow(orphan));
    assert!(rig.doctor().of("orphan").is_empty());

    // The table of its nftables backend.
    rig.node.shell(
        "nft -f - <<'END'\ntable ip cni_hostport {\n chain hostports {\n tcp dport 80 dnat to 10.0.0.2:80 comment \"upstreams\"\n }\n}\nEND",
    );
    let all = format!("{}:/usr/sbin", rig.node.path.display());
    let said = rig.doctor_with(all.as_ref());
    assert!(
        said.only("orphan")["found"].as_str().unwrap().contains("1 rule of container upstreams")
    );
    rig.follow(said.only("orphan"));
    assert!(rig.doctor_with(all.as_ref()).of("orphan").is_empty());
    // Without nft it can be seen and not be read.
    let said = rig.doctor();
    assert!(said.only("orphan")["fix"].as_str().unwrap().contains("PATH"), "{:#}", said.json);
}
