//! Drop-ins of a list, which libcni appends to its plugins.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::{CILIUM, Node, PORTMAP, attached, fails, read, store};
use crate::running::{names, succeeds, text};

/// A list of libcni 1.3 or later, with the plugin in a file of its own.
fn dropped_in(node: &Node, list: &str) -> (PathBuf, PathBuf) {
    let list = node.write("10-cilium.conflist", list);
    let dir = node.list("cilium");
    fs::create_dir_all(dir.join("40-directory.conf")).unwrap();
    fs::write(dir.join("README"), "no configuration").unwrap();
    let drop_in = dir.join("50-portmap.conf");
    let capabilities = json!({"portMappings": true});
    let text =
        json!({"type": "portmap", "capabilities": capabilities, "stateDir": node.0.join("own")});
    fs::write(&drop_in, text.to_string()).unwrap();
    (list, drop_in)
}

#[test]
fn what_a_drop_in_names_is_not_installed_twice_and_still_needed() {
    let node = Node::new("drop-in");
    let (list, drop_in) = dropped_in(&node, CILIUM);
    for choice in [Path::new("auto"), &list] {
        let said = succeeds(node.install().arg("--conflist").arg(choice));
        assert!(said.contains(&format!("already, from {}", drop_in.display())), "{said}");
        assert!(said.contains("libcni before 1.3 do not read it"), "{said}");
        assert_eq!(read(&list), CILIUM);
    }
    let names_it = format!("{} names it (a drop-in of {}", drop_in.display(), list.display());
    fails(&mut node.uninstall(), &names_it);
    fails(node.uninstall().arg("--conflist"), &names_it);
    // One elsewhere has drop-ins as well.
    let mut uninstall = Command::new(PORTMAP);
    uninstall.arg("uninstall");
    for (option, place) in
        [("--dest", "bin"), ("--conf-dir", "elsewhere"), ("--state-dir", "state")]
    {
        uninstall.arg(option).arg(node.0.join(place));
    }
    fails(uninstall.arg("--conflist").arg(&list), &names_it);
    let record = attached(&node.0.join("own"));
    fails(&mut node.uninstall(), "c1 on n");
    assert!(node.portmap().exists());

    // The list alone counts.
    let alone = CILIUM.replacen('{', "{\"loadOnlyInlinedPlugins\": \"True\",", 1);
    node.write("10-cilium.conflist", &alone);
    let said = succeeds(node.install().arg("--conflist"));
    assert!(said.contains("put portmap behind cilium-cni"), "{said}");
    store(&node.0.join("own")).remove(&record).unwrap();
    succeeds(node.uninstall().arg("--conflist"));
    assert_eq!(read(&list), alone);
}

#[test]
fn a_list_of_drop_ins_alone_is_left_as_it_is() {
    let node = Node::new("drop-ins-alone");
    const NAME: &str = r#"{"cniVersion": "1.0.0", "name": "cilium"}"#;
    let (list, drop_in) = dropped_in(&node, NAME);
    fs::write(list.with_file_name("cilium/05-main.conf"), r#"{"type": "cilium-cni"}"#).unwrap();
    let said = succeeds(node.install().arg("--conflist"));
    assert!(said.contains("already, from"), "{said}");
    fails(node.uninstall().arg("--conflist"), "50-portmap.conf names it");
    fs::remove_file(&drop_in).unwrap();
    fails(node.install().arg("--conflist"), "add a drop-in behind the others");
    let said = succeeds(node.uninstall().arg("--conflist"));
    assert!(said.contains("has no entry of portmap"), "{said}");
    assert_eq!((read(&list).as_str(), names(&node.bin())), (NAME, Vec::<String>::new()));
}

#[test]
#[ignore = "privileged: probes backends in network namespaces"]
fn check_config_reads_drop_ins() {
    let node = Node::new("check-drop-ins");
    let path = std::env::var_os("PATH").unwrap();
    let (list, drop_in) = dropped_in(&node, CILIUM);
    let check = |status: i32, words: &str| {
        let mut command = Command::new(PORTMAP);
        let output = command.arg("check-config").arg(&list).env("PATH", &path).output().unwrap();
        let said = text(&output.stdout);
        assert!(output.status.code() == Some(status) && said.contains(words), "{output:?}");
    };
    check(0, &format!("portmap is from {}: runtimes with libcni before 1.3", drop_in.display()));
    check(0, "nothing is wrong");
    fs::write(&drop_in, "\n {\"type\": \"portmap\"}").unwrap();
    check(2, &format!("{}, line 2, column 2: broken: the capability", drop_in.display()));
}
