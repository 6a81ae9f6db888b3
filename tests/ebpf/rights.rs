//! What the backend may not do, or has not: said by ADD and STATUS in words that help, and nothing is
//! left of what was begun.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount, umount};
use portmap::demo::plugin::{self, Output};
use portmap::demo::snapshot::pins;
use portmap::demo::topology::Lab;
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use serde_json::Value;

use super::group::Group;
use super::support::{PORTMAP, ebpf, files_of, strace};
use super::{Scene, TIMEOUT, lab};

impl Scene<'_> {
    /// A call, with a command in front of it that takes something away.
    pub fn command(&self, words: &[&str], verb: &str, pod: usize) -> Command {
        let call = plugin::command(Path::new(PORTMAP), verb, &self.key(pod));
        let mut words = words.iter().chain([&PORTMAP]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env_clear();
        for (name, value) in call.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command.env("PATH", &self.node.path);
        command
    }

    fn without(&self, words: &[&str], verb: &str, pod: usize) -> Output {
        let input = self.config(pod).to_string();
        plugin::run(&mut self.command(words, verb, pod), input.as_bytes(), &self.lab.node).unwrap()
    }

    /// As [`Scene::without`], by system calls that fail.
    fn failing(&self, calls: &str, how: &str, verb: &str, pod: usize) -> Output {
        let command = self.command(&[], verb, pod);
        strace::tampered(&self.lab.node, &command, &self.config(pod).to_string(), calls, how).0
    }

    /// Everything that an ADD which fails must not leave behind.
    fn traces(&self) -> (Vec<String>, Vec<PathBuf>, Vec<PathBuf>) {
        let mut files: Vec<PathBuf> = files_of(&self.node.state_dir).into_keys().collect();
        // What was found out about the node may be remembered.
        let noted = ["lock", "boot", "notes/kernel", "notes/facts-ebpf", "notes/namespaces"];
        files.retain(|file| !noted.iter().any(|name| file.ends_with(name)));
        (ebpf::hooks(&self.lab.node), pins(&self.lab.node).unwrap(), files)
    }

    /// What an ADD which fails must not change where others have been before.
    fn all_traces(&self) -> (Vec<String>, Vec<PathBuf>, Vec<PathBuf>) {
        let (_, pins, files) = self.traces();
        (ebpf::state(&self.lab.node), pins, files)
    }

    fn assert_refused(&self, output: &Output, code: u64, reasons: &[&str]) {
        assert_refusal(output, code, reasons);
        assert_eq!(self.traces(), Default::default(), "{}", output.reason());
    }
}

fn assert_refusal(output: &Output, code: u64, reasons: &[&str]) {
    let error: Value = serde_json::from_str(&output.stdout)
        .unwrap_or_else(|_| panic!("no refusal: {} {}", output.stdout, output.stderr));
    let text = output.reason();
    assert_eq!(error["code"], code, "{text}");
    for reason in reasons {
        assert!(text.contains(reason), "no {reason:?} in {text}");
    }
}

const BPFFS: &str = "/sys/fs/bpf";

fn in_node(lab: &Lab, action: impl FnOnce() + Send) {
    lab.node.run(action).unwrap();
}

/// The machine's own may lie underneath.
fn unmount_bpffs() {
    while umount(BPFFS).is_ok() {}
}

const SETPRIV: [&str; 2] = ["/usr/bin/setpriv", "--bounding-set"];

#[test]
#[ignore = "privileged: makes network namespaces, needs setpriv"]
fn missing_capabilities_are_named() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let net = "this process lacks CAP_NET_ADMIN";
    let bpf = "this process lacks CAP_BPF, or CAP_SYS_ADMIN";
    let sys = "this process lacks CAP_SYS_ADMIN";
    for (without, reasons) in [
        ("-bpf,-sys_admin", vec![bpf]),
        ("-net_admin,-sys_admin", vec![net, sys]),
        ("-all", vec![net, bpf]),
        ("-net_admin", vec![net]),
        ("-sys_admin", vec![sys]),
    ] {
        let words = [SETPRIV[0], SETPRIV[1], without];
        for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
            scene.assert_refused(&scene.without(&words, verb, 0), code, &reasons);
        }
        // With what is known of the kernel, and with everything loaded.
        scene.ok("ADD", 0);
        scene.ok("DEL", 0);
        let before = scene.all_traces();
        for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
            assert_refusal(&scene.without(&words, verb, 0), code, &reasons);
            assert_eq!(scene.all_traces(), before, "{without} {verb}");
        }
        assert!(scene.node.flush().success());
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs setpriv"]
fn an_unprivileged_user_is_refused() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    std::fs::create_dir(&scene.node.state_dir).unwrap();
    chown(&scene.node.state_dir, Some(65534), Some(65534)).unwrap();
    let words = ["/usr/bin/setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
        let refused = scene.without(&words, verb, 0);
        scene.assert_refused(&refused, code, &["CAP_NET_ADMIN", "CAP_BPF, or CAP_SYS_ADMIN"]);
    }
    std::fs::remove_dir_all(&scene.node.state_dir).unwrap();
}

