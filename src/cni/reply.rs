//! What goes to stdout: exactly one JSON object, or nothing.

use serde::Serialize;

use super::version::{NEWEST, SUPPORTED, Version};
use crate::error::Error;

/// The specification's error object.
#[derive(Debug, Serialize)]
pub struct ErrorReply {
    #[serde(rename = "cniVersion")]
    pub cni_version: String,
    pub code: u32,
    pub msg: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl ErrorReply {
    /// `version` is the input's `cniVersion`, where it could be read; the reply uses it if it is
    /// supported, else the newest.
    #[must_use]
    pub fn new(error: &Error, version: Option<&str>) -> Self {
        ErrorReply {
            cni_version: supported_or_newest(version),
            code: error.code(),
            msg: error.to_string(),
            details: error.details(),
        }
    }

    /// For DEL: go-cni takes an error whose text contains "not found" or "no such file or
    /// directory" for success and skips the rest of the network's DEL, which leaks addresses.
    #[must_use]
    pub fn without_success_words(mut self) -> Self {
        for text in [&mut self.msg, &mut self.details] {
            *text = replace_ignoring_case(text, "not found", "missing");
            *text = replace_ignoring_case(text, "no such file or directory", "the file is missing");
        }
        self
    }
}

/// The reply to VERSION.
#[derive(Debug, Serialize)]
pub struct VersionReply {
    #[serde(rename = "cniVersion")]
    pub cni_version: String,
    #[serde(rename = "supportedVersions")]
    pub supported_versions: [&'static str; 7],
}

impl VersionReply {
    /// The specification wants the version of the input back.
    #[must_use]
    pub fn new(version: Option<&str>) -> Self {
        VersionReply { cni_version: supported_or_newest(version), supported_versions: SUPPORTED }
    }
}

fn supported_or_newest(version: Option<&str>) -> String {
    version.and_then(|text| Version::parse(text).ok()).map_or(NEWEST, Version::as_str).to_owned()
}

fn replace_ignoring_case(text: &str, from: &str, to: &str) -> String {
    let lower = text.to_ascii_lowercase();
    let mut out = String::with_capacity(text.len());
    let mut rest = 0;
    for (at, _) in lower.match_indices(from) {
        out.push_str(text.get(rest..at).unwrap_or_default());
        out.push_str(to);
        rest = at + from.len();
    }
    out.push_str(text.get(rest..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn del_errors_avoid_the_words_that_mean_success() {
        let error = Error::Tool {
            what: "cannot remove: Chain Not Found".into(),
            tool: "iptables".into(),
            details: "exec: No such file or directory (os error 2), é not found".into(),
        };
        let reply = ErrorReply::new(&error, Some("0.3.1")).without_success_words();
        assert_eq!(reply.msg, "cannot remove: Chain missing (iptables failed)");
        assert_eq!(reply.details, "exec: the file is missing (os error 2), é missing");
        assert_eq!(reply.cni_version, "0.3.1");
    }
}
