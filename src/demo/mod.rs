//! `portmap demo`: proves on this machine that hostPorts work, without touching its network.
//!
//! A throw-away node, two pods and an outside client are built in network namespaces of their own
//! ([`topology`]), the plugin is run in the node as a runtime would ([`plugin`]), every path to the
//! hostPorts is tried with real connections ([`matrix`]), and at the end the node must be as it was
//! ([`snapshot`]). Root is needed and no other program: links and routes are made through
//! netlink. Tools that list rules are used where they exist, to show and compare.
//!
//! The integration tests stand on the same parts.
#![allow(
    clippy::disallowed_methods,
    reason = "the demonstration makes a node of its own and acts on it"
)]

mod addresses;
mod bypass;
pub mod links;
pub mod listing;
pub mod matrix;
pub mod netns;
pub mod plugin;
mod report;
pub mod server;
pub mod snapshot;
mod state_dir;
mod story;
pub mod topology;
pub mod traffic;

use std::io::{self, Write};
use std::path::PathBuf;

pub use matrix::Capabilities;

/// What to demonstrate.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// The configuration's `backend`; `None` leaves the choice to the plugin.
    pub backend: Option<String>,
    /// The plugin to run; an absolute path.
    pub plugin: PathBuf,
}

/// What kept the demonstration from being carried out. That something did not hold is no error.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A namespace could not be entered, a file or program of the demonstration not be used, or the
    /// report not be written.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Carries the demonstration out and writes its report to `out`. Returns whether all held.
pub fn run(options: &DemoOptions, out: &mut dyn Write) -> Result<bool, DemoError> {
    story::tell(options, out)
}

/// What kept the laboratory from being built or used.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The kernel does not let this user make network namespaces.
    #[error(
        "making a network namespace is not permitted: run this as root, with CAP_SYS_ADMIN and CAP_NET_ADMIN"
    )]
    NotPermitted,
    /// One step failed; the message names the namespace and the step.
    #[error("{step}: {source}")]
    Step { step: String, source: io::Error },
}

impl LabError {
    fn namespace(name: &str, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::PermissionDenied {
            return Self::NotPermitted;
        }
        Self::Step { step: format!("making the network namespace {name}"), source }
    }
}
