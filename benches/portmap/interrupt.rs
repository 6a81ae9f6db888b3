//! Ctrl-C and SIGTERM end the benchmark as an error does, so that nodes are cleared (`rig.rs`).

use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use crate::Res;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// To be called before there are other threads. Processes that the benchmark starts do not get these
/// signals either: they take milliseconds, and nothing is left half done.
pub fn watch() -> Res<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if INTERRUPTED.swap(true, Ordering::Relaxed) {
                // Whoever asks twice does not want to wait.
                process::exit(130);
            }
        }
    });
    Ok(())
}

pub fn check() -> Res<()> {
    match INTERRUPTED.load(Ordering::Relaxed) {
        true => Err("interrupted".into()),
        false => Ok(()),
    }
}
