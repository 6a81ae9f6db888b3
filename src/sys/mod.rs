//! The one module tree that touches the host: processes, files under the state directory, netlink,
//! sysctls and clocks. Everything outside of it is a function of its arguments.

#![allow(
    clippy::disallowed_methods,
    reason = "this is the door that clippy.toml sends everything else to"
)]

pub mod netlink;
