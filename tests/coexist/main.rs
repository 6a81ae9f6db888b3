//! hostPorts by eBPF beside others: programs of Cilium and its agent, netfilter's rules, cgroups that
//! somebody else manages, sidecars, and pods without a link of their own.
//!
//! Run as root: `cargo test --test coexist -- --ignored`. What others attach is of
//! testdata/bpf/standins.bpf.c, or two instructions long.

#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a part of the rig is for others; a test says by a panic that it failed"
)]

mod bypass;
mod capture;
#[path = "../support/cgroups.rs"]
mod cgroups;
mod frames;
mod lan;
mod macvlan;
mod netfilter;
mod order;
mod pmtu;
#[path = "../matrix/rig.rs"]
mod rig;
mod sidecar;
mod sockets;
mod standins;
#[path = "../support/mod.rs"]
mod support;
mod tunnel;

use std::io::{self, ErrorKind};
use std::time::Instant;

use portmap::demo::netns::Netns;

/// A socket inside, once the former one of its port is gone: that may live on for moments, in a process that
/// another test is about to start.
fn once_free<T: Send>(inside: &Netns, bind: impl Fn() -> io::Result<T> + Send + Sync) -> T {
    let started = Instant::now();
    loop {
        match inside.run(&bind).unwrap() {
            Err(error)
                if error.kind() == ErrorKind::AddrInUse && started.elapsed() < rig::TIMEOUT =>
            {
                std::thread::yield_now();
            }
            bound => return bound.unwrap(),
        }
    }
}
