//! A laboratory in network namespaces.

mod addresses;
mod bypass;
pub mod links;
pub mod netns;
pub mod plugin;
pub mod server;
pub mod topology;
pub mod traffic;

use std::io;

/// What kept the laboratory from being built or used.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The kernel does not let this user make network namespaces.
    #[error(
        "making a network namespace is not permitted: run this as root (CAP_SYS_ADMIN and CAP_NET_ADMIN)"
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
        Self::Step {
            step: format!("making the network namespace {name}"),
            source,
        }
    }
}
