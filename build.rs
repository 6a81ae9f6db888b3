//! Has the linker put the functions that runtimes' calls run through side by side (scripts/functions.sh).

#![allow(
    clippy::disallowed_methods,
    reason = "cargo tells a build script everything by its environment"
)]

use std::env::var;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=scripts/functions.ld");
    // With musl cargo leaves linking to GNU ld, where nothing else is set; other linkers may not know
    // INSERT.
    let is_musl = var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "musl");
    let is_release = var("PROFILE").is_ok_and(|profile| profile == "release");
    if is_musl
        && is_release
        && let Ok(root) = var("CARGO_MANIFEST_DIR")
    {
        println!("cargo::rustc-link-arg-bin=portmap=-T{root}/scripts/functions.ld");
    }
}
