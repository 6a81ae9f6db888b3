//! What the kernel is asked without starting a process: links, addresses and routes
//! (`NETLINK_ROUTE`), connection tracking and nf_tables (`NETLINK_NETFILTER`).

pub mod socket;
