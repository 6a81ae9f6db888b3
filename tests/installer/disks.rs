//! File systems that refuse: read-only, full, without execution, with labels.

use std::fs;
use std::path::Path;

use super::{CILIUM, Node, copy_program, on_tmpfs};
use crate::running::{succeeds, text};

#[test]
#[ignore = "privileged: mounts file systems in a mount namespace of its own"]
fn a_read_only_directory_is_named_as_such() {
    let node = Node::new("read-only");
    fs::write(node.0.join("list"), CILIUM).unwrap();
    on_tmpfs(
        &node,
        "size=1m",
        &format!(
            "cp /bin/sleep $dest/portmap; cp {list} $dest/10-x.conflist; mount -o remount,ro $dest
             fails 'is on a read-only file system; choose a writable directory' $portmap install --dest $dest
             fails 'read-only file system' $portmap uninstall --force --dest $dest
             mkdir {bin}
             fails 'write '$dest'/10-x.conflist.portmap-backup: it is on a read-only' \
                 $portmap install --dest {bin} --conflist $dest/10-x.conflist
             cmp /bin/sleep $dest/portmap; cmp {list} $dest/10-x.conflist",
            list = node.0.join("list").display(),
            bin = node.bin().display(),
        ),
    );
}

#[test]
#[ignore = "privileged: mounts file systems in a mount namespace of its own"]
fn a_full_disk_keeps_the_old_one() {
    let node = Node::new("full");
    on_tmpfs(
        &node,
        "size=128k",
        "cp /bin/sleep $dest/portmap
         fails 'the file system is full; nothing was changed' $portmap install --dest $dest
         cmp /bin/sleep $dest/portmap; [ \"$(ls -A $dest)\" = portmap ]",
    );
}

#[test]
#[ignore = "privileged: mounts file systems in a mount namespace of its own"]
fn a_directory_that_nothing_runs_from_is_noticed_before_the_runtime_does() {
    let node = Node::new("noexec");
    on_tmpfs(
        &node,
        "size=1m,noexec",
        "fails 'nothing can be run from' $portmap install --dest $dest; [ -z \"$(ls -A $dest)\" ]",
    );
}

#[test]
#[ignore = "privileged: sets security labels"]
fn the_security_label_is_kept() {
    const LABEL: &str = "security.selinux";
    let node = Node::new("label");
    copy_program("/bin/sleep", &node.portmap());
    let list = node.write("10-x.conflist", CILIUM);
    xattr::set(node.portmap(), LABEL, b"system_u:object_r:container_runtime_exec_t:s0").unwrap();
    xattr::set(&list, LABEL, b"system_u:object_r:etc_t:s0").unwrap();
    succeeds(node.install().arg("--conflist"));
    let label = |path: &Path| text(&xattr::get(path, LABEL).unwrap().unwrap());
    assert_eq!(label(&node.portmap()), "system_u:object_r:container_runtime_exec_t:s0");
    assert_eq!(label(&list), "system_u:object_r:etc_t:s0");
}
