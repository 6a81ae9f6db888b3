//! `portmap uninstall`: what still needs the binary, and what is left of the list.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{CILIUM, CILIUM_WITH, Node, attached, copy_program, fails, read, store};
use crate::running::{names, succeeds, text};

#[test]
fn uninstall_refuses_what_is_still_needed() {
    let node = Node::new("needed");
    let list = node.write("10-cilium.conflist", CILIUM_WITH);
    node.write("20-other.conflist", "broken, and names \"portmap\"");
    succeeds(&mut node.install());
    let state = node.0.join("state");
    let record = attached(&state);

    let refusal = fails(&mut node.uninstall(), "10-cilium.conflist names it");
    let refusal = text(&refusal.stderr);
    assert!(
        refusal.contains("20-other.conflist names it") && refusal.contains("8080"),
        "{refusal}"
    );
    // The list is left at once, the binary when nothing needs it any more.
    fs::remove_file(node.list("20-other.conflist")).unwrap();
    let output = fails(node.uninstall().arg("--conflist"), "c1 on n");
    assert!(text(&output.stdout).contains("took portmap out"), "{output:?}");
    assert_eq!(read(&list), CILIUM);
    assert!(node.portmap().exists());

    store(&state).remove(&record).unwrap();
    assert!(succeeds(&mut node.uninstall()).contains("removed"));
    assert_eq!(names(&node.bin()), [""; 0]);
}

/// Its delegates are run as a list's plugins are.
#[test]
fn uninstall_refuses_what_multus_needs() {
    let node = Node::new("multus");
    node.write(
        "00-multus.conf",
        r#"{"type":"multus","delegates":[{"plugins":[{"type":"flannel"},{"type":"portmap"}]}]}"#,
    );
    succeeds(&mut node.install());
    fails(&mut node.uninstall(), "00-multus.conf names it (which has to be edited by hand)");
    assert_eq!(names(&node.bin()), ["portmap"]);
}

#[test]
fn what_an_entry_said_outlives_it() {
    let node = Node::new("entry");
    let state = node.0.join("other");
    let options =
        format!("\"type\": \"portmap\", \"stateDir\": {:?}, \"snat\": false", state.display());
    let before = CILIUM_WITH.replace("\"type\": \"portmap\"", &options);
    let list = node.write("10-cilium.conflist", &before);
    let backup = node.list("10-cilium.conflist.portmap-backup");
    succeeds(&mut node.install());
    let record = attached(&state);
    let flush = format!(
        "c1 on n (nftables): tcp 0.0.0.0:8080 is forwarded (it ends with the pod, or with portmap flush --state-dir {})",
        state.display()
    );
    let output = fails(node.uninstall().arg("--conflist"), &flush);
    let said = text(&output.stdout);
    assert!(said.contains(&format!("; as it was: {}", backup.display())), "{said}");
    assert_eq!((read(&list), read(&backup)), (CILIUM.to_owned(), before));
    // The list does not tell any more.
    fails(&mut node.uninstall(), &flush);
    store(&state).remove(&record).unwrap();
    succeeds(&mut node.uninstall());
    assert_eq!(names(&node.bin()), [""; 0]);
    assert_eq!(names(&node.0.join("net.d")).len(), 2);
}

#[test]
fn what_was_done_before_a_refusal_is_told() {
    let node = Node::new("told");
    node.write("10-x.conflist", "{\"type\": \"ptp\"}");
    let output = fails(node.install().args(["--json", "--conflist"]), "single plugin");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["binary"]["change"], "installed");
    assert_eq!(report["list"], Value::Null);
    assert!(report["failed"].as_str().unwrap().contains("single plugin"), "{report}");

    node.write("10-x.conflist", CILIUM_WITH);
    node.write("20-y.conflist", CILIUM_WITH);
    let output = fails(node.uninstall().args(["--json", "--conflist"]), "20-y.conflist names it");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["binary"]["change"], "none");
    assert_eq!(report["list"]["change"], "removed");
    assert!(report["failed"].as_str().unwrap().contains("20-y.conflist names it"), "{report}");
    assert_eq!(read(&node.list("10-x.conflist")), CILIUM);
}

/// Who takes a node apart removes its network first.
#[test]
fn a_list_that_is_gone_is_no_reason_to_stay() {
    let node = Node::new("list-gone");
    let gone = node.list("10-cilium.conflist");
    let none = format!("there is no list in {}", node.0.join("net.d").display());
    let no_file = format!("{} does not exist", gone.display());
    for (choice, note) in [(Path::new("auto"), &none), (&gone, &no_file)] {
        succeeds(&mut node.install());
        let said = succeeds(node.uninstall().arg("--conflist").arg(choice));
        assert!(said.contains("removed") && said.contains(note.as_str()), "{said}");
        assert_eq!(names(&node.bin()), [""; 0]);
    }
    // Others may still need the binary.
    succeeds(&mut node.install());
    node.write("20-other.conflist", CILIUM_WITH);
    fails(node.uninstall().arg("--conflist").arg(&gone), "20-other.conflist names it");
    let record = attached(&node.0.join("state"));
    fs::remove_dir_all(node.0.join("net.d")).unwrap();
    fails(node.uninstall().args(["--conflist", "auto"]), "c1 on n");
    store(&node.0.join("state")).remove(&record).unwrap();
    let said = succeeds(node.uninstall().args(["--json", "--conflist", "auto"]));
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&report["list"], &report["failed"]), (&Value::Null, &Value::Null), "{report}");
    assert!(report["notes"][0].as_str().unwrap().contains(&none), "{report}");
}

#[test]
fn uninstall_leaves_other_programs_alone_unless_forced() {
    let node = Node::new("strange");
    copy_program("/bin/true", &node.portmap());
    fails(&mut node.uninstall(), "not a portmap of this project");
    node.write("10-cilium.conflist", CILIUM_WITH);
    let report = succeeds(node.uninstall().args(["--force", "--json"]));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["binary"]["change"], "removed");
    assert_eq!(names(&node.bin()), [""; 0]);
}
