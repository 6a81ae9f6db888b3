//! Ways to forward. Each backend renders records (pure), changes the kernel in one transaction,
//! and reads it back.

pub mod iptables;
pub mod nftables;
