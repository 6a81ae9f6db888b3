//! `portmap flush` with somebody at a terminal, and a program that reads what it reports.

use std::path::Path;
use std::process::Command;

use portmap::demo::plugin;
use portmap::model::Family;
use serde_json::{Value, json};

use super::support::{Node, PORTMAP, Scratch, Variant};
use super::{add, lab, run_with};

/// What it writes to stdout and stderr, both of them files, with a terminal of util-linux's script(1) at
/// stdin.
fn answered(node: &Node, answer: &str, arguments: &str) -> (i32, String, String) {
    assert!(Path::new("/usr/bin/script").exists(), "install bsdutils");
    let scratch = Scratch::new();
    let [stdout, stderr] = ["stdout", "stderr"].map(|name| scratch.0.join(name));
    let command = format!(
        "{PORTMAP} flush --network {} {arguments} --state-dir {} >{} 2>{}",
        node.network,
        node.state_dir.display(),
        stdout.display(),
        stderr.display()
    );
    let mut script = Command::new("script");
    script.env_clear().env("PATH", plugin::search_path()).args(["-qec", &command, "/dev/null"]);
    let output = plugin::run(&mut script, answer.as_bytes(), node.netns).unwrap();
    let read = |path| std::fs::read_to_string(path).unwrap();
    (output.status.unwrap(), read(stdout), read(stderr))
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_question_is_no_part_of_the_report() {
    let lab = lab(1);
    let node = Node::new(&lab.node, Variant::Nftables);
    add(&node, &lab, 0, 8080);
    let asked = "Remove the hostPorts of 1 attachment? Containers that run lose them. [y/N] ";
    for arguments in ["", "--json"] {
        let (status, stdout, stderr) = answered(&node, "n\n", arguments);
        assert_eq!((status, stdout.as_str()), (1, ""), "{stderr}");
        let (listed, question) = stderr.split_once('\n').unwrap();
        assert!(
            listed.ends_with("on portmap (nftables): tcp 0.0.0.0:8080, tcp [::]:8080"),
            "{listed}"
        );
        assert_eq!(question, format!("{asked}portmap flush: nothing was removed\n"));
    }
    let (status, stdout, stderr) = answered(&node, "y\n", "--json");
    assert_eq!(status, 0, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let removed = json!({"network": "portmap", "containerID": "container-0", "ifname": "eth0"});
    assert_eq!(report, json!({"removed": [removed], "failed": [], "notes": []}));
    assert!(stderr.ends_with(asked), "{stderr}");
}

/// With the last attachment of a state directory eBPF's programs go, for others as well.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_goes_with_ebpf_is_part_of_the_question() {
    let lab = lab(1);
    let mut node = Node::new(&lab.node, Variant::Ebpf);
    let (config, attachment) = add(&node, &lab, 0, 8080);
    let [own, other] = ["state", "other"].map(|name| node.state_dir.with_file_name(name));
    let ask = |node: &Node| {
        let output = run_with(node, Path::new("/nowhere"), &["flush", "--all"]);
        assert_eq!(output.status, Some(1), "{}", output.stdout);
        output.stderr
    };
    node.state_dir = other;
    let asked = ask(&node);
    let forward = format!(
        "-> {}:80 (ebpf), which has no record in ",
        lab.pods[0].address(Family::V4).unwrap()
    );
    assert!(asked.contains(&forward), "{asked}");
    let sum = "the hostPorts of 0 attachments and 2 forwards without a record would be removed";
    assert!(asked.contains(sum), "{asked}");
    node.state_dir = own;
    let asked = ask(&node);
    assert!(asked.contains("the hostPorts of 1 attachment would be removed"), "{asked}");
    node.ok("DEL", &config, &attachment);
    node.flush();
}
