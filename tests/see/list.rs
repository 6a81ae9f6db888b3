//! What `portmap list` says.

use std::time::Duration;

use portmap::demo::server::Servers;
use portmap::demo::traffic::{self, Transport};
use portmap::model::Family;
use serde_json::{Value, json};

use super::support::{IPTABLES, Node, UPSTREAM, VARIANTS, Variant, attachment, prev_result};
use super::{add, add_dead, changes_nothing, lab, report, run, run_with};

/// Host port, container and state of every claim of IPv4.
fn states(report: &Value) -> Vec<String> {
    report["claims"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|claim| claim["hostAddress"] == "0.0.0.0")
        .map(|claim| {
            format!(
                "{} {} {}",
                claim["hostPort"],
                claim["owner"]["attachment"]["containerID"].as_str().unwrap(),
                claim["state"].as_str().unwrap()
            )
        })
        .collect()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn every_claim_is_there_with_its_owner_and_state() {
    for variant in VARIANTS {
        let lab = lab(4);
        let node = Node::new(&lab.node, variant);
        let (empty, status) = changes_nothing(&node, || report(&node, &["list"]));
        let nothing = json!({"claims": [], "unrecorded": [], "packets": null, "notes": []});
        assert_eq!((empty, status), (nothing, 0));
        assert!(!node.state_dir.exists(), "{variant:?}: looking has made a state directory");
        assert_eq!(run(&node, &["list"]).stdout, "no hostPorts on this node\n");

        add(&node, &lab, 0, 8080);
        add(&node, &lab, 1, 8080);
        add(&node, &lab, 2, 8082);
        let (found, status) = changes_nothing(&node, || report(&node, &["list"]));
        assert_eq!(
            states(&found),
            ["8080 container-1 active", "8080 container-0 shadowed", "8082 container-2 active"],
            "{variant:?}"
        );
        assert_eq!((status, &found["notes"]), (0, &json!([])), "{variant:?}");
        let claim = &found["claims"][1];
        assert_eq!(claim["shadowedBy"]["pod"]["name"], "pod-b", "{variant:?} {claim}");
        assert_eq!(claim["backend"], variant.backend());
        let address = lab.pods[0].address(Family::V4).unwrap();
        assert_eq!((&claim["podAddress"], &claim["podPort"]), (&json!(address), &json!(80)));
        assert_eq!(
            claim["owner"]["pod"],
            json!({"namespace": "demo", "name": "pod-a", "uid": "uid-pod-a"})
        );
        assert!(claim["ageSeconds"].as_u64().unwrap() < 600, "{claim}");
        let text = run(&node, &["list"]).stdout;
        assert!(text.contains("shadowed by demo/pod-b"), "{text}");

        add_dead(&node, &lab, 3, 8083);
        let (found, status) = changes_nothing(&node, || report(&node, &["list"]));
        assert!(states(&found).contains(&"8083 container-3 dead".to_owned()), "{found}");
        assert_eq!(status, 1, "{variant:?}");

        node.damage();
        let (found, status) = changes_nothing(&node, || report(&node, &["list"]));
        assert_eq!(
            states(&found),
            [
                "8080 container-1 missing",
                "8080 container-0 missing",
                "8082 container-2 missing",
                "8083 container-3 dead"
            ],
            "{variant:?}"
        );
        assert_eq!((status, &found["claims"][0]["inKernel"]), (1, &json!(false)));
        assert_ne!(found["claims"][0]["problems"], json!([]));
        let text = run(&node, &["list"]).stdout;
        assert!(text.contains("portmap restore") && text.contains("portmap gc"), "{text}");
    }
}

/// A state directory that outlives the boot: nothing of it is true any more, and to look is not to discard it.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn who_only_looks_leaves_what_is_of_another_boot() {
    let lab = lab(1);
    let node = Node::new(&lab.node, Variant::Nftables);
    let (config, attachment) = add(&node, &lab, 0, 8080);
    std::fs::write(node.state_dir.join("boot"), "another").unwrap();
    node.damage();
    for words in [&["list"][..], &["who", "8080"], &["gc", "--dry-run"]] {
        let (found, _) = changes_nothing(&node, || report(&node, words));
        assert!(!found.to_string().contains("container-0"), "{words:?}: {found}");
    }
    assert_eq!(node.records().len(), 1);
    node.ok("DEL", &config, &attachment);
    assert!(node.records().is_empty());
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_counts_what_passes() {
    let lab = lab(1);
    let node = Node::new(&lab.node, Variant::Ebpf);
    let (config, attachment) = add(&node, &lab, 0, 8080);
    let counters = || report(&node, &["list"]).0["claims"][0]["counters"].clone();
    assert_eq!(counters()["connections"], 0);
    let _servers: Servers = lab.pods[0].serve(&[80], &[]).unwrap();
    let target = lab.node_socket(Family::V4, 8080);
    let call = traffic::Call::new(Transport::Tcp, target, Duration::from_secs(5));
    traffic::reach(&lab.client, call).unwrap();
    let counted = counters();
    assert_eq!(counted["connections"], 1, "{counted}");
    for number in ["packetsIn", "bytesIn", "packetsOut", "bytesOut"] {
        assert!(counted[number].as_u64().unwrap() > 0, "{number}: {counted}");
    }

    // The same packets by what became of them, and others that nobody is counted for.
    let packets = || report(&node, &["list"]).0["packets"].clone();
    let before = packets();
    assert_eq!(before["newFlow"], 1, "{before}");
    assert_eq!(before["forwarded"], counted["packetsIn"], "{before}");
    assert_eq!(before["answered"], counted["packetsOut"], "{before}");
    assert_eq!(before["connect"], 0, "{before}");
    traffic::reach(&lab.node, call).unwrap();
    let after = packets();
    let changed: Vec<&String> = after
        .as_object()
        .unwrap()
        .iter()
        .filter_map(|(name, number)| (before[name] != *number).then_some(name))
        .collect();
    assert_eq!(changed, ["connect"], "{after}");
    // What was counted stays with the programs, and not with the claim.
    node.ok("DEL", &config, &attachment);
    assert_eq!(packets(), after);
    assert!(node.flush().success());
    assert_eq!(packets(), Value::Null);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_cannot_be_read_is_said_and_the_rest_is_listed() {
    for variant in IPTABLES {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let own = add(&node, &lab, 0, 8080);
        // The same node with another backend's attachment, in the same state directory.
        let mut config = node.config(
            json!([{"hostPort": 9090, "containerPort": 80}]),
            prev_result(&lab, 1, "1.0.0"),
        );
        config["backend"] = json!("ebpf");
        node.ok("ADD", &config, &attachment(&lab.pods[1], "container-1"));
        let output =
            changes_nothing(&node, || run_with(&node, "/nowhere".as_ref(), &["list", "--json"]));
        let found: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(
            states(&found),
            ["8080 container-0 unknown", "9090 container-1 active"],
            "{variant:?} {found}"
        );
        assert_eq!(output.status, Some(1));
        let notes = found["notes"].to_string();
        assert!(notes.contains("iptables is not installed"), "{notes}");
        // What outlives them goes with the node, and needs iptables no more.
        node.ok("DEL", &config, &attachment(&lab.pods[1], "container-1"));
        node.ok("DEL", &own.0, &own.1);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's plugin"]
fn what_upstream_left_is_marked_as_such() {
    for variant in IPTABLES {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        add(&node, &lab, 0, 8080);
        let mappings = json!([{"hostPort": 7070, "containerPort": 70, "protocol": "tcp"}]);
        let config = node.config(mappings, prev_result(&lab, 1, "1.0.0"));
        let theirs = attachment(&lab.pods[1], "upstream-container");
        let output = node.call(UPSTREAM, "ADD", &config, &theirs);
        assert!(output.success(), "{}", output.reason());

        let (found, status) = changes_nothing(&node, || report(&node, &["list"]));
        assert_eq!(states(&found), ["8080 container-0 active"], "{variant:?}");
        assert_eq!(status, 0);
        let place = match variant {
            Variant::IptablesNft => "iptables-nft",
            _ => "iptables-legacy",
        };
        let unrecorded = found["unrecorded"].as_array().unwrap();
        assert_eq!(unrecorded.len(), lab.options.families.len(), "{found}");
        let first = &unrecorded[0];
        assert_eq!(
            (&first["place"], &first["containerID"], &first["network"]),
            (&json!(place), &json!("upstream-container"), &json!("portmap"))
        );
        let address = lab.pods[1].address(Family::V4).unwrap();
        assert_eq!(
            first["forwards"],
            json!([{"protocol": "tcp", "hostAddress": "0.0.0.0", "hostPort": 7070,
                    "podAddress": address, "podPort": 70}])
        );
        let text = run(&node, &["list"]).stdout;
        assert!(text.contains("no record"), "{text}");

        // Without the tool the table is known to be there, and no more.
        let output = run_with(&node, "/nowhere".as_ref(), &["list"]);
        assert!(
            output.stdout.contains(&format!("table nat of {place} (IPv4) cannot be read")),
            "{}",
            output.stdout
        );

        let output = node.call(UPSTREAM, "DEL", &config, &theirs);
        assert!(output.success(), "{}", output.reason());
        assert_eq!(report(&node, &["list"]).0["unrecorded"], json!([]));
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_upstream_s_nftables_backend_left_is_marked_as_such() {
    let lab = lab(1);
    let node = Node::new(&lab.node, Variant::Nftables);
    add(&node, &lab, 0, 8080);
    node.shell(
        "nft -f - <<'END'\n\
         table ip cni_hostport {\n\
         \tchain hostports { tcp dport 7070 dnat to 10.1.2.3:70 comment \"theirs\"; }\n\
         }\nEND\n",
    );
    let (found, _) = changes_nothing(&node, || report(&node, &["list"]));
    assert_eq!(states(&found), ["8080 container-0 active"]);
    assert_eq!(
        found["unrecorded"],
        json!([{"place": "nftables", "object": "table ip cni_hostport", "network": "",
                "containerID": "theirs",
                "forwards": [{"protocol": "tcp", "hostAddress": "0.0.0.0", "hostPort": 7070,
                              "podAddress": "10.1.2.3", "podPort": 70}]}])
    );
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn entries_whose_record_is_lost_are_marked_as_such() {
    let lab = lab(1);
    let node = Node::new(&lab.node, Variant::Ebpf);
    add(&node, &lab, 0, 8080);
    std::fs::remove_dir_all(&node.state_dir).unwrap();
    let (found, _) = changes_nothing(&node, || report(&node, &["list"]));
    assert_eq!(found["claims"], json!([]));
    let address = lab.pods[0].address(Family::V4).unwrap();
    let forward = json!([{"protocol": "tcp", "hostAddress": "0.0.0.0", "hostPort": 8080,
                          "podAddress": address, "podPort": 80}]);
    let unrecorded = found["unrecorded"].as_array().unwrap();
    assert!(
        unrecorded.iter().any(|one| one["place"] == "ebpf" && one["forwards"] == forward),
        "{found}"
    );
}
