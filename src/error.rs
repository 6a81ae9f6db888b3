//! What can go wrong, and how it is reported.
//!
//! `msg` is the variant's text: what failed, with names and values. `details` is the cause: the
//! chain of sources and a tool's own stderr. Codes are those of the CNI specification 1.1.0,
//! section "Error"; 100 and above are this plugin's own.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use crate::model::Family;

/// A failure that ends a verb.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cniVersion {version:?} is not supported: use one of {}", crate::cni::version::SUPPORTED.join(", "))]
    UnsupportedVersion { version: String },
    #[error("{verb} needs cniVersion {since} or newer, the network configuration says {version}")]
    VerbTooNew { verb: &'static str, since: &'static str, version: String },
    #[error("{0}")]
    Environment(String),
    #[error("cannot {action}")]
    Io {
        action: String,
        #[source]
        source: io::Error,
    },
    #[error("{0}")]
    Decode(String),
    #[error("{0}")]
    Config(String),
    #[error(
        "CNI_NETNS {path} is the network namespace of the plugin itself: it must be the pod's (or set CNI_NETNS_OVERRIDE=1)"
    )]
    OwnNetns { path: String },
    #[error("another process has held the lock {path} for {seconds} s: try again later")]
    Busy {
        path: PathBuf,
        seconds: u64,
        /// `process 12 (nft)`, if it is known.
        holder: Option<String>,
    },
    #[error("{tool} was ended after {seconds} s without a result: try again later")]
    Hung { tool: String, seconds: u64 },
    #[error("no backend works on this node: {reasons}")]
    NoBackend { reasons: String },
    #[error("the {backend} backend does not work on this node: {reason}")]
    BackendUnusable { backend: String, reason: String },
    #[error(
        "{claim} belongs to container {owner}, which is alive or may be, and conflictPolicy is \"deny\""
    )]
    PortTaken { claim: String, owner: String },
    #[error("{what} ({tool} failed)")]
    Tool { what: String, tool: String, details: String },
    #[error("externalSetMarkChain names {chain}, and table nat has no such chain ({family})")]
    MarkChainMissing { chain: String, family: Family },
    #[error("{0}")]
    Drift(String),
    #[error("record {path} cannot be used: {reason}")]
    Record { path: PathBuf, reason: String },
    #[error(
        "the eBPF maps have layout {newest} of a newer portmap, this one knows layouts up to {own}: install the newer one again, or run `portmap flush --all` with it first"
    )]
    NewerMaps { newest: u32, own: u32 },
    #[error("{what}{}", how_many(errors))]
    Several { what: String, errors: Vec<Error> },
}

fn how_many(errors: &[Error]) -> String {
    match errors {
        [_] => " failed".to_owned(),
        several => format!(": {} of the steps failed", several.len()),
    }
}

/// The result of everything that can end a verb.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failed operation on the host; `action` completes "cannot …".
    pub fn io(action: impl Into<String>, source: io::Error) -> Self {
        Error::Io { action: action.into(), source }
    }

    /// A failure of the slow path, with the reason why the fast one was left.
    #[must_use]
    pub fn after(self, reason: &str) -> Self {
        match self {
            Error::Tool { what, tool, details } => {
                Error::Tool { what, tool, details: format!("{details} (tried because: {reason})") }
            }
            other => other,
        }
    }

    /// The CNI error code. STATUS turns failures into 50 or 51 by itself.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Error::UnsupportedVersion { .. } | Error::VerbTooNew { .. } => 1,
            Error::Environment(_) => 4,
            Error::Io { .. } => 5,
            Error::Decode(_) => 6,
            Error::Config(_) | Error::MarkChainMissing { .. } => 7,
            Error::OwnNetns { .. } => 8,
            Error::Busy { .. } | Error::Hung { .. } => 11,
            Error::Tool { .. } => 100,
            Error::NoBackend { .. } | Error::BackendUnusable { .. } => 101,
            Error::Drift(_) => 102,
            Error::PortTaken { .. } => 103,
            Error::Record { .. } | Error::NewerMaps { .. } => 104,
            Error::Several { errors, .. } => match errors.as_slice() {
                [only] => only.code(),
                _ => 105,
            },
        }
    }

    /// Whether only a newer portmap can do what was asked for: it has left records or maps that this one
    /// does not understand.
    #[must_use]
    pub fn is_newer(&self) -> bool {
        self.code() == 104
    }

    /// The cause: what tools printed, and what the system answered. Empty if `msg` says all.
    #[must_use]
    pub fn details(&self) -> String {
        match self {
            Error::Tool { details, .. } => details.clone(),
            Error::Busy { holder: Some(holder), .. } => format!("{holder} has it"),
            Error::Several { errors, .. } => errors
                .iter()
                .map(|error| match error.details() {
                    details if details.is_empty() => error.to_string(),
                    details => format!("{error}: {details}"),
                })
                .collect::<Vec<_>>()
                .join("\n"),
            _ => {
                let mut causes = Vec::new();
                let mut source = self.source();
                while let Some(cause) = source {
                    causes.push(cause.to_string());
                    source = cause.source();
                }
                causes.join(": ")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_carry_the_cause_and_the_message_does_not_repeat_it() {
        let error = Error::io("read /run/x", io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.to_string(), "cannot read /run/x");
        assert_eq!(error.details(), "Permission denied (os error 13)");
        assert_eq!(error.code(), 5);
        let holder = Some("process 12 (nft)".into());
        let error = Error::Busy { path: "/run/lock".into(), seconds: 60, holder };
        assert_eq!(error.details(), "process 12 (nft) has it");
    }

    #[test]
    fn several_failures_are_all_reported_and_one_keeps_its_code() {
        let one = || Error::Config("hostPort is 0".into());
        let several = Error::Several {
            what: "GC".into(),
            errors: vec![one(), Error::Decode("not JSON".into())],
        };
        assert_eq!(several.details(), "hostPort is 0\nnot JSON");
        assert_eq!(several.code(), 105);
        let single = Error::Several { what: "GC".into(), errors: vec![one()] };
        assert_eq!((single.code(), single.to_string()), (7, "GC failed".to_owned()));
    }
}
