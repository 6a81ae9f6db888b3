//! `portmap install`, its watch, and `portmap uninstall`, on real directories.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "these tests run the program and look at the files that it leaves"
)]

#[path = "support/executable.rs"]
mod executable;
#[path = "support/golden.rs"]
mod golden;
#[path = "support/running.rs"]
mod running;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use executable::write_executable;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
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
    assert!(succeeds(own.arg("--state-dir").arg(node.0.join("state"))).contains("removed"));
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
    Store::open(state, &Host::new(None).boot_id()).unwrap()
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
    store(state).put(&record, None).unwrap();
    record
}

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

/// `portmap install --watch`, and the lines that it logs.
struct Watch {
    child: Running,
    lines: Receiver<String>,
}

impl Watch {
    fn start(command: &mut Command) -> Self {
        Self::with_pause(command, "1")
    }

    fn with_pause(command: &mut Command, seconds: &str) -> Self {
        command.args(["--watch", "--pause", seconds]).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                drop(sender.send(line.unwrap()));
            }
        });
        Watch { child: Running(child), lines }
    }

    /// Waits for a line with these words.
    #[track_caller]
    fn says(&self, words: &str) {
        let mut others = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(words) => return,
                Ok(line) => others.push(line),
                Err(error) => panic!("{words:?} was not said ({error}), but {others:#?}"),
            }
        }
    }

    fn stop(mut self, signal: Signal) {
        kill(Pid::from_raw(self.child.0.id().cast_signed()), signal).unwrap();
        assert_eq!(self.child.0.wait().unwrap().code(), Some(0));
        self.says("stopped");
    }
}

#[test]
fn the_watch_puts_back_what_is_changed_or_removed() {
    let node = Node::new("watch");
    let list = node.write("10-cilium.conflist", CILIUM);
    let watch = Watch::start(node.install().arg("--conflist"));
    watch.says("installed");
    watch.says("put portmap behind cilium-cni");
    fs::remove_file(node.portmap()).unwrap();
    watch.says("installed");
    assert!(same(&node.portmap(), Path::new(PORTMAP)));
    // An adversary that answers every repair at once.
    for _ in 0..2 {
        fs::write(&list, CILIUM).unwrap();
        watch.says("put portmap behind cilium-cni");
        assert_eq!(read(&list), CILIUM_WITH);
    }
    watch.says("3 times in a row now; with Cilium, set cni.exclusive=false");
    watch.says("the next repair waits for 4 s");
    fs::write(&list, CILIUM).unwrap();
    watch.says("put portmap behind cilium-cni");
    watch.says("the next repair waits for 8 s");
    // A stop signal is heard during a pause.
    fs::write(&list, CILIUM).unwrap();
    watch.stop(Signal::SIGTERM);
    assert_eq!(read(&list), CILIUM);
}

#[test]
fn the_watch_waits_for_directories_and_for_lists_that_can_be_read() {
    let node = Node::new("later");
    fs::remove_dir(node.0.join("net.d")).unwrap();
    let watch = Watch::start(node.install().arg("--conflist"));
    watch.says("there is no list in");
    fs::create_dir(node.0.join("net.d")).unwrap();
    node.write("10-x.conflist", "{");
    watch.says("10-x.conflist: line 1, column 1: this is not JSON");
    node.write("10-x.conflist", CILIUM);
    watch.says("put portmap behind cilium-cni");
    // The whole directory goes and comes again; a list that sorts before is the one that counts now.
    fs::rename(node.0.join("net.d"), node.0.join("gone")).unwrap();
    watch.says("there is no list in");
    fs::create_dir(node.0.join("net.d")).unwrap();
    node.write("05-y.conflist", CILIUM);
    watch.says("05-y.conflist: put portmap behind cilium-cni");
    fs::rename(node.bin(), node.0.join("gone-bin")).unwrap();
    watch.says("installed");
    assert_eq!(names(&node.bin()), ["portmap"]);
    watch.stop(Signal::SIGINT);
}

