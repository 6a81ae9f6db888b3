//! The state directory and its lock.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use crate::rig::{Rig, lab};
use crate::support::{Variant, files_of};

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_can_be_wrong_with_the_directory() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Nftables);
    rig.add(0);
    assert_eq!(rig.doctor().checks(), []);
    let dir = rig.node.state_dir.clone();
    std::fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
    let said = rig.doctor();
    assert_eq!(said.only("directory")["severity"], "broken");
    rig.follow(said.only("directory"));
    assert_eq!(rig.doctor().checks(), []);

    // Mounts are the node's alone.
    let mounted = |options: &str, then: &str| {
        let at = dir.display();
        rig.node.shell(&format!("mount -t tmpfs -o mode=700,{options} none {at}; {then}"));
        let said = rig.doctor();
        rig.node.shell(&format!("umount {at}"));
        said
    };
    let at = dir.display();
    let full = mounted("size=16k", &format!("cat /dev/zero > {at}/all 2>/dev/null || true"));
    assert_eq!(full.only("space")["fix"], format!("df -h {at}"));
    let no_inodes = mounted("nr_inodes=2", &format!("touch {at}/one"));
    assert_eq!(no_inodes.only("space")["fix"], format!("df -i {at}"));
    let read_only = mounted("size=1m", &format!("mount -o remount,ro {at}"));
    assert_eq!(read_only.only("directory")["severity"], "broken");
    let sound = mounted("size=1m", "true");
    assert!(sound.of("directory").is_empty() && sound.of("space").is_empty(), "{:#}", sound.json);
    assert_eq!(rig.doctor().checks(), []);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_directory_on_a_disk() {
    let lab = lab(1);
    let mut rig = Rig::new(&lab, Variant::Nftables);
    let disk = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("state-{}", std::process::id()));
    rig.node.state_dir = disk.clone();
    rig.write_list(crate::rig::LIST);
    rig.add(0);
    assert_eq!(rig.doctor().checks(), [("memory".into(), "warning".into())]);
    std::fs::remove_dir_all(disk).unwrap();
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_interrupted_call_another_boot_and_a_lock_that_is_held() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Nftables);
    rig.add(0);
    let dir = &rig.node.state_dir;
    std::fs::write(dir.join("notes/pending"), "[]").unwrap();
    let before = files_of(dir);
    let said = rig.doctor();
    assert_eq!(said.checks(), [("pending".into(), "warning".into())]);
    assert_eq!(files_of(dir), before, "it finishes nothing itself");
    rig.follow(said.only("pending"));
    assert_eq!(rig.doctor().checks(), []);

    let lock = std::fs::File::open(dir.join("lock")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let said = rig.doctor();
    let held = said.only("lock");
    assert!(
        held["found"].as_str().unwrap().contains(&format!("process {} ", std::process::id())),
        "{held}"
    );
    assert!(rig.node.shell(held["fix"].as_str().unwrap()).contains("doctor"));
    drop(lock);
    let lock = std::fs::File::open(dir.join("lock")).unwrap();
    let _reader = Flock::lock(lock, FlockArg::LockShared).unwrap();
    assert_eq!(rig.doctor().checks(), [], "readers do not keep each other out");
    drop(_reader);

    let boot = dir.join("boot");
    let own = std::fs::read_to_string(&boot).unwrap();
    std::fs::write(&boot, "another").unwrap();
    let before = files_of(dir);
    let said = rig.doctor();
    assert!(said.only("boot")["found"].as_str().unwrap().contains("(1 record)"), "{:#}", said.json);
    assert_eq!(files_of(dir), before, "it discards nothing itself");
    rig.follow(said.only("boot"));
    assert_eq!(std::fs::read_to_string(&boot).unwrap(), own);
    assert!(rig.doctor().of("boot").is_empty());
}