#[test]
#[ignore = "privileged: makes network namespaces, needs setpriv"]
fn a_bpffs_that_cannot_be_used_is_named() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let none = None::<&str>;
    in_node(&lab, || {
        mount(none, BPFFS, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none).unwrap();
    });
    for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
        let refused = scene.without(&[], verb, 0);
        scene.assert_refused(&refused, code, &[BPFFS, "Read-only file system"]);
    }
    in_node(&lab, unmount_bpffs);
    // A mount namespace to try it in comes first.
    for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
        let refused = scene.failing("mount", "error=ENODEV:when=2", verb, 0);
        let reasons =
            ["no bpffs is mounted, and none can be mounted at /sys/fs/bpf: No such device"];
        scene.assert_refused(&refused, code, &reasons);
    }
    // A kernel without bpf(2) has no such directory.
    in_node(&lab, || {
        mount(Some("none"), "/sys/fs", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    });
    for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
        scene.assert_refused(&scene.without(&[], verb, 0), code, &["there is no /sys/fs/bpf"]);
    }
    in_node(&lab, || umount("/sys/fs").unwrap());
    // Where it can be mounted it is.
    scene.ok("STATUS", 0);
    assert_eq!(scene.traces(), Default::default());
    scene.ok("ADD", 0);
    scene.ok("CHECK", 0);
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn kernels_that_refuse_are_explained() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    for (how, reason) in [
        ("error=ENOSYS", "this kernel has no bpf(2) (CONFIG_BPF_SYSCALL), or a seccomp filter"),
        ("error=EPERM", "a security module or a seccomp filter may forbid it"),
    ] {
        for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
            scene.assert_refused(&scene.failing("bpf", how, verb, 0), code, &[reason]);
        }
    }
    // Modules may be missing, which are needed for no more than the last step.
    let refused = scene.failing("sendto", "error=EOPNOTSUPP", "STATUS", 0);
    scene.assert_refused(&refused, 50, &["attaching a program to a device (clsact, cls_bpf)"]);
    // Kernels that were locked down before 5.4, by patches of distributions, have no bpf(2).
    in_node(&lab, || {
        let at = "/sys/kernel/security";
        mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        std::fs::write(format!("{at}/lockdown"), "none [integrity] confidentiality\n").unwrap();
    });
    for (verb, code) in [("STATUS", 50), ("ADD", 5)] {
        let refused = scene.failing("bpf", "error=EPERM", verb, 0);
        scene.assert_refused(&refused, code, &["the kernel is locked down (integrity)"]);
    }
    scene.ok("STATUS", 0);
    scene.ok("ADD", 0);
}

/// Whether the node's own processes are answered, and whether the client is.
fn answered(lab: &Lab) -> (bool, bool) {
    let call = Call::new(Transport::Tcp, lab.node_socket(Family::V4, 8080), TIMEOUT);
    (reach(&lab.node, call).is_ok(), reach(&lab.client, call).is_ok())
}

fn unmount_cgroups() {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    for line in mounts.lines().filter(|line| line.contains(" - cgroup2 ")) {
        umount(line.split(' ').nth(4).unwrap()).unwrap();
    }
}

/// Runtimes in containers have a cgroup namespace of their own. The way out is process 1's, which not
/// every machine lets anybody look at.
#[test]
#[ignore = "privileged: makes network namespaces and a cgroup"]
fn a_cgroup_namespace_is_left_or_named() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    let group = Group::new(&format!("portmap-test-{}", std::process::id()));
    in_node(&lab, unmount_cgroups);
    let inside = format!(
        "echo $$ >/proc/{}/root{}/cgroup.procs && exec /usr/bin/unshare -C \"$0\" \"$@\"",
        std::process::id(),
        group.path().display()
    );
    let words = ["/bin/sh", "-c", &inside];
    for verb in ["STATUS", "ADD", "CHECK"] {
        let output = scene.without(&words, verb, 0);
        assert!(output.success(), "{verb}: {} {}", output.reason(), output.stderr);
        let can_leave = std::fs::File::open("/proc/1/ns/cgroup").is_ok();
        let said = output.stderr.contains("this process is in a cgroup namespace of its own");
        assert_eq!(said, verb == "ADD" && !can_leave, "{verb}: {}", output.stderr);
        if verb != "STATUS" {
            assert_eq!(answered(&lab), (can_leave, true));
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn without_cgroup_v2_everybody_else_is_served() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    in_node(&lab, unmount_cgroups);
    for (how, reason) in [
        ("error=ENODEV", "this kernel has no cgroup v2"),
        ("error=ENOSYS", "cgroup v2 is mounted nowhere, and this kernel (before 5.2)"),
    ] {
        let run = |verb: &str| {
            let output = scene.failing("fsopen", how, verb, 0);
            assert!(output.success(), "{verb}: {}", output.reason());
            output.stderr
        };
        run("STATUS");
        let note = run("ADD");
        assert!(note.contains("processes of the node itself") && note.contains(reason), "{note}");
        run("CHECK");
        assert_eq!(answered(&lab), (false, true));
        assert_eq!(ebpf::at_sockets(&lab.node), Vec::<String>::new());
        run("DEL");
        // What could be found now makes up for it.
        let note = scene.ok("ADD", 0);
        assert!(note.is_empty(), "{note}");
        assert_eq!(answered(&lab), (true, true));
        scene.ok("DEL", 0);
        assert!(scene.node.flush().success());
        std::fs::remove_dir_all(&scene.node.state_dir).unwrap();
    }
}

/// Somebody's pins are there, and this call may not look at them: runtimes would repeat a DEL that fails.
#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_del_of_a_pod_that_nobody_knows_needs_no_rights() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let output = scene.failing("bpf", "error=EPERM", "DEL", 1);
    assert!(output.success(), "{}", output.reason());
    assert!(output.stderr.contains("which has no record, is left alone"), "{}", output.stderr);
    assert_eq!(answered(&lab), (true, true));
    scene.ok("DEL", 1);
    scene.ok("DEL", 0);
}
