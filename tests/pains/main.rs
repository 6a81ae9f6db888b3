//! What users of hostPorts have suffered from, one test each, so that it does not come back. A test
//! is named after the pain, and its comment names the public threads (`plugins` is
//! containernetworking/plugins, `cni` is containernetworking/cni).
//!
//! Run as root: `cargo test --test pains -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test says by a panic that it failed, and on which variant"
)]

#[path = "../support/executable.rs"]
mod executable;
#[path = "../support/mod.rs"]
mod support;

mod choice;
mod cilium;
mod conntrack;
mod cost;
mod history;
mod history_rules;
mod hostip;
mod ipv6;
mod localhost;
mod marks;
mod runtime;
mod services;
mod several;
mod site;
mod source;
mod stale;
