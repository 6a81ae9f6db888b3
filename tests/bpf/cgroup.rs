use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::sched::{CloneFlags, setns};
use portmap::sys::bpf::cgroup::{Cgroup, root, root_by};
use portmap::sys::bpf::program::{Program, SocketHook};

use crate::cgroups::{Group, mounted};
use crate::programs::socket_program as program;
use crate::{isolated, run};

const HOOK: SocketHook = SocketHook::Connect4;

#[test]
#[ignore = "privileged: needs bpf(2) and cgroup v2"]
fn programs_stand_beside_others_and_keep_their_place() {
    isolated(|| {
        let group = Group::new();
        let (cgroup, child) = (group.open(), group.below("child"));
        for hook in SocketHook::ALL {
            let [foreign, ours, newer, last] =
                ["foreign", "pm_old", "pm_new", "last"].map(|name| program(name, hook));
            let ids = || cgroup.query(hook).unwrap().programs;
            assert!(ids().is_empty());
            assert!(!cgroup.detach(hook, &ours).unwrap());
            for program in [&foreign, &ours, &last] {
                cgroup.attach(hook, program).unwrap();
            }
            assert_eq!(ids(), [foreign.id(), ours.id(), last.id()]);
            assert_eq!(cgroup.query(hook).unwrap().flags, 2);

            cgroup.replace(hook, &ours, &newer).unwrap();
            assert_eq!(ids(), [foreign.id(), newer.id(), last.id()]);
            let missing = Some(libc::ENOENT);
            let replaced = cgroup.replace(hook, &ours, &newer);
            assert_eq!(replaced.unwrap_err().raw_os_error(), missing);
            let replaced = cgroup.replace_in_two_steps(hook, &ours, &newer);
            assert_eq!(replaced.unwrap_err().raw_os_error(), missing);
            cgroup.replace_in_two_steps(hook, &newer, &ours).unwrap();
            assert_eq!(ids(), [foreign.id(), last.id(), ours.id()]);

            let child = Cgroup::open(&child).unwrap();
            assert!(child.query(hook).unwrap().programs.is_empty());
            let effective = child.effective(hook).unwrap();
            // Somebody else may have attached programs to the root.
            assert!(effective.windows(3).any(|three| three == ids()), "{effective:?}");
            child.attach(hook, &newer).unwrap();
            let effective = child.effective(hook).unwrap();
            assert!(effective.contains(&newer.id()) && effective.contains(&ours.id()));
            assert!(!cgroup.effective(hook).unwrap().contains(&newer.id()));
            for program in [&foreign, &ours, &last] {
                assert!(cgroup.detach(hook, program).unwrap());
            }
            assert!(ids().is_empty());
        }
    });
}

/// Without `BPF_F_ALLOW_MULTI`, which nothing here can do.
fn attach_alone(group: &Group, program: &Program) {
    let pin = Path::new("/sys/fs/bpf/alone");
    program.pin(pin).unwrap();
    let group = group.0.display();
    run(&format!("bpftool cgroup attach {group} connect4 pinned {}", pin.display()));
}

