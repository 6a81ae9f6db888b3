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
