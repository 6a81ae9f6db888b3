//! `portmap check-config`, by its status and its words.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::{CILIUM, CILIUM_WITH, Node, PORTMAP, SAMPLES, fails};
use crate::executable::write_executable;
use crate::running::{succeeds, text};

#[test]
#[ignore = "privileged: probes backends in network namespaces"]
fn every_sample_is_found_sound() {
    for entry in fs::read_dir(SAMPLES).unwrap() {
        let sample = entry.unwrap().path();
        if sample.extension().is_some_and(|ending| ending == "conflist") {
            let path = std::env::var_os("PATH").unwrap();
            let said =
                succeeds(Command::new(PORTMAP).arg("check-config").arg(&sample).env("PATH", path));
            assert!(said.contains("nothing is wrong with it"), "{}: {said}", sample.display());
        }
    }
}

#[test]
#[ignore = "privileged: probes backends in network namespaces"]
fn check_config_tells_by_its_status_what_is_wrong() {
    let node = Node::new("check");
    let path = std::env::var_os("PATH").unwrap();
    let check = |arguments: &[&str]| {
        let mut command = Command::new(PORTMAP);
        command.arg("check-config").args(arguments).env("PATH", &path);
        command
    };
    for (text, status, words) in [
        (CILIUM.to_owned(), 2, "line 1, column 1: broken: portmap is not in this list"),
        (
            CILIUM_WITH.replace("\"type\": \"portmap\"", "\"type\": \"portmap\", \"colour\": 1"),
            1,
            "line 10, column 27: warning: portmap does not know the key \"colour\"",
        ),
        (
            CILIUM_WITH.replace("\"type\": \"portmap\"", "\"type\": \"portmap\", \"snat\": 1"),
            2,
            "line 10, column 35: broken: snat is 1",
        ),
        (CILIUM_WITH.to_owned(), 0, "nothing is wrong"),
    ] {
        let list = node.write("10-x.conflist", &text);
        let output = check(&[list.to_str().unwrap()]).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(words), "{output:?}");
    }
    let output = check(&["--json", node.list("10-x.conflist").to_str().unwrap()]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["plugins"], json!(["cilium-cni", "portmap"]));
    assert_eq!((&report["configuredBackend"], &report["findings"]), (&json!("auto"), &json!([])));
    assert_eq!(report["options"]["snat"], true);
    fails(&mut check(&["/nowhere"]), "/nowhere does not exist");
}

#[test]
fn what_is_no_list_is_a_finding() {
    let check = |arguments: &[&str]| {
        let mut command = Command::new(PORTMAP);
        command.arg("check-config").args(arguments).arg("-").stdin(Stdio::null());
        let output = command.output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(2), ""));
        text(&output.stdout)
    };
    let said = check(&[]);
    let place = "standard input: no list\nline 1, column 1: broken: this is not JSON";
    assert!(said.starts_with(place), "{said}");
    let report: Value = serde_json::from_str(&check(&["--json"])).unwrap();
    let found = &report["findings"][0];
    assert_eq!((&found["severity"], &found["line"]), (&json!("broken"), &json!(1)), "{report}");
    assert_eq!((&report["plugins"], &report["options"]), (&json!([]), &Value::Null));
}

/// Without rights nothing works, which says nothing against a list.
#[test]
fn who_is_not_root_is_told_what_is_wrong_with_a_list_all_the_same() {
    let node = Node::new("check-nobody");
    let named = |backend: &str| {
        CILIUM_WITH.replace("\"type\": \"portmap\"", &format!("\"type\": \"portmap\"{backend}"))
    };
    for (backend, problem) in [
        ("", "which backend auto takes cannot be told without root"),
        (
            ", \"backend\": \"ebpf\"",
            "whether the ebpf backend works on this node cannot be told without root",
        ),
    ] {
        let list = node.write("10-x.conflist", &named(backend));
        let mut command = match nix::unistd::geteuid().is_root() {
            true => {
                let mut command = Command::new("setpriv");
                command.args(["--bounding-set=-all", "--inh-caps=-all", "--", PORTMAP]);
                command
            }
            false => Command::new(PORTMAP),
        };
        let output = command.arg("check-config").arg(&list).output().unwrap();
        let said = text(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(said.contains(&format!("\nwarning: {problem}\n")), "{said}");
        assert!(!said.contains("broken"), "{said}");
    }
}

/// Where no tool is, `auto` ends at eBPF.
#[test]
#[ignore = "privileged: probes backends in network namespaces"]
fn a_list_is_judged_by_the_backend_that_auto_takes() {
    let node = Node::new("check-auto");
    let shaped = CILIUM_WITH.replace("\n  ]", ",\n    {\"type\": \"bandwidth\"}\n  ]");
    let list = node.write("10-x.conflist", &shaped);
    let mut command = Command::new(PORTMAP);
    command.arg("check-config").arg(&list).env("PATH", &node.0);
    let output = command.output().unwrap();
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("auto, on this node ebpf"), "{said}");
    assert!(said.contains("line 15, column 5: broken: bandwidth stands behind portmap"), "{said}");
}

/// What iptables 1.8.9 says, with its exit status, when its `-w 15` is over.
#[test]
#[ignore = "privileged: probes a backend in a network namespace"]
fn a_lock_that_somebody_else_has_says_nothing_against_a_list() {
    let node = Node::new("check-busy");
    let list = node.write("10-x.conflist", CILIUM_WITH);
    fs::create_dir_all(node.bin()).unwrap();
    let message = "Another app is currently holding the xtables lock. Stopped waiting after 15s.";
    write_executable(
        &node.bin().join("iptables-restore"),
        format!("#!/bin/sh\necho '{message}' >&2\nexit 4\n"),
    );
    let check = |arguments: &[&str]| {
        let mut command = Command::new(PORTMAP);
        command.arg("check-config").args(arguments).arg(&list).env("PATH", node.bin());
        command.output().unwrap()
    };
    let output = check(&[]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("backend               auto, on this node not known now\n"), "{said}");
    let warning = "warning: which backend auto takes cannot be told now: another process has held the lock /run/xtables.lock for 15 s";
    assert!(said.contains(warning), "{said}");
    let report: Value = serde_json::from_slice(&check(&["--json"]).stdout).unwrap();
    assert_eq!(report["backend"], Value::Null);
    assert_eq!(report["findings"].as_array().unwrap().len(), 1, "{report}");
    // An ADD with a backend that is named waits.
    node.write(
        "10-x.conflist",
        &CILIUM_WITH
            .replace("\"type\": \"portmap\"", "\"type\": \"portmap\", \"backend\": \"iptables\""),
    );
    let output = check(&[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
