//! The crate `iptables` splits a command line by a regular expression. For that `regex` brings tables
//! of Unicode that are a third of the binary and, since they are full of addresses, are read and
//! relocated whenever a process starts; and a compiler that takes longer than the split.
//!
//! The version is that of the `regex` which cargo would take: where a crate asks for a newer one the
//! patch does not apply, and deny.toml refuses the build.
pub use regex_lite::*;
