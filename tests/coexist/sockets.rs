//! Programs at sockets among others' at cgroups that others manage.
//!
//! What is attached to the machine's own root would meet whatever else runs there, so that most of this
//! is done in a node that is a container: in a PID and a cgroup namespace of its own, whose root is a
//! cgroup of the test.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use portmap::demo::matrix::Place;
use portmap::demo::plugin::{self, Output};
use portmap::demo::topology::{Lab, Shape};
use portmap::model::Family;
use portmap::sys::bpf::cgroup::Cgroup;
use portmap::sys::bpf::program::{Program, SocketHook};
use serde_json::{Value, json};

use crate::cgroups::Group;
use crate::rig::{Container, INSIDE, PORT, Stage, assert_calls, client, mapped, reaches};
use crate::standins::{Cilium, attach_alone};
use crate::support::programs::socket_program;
use crate::support::{Node, PORTMAP, Variant};

/// What the mounts of a container show of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mount {
    /// The root of its own cgroup namespace, where the machine has it.
    Own,
    None,
}

/// Makes the shell a process of $GROUP, and what it becomes one in a cgroup namespace with that as its
/// root, which is what process 1 sees.
const ENTER: &str = r#"
echo $$ >"$GROUP/cgroup.procs"
exec unshare --cgroup --mount --pid --fork --mount-proc sh -ec "$INSIDE" "$0" "$@"
"#;

/// Takes the machine's mounts of cgroup v2 away. The last one was there first.
const FORGET_MOUNTS: &str = r#"
for point in $(awk '/ - cgroup2 / {print $5}' /proc/self/mountinfo); do
    umount -l "$point"
    last=$point
done
if [ "$MOUNT" = Own ]; then mount -t cgroup2 none "$last"; fi
"#;

/// Leaves all but the plugin's variables behind.
const PLUGIN: &str = r#"PATH=$PLUGIN_PATH exec "$0" "$@""#;

/// A node that is a container.
struct Nested<'a> {
    node: &'a Node<'a>,
    group: Group,
    mount: Mount,
}

impl<'a> Nested<'a> {
    fn new(node: &'a Node<'a>, mount: Mount) -> Self {
        Nested { node, group: Group::new(), mount }
    }

    /// Runs the plugin inside. What comes before it is for the shell.
    fn run(&self, prepare: &str, command: &Command, stdin: &[u8]) -> Output {
        let mut outer = Command::new("sh");
        outer
            .args(["-ec", ENTER])
            .arg(command.get_program())
            .args(command.get_args())
            .env("PATH", plugin::search_path())
            .env("GROUP", &self.group.0)
            .env("MOUNT", format!("{:?}", self.mount))
            .env("INSIDE", format!("{FORGET_MOUNTS}{prepare}{PLUGIN}"))
            .env("PLUGIN_PATH", &self.node.path);
        for (name, value) in command.get_envs().filter(|(name, _)| *name != "PATH") {
            outer.env(name, value.unwrap_or_default());
        }
        plugin::run(&mut outer, stdin, self.node.netns).unwrap()
    }

    fn call(&self, verb: &str, container: &Container) -> Output {
        self.call_after("", verb, container)
    }

    fn call_after(&self, prepare: &str, verb: &str, container: &Container) -> Output {
        let command = plugin::command(Path::new(PORTMAP), verb, &container.attachment);
        self.run(prepare, &command, container.config.to_string().as_bytes())
    }

    /// A call that succeeds; returns what it warns of.
    fn ok(&self, verb: &str, container: &Container) -> String {
        let output = self.call(verb, container);
        assert!(output.success(), "{verb}: {} {}", output.reason(), output.stderr);
        output.stderr
    }

    /// What CHECK has found wrong.
    fn drift(&self, container: &Container) -> String {
        let output = self.call("CHECK", container);
        assert!(!output.success(), "CHECK says that all is well");
        let error: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(error["code"], 102, "{error}");
        output.reason()
    }

    fn flush(&self) {
        let mut command = Command::new(PORTMAP);
        command.args(["flush", "--all", "--yes", "--state-dir"]).arg(&self.node.state_dir);
        let output = self.run("", &command, b"");
        assert!(output.success(), "{} {}", output.stdout, output.stderr);
    }

    /// The answer that a process of this cgroup gets from a hostPort; `None` if there is none.
    fn ask(&self, group: &Path, protocol: &str, ip: &str) -> Option<String> {
        let script = format!(
            r#"echo $$ >"$GROUP/cgroup.procs"
            exec timeout 10 bash -c 'exec 3<>/dev/{protocol}/{ip}/{PORT} && echo >&3 && dd bs=512 count=1 <&3 2>/dev/null'"#
        );
        let mut command = Command::new("sh");
        command.args(["-ec", &script]).env("GROUP", group).env("PATH", plugin::search_path());
        let output = plugin::run(&mut command, b"", self.node.netns).unwrap();
        let (name, _) = output.stdout.split_once(' ').filter(|_| output.success())?;
        Some(name.to_owned())
    }

