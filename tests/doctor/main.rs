//! `portmap doctor`: each finding provoked on a node made for it, and absent on the healthy one.
//!
//! Run as root: `cargo test --test doctor -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "../support/executable.rs"]
mod executable;
#[path = "../support/mod.rs"]
mod support;

mod attachments;
mod backends;
mod cilium;
mod firewall;
mod golden;
mod healthy;
mod localhost;
mod rig;
mod setup;
mod state;
