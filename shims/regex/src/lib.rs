//! The crate `iptables` splits a command line by a regular expression. For that `regex` brings tables
//! of Unicode that are a third of the binary and, since they are full of addresses, are read and
//! relocated whenever a process starts; and a compiler that takes longer than the split.
pub use regex_lite::*;
