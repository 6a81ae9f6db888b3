//! The binary under test as a bare process: exactly these variables, exactly these bytes.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "each test program uses a part, and says by a panic that it failed"
)]

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

const PORTMAP: &str = env!("CARGO_BIN_EXE_portmap");

/// Every variable that an ADD needs.
pub const ADD: [(&str, &str); 4] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/run/netns/of-nobody"),
    ("CNI_IFNAME", "eth0"),
];

/// What a process left behind.
#[derive(Debug)]
pub struct Answer {
    pub status: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Answer {
    /// The one JSON object on stdout; anything else there fails the test.
    pub fn object(&self) -> Value {
        let mut values = serde_json::Deserializer::from_slice(&self.stdout).into_iter::<Value>();
        let shown = String::from_utf8_lossy(&self.stdout);
        let first = values.next().unwrap_or_else(|| panic!("nothing on stdout: {self:?}"));
        let first = first.unwrap_or_else(|error| panic!("{error}: {shown}"));
        assert!(first.is_object(), "not an object: {shown}");
        assert!(values.next().is_none(), "more than one value: {shown}");
        first
    }

    /// Code and message of the error that it must have reported, in the form of the specification.
    pub fn error(&self) -> (u64, String) {
        assert_eq!(self.status, Some(1), "{self:?}");
        let object = self.object();
        let version = object["cniVersion"].as_str().unwrap_or_default();
        assert!(portmap::cni::version::SUPPORTED.contains(&version), "cniVersion: {object}");
        let code = object["code"].as_u64().unwrap_or_else(|| panic!("code: {object}"));
        let msg = object["msg"].as_str().unwrap_or_else(|| panic!("msg: {object}"));
        assert_ne!(code, 999, "it panicked: {object}");
        assert!(!msg.is_empty(), "{object}");
        let known = ["cniVersion", "code", "msg", "details"];
        let strange = object.as_object().unwrap().keys().find(|key| !known.contains(&key.as_str()));
        assert_eq!(strange, None, "{object}");
        (code, msg.to_owned())
    }
}

/// Runs the binary with these variables and no others, so also without PATH: it finds no tools.
pub fn run<V: AsRef<OsStr>>(env: &[(&str, V)], stdin: &[u8]) -> Answer {
    let mut command = Command::new(PORTMAP);
    command.env_clear().envs(env.iter().map(|(name, value)| (name, value.as_ref())));
    communicate(&mut command, stdin)
}

/// The same through a shell that redirects one of the streams first, such as `<&-`.
pub fn run_redirected(env: &[(&str, &str)], redirection: &str, stdin: &[u8]) -> Answer {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("exec \"$0\" {redirection}"), PORTMAP]);
    command.env_clear().envs(env.iter().copied());
    communicate(&mut command, stdin)
}

thread_local! {
    static SECLUDED: Cell<bool> = const { Cell::new(false) };
}

/// Puts the thread where a plugin that works after all changes nothing: root could change rules and
/// sysctls, which a network namespace keeps in, and eBPF programs at the root of cgroup v2, for which the
/// plugin finds no place to pin what they need.
pub fn seclude() {
    if !nix::unistd::geteuid().is_root() || SECLUDED.get() {
        return;
    }
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("tmpfs"), "/sys/fs", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    SECLUDED.set(true);
}

/// A child has the namespaces of the thread that starts it.
fn spawn(command: &mut Command) -> Child {
    if SECLUDED.get() {
        return command.spawn().unwrap();
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            seclude();
            command.spawn().unwrap()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn communicate(command: &mut Command, stdin: &[u8]) -> Answer {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command);
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut errors = child.stderr.take().unwrap();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        // A process that has seen enough does not read the rest.
        scope.spawn(move || input.write_all(stdin).ok());
        scope.spawn(|| output.read_to_end(&mut stdout).unwrap());
        scope.spawn(|| errors.read_to_end(&mut stderr).unwrap());
    });
    let status = child.wait().unwrap().code();
    Answer { status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() }
}

/// `base` with other values for some variables.
pub fn with<'a>(
    base: &[(&'a str, &'a str)],
    changes: &[(&'a str, &'a str)],
) -> Vec<(&'a str, &'a str)> {
    let mut env: Vec<_> = base
        .iter()
        .filter(|(name, _)| changes.iter().all(|(changed, _)| changed != name))
        .copied()
        .collect();
    env.extend_from_slice(changes);
    env
}

/// A path below which nothing exists yet; what is made there goes with its owner.
pub struct NewPath(pub PathBuf);

impl NewPath {
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("portmap-raw-{}-{number}", std::process::id());
        NewPath(std::env::temp_dir().join(name))
    }

    pub fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for NewPath {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Variables as owned strings of the system, which need not be UTF-8.
pub fn owned<'a>(env: &[(&'a str, &str)]) -> Vec<(&'a str, OsString)> {
    env.iter().map(|(name, value)| (*name, OsString::from(value))).collect()
}

/// Names of everything below a directory; none if it does not exist.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths
        .into_iter()
        .flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] })
        .collect()
}
