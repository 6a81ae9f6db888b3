//! What not every kernel has: SCTP sockets, VLAN, ipvlan and netkit devices. These tests are run in guests, whose
//! kernels have all of it, by `tests/kernels/run.sh`.

#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a part of the rig is for others; a test says by a panic that it failed"
)]

mod ipvlan;
mod netkit;
#[path = "../matrix/rig.rs"]
mod rig;
mod sctp;
#[path = "../support/mod.rs"]
mod support;
mod vlan;