/// A list that names a plugin which is not there keeps every pod from starting and from ending.
#[test]
fn the_watch_lets_the_list_wait_for_the_binary() {
    let node = Node::new("waits");
    let list = node.write("10-x.conflist", CILIUM);
    fs::write(node.bin(), "not a directory").unwrap();
    let watch = Watch::start(node.install().arg("--conflist"));
    watch.says("cannot do it yet: cannot create");
    watch.says("cannot do it yet: no list is edited before there is an executable");
    assert_eq!(read(&list), CILIUM);
    fs::remove_file(node.bin()).unwrap();
    watch.says("installed");
    watch.says("put portmap behind cilium-cni");
    watch.stop(Signal::SIGTERM);

    // During a pause the binary is not put back, and whatever runtimes can start will do.
    let node = Node::new("any");
    let watch = Watch::with_pause(node.install().arg("--conflist"), "300");
    watch.says("installed");
    watch.says("there is no list in");
    fs::remove_file(node.portmap()).unwrap();
    let list = node.write("10-x.conflist", CILIUM);
    watch.says("no list is edited");
    assert_eq!(read(&list), CILIUM);
    copy_program("/bin/sleep", &node.portmap());
    watch.says("put portmap behind cilium-cni");
    watch.stop(Signal::SIGTERM);
    assert!(same(&node.portmap(), Path::new("/bin/sleep")));
}

/// Puts a build of this plugin in place, as an installer does.
fn upgrade(node: &Node, version: &str) {
    let new = node.0.join("new");
    write_executable(&new, format!("#!/bin/sh\necho portmap {version}\n"));
    fs::rename(new, node.portmap()).unwrap();
}

#[test]
fn the_watch_undoes_no_upgrade() {
    let node = Node::new("upgrade");
    let own = env!("CARGO_PKG_VERSION");
    fs::create_dir(node.bin()).unwrap();
    upgrade(&node, own);
    let watch = Watch::start(&mut node.install());
    watch.says("in place of another file");
    assert!(same(&node.portmap(), Path::new(PORTMAP)));
    for version in ["99.0.0", own] {
        upgrade(&node, version);
        watch.says(&format!("portmap is left alone: it is portmap {version}, a"));
        assert!(read(&node.portmap()).contains(version));
    }
    // An older one is none, and others' programs never.
    upgrade(&node, "0.0.1");
    watch.says("in place of another file");
    copy_program("/bin/sleep", &node.0.join("sleep"));
    fs::rename(node.0.join("sleep"), node.portmap()).unwrap();
    watch.says("in place of another file");
    watch.stop(Signal::SIGTERM);

    // One that is started again does not undo it either.
    upgrade(&node, "99.0.0");
    let watch = Watch::start(&mut node.install());
    watch.says("portmap is left alone: it is portmap 99.0.0, a newer one");
    watch.stop(Signal::SIGTERM);
}

/// Who replaces the file that the watch runs from is about to restart it.
#[test]
fn a_watch_whose_own_file_is_replaced_puts_itself_over_no_other_build() {
    let node = Node::new("replaced");
    let own = node.0.join("libexec/portmap");
    copy_program(PORTMAP, &own);
    let mut command = Command::new(&own);
    command.arg("install").arg("--dest").arg(node.bin()).stdin(Stdio::null());
    let watch = Watch::start(&mut command);
    watch.says("installed");
    fs::remove_file(&own).unwrap();
    upgrade(&node, "0.0.1");
    watch.says("it is portmap 0.0.1, and the file of this one has been replaced");
    copy_program("/bin/sleep", &node.0.join("sleep"));
    fs::rename(node.0.join("sleep"), node.portmap()).unwrap();
    watch.says("in place of another file");
    watch.stop(Signal::SIGTERM);
}

