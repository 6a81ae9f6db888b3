//! `portmap install --watch`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{CILIUM, CILIUM_WITH, Node, PATIENCE, PORTMAP, copy_program, on_tmpfs, read, same};
use crate::executable::write_executable;
use crate::running::{Running, names};

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

fn replace_by_another_program(node: &Node) {
    copy_program("/bin/sleep", &node.0.join("sleep"));
    fs::rename(node.0.join("sleep"), node.portmap()).unwrap();
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
    replace_by_another_program(&node);
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
    replace_by_another_program(&node);
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

#[test]
#[ignore = "privileged: mounts file systems in a mount namespace of its own"]
fn the_watch_goes_on_when_a_disk_is_full_no_more() {
    let node = Node::new("full-watch");
    on_tmpfs(
        &node,
        "size=200m",
        "head -c $((200 * 1024 * 1024 - $(stat -c %s $portmap) / 2)) /dev/zero > $dest/filler
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
