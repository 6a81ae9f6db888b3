//! `portmap flush` where programs outlive the last pod.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use portmap::demo::plugin::{self, Output};
use portmap::demo::snapshot::pins;
use portmap::demo::topology::UPLINK;
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::{Attachment, Family};
use portmap::record::record_id;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::program::{Program, SocketHook};
use portmap::sys::bpf::{Direction, cgroup, tcx};
use portmap::sys::store::record_path;
use serde_json::{Value, json};

use super::support::{
    Node, PORTMAP, Variant, attachment, ebpf, files_of, prev_result, programs, strace,
};
use super::{Scene, TIMEOUT, lab};

impl Scene<'_> {
    fn flush_with(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(PORTMAP);
        command.env_clear().arg("flush").args(arguments);
        command.arg("--state-dir").arg(&self.node.state_dir);
        plugin::run(&mut command, b"", &self.lab.node).unwrap()
    }

    fn record(&self, pod: usize) -> PathBuf {
        let attachment = Attachment {
            network: "portmap".into(),
            container_id: format!("container-{pod}"),
            ifname: "eth0".into(),
        };
        record_path(&self.node.state_dir, &record_id(&attachment))
    }

    /// A pod's configuration on another network.
    fn on_network(&self, pod: usize, network: &str) -> Value {
        let mut config = self.config(pod);
        config["name"] = json!(network);
        config
    }

    fn reached(&self, pod: usize) -> bool {
        let target = self.lab.node_socket(Family::V4, Self::port(pod));
        reach(&self.lab.client, Call::new(Transport::Tcp, target, TIMEOUT)).is_ok()
    }

    fn everything(&self) -> (Vec<String>, usize, usize) {
        let pins = pins(&self.lab.node).unwrap().len();
        (ebpf::state(&self.lab.node), pins, files_of(&self.node.state_dir).len())
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_network_is_flushed_alone_and_the_last_one_takes_all_with_it() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.node.ok("ADD", &scene.on_network(0, "blue"), &scene.key(0));
    scene.node.ok("ADD", &scene.on_network(1, "green"), &scene.key(1));
    let hooks = ebpf::hooks(&lab.node);
    let nobody = scene.flush_with(&["--network", "red", "--yes"]);
    assert!(nobody.success(), "{}", nobody.stderr);
    assert!(scene.reached(0) && scene.reached(1));
    let flushed = scene.flush_with(&["--network", "blue", "--yes"]);
    assert!(flushed.success(), "{}", flushed.stderr);
    assert!(flushed.stdout.contains("on blue (ebpf)"), "{}", flushed.stdout);
    assert!(!scene.reached(0) && scene.reached(1));
    assert_eq!(ebpf::hooks(&lab.node), hooks);
    scene.node.ok("CHECK", &scene.on_network(1, "green"), &scene.key(1));
    // The runtime's DEL comes later, or never.
    scene.node.ok("DEL", &scene.on_network(0, "blue"), &scene.key(0));
    let flushed = scene.flush_with(&["--network", "green", "--yes"]);
    assert!(flushed.success(), "{}", flushed.stderr);
    assert_eq!(ebpf::state(&lab.node), Vec::<String>::new());
    assert_eq!(pins(&lab.node).unwrap(), Vec::<std::path::PathBuf>::new());
    assert!(!scene.reached(1));
    // And again, with nothing there.
    assert!(scene.flush_with(&["--all", "--yes"]).success());
    scene.ok("ADD", 0);
    assert!(scene.reached(0));
}

