//! The programs, packet by packet: what goes in, what comes out, and what the maps have then.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "these tests set up what is read, and fail by panicking"
)]

mod cost;
mod destinations;
mod editions;
mod errors;
mod extensions;
mod flows;
mod forged;
mod forward;
mod fragments;
mod hairpin;
mod links;
mod masquerade;
mod object;
mod packet;
mod random;
mod rig;
mod sctp;
mod seen;
mod sockets;
mod truncated;
