//! Pods whose DEL comes with the list that libcni cached when they were made.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::{CILIUM, CILIUM_WITH, Node, fails, read};
use crate::running::{names, succeeds, text};

/// A namespace that every process sees.
const LIVES: &str = "/proc/self/ns/net";

/// What libcni leaves of an ADD with `list`.
pub fn cache(node: &Node, container: &str, list: &str, more: Value) -> PathBuf {
    let mut base64 = Command::new("base64")
        .arg("-w0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    base64.stdin.take().unwrap().write_all(list.as_bytes()).unwrap();
    let config = text(&base64.wait_with_output().unwrap().stdout);
    let mut entry = json!({
        "kind": "cniCacheV1", "containerId": container, "config": config, "ifName": "eth0",
        "networkName": "cilium", "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAME", "web"]],
        "result": {"cniVersion": "0.3.1", "interfaces": [{"name": "lxc1"}], "ips": []},
    });
    for (key, value) in more.as_object().unwrap() {
        entry[key] = value.clone();
    }
    put(node, "cache/results", container, &entry.to_string())
}

fn put(node: &Node, dir: &str, container: &str, text: &str) -> PathBuf {
    let path = node.0.join(dir).join(format!("cilium-{container}-eth0"));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn uninstall_refuses_what_a_cached_list_needs() {
    let node = Node::new("cached");
    let list = node.write("10-cilium.conflist", CILIUM_WITH);
    succeeds(&mut node.install());
    let first = cache(&node, "a", CILIUM_WITH, json!({"netns": LIVES}));
    let second = cache(&node, "b", CILIUM_WITH, json!({}));
    // The list is left, and is not the one that their DEL comes with.
    let said = fails(node.uninstall().arg("--conflist"), "2 files of ");
    let said = text(&said.stderr);
    let such_as = format!("such as {} (CRI-O and podman call DEL", first.display());
    assert!(said.contains(&such_as) && !said.contains("conflist names it"), "{said}");
    assert_eq!((read(&list).as_str(), node.portmap().exists()), (CILIUM, true));

    fs::remove_file(&first).unwrap();
    fails(&mut node.uninstall(), &format!("{} is of an attachment", second.display()));
    let report = fails(node.uninstall().arg("--json"), "is of an attachment");
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert!(report["failed"].as_str().unwrap().contains("--force will do"), "{report}");
    assert!(succeeds(node.uninstall().arg("--force")).contains("removed"));
    assert!(second.exists());

    succeeds(&mut node.install());
    fs::remove_file(&second).unwrap();
    succeeds(&mut node.uninstall());
    assert_eq!(names(&node.bin()), [""; 0]);
}

#[test]
fn cached_attachments_that_need_nothing_are_no_reason_to_stay() {
    let node = Node::new("cached-without");
    succeeds(&mut node.install());
    cache(&node, "without", CILIUM, json!({"netns": LIVES}));
    let gone = node.0.join("gone");
    cache(&node, "gone", CILIUM_WITH, json!({"netns": gone}));
    let result = |sandbox: &Path| json!({"interfaces": [{"name": "eth0", "sandbox": sandbox}]});
    cache(&node, "sandbox-gone", CILIUM_WITH, json!({"result": result(&gone)}));
    put(&node, "cache/results", "before-libcni-0.8", &result(Path::new(LIVES)).to_string());
    put(&node, "cache/results", "half-written", "{\"kind\":\"cniCacheV1\",\"config\":\"eyJ0");
    fs::create_dir(node.0.join("cache/results/directory")).unwrap();
    succeeds(&mut node.uninstall());

    // What cannot be looked for may live.
    succeeds(&mut node.install());
    let unseen = node.0.join("no-such-directory/netns");
    let unseen = cache(&node, "unseen", CILIUM_WITH, json!({"netns": unseen}));
    fails(&mut node.uninstall(), &format!("{} is of an attachment", unseen.display()));
}

/// It makes its delegates' attachments with a cache of its own.
#[test]
fn what_multus_has_cached_counts() {
    let node = Node::new("cached-multus");
    succeeds(&mut node.install());
    let delegate = cache(&node, "a", CILIUM_WITH, json!({"netns": LIVES}));
    let of_multus = put(&node, "cache/multus/results", "a", &read(&delegate));
    let multus = r#"{"type":"multus","delegates":[{"plugins":[{"type":"portmap"}]}]}"#;
    let whole = cache(&node, "a", multus, json!({"netns": LIVES}));
    for (one, who) in [(whole, "(CRI-O and podman call"), (of_multus, "(Multus calls DEL")] {
        let said = fails(&mut node.uninstall(), &format!("{} is of an attachment", one.display()));
        assert!(text(&said.stderr).contains(who), "{said:?}");
        fs::remove_file(one).unwrap();
    }
    succeeds(&mut node.uninstall());
}