/// After a rollback: the programs are also an attachment's of which only a newer plugin knows.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_is_loaded_stays_for_a_newer_portmap_s_attachment() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    let hooks = ebpf::hooks(&lab.node);
    let file = scene.record(0);
    let known = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, known.replacen(r#""format":1,"#, r#""format":99,"#, 1)).unwrap();
    let flushed = scene.flush_with(&["--all", "--yes"]);
    let (reached, hooks_then) = ([0, 1].map(|pod| scene.reached(pod)), ebpf::hooks(&lab.node));
    // If it fails from here on, what clears up can read it.
    std::fs::write(&file, known).unwrap();
    assert!(flushed.stdout.contains("written by a newer portmap"), "{}", flushed.stdout);
    assert_eq!((reached, hooks_then), ([true, false], hooks));
    assert!(scene.flush_with(&["--all", "--yes"]).success());
    assert!(!scene.reached(0));
    assert_eq!(ebpf::state(&lab.node), Vec::<String>::new());
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn nobody_to_confirm_means_no() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let before = scene.everything();
    for arguments in [&["--all"] as &[&str], &["--network", "portmap"], &["--all", "--json"]] {
        let refused = scene.flush_with(arguments);
        assert_eq!(refused.status, Some(1), "{arguments:?}");
        let expected = "the hostPorts of 1 attachment would be removed: nobody is there to confirm it, repeat with --yes";
        assert!(refused.stderr.contains(expected), "{arguments:?}: {}", refused.stderr);
        assert_eq!(scene.everything(), before, "{arguments:?}");
    }
    // What is to be flushed has to be said.
    let refused = scene.flush_with(&["--yes"]);
    assert_eq!(refused.status, Some(2), "{}", refused.stderr);
    assert_eq!(scene.everything(), before);
    scene.ok("CHECK", 0);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_report_can_be_read_by_programs() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    let flushed = scene.flush_with(&["--all", "--yes", "--json"]);
    assert!(flushed.success(), "{}", flushed.stderr);
    let report: Value = serde_json::from_str(&flushed.stdout).unwrap();
    let removed = |pod: usize| json!({"network": "portmap", "containerID": format!("container-{pod}"), "ifname": "eth0"});
    assert_eq!(report, json!({"removed": [removed(0), removed(1)], "failed": [], "notes": []}));
    let flushed = scene.flush_with(&["--all", "--yes", "--json"]);
    let report: Value = serde_json::from_str(&flushed.stdout).unwrap();
    assert_eq!(report, json!({"removed": [], "failed": [], "notes": []}));
}

const HOOK: SocketHook = SocketHook::Connect4;

/// A program at the root cgroup, which is not the node's alone.
struct AtRoot(Program);

impl AtRoot {
    fn is_there(&self) -> bool {
        cgroup::root().unwrap().query(HOOK).unwrap().programs.contains(&self.0.id())
    }
}

impl Drop for AtRoot {
    fn drop(&mut self) {
        cgroup::root().unwrap().detach(HOOK, &self.0).unwrap();
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_others_have_attached_stays() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let [first, second] = [0, 1].map(|pod: usize| lab.pods[pod].host_link.clone());
    // Before this plugin: a qdisc with a filter, one without, programs by tcx and at sockets.
    scene.node.shell(&format!(
        "tc qdisc add dev {first} clsact
         tc filter add dev {first} ingress prio 7 protocol ip u32 match u32 0 0 flowid :1
         tc qdisc add dev cilium_host clsact"
    ));
    let at_device = |name: &str, direction: Direction| {
        let attach = || {
            let program = programs::classifier(name, -1);
            tcx::attach_first(ebpf::index_of(UPLINK), direction, &program).unwrap();
            program
        };
        lab.node.run(attach).unwrap()
    };
    let _before = at_device("foreign_in", Direction::Ingress);
    let root = AtRoot(programs::socket_program("foreign_sock", HOOK));
    cgroup::root().unwrap().attach(HOOK, &root.0).unwrap();
    let before = ebpf::hooks(&lab.node);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    // After it, in what it has made: the qdisc stays with them.
    let _after = at_device("foreign_out", Direction::Egress);
    scene.node.shell(&format!(
        "tc filter add dev {second} egress prio 9 protocol all u32 match u32 0 0 flowid :1"
    ));
    scene.ok("ADD", 0);
    let flushed = scene.flush_with(&["--all", "--yes"]);
    assert!(flushed.success(), "{}", flushed.stderr);
    let mut expected = before;
    expected.push(format!("{second} clsact"));
    expected.push(format!("{UPLINK} Egress tcx foreign_out"));
    // Its table and the filter in it.
    expected.extend([format!("{second} Egress u32 "), format!("{second} Egress u32 ")]);
    let mut now = ebpf::hooks(&lab.node);
    expected.sort();
    now.sort();
    assert_eq!(now, expected);
    assert!(root.is_there());
}

/// A node that forwards by rules need not be one on which eBPF works.
#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_node_without_ebpf_is_flushed() {
    let lab = lab(1);
    let node = Node::new(&lab.node, Variant::Nftables);
    let mappings = json!([{"hostPort": 8080, "containerPort": 80}]);
    let config = node.config(mappings, prev_result(&lab, 0, "1.0.0"));
    let before = node.snapshot();
    node.ok("ADD", &config, &attachment(&lab.pods[0], "c"));
    let mut command = Command::new(PORTMAP);
    command.env_clear().args(["flush", "--all", "--yes", "--state-dir"]).arg(&node.state_dir);
    command.env("PATH", &node.path);
    let (flushed, met) = strace::tampered(&lab.node, &command, "", "bpf", "error=ENOSYS");
    assert!(flushed.success(), "{}", flushed.stderr);
    assert!(met, "eBPF was not asked whether anything is attached");
    node.assert_clean(&before);
    assert!(!Path::new("/sys/fs/bpf/portmap").exists());
}