    /// Whether the node's own processes in a cgroup reach pod-a by every address of the node.
    fn reaches(&self, group: &Path) -> bool {
        let calls = ["127.0.0.1", "::1", "198.51.100.1", "fd00:51::1"];
        let answers = calls.map(|ip| ["tcp", "udp"].map(|by| self.ask(group, by, ip)));
        let reached = answers.iter().flatten().filter(|answer| answer.is_some()).count();
        assert!(reached == 0 || reached == 8, "{}: {answers:?}", group.display());
        assert!(answers.iter().flatten().flatten().all(|name| name == "pod-a"), "{answers:?}");
        reached == 8
    }
}

/// Names of the programs that are attached to a cgroup itself.
fn attached(group: &Path, hook: SocketHook) -> Vec<String> {
    let ids = Cgroup::open(group).unwrap().query(hook).unwrap().programs;
    ids.into_iter().map(|id| Program::from_id(id).unwrap().unwrap().name().to_owned()).collect()
}

/// How many programs are attached to a cgroup itself, at all hooks together.
fn count(group: &Path) -> usize {
    SocketHook::ALL.into_iter().map(|hook| attached(group, hook).len()).sum()
}

fn from_outside(lab: &Lab) -> Vec<portmap::demo::matrix::Case> {
    Family::ALL
        .iter()
        .flat_map(|family| {
            let ip = lab.node_address(*family);
            reaches(Place::Client, ip, PORT, "pod-a", client(lab, *family))
        })
        .collect()
}

/// cgroupfs and systemd lay cgroups out in different ways: the plugin must not care, and make none.
#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn processes_in_any_cgroup_reach_host_ports() {
    for mount in [Mount::Own, Mount::None] {
        let stage = Stage::new(Shape::Cilium);
        let node = Node::new(&stage.lab.node, Variant::Ebpf);
        let nested = Nested::new(&node, mount);
        let places = [
            "init.scope",
            "system.slice/kubelet.service",
            "user.slice/user-0.slice/session-1.scope",
            "kubepods/besteffort/pod6f/2a",
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod6f.slice/cri-2a.scope",
        ]
        .map(|name| nested.group.below(name));
        let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
        let before = nested.group.tree();
        assert!(!nested.reaches(&nested.group.0));
        assert_eq!(nested.ok("ADD", &container), "");
        for place in places.iter().chain([&nested.group.0]) {
            assert!(nested.reaches(place), "{mount:?}: {}", place.display());
            if *place != nested.group.0 {
                assert_eq!(count(place), 0);
            }
        }
        nested.ok("CHECK", &container);
        assert_eq!(attached(&nested.group.0, SocketHook::Connect4), ["pm_connect4"]);
        nested.ok("DEL", &container);
        assert!(!nested.reaches(&places[0]));
        nested.flush();
        assert_eq!(count(&nested.group.0), 0);
        assert_eq!(nested.group.tree(), before);
    }
}

/// Cilium's agent detaches all programs of these kinds from the root when it starts with socket load
/// balancing off (cilium/cilium#43877).
#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn programs_that_an_agent_has_detached_are_reported_and_put_back() {
    let stage = Stage::new(Shape::Cilium);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let nested = Nested::new(&node, Mount::Own);
    let root = nested.group.open();
    let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
    nested.ok("ADD", &container);
    assert!(nested.reaches(&nested.group.0));
    for hook in SocketHook::ALL {
        for id in root.query(hook).unwrap().programs {
            root.detach(hook, &Program::from_id(id).unwrap().unwrap()).unwrap();
        }
    }
    assert!(!nested.reaches(&nested.group.0));
    assert_calls("from outside", &stage.lab, from_outside(&stage.lab));
    let text = nested.drift(&container);
    for name in ["pm_connect4", "pm_sendmsg6", "pm_recvmsg4", "pm_peername6"] {
        // Found is what the machine's own root has.
        assert!(text.contains(&format!("cgroup /: program {name} expected, found ")), "{text}");
    }
    let other = Container::new(&node, &stage.lab, 1, mapped(PORT + 1, INSIDE));
    nested.ok("ADD", &other);
    assert!(nested.reaches(&nested.group.0));
    nested.ok("CHECK", &container);
}

