//! `portmap install`, its watch, `portmap uninstall` and `portmap check-config`, on real directories.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "these tests run the program and look at the files that it leaves"
)]

#[path = "installer/cached.rs"]
mod cached;
#[path = "installer/check_config.rs"]
mod check_config;
#[path = "installer/disks.rs"]
mod disks;
#[path = "installer/drop_ins.rs"]
mod drop_ins;
#[path = "support/executable.rs"]
mod executable;
#[path = "support/golden.rs"]
mod golden;
#[path = "support/running.rs"]
mod running;
#[path = "installer/uninstall.rs"]
mod uninstall;
#[path = "installer/watch.rs"]
mod watch;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use portmap::conf::Options;
use portmap::model::{Attachment, BackendKind, Mapping, Protocol};
use portmap::record::Record;
use portmap::sys::Host;
use portmap::sys::store::Store;
use running::{Running, fails as fails_with, names, succeeds, text};
use serde_json::{Value, json};

const PORTMAP: &str = env!("CARGO_BIN_EXE_portmap");
const SAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/samples/cilium");

/// A list as Cilium writes it without chaining.
const CILIUM: &str = "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \"type\": \"cilium-cni\",\n       \"enable-debug\": false\n    }\n  ]\n}\n";
const CILIUM_WITH: &str = "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \"type\": \"cilium-cni\",\n       \"enable-debug\": false\n    },\n    {\n       \"type\": \"portmap\",\n       \"capabilities\": {\n          \"portMappings\": true\n       }\n    }\n  ]\n}\n";

/// No machine takes so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A node's two directories, gone when the test has passed.
struct Node(PathBuf);

impl Node {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("installer-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        fs::create_dir_all(path.join("net.d")).unwrap();
        Node(path)
    }

    fn bin(&self) -> PathBuf {
        self.0.join("bin")
    }

    fn portmap(&self) -> PathBuf {
        self.bin().join("portmap")
    }

    fn list(&self, name: &str) -> PathBuf {
        self.0.join("net.d").join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.list(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(PORTMAP);
        command.env_clear().arg(name).arg("--dest").arg(self.bin());
        command.arg("--conf-dir").arg(self.0.join("net.d")).stdin(Stdio::null());
        if name == "uninstall" {
            command.arg("--state-dir").arg(self.0.join("state"));
            command.arg("--cache-dir").arg(self.0.join("cache"));
        }
        command
    }

    fn install(&self) -> Command {
        self.command("install")
    }

    fn uninstall(&self) -> Command {
        self.command("uninstall")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            drop(fs::remove_dir_all(&self.0));
        }
    }
}

