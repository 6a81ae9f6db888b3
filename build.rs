//! Has the linker put the functions that runtimes' calls run through side by side (scripts/functions.sh).

#![allow(
    clippy::disallowed_methods,
    reason = "cargo tells a build script everything by its environment"
)]

use std::env::var;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=scripts/functions.ld");
    // Cargo looks for changes of flags by itself, and cannot be told to for RUSTC_LINKER, which it sets.
    let target = var("TARGET").unwrap_or_default().to_uppercase().replace('-', "_");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_{target}_LINKER");
    let is_musl = var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "musl");
    let is_release = var("PROFILE").is_ok_and(|profile| profile == "release");
    // As rustc does for musl, where nothing else is set.
    let linker = var("RUSTC_LINKER").unwrap_or_else(|_| "cc".to_owned());
    if is_musl
        && is_release
        && knows_insert(&linker, &var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default())
        && let Ok(root) = var("CARGO_MANIFEST_DIR")
    {
        println!("cargo::rustc-link-arg-bin=portmap=-T{root}/scripts/functions.ld");
    }
}

/// Whether a linker takes a script that adds to its own. Gold and mold refuse to link with one, and what it
/// is good for is not worth a build that fails; nor is finding out what flags for the linker come to.
pub fn knows_insert(linker: &str, flags: &str) -> bool {
    let is_for_linker = |flag: &str| {
        ["link", "-Clink", "-Zlink", "--codegen=link"].iter().any(|begin| flag.starts_with(begin))
    };
    let version = || Command::new(linker).arg("-Wl,--version").env("LC_ALL", "C").output();
    !flags.split('\x1f').any(is_for_linker)
        && version().is_ok_and(|version| version.stdout.starts_with(b"GNU ld "))
}