/// What the plugin starts would have to be on the node, and in PATH or where it is expected.
#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn no_call_and_no_command_that_changes_anything_starts_a_process() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let started = |command: &Command, input: &str| {
        let (output, log) = strace::traced(&lab.node, command, input, "execve,execveat");
        assert!(output.success(), "{command:?}: {} {}", output.stdout, output.stderr);
        log.matches("execve").count()
    };
    let at_work = |arguments: &[&str]| {
        let mut command = Command::new(PORTMAP);
        command.env_clear().env("PATH", &scene.node.path).args(arguments);
        command.arg("--state-dir").arg(&scene.node.state_dir);
        assert_eq!(started(&command, ""), 1, "{arguments:?}");
    };
    let call = |verb: &str, pod: usize| {
        let mut config = scene.config(pod);
        // For GC, which lets no attachment be then.
        config["cni.dev/valid-attachments"] = json!([]);
        let command = scene.command(&[], verb, pod);
        assert_eq!(started(&command, &config.to_string()), 1, "{verb}");
    };
    call("STATUS", 0);
    for (verb, pod) in [("ADD", 0), ("ADD", 1), ("ADD", 1), ("CHECK", 1), ("DEL", 1), ("GC", 1)] {
        call(verb, pod);
    }
    assert!(scene.node.records().is_empty());
    call("ADD", 0);
    at_work(&["list"]);
    scene.node.damage();
    at_work(&["restore"]);
    at_work(&["gc"]);
    at_work(&["flush", "--all", "--yes"]);
    call("DEL", 0);
}

/// What a call leaves to be sorted out by a later one would add up.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_add_and_its_del_leave_every_map_as_it_was() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    // Counters of a map are of one value for each processor.
    let maps = || -> BTreeMap<String, Vec<String>> {
        let read = || {
            let pinned = ebpf::pinned(Path::new(ebpf::PINS)).into_iter();
            let all = pinned.filter(|(_, path)| !path.to_string_lossy().contains("/p-"));
            let entries = |path: &Path| {
                let entries = Map::from_pin(path).unwrap().unwrap().entries().unwrap();
                let mut lines: Vec<String> =
                    entries.iter().map(|entry| format!("{entry:02x?}")).collect();
                lines.sort();
                lines
            };
            all.map(|(name, path)| (name, entries(&path))).collect()
        };
        lab.node.run(read).unwrap()
    };
    scene.ok("ADD", 0);
    let before = maps();
    assert!(before.len() >= 10 && !before["pm_claims"].is_empty(), "{before:?}");
    for _ in 0..2 {
        scene.ok("ADD", 1);
        assert_ne!(maps(), before);
        scene.ok("DEL", 1);
        let after = maps();
        for (name, entries) in &before {
            assert_eq!(&after[name], entries, "{name}");
        }
        assert_eq!(after.len(), before.len());
    }
    scene.ok("DEL", 0);
    scene.node.flush();
}

/// Calls remember the numbers of programs, and are not misled where somebody else has loaded others.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn programs_that_were_loaded_anew_are_found_out() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    let note = scene.node.state_dir.join("notes/kernel");
    let noted = || -> BTreeMap<String, u32> {
        let note: Value = serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
        serde_json::from_value(note["programs"]["programs"].clone()).unwrap()
    };
    let loaded = || -> BTreeMap<String, u32> {
        let numbers = || {
            let pinned = ebpf::pinned(Path::new(ebpf::PINS)).into_iter();
            let id = |path: &Path| Program::from_pin(path).unwrap().unwrap().id();
            pinned
                .filter(|(_, path)| path.parent().unwrap().to_string_lossy().contains("/p-"))
                .map(|(name, path)| (name, id(&path)))
                .collect()
        };
        lab.node.run(numbers).unwrap()
    };
    (0..2).for_each(|pod| drop(scene.ok("ADD", pod)));
    let first = loaded();
    assert_eq!(noted(), first);
    let stale = std::fs::read(&note).unwrap();

    scene.node.flush();
    (0..2).for_each(|pod| drop(scene.ok("ADD", pod)));
    let second = loaded();
    assert_eq!(noted(), second);
    assert!(second.iter().all(|(name, id)| first[name] != *id), "{second:?}");

    std::fs::write(&note, stale).unwrap();
    scene.ok("ADD", 2);
    assert_eq!((noted(), loaded()), (second.clone(), second));
    for pod in 0..3 {
        scene.ok("CHECK", pod);
        assert!(scene.reached(pod), "{pod}");
    }
}
