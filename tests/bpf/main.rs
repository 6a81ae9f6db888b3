//! `sys::bpf` against the kernel. Every test has a network namespace and a bpffs of its own.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "these tests set up what is read, and fail by panicking"
)]

mod cgroup;
#[path = "../support/cgroups.rs"]
mod cgroups;
mod clsact;
mod cookie;
#[path = "../support/ending.rs"]
mod ending;
mod features;
mod map;
mod object;
mod pins;
mod program;
#[path = "../support/programs.rs"]
mod programs;
mod refusal;
mod tcx;

use std::process::Command;

use aya_obj::generated::bpf_map_type;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use portmap::demo::netns::Netns;
use portmap::sys::bpf::map::{Definition, Map};
use programs::{classifier, instruction, returning};

/// Runs `test` in a network namespace with a bpffs of its own at /sys/fs/bpf.
fn isolated(test: impl FnOnce() + Send) {
    // Kernels before 5.11 let go of the memory of what a test has made in a while only. Where this
    // is refused, there is a later one.
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).ok();
    Netns::with_private_bpffs("bpf").expect("root is needed").run(test).unwrap();
}

/// Major and minor version of the kernel.
fn kernel() -> (u32, u32) {
    let name = nix::sys::utsname::uname().unwrap();
    let mut numbers = name.release().to_str().unwrap().split(['.', '-']);
    let mut number = || numbers.next().unwrap().parse().unwrap();
    (number(), number())
}

/// Keys of 4 bytes, values of 8.
fn definition(name: &str, kind: bpf_map_type, max_entries: u32) -> Definition {
    let kind = kind as u32;
    Definition { name: name.into(), kind, key_size: 4, value_size: 8, max_entries, flags: 0 }
}

fn hash_map(name: &str, max_entries: u32) -> Map {
    Map::create(&definition(name, bpf_map_type::BPF_MAP_TYPE_HASH, max_entries)).unwrap()
}

/// Runs a command of words without spaces; a missing tool is a failure.
fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Index of a new device.
fn veth() -> u32 {
    run("ip link add pm0 type veth peer name pm1");
    nix::net::if_::if_nametoindex("pm0").unwrap()
}

/// Says to a test that it runs in a process that [`once_more`] has started.
const INNER: &str = "PORTMAP_TEST_INNER";

/// Runs a test of this file again in a process of its own, with what `words` put before it, and
/// `value` in the variable [`INNER`]. The process has the namespaces of this thread.
fn once_more(test: &str, words: &[&str], value: &str) {
    let this = std::env::current_exe().unwrap();
    let words = words.iter().map(AsRef::as_ref).chain([this.as_os_str()]);
    let mut words = words.chain(["--ignored", "--exact", test].map(AsRef::as_ref));
    let mut command = Command::new(words.next().unwrap());
    let output = command.args(words).env(INNER, value).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{value}: {text}{errors}");
}
