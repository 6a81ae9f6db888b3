//! Nodes on which nothing is wrong, nodes with nothing, and people who may not look.

use std::path::Path;
use std::process::Command;

use portmap::demo::plugin;
use portmap::demo::topology::{Lab, Options, Shape};
use serde_json::json;

use crate::executable::write_executable;
use crate::rig::{Rig, lab, report};
use crate::support::{PORTMAP, Scratch, VARIANTS, Variant, bare, files_of, foreign};

#[test]
#[ignore = "privileged: makes network namespaces"]
fn healthy_nodes_have_no_findings_and_are_left_as_they_are() {
    for variant in VARIANTS {
        let lab = lab(2);
        let rig = Rig::new(&lab, variant);
        let empty = rig.doctor();
        assert_eq!(
            (empty.status, empty.checks()),
            (Some(0), Vec::new()),
            "{variant:?}: {:#}",
            empty.json
        );
        assert!(!rig.node.state_dir.exists(), "{variant:?}: it made the state directory");

        rig.add(0);
        rig.add(1);
        let before = (rig.node.snapshot(), files_of(&rig.node.state_dir));
        let full = rig.doctor();
        assert_eq!(
            (full.status, full.checks()),
            (Some(0), Vec::new()),
            "{variant:?}: {:#}",
            full.json
        );
        assert_eq!((rig.node.snapshot(), files_of(&rig.node.state_dir)), before, "{variant:?}");
        let text = rig.doctor_text();
        assert!(
            text.contains("all 2 attachments are in the kernel as recorded"),
            "{variant:?}: {text}"
        );
        assert!(text.ends_with("all is fine\n") && !text.contains('\x1b'), "{variant:?}: {text}");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn rules_of_kube_proxy_and_docker_are_no_warning() {
    for variant in [Variant::IptablesNft, Variant::IptablesLegacy] {
        let lab = lab(1);
        let rig = Rig::new(&lab, variant);
        foreign::install(&rig.node);
        foreign::install_upstream_scaffold(&rig.node);
        rig.add(0);
        let said = rig.doctor();
        assert_eq!(
            (said.status, said.checks()),
            (Some(0), Vec::new()),
            "{variant:?}: {:#}",
            said.json
        );
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_cilium_keeps_to_itself_is_no_warning() {
    let lab = Lab::build(Options { pods: 1, ..Options::new(Shape::Cilium) }).unwrap();
    let rig = Rig::new(&lab, Variant::Nftables);
    rig.add(0);
    let said = rig.doctor();
    assert_eq!((said.status, said.checks()), (Some(0), Vec::new()), "{:#}", said.json);
    let text = rig.doctor_text();
    assert!(
        text.contains("device cilium_host") && text.contains("cannot be told from the node"),
        "{text}"
    );
    assert!(
        text.contains("ask: kubectl -n kube-system exec ds/cilium -- cilium-dbg status --verbose")
    );
}

fn nothing(path: &str) -> Command {
    let mut command = Command::new(path);
    command.env_clear().args(["doctor", "--json"]);
    for option in ["--state-dir", "--conf-dir", "--dest"] {
        command.args([option, "/nowhere/at/all"]);
    }
    command
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_node_with_nothing_and_an_empty_path() {
    let netns = bare::netns();
    let said = report(plugin::run(&mut nothing(PORTMAP), b"", &netns).unwrap());
    assert_eq!(said.status, Some(1), "{:#}", said.json);
    assert_eq!(
        said.checks(),
        [("list".into(), "warning".into()), ("binary".into(), "warning".into())],
        "{:#}",
        said.json
    );
    let found = |check: &str| {
        let all = said.json["findings"].as_array().unwrap();
        all.iter().find(|finding| finding["check"] == check).unwrap()["found"].clone()
    };
    assert!(found("iptables").to_string().contains("iptables-restore is not installed"));
    assert!(found("nftables").to_string().contains("nft is not installed"));
    assert_eq!(found("choice"), json!("auto takes ebpf"));
}

#[test]
#[ignore = "privileged: becomes another user"]
fn whoever_may_not_look_is_told_so() {
    // Where the build is need not be readable for others.
    let scratch = Scratch::new();
    let copy = scratch.0.join("portmap");
    // Not by this process, in which others start programs (ETXTBSY).
    assert!(Command::new("cp").arg(PORTMAP).arg(&copy).status().unwrap().success());
    let netns = bare::netns();
    let path = copy.to_str().unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command
        .args([path])
        .args(nothing(path).get_args())
        .env_clear()
        .env("PATH", plugin::search_path());
    let said = report(plugin::run(&mut command, b"", &netns).unwrap());
    assert_eq!(said.status, Some(1), "{:#}", said.json);
    for check in ["iptables", "nftables", "ebpf", "choice", "variants", "forward"] {
        let told = said.of(check);
        assert!(!told.is_empty(), "{check} is passed over: {:#}", said.json);
        let unread = |finding: &&serde_json::Value| {
            finding["found"].as_str().unwrap().contains("could not be read")
        };
        assert!(told.iter().all(unread), "{check}: {told:#?}");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn whoever_waits_for_longer_than_a_second_is_told_what_for() {
    let netns = bare::netns();
    let scratch = Scratch::new();
    let quick = plugin::run(&mut nothing(PORTMAP), b"", &netns).unwrap();
    // On a busy machine anything may take longer than a second.
    assert!(quick.stderr.lines().all(|line| line.ends_with(" …")), "{}", quick.stderr);
    let slow = scratch.0.join("nft");
    write_executable(&slow, "#!/bin/sh\n/bin/sleep 2\nexit 1\n");
    let output = plugin::run(nothing(PORTMAP).env("PATH", &scratch.0), b"", &netns).unwrap();
    let told = "portmap doctor: trying nftables out …";
    assert!(output.stderr.lines().any(|line| line == told), "{}", output.stderr);
    assert!(report(output).json["findings"].is_array());
}

/// By a terminal of util-linux's script(1).
fn on_terminal(environment: &str) -> String {
    let command = format!(
        "{environment} {PORTMAP} doctor --state-dir /nowhere --conf-dir /nowhere --dest /nowhere"
    );
    let mut script = Command::new("script");
    script.env_clear().env("PATH", plugin::search_path()).args(["-qec", &command, "/dev/null"]);
    plugin::run(&mut script, b"", &bare::netns()).unwrap().stdout
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn colours_are_for_terminals_and_for_who_wants_them() {
    assert!(Path::new("/usr/bin/script").exists(), "install bsdutils");
    let coloured = on_terminal("TERM=xterm");
    assert!(coloured.contains("\x1b[33mwarning"), "{coloured}");
    for environment in ["TERM=xterm NO_COLOR=1", "TERM=dumb"] {
        let plain = on_terminal(environment);
        assert!(plain.contains("warning") && !plain.contains('\x1b'), "{environment}: {plain}");
    }
    assert!(on_terminal("TERM=xterm NO_COLOR=").contains('\x1b'), "an empty value is no wish");
}