#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn others_programs_that_allow_ours_run_beside_them() {
    let stage = Stage::new(Shape::Cilium);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let nested = Nested::new(&node, Mount::Own);
    let cilium = Cilium::load();
    let connect = cilium.program("cil_sock4_connect");
    nested.group.open().attach(SocketHook::Connect4, connect).unwrap();
    let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
    nested.ok("ADD", &container);
    let before = cilium.runs("cil_sock4_connect");
    assert!(nested.reaches(&nested.group.0));
    // By TCP and by UDP, to two IPv4 addresses.
    assert_eq!(cilium.runs("cil_sock4_connect") - before, 4);
    nested.ok("CHECK", &container);
    nested.ok("DEL", &container);
    nested.flush();
    assert_eq!(attached(&nested.group.0, SocketHook::Connect4), ["cil_sock4_conne"]);
}

/// As Cilium's of old versions, and on kernels without links (before 5.7).
#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn beside_a_program_that_allows_no_others_the_rest_works_and_is_said() {
    let stage = Stage::new(Shape::Cilium);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let nested = Nested::new(&node, Mount::Own);
    let root = &nested.group.0;
    let foreign = socket_program("sock4_connect", SocketHook::Connect4);
    attach_alone(root, SocketHook::Connect4, &foreign).unwrap();
    let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
    let warned = nested.ok("ADD", &container);
    let expected = "processes of the node itself do not reach hostPorts by 127.0.0.1, ::1 or its addresses: a program that allows no others beside it has the hook Connect4 of the cgroup /: it is attached to it, without BPF_F_ALLOW_MULTI";
    assert!(warned.contains(expected), "{warned}");
    assert_eq!(warned.matches("do not reach").count(), 1, "{warned}");
    assert_eq!(attached(root, SocketHook::Connect4), ["sock4_connect"]);
    assert_eq!(nested.ask(root, "tcp", "127.0.0.1"), None);
    // What nobody has reserved is ours.
    assert_eq!(nested.ask(root, "tcp", "::1").as_deref(), Some("pod-a"));
    assert_calls("from outside", &stage.lab, from_outside(&stage.lab));
    let text = nested.drift(&container);
    let expected = "cgroup /: program pm_connect4 expected, found others alone: the node's own processes do not reach hostPorts";
    assert!(text.contains(expected), "{text}");
    assert!(!text.contains("pm_connect6"), "{text}");

    nested.group.open().detach(SocketHook::Connect4, &foreign).unwrap();
    assert_eq!(nested.ok("ADD", &container), "");
    assert!(nested.reaches(root));
    nested.ok("CHECK", &container);
    // Nor can it come later: whoever tries is told so.
    let late = attach_alone(root, SocketHook::Connect4, &foreign).unwrap_err();
    assert_eq!(late.raw_os_error(), Some(libc::EPERM));
}

/// Where Cilium's maps are, its agent may be.
fn with_cilium(node: &Node, there: bool) {
    let change = || match there {
        true => fs::create_dir("/sys/fs/bpf/cilium"),
        false => fs::remove_dir("/sys/fs/bpf/cilium"),
    };
    node.netns.run(change).unwrap().unwrap();
}

#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn beside_cilium_the_root_is_left_alone() {
    let stage = Stage::new(Shape::Cilium);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let nested = Nested::new(&node, Mount::Own);
    let root = &nested.group.0;
    let [system, pods] = ["system.slice", "kubepods.slice"].map(|name| nested.group.below(name));
    let deep = nested.group.below("system.slice/kubelet.service");
    let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
    // Cilium is installed on a node that was there before.
    nested.ok("ADD", &container);
    assert_eq!([count(root), count(&system), count(&pods)], [8, 0, 0]);
    with_cilium(&node, true);
    nested.drift(&container);
    assert_eq!(nested.ok("ADD", &container), "");
    assert_eq!([count(root), count(&system), count(&pods), count(&deep)], [0, 8, 8, 0]);
    for place in [&system, &deep, &pods] {
        assert!(nested.reaches(place));
    }
    nested.ok("CHECK", &container);

    // Its agent starts, and has the root for itself: both run, and what it attaches is not ours to
    // touch.
    let cilium = Cilium::load();
    let connect = cilium.program("cil_sock4_connect");
    nested.group.open().attach(SocketHook::Connect4, connect).unwrap();
    assert!(nested.reaches(&deep));
    assert_eq!(cilium.runs("cil_sock4_connect"), 4);
    // A cgroup that came later.
    let user = nested.group.below("user.slice");
    assert!(!nested.reaches(&user));
    let text = nested.drift(&container);
    let expected = "cgroup user.slice: program pm_connect4 expected, found others alone";
    assert!(text.contains(expected), "{text}");
    nested.ok("ADD", &container);
    assert!(nested.reaches(&user));
    nested.ok("CHECK", &container);
    nested.ok("DEL", &container);
    nested.flush();
    assert_eq!(attached(root, SocketHook::Connect4), ["cil_sock4_conne"]);
    assert_eq!([count(root), count(&system), count(&pods), count(&user)], [1, 0, 0, 0]);
    with_cilium(&node, false);
}

