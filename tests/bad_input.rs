//! Bad input: what is refused, with which code, and that the message says which field it is, what it
//! holds and what is allowed. Nothing is changed before a whole request is known to be valid.
//!
//! The privileged tests give the same table to a node with a living pod: its rules stay as they are.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "bad_input/cases.rs"]
mod cases;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::path::Path;
use std::process::Command;

use cases::{Case, cases, valid};
use portmap::demo::plugin;
use portmap::demo::topology::{Lab, Options, Shape};
use raw::{ADD, NewPath, run, with};
use serde_json::json;
use support::{Node, PORTMAP, VARIANTS, Variant, attachment, prev_result};

fn judge(case: &Case, code: u64, msg: &str) {
    assert_eq!(code, case.code, "{}: {msg}", case.name);
    for word in &case.words {
        assert!(msg.contains(word), "{}: {word:?} is not in {msg:?}", case.name);
    }
}

#[test]
fn every_case_has_its_code_and_says_what_is_wrong() {
    let dir = NewPath::new();
    let all = cases(&dir.0);
    assert!(all.len() >= 60, "{} cases", all.len());
    for case in &all {
        let (code, msg) = run(&with(&ADD, &case.env), &case.stdin).error();
        judge(case, code, &msg);
        assert!(!dir.0.exists(), "{}: the state directory was made", case.name);
    }
}

/// The table would prove nothing if the configuration that it spoils were bad already.
#[test]
fn what_the_table_starts_from_is_valid() {
    let dir = NewPath::new();
    for (key, value) in [("backend", json!("iptables")), ("backend", json!("nftables"))] {
        let mut config = valid(&dir.0);
        config[key] = value;
        let (code, msg) = run(&ADD, config.to_string().as_bytes()).error();
        assert_eq!(code, 100, "there are no tools, and nothing else is wrong: {msg}");
    }
    assert_eq!(raw::files_below(&dir.0.join("records")), Vec::<std::path::PathBuf>::new());
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn nothing_is_changed_on_a_node_with_a_living_pod() {
    let lab = Lab::build(Options::new(Shape::Cilium)).unwrap();
    for variant in VARIANTS {
        let node = Node::new(&lab.node, variant);
        let empty = node.snapshot();
        let pod = attachment(&lab.pods[0], "living");
        let config = node.config(
            json!([{"hostPort": 8080, "containerPort": 80}]),
            prev_result(&lab, 0, "1.0.0"),
        );
        node.ok("ADD", &config, &pod);
        let before = node.snapshot();
        for case in cases(&node.state_dir) {
            let mut command = Command::new(PORTMAP);
            command.env_clear().envs(with(&ADD, &case.env)).env("PATH", &node.path);
            let output = plugin::run(&mut command, &case.stdin, &lab.node).unwrap();
            let error: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
            judge(&case, error["code"].as_u64().unwrap(), error["msg"].as_str().unwrap());
        }
        let after = node.snapshot();
        after.same_rules(&before).unwrap_or_else(|lines| panic!("{variant:?}: {lines}"));
        assert_eq!(after, before, "{variant:?}");
        refuse_what_only_the_tools_can_judge(&lab, &node);
        assert_eq!(node.snapshot(), before, "{variant:?}");
        node.ok("CHECK", &config, &pod);
        node.ok("DEL", &config, &pod);
        node.assert_clean(&empty);
    }
}

/// Conditions and chain names are the tools' language: they find the mistake, and nothing is changed.
fn refuse_what_only_the_tools_can_judge(lab: &Lab, node: &Node) {
    let before = node.snapshot();
    let bad: Vec<(&str, serde_json::Value)> = match node.variant {
        Variant::Nftables => vec![
            ("conditionsV4", json!(["no", "such", "syntax"])),
            ("conditionsV4", json!(["ip", "saddr", "10.0.0.0/33"])),
            ("conditionsV4", json!(["tcp dport 80;", "flush ruleset;", "accept"])),
            ("conditionsV4", json!(["tcp dport 80 accept } chain x {"])),
            ("conditionsV4", json!(["tcp dport 80 drop; ip saddr 10.0.0.1"])),
            ("conditionsV4", json!(["accept", "comment", "\"x\";"])),
            ("conditionsV6", json!(["}} table inet evil {{"])),
            ("conditionsV4", json!(["# everything after is a comment"])),
        ],
        Variant::IptablesNft | Variant::IptablesLegacy => vec![
            ("conditionsV4", json!(["-m", "no-such-match"])),
            ("conditionsV4", json!(["-s", "10.0.0.0/33"])),
            ("conditionsV6", json!(["-p", "icmp", "COMMIT"])),
            ("conditionsV4", json!(["--no-such-option", "*nat"])),
        ],
        // Options of rules are no options of maps.
        Variant::Ebpf => vec![
            ("conditionsV4", json!(["-s", "10.0.0.0/8"])),
            ("conditionsV6", json!(["ip6 saddr fd00::/8"])),
            ("externalSetMarkChain", json!("KUBE-MARK-MASQ")),
        ],
    };
    for (key, value) in bad {
        let mut config = node.config(
            json!([{"hostPort": 8080, "containerPort": 81}, {"hostPort": 8081, "containerPort": 81}]),
            prev_result(lab, 1, "1.0.0"),
        );
        config[key] = value.clone();
        let pod = attachment(&lab.pods[1], "refused");
        let (got, text) = node.fails("ADD", &config, &pod);
        assert_eq!(got, 7, "{:?} {key} {value}: {text}", node.variant);
        assert_eq!(node.snapshot(), before, "{:?} {key} {value}", node.variant);
        // The runtime has to send a DEL after a failed ADD.
        node.ok("DEL", &config, &pod);
        assert_eq!(node.snapshot(), before, "{:?} {key} {value}", node.variant);
    }
    if node.variant.backend() == "iptables" {
        let mut config = node
            .config(json!([{"hostPort": 8080, "containerPort": 81}]), prev_result(lab, 1, "1.0.0"));
        config["externalSetMarkChain"] = json!("NO-SUCH-CHAIN");
        let (code, text) = node.fails("ADD", &config, &attachment(&lab.pods[1], "refused"));
        assert_eq!(code, 7, "{text}");
        assert!(text.contains("externalSetMarkChain") && text.contains("NO-SUCH-CHAIN"), "{text}");
    }
    assert!(Path::new(&node.state_dir).exists());
}