/// A node on which other programs have used up what the kernel gives of inotify.
#[test]
#[ignore = "privileged: makes a user namespace"]
fn the_watch_looks_by_the_clock_where_there_is_no_inotify() {
    for (limit, why) in [
        ("max_inotify_instances", "inotify instances are used up (fs.inotify.max_user_instances)"),
        ("max_inotify_watches", "inotify watches are used up (fs.inotify.max_user_watches)"),
    ] {
        let node = Node::new(limit);
        let list = node.write("10-x.conflist", CILIUM);
        let install = node.install();
        let mut command = Command::new("unshare");
        // Limits of the user namespace, beside those of the user.
        let script = format!("echo 0 >/proc/sys/user/{limit} && exec \"$@\"");
        command.args(["-Ur", "sh", "-c", &script, "sh"]).arg(install.get_program());
        command.args(install.get_args()).arg("--conflist").stdin(Stdio::null());
        let watch = Watch::start(&mut command);
        watch.says(&format!("cannot watch directories: this user's {why}; looking every 60 s"));
        watch.says("installed");
        watch.says("put portmap behind cilium-cni");
        assert_eq!(read(&list), CILIUM_WITH);
        // A look follows the pause of a repair.
        fs::remove_file(node.portmap()).unwrap();
        watch.says("installed");
        assert!(same(&node.portmap(), Path::new(PORTMAP)));
        watch.stop(Signal::SIGTERM);
    }
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
fn the_watch_goes_on_when_a_disk_is_full_no_more() {
    let node = Node::new("full-watch");
    on_tmpfs(
        &node,
        "size=200m",
        "head -c 150m /dev/zero > $dest/filler
         $portmap install --watch --pause 1 --dest $dest/bin 2> $dest/../log & watch=$!
         trap 'kill $watch' EXIT
         until grep -q 'the file system is full' $dest/../log; do sleep 0.1; done
         rm $dest/filler
         until cmp -s $portmap $dest/bin/portmap; do sleep 0.1; done
         kill $watch; trap - EXIT; wait $watch; [ \"$(ls -A $dest/bin)\" = portmap ]
         # What goes wrong is said once, however often it is tried.
         [ \"$(grep -c 'is full' $dest/../log)\" = 1 ]",
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

#[test]
#[ignore = "privileged: probes backends in network namespaces"]
fn every_sample_is_found_sound() {
    for entry in fs::read_dir(SAMPLES).unwrap() {
        let sample = entry.unwrap().path();
        if sample.extension().is_some_and(|ending| ending == "conflist") {
            let path = std::env::var_os("PATH").unwrap();
            let said =
                succeeds(Command::new(PORTMAP).arg("check-config").arg(&sample).env("PATH", path));
            assert!(said.contains("nothing is wrong with it"), "{}: {said}", sample.display());
        }
    }
}

#[test]
#[ignore = "privileged: probes backends in network namespaces"]
fn check_config_tells_by_its_status_what_is_wrong() {
    let node = Node::new("check");
    let path = std::env::var_os("PATH").unwrap();
    let check = |arguments: &[&str]| {
        let mut command = Command::new(PORTMAP);
        command.arg("check-config").args(arguments).env("PATH", &path);
        command
    };
    for (text, status, words) in [
        (CILIUM.to_owned(), 2, "line 1, column 1: broken: portmap is not in this list"),
        (
            CILIUM_WITH.replace("\"type\": \"portmap\"", "\"type\": \"portmap\", \"colour\": 1"),
            1,
            "line 10, column 27: warning: portmap does not know the key \"colour\"",
        ),
        (
            CILIUM_WITH.replace("\"type\": \"portmap\"", "\"type\": \"portmap\", \"snat\": 1"),
            2,
            "line 10, column 35: broken: snat is 1",
        ),
        (CILIUM_WITH.to_owned(), 0, "nothing is wrong"),
    ] {
        let list = node.write("10-x.conflist", &text);
        let output = check(&[list.to_str().unwrap()]).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(words), "{output:?}");
    }
    let output = check(&["--json", node.list("10-x.conflist").to_str().unwrap()]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["plugins"], json!(["cilium-cni", "portmap"]));
    assert_eq!((&report["configuredBackend"], &report["findings"]), (&json!("auto"), &json!([])));
    assert_eq!(report["options"]["snat"], true);
    fails(&mut check(&["/nowhere"]), "/nowhere does not exist");
}

#[test]
fn what_is_no_list_is_a_finding() {
    let check = |arguments: &[&str]| {
        let mut command = Command::new(PORTMAP);
        command.arg("check-config").args(arguments).arg("-").stdin(Stdio::null());
        let output = command.output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(2), ""));
        text(&output.stdout)
    };
    let said = check(&[]);
    let place = "standard input: no list\nline 1, column 1: broken: this is not JSON";
    assert!(said.starts_with(place), "{said}");
    let report: Value = serde_json::from_str(&check(&["--json"])).unwrap();
    let found = &report["findings"][0];
    assert_eq!((&found["severity"], &found["line"]), (&json!("broken"), &json!(1)), "{report}");
    assert_eq!((&report["plugins"], &report["options"]), (&json!([]), &Value::Null));
}

/// Without rights nothing works, which says nothing against a list.
#[test]
fn who_is_not_root_is_told_what_is_wrong_with_a_list_all_the_same() {
    let node = Node::new("check-nobody");
    let named = |backend: &str| {
        CILIUM_WITH.replace("\"type\": \"portmap\"", &format!("\"type\": \"portmap\"{backend}"))
    };
    for (backend, problem) in [
        ("", "which backend auto takes cannot be told without root"),
        (
            ", \"backend\": \"ebpf\"",
            "whether the ebpf backend works on this node cannot be told without root",
        ),
    ] {
        let list = node.write("10-x.conflist", &named(backend));
        let mut command = match nix::unistd::geteuid().is_root() {
            true => {
                let mut command = Command::new("setpriv");
                command.args(["--bounding-set=-all", "--inh-caps=-all", "--", PORTMAP]);
                command
            }
            false => Command::new(PORTMAP),
        };
        let output = command.arg("check-config").arg(&list).output().unwrap();
        let said = text(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(said.contains(&format!("\nwarning: {problem}\n")), "{said}");
        assert!(!said.contains("broken"), "{said}");
    }
}

/// Where no tool is, `auto` ends at eBPF.
#[test]
#[ignore = "privileged: probes backends in network namespaces"]
fn a_list_is_judged_by_the_backend_that_auto_takes() {
    let node = Node::new("check-auto");
    let shaped = CILIUM_WITH.replace("\n  ]", ",\n    {\"type\": \"bandwidth\"}\n  ]");
    let list = node.write("10-x.conflist", &shaped);
    let mut command = Command::new(PORTMAP);
    command.arg("check-config").arg(&list).env("PATH", &node.0);
    let output = command.output().unwrap();
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("auto, on this node ebpf"), "{said}");
    assert!(said.contains("line 15, column 5: broken: bandwidth stands behind portmap"), "{said}");
}

/// What iptables 1.8.9 says, with its exit status, when its `-w 15` is over.
#[test]
#[ignore = "privileged: probes a backend in a network namespace"]
fn a_lock_that_somebody_else_has_says_nothing_against_a_list() {
    let node = Node::new("check-busy");
    let list = node.write("10-x.conflist", CILIUM_WITH);
    fs::create_dir_all(node.bin()).unwrap();
    let message = "Another app is currently holding the xtables lock. Stopped waiting after 15s.";
    write_executable(
        &node.bin().join("iptables-restore"),
        format!("#!/bin/sh\necho '{message}' >&2\nexit 4\n"),
    );
    let check = |arguments: &[&str]| {
        let mut command = Command::new(PORTMAP);
        command.arg("check-config").args(arguments).arg(&list).env("PATH", node.bin());
        command.output().unwrap()
    };
    let output = check(&[]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("backend               auto, on this node not known now\n"), "{said}");
    let warning = "warning: which backend auto takes cannot be told now: another process has held the lock /run/xtables.lock for 15 s";
    assert!(said.contains(warning), "{said}");
    let report: Value = serde_json::from_slice(&check(&["--json"]).stdout).unwrap();
    assert_eq!(report["backend"], Value::Null);
    assert_eq!(report["findings"].as_array().unwrap().len(), 1, "{report}");
    // An ADD with a backend that is named waits.
    node.write(
        "10-x.conflist",
        &CILIUM_WITH
            .replace("\"type\": \"portmap\"", "\"type\": \"portmap\", \"backend\": \"iptables\""),
    );
    let output = check(&[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
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
