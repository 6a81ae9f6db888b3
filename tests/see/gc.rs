//! What `portmap gc` removes, and what it leaves.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use portmap::demo::plugin;
use serde_json::{Value, json};

use super::support::{
    GONE_NETNS, IPTABLES, Node, PORTMAP, RULES, UPSTREAM, VARIANTS, Variant, attachment,
    prev_result,
};
use super::{add, add_dead, changes_nothing, lab, report, run, run_with};

/// The file of a container's record.
fn record_of(node: &Node, container_id: &str) -> PathBuf {
    let files = fs::read_dir(node.state_dir.join("records")).unwrap();
    let mut paths = files.map(|entry| entry.unwrap().path());
    paths.find(|path| fs::read_to_string(path).unwrap().contains(container_id)).unwrap()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_dead_go_and_the_living_stay() {
    for variant in VARIANTS {
        let lab = lab(3);
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let (nothing, status) = changes_nothing(&node, || report(&node, &["gc"]));
        assert_eq!((&nothing["removed"], status), (&json!([]), 0), "{variant:?}");
        assert!(!node.state_dir.exists());

        let live = add(&node, &lab, 0, 8080);
        let unknown = add(&node, &lab, 1, 8081);
        let record = record_of(&node, "container-1");
        let netns = unknown.1.netns.to_str().unwrap();
        let text = fs::read_to_string(&record).unwrap().replace(netns, "");
        // Nobody can tell whether it lives.
        fs::write(&record, text).unwrap();
        let alone = node.snapshot();
        // It claims the port of the one that lives, and has it.
        add_dead(&node, &lab, 2, 8080);

        let output = changes_nothing(&node, || run(&node, &["gc", "--dry-run"]));
        assert!(output.stdout.contains("would remove demo/pod-c on portmap"), "{}", output.stdout);
        assert!(output.stdout.ends_with("1 would be removed, 2 stay\n"), "{}", output.stdout);
        assert_eq!(output.status, Some(0));

        let (found, status) = report(&node, &["gc"]);
        assert_eq!(status, 0, "{found}");
        assert_eq!(found["removed"][0]["attachment"]["containerID"], "container-2", "{variant:?}");
        assert_eq!((&found["live"], &found["removed"][1]), (&json!(2), &json!(null)));
        assert_eq!(node.snapshot(), alone, "{variant:?}");
        node.ok("CHECK", &live.0, &live.1);
        let (again, _) = changes_nothing(&node, || report(&node, &["gc"]));
        assert_eq!(again["removed"], json!([]), "{variant:?}");

        node.ok("DEL", &unknown.0, &unknown.1);
        node.ok("DEL", &live.0, &live.1);
        node.assert_clean(&before);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_damaged_record_goes_only_if_its_container_is_known_to_be_gone() {
    for variant in VARIANTS {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let live = add(&node, &lab, 0, 8080);
        let alone = node.snapshot();
        add_dead(&node, &lab, 1, 8081);
        let dead = record_of(&node, "container-1");
        let whole = fs::read_to_string(&dead).unwrap();

        // Cut off: the path of the namespace cannot be told.
        fs::write(&dead, &whole[..whole.len() / 2]).unwrap();
        let (found, status) = changes_nothing(&node, || report(&node, &["gc"]));
        assert_eq!((&found["repaired"], &found["removed"], status), (&json!([]), &json!([]), 1));
        assert_eq!(found["unclear"].as_array().unwrap().len(), 1, "{variant:?} {found}");

        fs::write(&dead, whole.replace("\"mappings\":[", "\"mappings\":[17,")).unwrap();
        let (dry, status) = changes_nothing(&node, || report(&node, &["gc", "--dry-run"]));
        assert_eq!((dry["repaired"].as_array().unwrap().len(), status), (1, 0), "{dry}");
        let (found, status) = report(&node, &["gc"]);
        assert_eq!(found["repaired"][0]["netns"], GONE_NETNS, "{variant:?}");
        assert_eq!((status, node.snapshot()), (0, alone), "{variant:?}");
        node.ok("CHECK", &live.0, &live.1);
        node.ok("DEL", &live.0, &live.1);
        node.assert_clean(&before);
    }
}

/// In a container that does not see the node's namespaces all of them would pass for gone.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_cannot_be_seen_is_left_alone() {
    for variant in VARIANTS {
        let lab = lab(1);
        let node = Node::new(&lab.node, variant);
        let (config, attachment) = add(&node, &lab, 0, 8080);
        let record = record_of(&node, "container-0");
        let netns = attachment.netns.to_str().unwrap();
        let text = fs::read_to_string(&record).unwrap();
        fs::write(&record, text.replace(netns, "/no-such-directory/netns")).unwrap();
        let (found, status) = changes_nothing(&node, || report(&node, &["gc"]));
        assert_eq!((&found["removed"], &found["live"], status), (&json!([]), &json!(0), 1));
        assert_eq!(found["unseen"][0]["netns"], "/no-such-directory/netns", "{variant:?}");
        assert_eq!(report(&node, &["list"]).1, 0, "{variant:?}: nothing is known to be wrong");
        node.ok("DEL", &config, &attachment);
    }
}

/// A container may have a directory of its own where the node has that of the namespaces.
#[test]
#[ignore = "privileged: makes namespaces"]
fn another_directory_of_that_name_says_nothing() {
    for variant in VARIANTS {
        let lab = lab(1);
        let node = Node::new(&lab.node, variant);
        let dir = node.state_dir.with_file_name("netns");
        fs::create_dir(&dir).unwrap();
        let name = dir.join("pod");
        std::os::unix::fs::symlink(lab.pods[0].netns.path(), &name).unwrap();
        let mappings = json!([{"hostPort": 8080, "containerPort": 80}]);
        let config = node.config(mappings, prev_result(&lab, 0, "1.0.0"));
        let mut attachment = attachment(&lab.pods[0], "container-0");
        attachment.netns.clone_from(&name);
        node.ok("ADD", &config, &attachment);
        let elsewhere = |mount: &str, command: &str| {
            let portmap =
                format!("{PORTMAP} {command} --json --state-dir {}", node.state_dir.display());
            let script = format!("{mount} {portmap} || true");
            let output = node.shell(&format!("unshare --mount sh -c '{script}'"));
            serde_json::from_str::<Value>(&output).unwrap()
        };
        let empty = format!("mount -t tmpfs none {} &&", dir.display());
        let found = changes_nothing(&node, || elsewhere(&empty, "gc"));
        assert_eq!(found["unseen"].as_array().unwrap().len(), 1, "{variant:?}: {found}");
        let found = changes_nothing(&node, || elsewhere(&empty, "restore"));
        assert_eq!((&found["attachments"], &found["dead"]), (&json!(1), &json!([])), "{found}");
        // The node's own, as a container has it that mounts it.
        fs::remove_file(&name).unwrap();
        let found = elsewhere("", "gc");
        assert_eq!(found["removed"].as_array().unwrap().len(), 1, "{variant:?}: {found}");
    }
}

/// In a container with PIDs of its own the processes behind such paths would pass for gone.
#[test]
#[ignore = "privileged: makes namespaces"]
fn processes_of_other_pid_namespaces_are_not_looked_for() {
    let lab = lab(1);
    let node = Node::new(&lab.node, Variant::Nftables);
    let mappings = json!([{"hostPort": 8080, "containerPort": 80}]);
    let config = node.config(mappings, prev_result(&lab, 0, "1.0.0"));
    let mut attachment = attachment(&lab.pods[0], "container-0");
    attachment.netns = format!("/proc/{}/ns/net", std::process::id()).into();
    node.ok("ADD", &config, &attachment);
    let (found, status) = report(&node, &["gc"]);
    assert_eq!((&found["live"], status), (&json!(1), 0), "{found}");
    let dir = node.state_dir.display();
    let elsewhere = |command: &str| {
        let portmap = format!("{PORTMAP} {command} --json --state-dir {dir}");
        let output = node.shell(&format!("unshare --pid --fork --mount-proc {portmap} || true"));
        serde_json::from_str::<Value>(&output).unwrap()
    };
    let found = changes_nothing(&node, || elsewhere("gc"));
    assert_eq!(found["unseen"].as_array().unwrap().len(), 1, "{found}");
    let found = changes_nothing(&node, || elsewhere("restore"));
    assert_eq!((&found["attachments"], &found["dead"]), (&json!(1), &json!([])), "{found}");
    node.ok("DEL", &config, &attachment);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_cannot_be_removed_is_said_and_stays() {
    for variant in RULES {
        let lab = lab(1);
        let node = Node::new(&lab.node, variant);
        add_dead(&node, &lab, 0, 8080);
        let output = run_with(&node, "/nowhere".as_ref(), &["gc"]);
        assert_eq!(output.status, Some(1), "{}", output.stdout);
        assert!(output.stdout.contains("cannot remove container container-0"), "{}", output.stdout);
        assert!(output.stdout.contains("not installed"), "{}", output.stdout);
        let (found, status) = report(&node, &["gc"]);
        assert_eq!(found["removed"][0]["attachment"]["containerID"], "container-0", "{variant:?}");
        assert_eq!((&found["failed"], status), (&json!([]), 0), "{variant:?}");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's plugin"]
fn what_upstream_left_stays_and_is_said() {
    for variant in IPTABLES {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        add_dead(&node, &lab, 0, 8080);
        let mappings = json!([{"hostPort": 7070, "containerPort": 70, "protocol": "tcp"}]);
        let config = node.config(mappings, prev_result(&lab, 1, "1.0.0"));
        let output =
            node.call(UPSTREAM, "ADD", &config, &attachment(&lab.pods[1], "upstream-container"));
        assert!(output.success(), "{}", output.reason());
        let output = run(&node, &["gc"]);
        assert_eq!(output.status, Some(0), "{}", output.stdout);
        assert!(output.stdout.contains("removed demo/pod-a"), "{}", output.stdout);
        assert!(output.stdout.contains("of container upstream-con alone"), "{}", output.stdout);
        let nat = node.shell("iptables -t nat -S");
        assert!(nat.contains("--dport 7070") && !nat.contains("--dport 8080"), "{nat}");
    }
}

/// A container that has the state directory, and a network of its own.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn commands_change_nothing_from_another_network_than_the_node_s() {
    for variant in VARIANTS {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let live = add(&node, &lab, 0, 8080);
        add_dead(&node, &lab, 1, 8081);
        let away = |arguments: &[&str]| {
            let mut command = Command::new(PORTMAP);
            command.env_clear().env("PATH", &node.path).args(arguments);
            command.arg("--state-dir").arg(&node.state_dir);
            plugin::run(&mut command, b"", &lab.client).unwrap()
        };
        changes_nothing(&node, || {
            for arguments in [&["gc"][..], &["restore"], &["flush", "--all", "--yes"]] {
                let output = away(arguments);
                assert_eq!(output.status, Some(1), "{arguments:?}: {}", output.stdout);
                assert!(output.stderr.contains("network namespace net:["), "{}", output.stderr);
            }
            for arguments in [&["list"][..], &["gc", "--dry-run"]] {
                let output = away(arguments);
                let text = output.stdout.clone() + &output.stderr;
                assert!(text.contains("network namespace net:["), "{arguments:?}: {text}");
            }
        });
        assert_eq!(run(&node, &["gc"]).status, Some(0));
        node.ok("CHECK", &live.0, &live.1);
        assert!(!run(&node, &["list"]).stdout.contains("net:["));
        node.ok("DEL", &live.0, &live.1);
    }
}