#[test]
#[ignore = "privileged: needs bpf(2), bpftool and cgroup v2"]
fn a_program_that_allows_no_others_is_reported() {
    isolated(|| {
        let group = Group::new();
        let child = Cgroup::open(&group.below("below")).unwrap();
        let (foreign, ours) = (program("foreign", HOOK), program("pm_ours", HOOK));
        attach_alone(&group, &foreign);
        let refused = |group: &Cgroup| {
            let error = group.attach(HOOK, &ours).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            error.to_string()
        };
        let here = refused(&group.open());
        assert!(here.contains("attached to it, without BPF_F_ALLOW_MULTI"), "{here}");
        let below = refused(&child);
        assert!(below.contains("hook Connect4 of the cgroup below"), "{below}");
        assert!(below.contains("attached to a cgroup above it"), "{below}");
        assert!(group.open().detach(HOOK, &foreign).unwrap());
        child.attach(HOOK, &ours).unwrap();
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and cgroup v2"]
fn the_root_is_found_mounted_or_not() {
    let group = Group::new();
    let inode = fs::metadata(&group.0).unwrap().ino();
    let cgroup = group.open();
    isolated(|| {
        let name = group.0.file_name().unwrap().to_string_lossy().into_owned();
        let check = || {
            let root = root().unwrap();
            assert_eq!(root.name(), "/");
            root.query(HOOK).unwrap();
            root.effective(HOOK).unwrap();
            let children = root.children().unwrap();
            let ours = children.iter().find(|child| child.name() == name).unwrap();
            ours.attach(HOOK, &program("pm_child", HOOK)).unwrap();
            let attached = cgroup.query(HOOK).unwrap().programs;
            assert_eq!(attached.len(), 1);
            let attached = Program::from_id(attached[0]).unwrap().unwrap();
            assert!(ours.detach(HOOK, &attached).unwrap());
        };
        check();
        // A directory below the root, mounted on top of all, is not taken for it.
        let place = mounted();
        run(&format!("mount --bind {} {}", group.0.display(), place.display()));
        assert_eq!(fs::metadata(place).unwrap().ino(), inode);
        check();
        run(&format!("umount {}", place.display()));
        check();
        run(&format!("umount {}", place.display()));
        assert!(!fs::read_to_string("/proc/thread-self/mountinfo").unwrap().contains(" cgroup2 "));
        check();
    });
}

/// A process in a cgroup namespace whose root is `group`.
struct Namespace {
    process: Child,
    _group: Group,
}

impl Namespace {
    fn new() -> (Self, u64) {
        let group = Group::new();
        let inode = fs::metadata(&group.0).unwrap().ino();
        let script =
            format!("echo $$ > {}/cgroup.procs && exec unshare -C sleep 1000", group.0.display());
        let process = Command::new("sh").args(["-c", &script]).spawn().unwrap();
        let namespace = Namespace { process, _group: group };
        let own = fs::read_link("/proc/self/ns/cgroup").unwrap();
        while fs::read_link(namespace.path()).is_ok_and(|theirs| theirs == own) {
            std::thread::yield_now();
        }
        (namespace, inode)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/cgroup", self.process.id()))
    }

    /// This thread goes there, and sees no other mount than one of its own.
    fn enter(&self) {
        let group = mounted();
        setns(File::open(self.path()).unwrap(), CloneFlags::CLONE_NEWCGROUP).unwrap();
        run(&format!("umount {}", group.display()));
        run(&format!("mount -t cgroup2 none {}", group.display()));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Threads of this process that are not in a test are in the machine's cgroup namespace.
fn machines_namespace() -> PathBuf {
    PathBuf::from(format!("/proc/{}/ns/cgroup", std::process::id()))
}

#[test]
#[ignore = "privileged: needs bpf(2) and cgroup v2"]
fn a_cgroup_namespace_is_left_for_that_of_process_1() {
    let (namespace, inode) = Namespace::new();
    isolated(|| {
        namespace.enter();
        assert_eq!(fs::metadata(mounted()).unwrap().ino(), inode);
        let root = root_by(&machines_namespace()).unwrap();
        let inside = format!("portmap-test-{}", std::process::id());
        let children = root.children().unwrap();
        assert!(children.iter().any(|child| child.name().starts_with(&inside)));

        let refused = root_by(Path::new("/proc/1/no-such-namespace")).unwrap_err();
        let expected = "this process is in a cgroup namespace of its own, and /proc/1/no-such-namespace cannot be opened to leave it: No such file or directory (os error 2)";
        assert_eq!(refused.to_string(), expected);
        let refused = root_by(Path::new("/proc/self/ns/net")).unwrap_err().to_string();
        assert!(refused.contains("cannot leave it"), "{refused}");
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and cgroup v2"]
fn a_node_in_a_container_has_the_root_of_its_namespace() {
    let (namespace, _) = Namespace::new();
    let (other, _) = Namespace::new();
    isolated(|| {
        namespace.enter();
        // Both are where process 1 is, which has a network namespace of its own.
        let root = root_by(&namespace.path()).unwrap();
        assert!(root.children().unwrap().is_empty());
        let refused = root_by(&other.path()).unwrap_err().to_string();
        assert!(refused.ends_with("process 1 is in another one"), "{refused}");
        // In the machine's network namespace there are processes elsewhere.
        let machine = File::open(format!("/proc/{}/ns/net", std::process::id())).unwrap();
        setns(machine, CloneFlags::CLONE_NEWNET).unwrap();
        let refused = root_by(&namespace.path()).unwrap_err().to_string();
        assert!(refused.contains("while the network namespace is the machine's"), "{refused}");
    });
}
