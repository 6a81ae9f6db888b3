//! The one module tree that touches the host: processes, files under the state directory, netlink,
//! sysctls and clocks. Everything outside of it is a function of its arguments.

pub mod command;
pub mod netlink;
pub mod store;
pub mod sysctl;