/// A refusal, or something that could not be done.
#[track_caller]
fn fails(command: &mut Command, message: &str) -> Output {
    fails_with(command, 1, message)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn same(left: &Path, right: &Path) -> bool {
    fs::read(left).unwrap() == fs::read(right).unwrap()
}

/// cp, because a file that this process had open for writing may still be open in a child that another
/// test's thread is just starting.
fn copy_program(from: &str, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

#[test]
fn installs_once_and_has_then_nothing_to_do() {
    let node = Node::new("idempotent");
    let list = node.write("10-cilium.conflist", CILIUM);
    let said = succeeds(node.install().arg("--conflist"));
    assert!(said.contains("installed") && said.contains("is the first list"), "{said}");
    assert!(said.contains("put portmap behind cilium-cni"), "{said}");
    assert!(said.contains("cni.chainingMode=portmap"), "{said}");
    assert_eq!(names(&node.bin()), ["portmap"]);
    assert!(same(&node.portmap(), Path::new(PORTMAP)));
    assert_eq!(fs::metadata(node.portmap()).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(read(&list), CILIUM_WITH);
    assert_eq!(read(&node.list("10-cilium.conflist.portmap-backup")), CILIUM);

    let before = fs::metadata(node.portmap()).unwrap().ino();
    let said = succeeds(node.install().args(["--conflist", "auto"]));
    assert!(said.contains("is up to date") && said.contains("names portmap already"), "{said}");
    assert_eq!(fs::metadata(node.portmap()).unwrap().ino(), before);

    let report: Value =
        serde_json::from_str(&succeeds(node.install().args(["--conflist", "--json"]))).unwrap();
    assert_eq!(report["binary"]["change"], "none");
    assert_eq!(
        report["list"],
        json!({"path": list, "change": "none", "after": null, "backup": null})
    );
}

#[test]
fn relative_paths_are_those_of_the_caller() {
    let node = Node::new("relative");
    node.write("10-x.conflist", CILIUM);
    let mut command = Command::new(PORTMAP);
    command
        .args(["install", "--dest", "bin", "--conflist", "net.d/10-x.conflist"])
        .current_dir(&node.0);
    let said = succeeds(&mut command);
    assert!(said.contains(node.portmap().to_str().unwrap()), "{said}");
    assert_eq!(read(&node.list("10-x.conflist")), CILIUM_WITH);
}

#[test]
fn every_sample_comes_back_byte_for_byte() {
    let mut seen = 0;
    for entry in fs::read_dir(SAMPLES).unwrap() {
        let sample = entry.unwrap().path();
        if sample.extension().is_none_or(|ending| ending != "conflist") {
            continue;
        }
        seen += 1;
        let node = Node::new("samples");
        let list = node.write("50-sample.conflist", &read(&sample));
        let said = succeeds(node.install().arg("--conflist").arg(&list));
        assert!(said.contains("names portmap already"), "{}: {said}", sample.display());
        assert_eq!(read(&list), read(&sample));

        succeeds(node.uninstall().arg("--conflist").arg(&list));
        let without = read(&list);
        let said = succeeds(node.install().arg("--conflist").arg(&list));
        assert!(said.contains("put portmap behind"), "{}: {said}", sample.display());
        let with: Value = serde_json::from_str(&read(&list)).unwrap();
        let mut expected: Value = serde_json::from_str(&without).unwrap();
        let entry = json!({"type": "portmap", "capabilities": {"portMappings": true}});
        expected["plugins"].as_array_mut().unwrap().insert(1, entry);
        assert_eq!(with, expected, "{}", sample.display());

        succeeds(node.uninstall().arg("--conflist").arg(&list));
        assert_eq!(read(&list), without, "{}", sample.display());
        assert_eq!(names(&node.0.join("net.d")), ["50-sample.conflist"]);
        assert_eq!(names(&node.bin()), [""; 0]);
    }
    assert!(seen >= 5, "only {seen} samples");
}

#[test]
fn the_list_keeps_owner_mode_and_the_link_to_it() {
    let node = Node::new("link");
    let real = node.write("real-file", CILIUM);
    fs::set_permissions(&real, PermissionsExt::from_mode(0o604)).unwrap();
    let link = node.list("10-x.conflist");
    symlink(&real, &link).unwrap();
    succeeds(node.install().arg("--conflist"));
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(read(&real), CILIUM_WITH);
    assert_eq!(fs::metadata(&real).unwrap().mode() & 0o7777, 0o604);
}

#[test]
fn what_cannot_be_a_list_is_named_with_its_place_and_left_alone() {
    let node = Node::new("refuse");
    fails(node.install().arg("--conflist"), "there is no list in");
    fails(node.install().args(["--conflist", "/nowhere/x.conflist"]), "does not exist");
    for (name, content, message) in [
        (
            "9-trailing.conflist",
            "{\n  \"plugins\": [{},]\n}",
            "9-trailing.conflist: line 2, column 18: this is not JSON",
        ),
        ("8-single.conf", "{\"name\": \"x\", \"type\": \"ptp\"}", "single plugin"),
        ("7-multus.conf", "{\"plugins\": [{\"type\": \"multus\"}]}", "line 1, column 14"),
    ] {
        let path = node.write(name, content);
        fails(node.install().arg("--conflist"), message);
        assert_eq!(read(&path), content);
    }
    assert_eq!(
        names(&node.0.join("net.d")),
        ["7-multus.conf", "8-single.conf", "9-trailing.conflist"]
    );
}

#[test]
fn replaces_a_running_program_and_clears_what_killed_ones_left() {
    let node = Node::new("running");
    copy_program("/bin/sleep", &node.portmap());
    fs::write(node.bin().join(".portmap-new.0123456789abcdef"), "half").unwrap();
    let mut running = Running(Command::new(node.portmap()).arg("600").spawn().unwrap());
    let said = succeeds(&mut node.install());
    assert!(said.contains("in place of another file"), "{said}");
    assert!(same(&node.portmap(), Path::new(PORTMAP)));
    assert!(running.0.try_wait().unwrap().is_none(), "the running one runs on");
    assert_eq!(names(&node.bin()), ["portmap"]);
    // The mode is part of being installed.
    fs::set_permissions(node.portmap(), PermissionsExt::from_mode(0o644)).unwrap();
    succeeds(&mut node.install());
    assert_eq!(fs::metadata(node.portmap()).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn the_installed_binary_installs_and_removes_itself() {
    let node = Node::new("itself");
    succeeds(&mut node.install());
    let mut own = Command::new(node.portmap());
    assert!(succeeds(own.args(["install", "--dest"]).arg(node.bin())).contains("up to date"));
    let mut own = Command::new(node.portmap());
    own.args(["uninstall", "--dest"]).arg(node.bin()).arg("--conf-dir").arg(node.0.join("net.d"));
    own.arg("--state-dir").arg(node.0.join("state")).arg("--cache-dir").arg(node.0.join("cache"));
    assert!(succeeds(&mut own).contains("removed"));
    assert!(succeeds(&mut node.uninstall()).contains("not installed; nothing to do"));
}

#[test]
fn a_kill_at_any_moment_leaves_old_or_new() {
    let node = Node::new("kill");
    let old = node.0.join("old");
    copy_program("/bin/sleep", &old);
    let (old_binary, new_binary) = (fs::read(&old).unwrap(), fs::read(PORTMAP).unwrap());
    let list = node.list("10-cilium.conflist");
    let started = std::time::Instant::now();
    copy_program("/bin/sleep", &node.portmap());
    fs::write(&list, CILIUM).unwrap();
    succeeds(node.install().arg("--conflist"));
    let usual = started.elapsed();
    let (mut killed, mut kept_old) = (0, 0);
    for round in 0..60_u32 {
        fs::rename(
            {
                copy_program("/bin/sleep", &old);
                &old
            },
            node.portmap(),
        )
        .unwrap();
        fs::write(&list, CILIUM).unwrap();
        let mut child = Running(
            node.install()
                .arg("--conflist")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        std::thread::sleep(usual * (round % 30) / 25);
        child.0.kill().unwrap();
        killed += u32::from(child.0.wait().unwrap().code().is_none());
        let now = fs::read(node.portmap()).unwrap();
        assert!(now == old_binary || now == new_binary, "{} bytes in round {round}", now.len());
        kept_old += u32::from(now == old_binary);
        let now = read(&list);
        assert!(now == CILIUM || now == CILIUM_WITH, "round {round}: {now:?}");
        assert_eq!(fs::metadata(node.portmap()).unwrap().mode() & 0o111, 0o111);
    }
    assert!(killed > 0 && kept_old > 0, "{killed} kills, {kept_old} before the rename");
    succeeds(node.install().arg("--conflist"));
    assert_eq!(names(&node.bin()), ["portmap"]);
    assert_eq!(
        names(&node.0.join("net.d")),
        ["10-cilium.conflist", "10-cilium.conflist.portmap-backup"]
    );
}

fn store(state: &Path) -> Store {
    Store::open(state, Host::new(None).boot_id()).unwrap()
}

/// The record of an attachment.
fn attached(state: &Path) -> Record {
    let attachment =
        Attachment { network: "n".into(), container_id: "c1".into(), ifname: "eth0".into() };
    let mapping =
        Mapping { protocol: Protocol::Tcp, host_port: 8080, container_port: 80, host_ip: None };
    let addresses = vec!["10.0.0.2/32".parse().unwrap()];
    let options = Options::default();
    let record = Record::new(attachment, vec![mapping], addresses, options, BackendKind::Nftables);
    let store = store(state);
    store.stage(&record).unwrap();
    store.put(&record, None).unwrap();
    record
}

/// Runs `body` with `$dest` on a fresh tmpfs that only this script sees; `$portmap` is the program.
fn on_tmpfs(node: &Node, options: &str, body: &str) {
    let mount = node.0.join("mount");
    fs::create_dir_all(&mount).unwrap();
    let script = format!(
        "set -eu; dest='{mount}'; portmap='{PORTMAP}'
         mount -t tmpfs -o {options} none \"$dest\"
         fails() {{ message=$1; shift; if said=$(\"$@\" 2>&1); then echo \"succeeded: $said\"; exit 1; fi
             case $said in *\"$message\"*) ;; *) echo \"says: $said\"; exit 1;; esac; }}
         {body}",
        mount = mount.display(),
    );
    let output = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", &script])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Compares what a command says with `testdata/golden/commands`; `UPDATE_GOLDEN=1` writes it.
#[track_caller]
fn says(node: &Node, name: &str, said: &str) {
    let said = said
        .replace(node.0.to_str().unwrap(), "NODE")
        .replace(concat!("portmap ", env!("CARGO_PKG_VERSION")), "portmap VERSION");
    golden::holds(&format!("commands/{name}"), &said);
}

#[test]
fn what_install_and_uninstall_say_is_golden() {
    let node = Node::new("golden");
    let list = node.write("05-cilium.conflist", CILIUM);
    says(&node, "install", &succeeds(node.install().arg("--conflist")));
    says(&node, "install-again", &succeeds(node.install().arg("--conflist")));
    let refusal = fails(&mut node.uninstall(), "names it");
    says(&node, "uninstall-refused", &text(&refusal.stderr));
    let cached = cached::cache(&node, "4e16b3d1", CILIUM_WITH, json!({}));
    let refusal = fails(node.uninstall().arg("--conflist"), "is of an attachment");
    says(&node, "uninstall-cached", &text(&refusal.stderr));
    fs::remove_file(cached).unwrap();
    succeeds(node.install().arg("--conflist"));
    says(&node, "uninstall", &succeeds(node.uninstall().arg("--conflist")));
    says(
        &node,
        "install.json",
        &succeeds(node.install().arg("--json").arg("--conflist").arg(&list)),
    );
    says(&node, "uninstall.json", &succeeds(node.uninstall().args(["--json", "--conflist"])));
}

#[test]
#[ignore = "privileged: probes a backend in a network namespace"]
fn what_check_config_says_is_golden() {
    let node = Node::new("golden-check");
    let check = |arguments: &[&str], list: &Path| {
        let mut command = Command::new(PORTMAP);
        command.arg("check-config").args(arguments).arg(list);
        text(&command.output().unwrap().stdout)
    };
    let sound = CILIUM_WITH.replace("\"portmap\",", "\"portmap\", \"backend\": \"nftables\",");
    let list = node.write("05-cilium.conflist", &sound);
    says(&node, "check-config", &check(&[], &list));
    says(&node, "check-config.json", &check(&["--json"], &list));
    let bad = sound
        .replace("\"backend\"", "\"snatt\": true, \"backend\"")
        .replace("\"cniVersion\": \"0.3.1\",", "");
    let list = node.write("05-cilium.conflist", &bad.replace("\"portMappings\": true", ""));
    says(&node, "check-config-bad", &check(&[], &list));
    says(&node, "check-config-bad.json", &check(&["--json"], &list));
}
