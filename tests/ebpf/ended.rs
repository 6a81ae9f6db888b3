//! A call that is killed before it has ended the connections of a former owner: the next one ends them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use portmap::backend::ebpf::layout::FlowKey;
use portmap::backend::ebpf::loaded::OWN;
use portmap::demo::plugin;
use portmap::demo::traffic::{Call, Session, Transport};
use portmap::model::Family;
use portmap::sys::bpf::pins::Pins;
use serde_json::Value;
use zerocopy::FromBytes;

use super::support::{PORTMAP, ebpf, strace};
use super::talks::Talks;
use super::{Scene, TIMEOUT, lab};

/// Who talks to hostPort 8080 by UDP: the client, whose packets meet the claim, and the node, whose
/// connected socket has the pod's address.
struct Talk {
    client: Session,
    node: Session,
}

impl Talk {
    fn begin(scene: &Scene) -> Self {
        let open = |from, to| {
            let mut session = Session::open(from, Call::new(Transport::Udp, to, TIMEOUT)).unwrap();
            assert_eq!(session.ask().unwrap().server, "pod-a");
            session
        };
        let inner = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), Scene::port(0));
        let outer = scene.lab.node_socket(Family::V4, Scene::port(0));
        Talk { client: open(&scene.lab.client, outer), node: open(&scene.lab.node, inner) }
    }
}

impl Scene<'_> {
    fn killed_before(&self, verb: &str, config: &Value, pod: usize, call: &str, n: usize) -> bool {
        let mut command = plugin::command(Path::new(PORTMAP), verb, &self.key(pod));
        command.env("PATH", &self.node.path);
        let how = format!("signal=SIGKILL:when={n}");
        let input = config.to_string();
        let (output, _) = strace::tampered(&self.lab.node, &command, &input, call, &how);
        output.status.is_none()
    }

    /// Flows that lead to a pod's UDP server.
    fn flows_to(&self, pod: usize) -> usize {
        let server = SocketAddr::new(self.lab.pods[pod].address(Family::V4).unwrap(), 53);
        let flows = self.lab.node.run(|| ebpf::map("pm_flows").entries().unwrap()).unwrap();
        let leads_there = |key: &[u8]| FlowKey::read_from_bytes(key).unwrap().target() == server;
        flows.iter().filter(|(key, _)| leads_there(key)).count()
    }
}

/// Has `end` killed before each of its calls, one after the other.
fn walk(scene: &Scene, end: impl Fn(&str, usize, Talk) -> bool) {
    for call in ["bpf", "sendto"] {
        let mut number = 1;
        while end(call, number, Talk::begin(scene)) {
            number += 1;
        }
        assert!(number > 5, "{call}: strace has not traced");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn connections_end_with_their_claim_when_the_del_is_killed() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    walk(&scene, |call, number, mut talk| {
        let killed = scene.killed_before("DEL", &scene.config(0), 0, call, number);
        scene.ok("DEL", 0);
        assert!(talk.node.ask().is_err(), "{call} {number}: the node's socket was not told");
        assert_eq!(scene.flows_to(0), 0, "{call} {number}");
        scene.ok("ADD", 0);
        // As if nothing had been.
        assert_eq!(talk.client.ask().unwrap().server, "pod-a", "{call} {number}");
        killed
    });
    scene.ok("DEL", 0);
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn connections_end_with_their_claim_when_the_takeover_is_killed() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let taking = scene.config_with(1, Scene::port(0));
    walk(&scene, |call, number, mut talk| {
        let killed = scene.killed_before("ADD", &taking, 1, call, number);
        // Somebody else comes and goes before it is tried again.
        for verb in ["ADD", "DEL"] {
            scene.ok(verb, 2);
        }
        let owner = talk.client.ask().unwrap().server;
        match talk.node.ask() {
            Ok(reply) => assert_eq!(reply.server, owner, "{call} {number}"),
            Err(failure) => {
                assert_eq!(owner, "pod-b", "{call} {number}: {failure}");
            }
        }
        scene.node.ok("ADD", &taking, &scene.key(1));
        assert!(talk.node.ask().is_err(), "{call} {number}: the node's socket was not told");
        assert_eq!(scene.flows_to(0), 0, "{call} {number}");
        assert_eq!(talk.client.ask().unwrap().server, "pod-b", "{call} {number}");
        scene.node.ok("DEL", &taking, &scene.key(1));
        assert_eq!(talk.client.ask().unwrap().server, "pod-a", "{call} {number}");
        killed
    });
    scene.ok("DEL", 0);
}

/// The new maps have taken over what the former ones held, whose name is gone, and have none yet.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn connections_go_on_when_the_call_is_killed_between_the_names_of_maps() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let mut talks = Talks::open(&lab);
    let rename = || {
        let pins = Pins::open().unwrap();
        for revision in pins.list().unwrap().revisions {
            pins.remove_programs(&revision).unwrap();
        }
        let named = pins.maps_dir(OWN.layout);
        let name = named.file_name().unwrap().to_str().unwrap();
        std::fs::rename(&named, named.with_file_name(format!("tmp-{name}"))).unwrap();
    };
    let before = scene.flows_to(0);
    assert!(before > 0);
    lab.node.run(rename).unwrap();
    scene.ok("ADD", 1);
    // Also those whose server speaks next.
    assert_eq!(scene.flows_to(0), before);
    talks.go_on();
    for pod in [0, 1] {
        scene.ok("DEL", pod);
    }
}

/// A map has lost its name, so that all are made anew. Of many calls a run takes every third.
#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn connections_go_on_when_the_call_that_makes_maps_anew_is_killed() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let mut talks = Talks::open(&lab);
    let before = scene.flows_to(0);
    assert!(before > 0);
    let mut tried = 0;
    for (calls, step) in [("unlinkat", 3), ("?rename,?renameat", 1)] {
        for number in (1 + std::process::id() as usize % step..).step_by(step) {
            let unpin = || std::fs::remove_file(ebpf::map_path("pm_ports")).unwrap();
            lab.node.run(unpin).unwrap();
            let killed = scene.killed_before("ADD", &scene.config(1), 1, calls, number);
            scene.ok("ADD", 1);
            assert_eq!(scene.flows_to(0), before, "{calls} {number}");
            if !killed {
                break;
            }
            tried += 1;
        }
    }
    assert!(tried > 10, "strace has not traced");
    talks.go_on();
    (0..2).for_each(|pod| drop(scene.ok("DEL", pod)));
}
