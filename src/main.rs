#![allow(
    clippy::disallowed_methods,
    reason = "here the process's arguments, environment and streams become values"
)]

fn main() {}