/// An old Cilium's program at the root does not run for cgroups that have any of their own: its Services
/// would stop working for all pods.
#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn programs_give_way_to_an_old_cilium_s() {
    let stage = Stage::new(Shape::Cilium);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let nested = Nested::new(&node, Mount::Own);
    let pods = nested.group.below("kubepods.slice/pod1");
    with_cilium(&node, true);
    let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
    nested.ok("ADD", &container);
    assert!(nested.reaches(&pods));

    let cilium = Cilium::load();
    let connect = cilium.program("cil_sock4_connect");
    attach_alone(&nested.group.0, SocketHook::Connect4, connect).unwrap();
    nested.ask(&pods, "tcp", "127.0.0.1");
    assert_eq!(cilium.runs("cil_sock4_connect"), 0, "this kernel runs both");
    let text = nested.drift(&container);
    let expected = "the root cgroup has a program without BPF_F_ALLOW_MULTI at the hook Connect4, which others below it would keep from running";
    assert!(text.contains(expected), "{text}");

    let other = Container::new(&node, &stage.lab, 1, mapped(PORT + 1, INSIDE));
    let warned = nested.ok("ADD", &other);
    assert!(warned.contains(expected), "{warned}");
    assert_eq!(nested.ask(&pods, "tcp", "127.0.0.1"), None);
    assert_eq!(cilium.runs("cil_sock4_connect"), 1);
    // The hooks that it has left.
    assert_eq!(nested.ask(&pods, "tcp", "::1").as_deref(), Some("pod-a"));
    assert_calls("from outside", &stage.lab, from_outside(&stage.lab));
    with_cilium(&node, false);
}

/// Cilium that replaces kube-proxy has hostPorts of its own.
#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn ebpf_is_not_chosen_where_cilium_forwards_host_ports() {
    let stage = Stage::new(Shape::Cilium);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let nested = Nested::new(&node, Mount::Own);
    nested.group.below("kubepods.slice");
    with_cilium(&node, true);
    let cilium = Cilium::load();
    let connect = cilium.program("cil_sock4_connect");
    nested.group.open().attach(SocketHook::Connect4, connect).unwrap();
    let mut container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
    container.config["backend"] = json!("auto");
    let output = nested.call("ADD", &container);
    assert!(!output.success());
    let expected = "Cilium replaces kube-proxy here and forwards hostPorts itself; set \"backend\": \"ebpf\" to use it all the same";
    assert!(output.reason().contains(expected), "{}", output.reason());
    nested.group.open().detach(SocketHook::Connect4, connect).unwrap();
    nested.ok("ADD", &container);
    assert_calls("chosen", &stage.lab, from_outside(&stage.lab));
    nested.ok("DEL", &container);
    with_cilium(&node, false);
}

/// In a cgroup namespace of its own, as in a container that is not the node itself, programs would be
/// attached where they do nothing for the node's processes.
#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn a_part_of_the_cgroups_is_not_taken_for_the_root() {
    let stage = Stage::new(Shape::Cilium);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let nested = Nested::new(&node, Mount::Own);
    let agent = nested.group.below("agent");
    let inode = fs::metadata(&agent).unwrap().ino();
    // Process 1 stays where it is; the plugin goes further, and has a mount of its own.
    let further = format!(
        r#"mkdir -p "$last" && echo $$ >"$last/agent/cgroup.procs"
        unshare --cgroup --mount sh -ec 'umount "$1"; mount -t cgroup2 none "$1"
            test "$(stat -c %i "$1")" = {inode}; shift
            PATH=$PLUGIN_PATH exec "$0" "$@"' "$0" "$last" "$@"
        exit
        "#
    );
    let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
    let output = nested.call_after(&further, "ADD", &container);
    assert!(output.success(), "{} {}", output.reason(), output.stderr);
    let expected = "processes of the node itself do not reach hostPorts by 127.0.0.1, ::1 or its addresses: this process is in a cgroup namespace of its own, and process 1 is in another one";
    assert!(output.stderr.contains(expected), "{}", output.stderr);
    assert_eq!([count(&agent), count(&nested.group.0)], [0, 0]);
    assert_calls("from outside", &stage.lab, from_outside(&stage.lab));
    // Only that process was in the wrong place.
    assert_eq!(nested.ok("ADD", &container), "");
    assert!(nested.reaches(&nested.group.0) && nested.reaches(&agent));
    // Seen from the wrong place, all is still well.
    let output = nested.call_after(&further, "CHECK", &container);
    assert!(output.success(), "{}", output.reason());
}
