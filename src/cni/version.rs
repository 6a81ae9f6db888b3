//! Versions of the specification.

use crate::error::{Error, Result};

/// Every version this plugin speaks, oldest first. Runtimes look for their list's version
/// literally (libcni compares strings).
pub const SUPPORTED: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The newest version: what is said where the input names none that is supported.
pub const NEWEST: &str = "1.1.0";

/// A supported version. Ordered by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(usize);

/// How a result is laid out: only results of the same form can stand for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultForm {
    /// 0.1.0, 0.2.0: `ip4` and `ip6` objects.
    PerFamily,
    /// 0.3.0 to 0.4.0: `interfaces` and `ips`, each with a `version`.
    Interfaces,
    /// 1.0.0 and 1.1.0: `ips` without a `version`.
    Modern,
}

impl Version {
    /// Reads `cniVersion`. Absent and empty mean 0.1.0 (specification, "Configuration format");
    /// anything else must match exactly.
    pub fn parse(text: &str) -> Result<Self> {
        let text = if text.is_empty() { "0.1.0" } else { text };
        SUPPORTED
            .iter()
            .position(|supported| *supported == text)
            .map(Version)
            .ok_or_else(|| Error::UnsupportedVersion { version: text.to_owned() })
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        SUPPORTED.get(self.0).copied().unwrap_or(NEWEST)
    }

    #[must_use]
    pub fn form(self) -> ResultForm {
        match self.as_str() {
            "0.1.0" | "0.2.0" => ResultForm::PerFamily,
            "0.3.0" | "0.3.1" | "0.4.0" => ResultForm::Interfaces,
            _ => ResultForm::Modern,
        }
    }

    /// Refuses `verb` on configurations older than the version that introduced it.
    pub fn require(self, verb: &'static str, since: &'static str) -> Result<()> {
        let known = SUPPORTED.iter().position(|supported| *supported == since);
        if known.is_some_and(|since| self.0 >= since) {
            return Ok(());
        }
        Err(Error::VerbTooNew { verb, since, version: self.as_str().to_owned() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn absent_means_the_oldest_and_only_exact_names_count() {
        assert_eq!(Version::parse("").unwrap().as_str(), "0.1.0");
        assert_eq!(Version::parse("1.1.0").unwrap().as_str(), NEWEST);
        for wrong in ["1.0", "v1.0.0", "1.2.0", " 1.0.0", "9.9.9"] {
            assert_eq!(Version::parse(wrong).unwrap_err().code(), 1, "{wrong}");
        }
    }

    #[test]
    fn verbs_are_refused_below_the_version_that_has_them() {
        let old = Version::parse("0.3.1").unwrap();
        assert_eq!(old.require("CHECK", "0.4.0").unwrap_err().code(), 1);
        Version::parse("0.4.0").unwrap().require("CHECK", "0.4.0").unwrap();
        assert!(Version::parse("1.0.0").unwrap().require("GC", "1.1.0").is_err());
    }
}
