//! STATUS, GC, and the choice of eBPF where nothing else works.

use portmap::demo::plugin::Output;
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use serde_json::{Value, json};

use super::support::{PORTMAP, ebpf};
use super::talks::Talks;
use super::{Scene, TIMEOUT, lab};

impl Scene<'_> {
    fn who_answers(&self, pod: usize, transport: Transport) -> Option<String> {
        let target = self.lab.node_socket(Family::V4, Self::port(pod));
        let reply = reach(&self.lab.client, Call::new(transport, target, TIMEOUT));
        reply.ok().map(|reply| reply.server)
    }

    /// A call that leaves the choice to the plugin.
    fn auto(&self, verb: &str, pod: usize) -> Output {
        let mut config = self.config(pod);
        config["backend"] = json!("auto");
        self.node.call(PORTMAP, verb, &config, &self.key(pod))
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn status_says_whether_an_add_would_work_and_changes_nothing() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let nothing = ebpf::state(&lab.node);
    scene.ok("STATUS", 0);
    assert!(scene.auto("STATUS", 0).success());
    assert_eq!(ebpf::state(&lab.node), nothing);
    scene.ok("ADD", 0);
    let whole = ebpf::state(&lab.node);
    scene.ok("STATUS", 0);
    assert!(scene.auto("STATUS", 0).success());
    assert_eq!(ebpf::state(&lab.node), whole);
    scene.ok("DEL", 0);
    scene.ok("STATUS", 0);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn gc_takes_what_the_runtime_does_not_know() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    (0..3).for_each(|pod| drop(scene.ok("ADD", pod)));
    let mut talks = Talks::open(&lab);
    // A datagram's flow that the collected pod leaves behind.
    assert_eq!(scene.who_answers(1, Transport::Udp).as_deref(), Some("pod-b"));
    let collect = |valid: &[usize]| {
        let mut config = scene.config(0);
        let valid: Vec<Value> = valid
            .iter()
            .map(|pod| json!({"containerID": format!("container-{pod}"), "ifname": "eth0"}))
            .collect();
        config["cni.dev/valid-attachments"] = json!(valid);
        let note = scene.node.ok("GC", &config, &scene.key(0)).stderr;
        assert!(note.is_empty(), "{note}");
    };
    collect(&[0, 1, 2]);
    (0..3).for_each(|pod| drop(scene.ok("CHECK", pod)));
    collect(&[0]);
    talks.go_on();
    for transport in [Transport::Tcp, Transport::Udp] {
        assert_eq!(scene.who_answers(0, transport).as_deref(), Some("pod-a"));
        assert_eq!(scene.who_answers(1, transport), None);
    }
    scene.ok("CHECK", 0);
    // One claim and the pod behind it for each protocol and family.
    let entries = ebpf::entries(&lab.node);
    let claims = entries.iter().filter(|entry| entry.starts_with("pm_claims "));
    assert_eq!(claims.count(), 8, "{entries:#?}");
    collect(&[]);
    assert_eq!(scene.who_answers(0, Transport::Tcp), None);
    // Programs stay, and a network without attachments is no reason to fail.
    assert!(!ebpf::hooks(&lab.node).is_empty());
    collect(&[]);
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn where_there_is_no_tool_ebpf_is_chosen_or_its_reason_told() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let mut config = scene.config(0);
    config["backend"] = json!("auto");
    let input = config.to_string();
    for (verb, code) in [("STATUS", 50), ("ADD", 101)] {
        let (refused, met) = super::support::strace::tampered(
            &lab.node,
            &scene.command(&[], verb, 0),
            &input,
            "bpf",
            "error=EPERM",
        );
        assert!(met);
        let error: Value = serde_json::from_str(&refused.stdout).unwrap();
        let text = refused.reason();
        assert_eq!(error["code"], code, "{text}");
        for part in [
            "no backend works on this node",
            "iptables: ",
            "nftables: ",
            "ebpf: cannot use eBPF: Operation not permitted (os error 1): a security module or a seccomp filter may forbid it",
        ] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }
    // What did not work is tried again.
    let added = scene.auto("ADD", 0);
    assert!(added.success(), "{}", added.reason());
    assert!(scene.auto("CHECK", 0).success());
    assert!(!ebpf::hooks(&lab.node).is_empty());
    Talks::open_from(&lab, &["client", "node"]);
    assert!(scene.auto("DEL", 0).success());
}
