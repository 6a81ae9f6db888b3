//! What is wrong with a node, and what to do about it.
//!
//! ```text
//! gather (reads the node) ─► Facts ─► examine (pure) ─► findings ─► report (pure)
//! ```
//!
//! Every part of the facts that could not be read says why, and becomes a finding like all others:
//! what nobody looked at is never taken for sound.

pub mod attachments;
pub mod backends;
pub mod bypass;
pub mod cilium;
pub mod firewall;
pub mod gather;
pub mod localhost;
pub mod report;
pub mod rules;
pub mod setup;
pub mod state;

use std::path::Path;

use serde::Serialize;

use crate::conflist::check::Severity as Problem;
use crate::conflist::files;
use crate::sys::install::DEFAULT_BIN_DIR;
use crate::sys::store::DEFAULT_DIR;

/// What was read, or why it could not be.
pub type Told<T> = Result<T, String>;

/// How bad it is. Ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Fine,
    /// Works now, and deserves attention; or it could not be told.
    Warning,
    /// hostPorts, or some of them, do not work, or open what should be closed.
    Broken,
}

impl From<Problem> for Severity {
    fn from(problem: Problem) -> Self {
        match problem {
            Problem::Warning => Severity::Warning,
            Problem::Broken => Severity::Broken,
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about; findings of one area stand together.
    pub area: Area,
    /// Stable name of what was looked at, for scripts.
    pub check: &'static str,
    pub severity: Severity,
    pub found: String,
    /// Why it matters; empty where nothing is wrong.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The command that settles it, or says more; empty where there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

/// Areas, in the order of the report: from what all depends on to single attachments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    Backends,
    Installation,
    State,
    Attachments,
    Localhost,
    Firewall,
    Cilium,
}

impl Area {
    pub const ALL: [Area; 7] = [
        Area::Backends,
        Area::Installation,
        Area::State,
        Area::Attachments,
        Area::Localhost,
        Area::Firewall,
        Area::Cilium,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Area::Backends => "backends",
            Area::Installation => "installation",
            Area::State => "state",
            Area::Attachments => "attachments",
            Area::Localhost => "localhost",
            Area::Firewall => "firewall",
            Area::Cilium => "cilium",
        }
    }

    fn fine(self, check: &'static str, found: impl Into<String>) -> Finding {
        let (why, fix) = (String::new(), String::new());
        Finding { area: self, check, severity: Severity::Fine, found: found.into(), why, fix }
    }

    fn warning(
        self,
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Finding {
        let finding = self.fine(check, found);
        Finding { severity: Severity::Warning, why: why.into(), fix: fix.into(), ..finding }
    }

    fn broken(
        self,
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Finding {
        Finding { severity: Severity::Broken, ..self.warning(check, found, why, fix) }
    }

    /// What nobody could look at. `what` completes "… could not be read".
    fn unread(self, check: &'static str, what: &str, reason: &str) -> Finding {
        self.warning(
            check,
            format!("{what} could not be read: {reason}"),
            "what nobody looked at may be wrong",
            match reason.contains("PATH") {
                true => {
                    "put the tool into PATH (usually /usr/sbin), or install it, and repeat this"
                }
                false => "sudo portmap doctor, in the node's own namespaces",
            },
        )
    }
}

/// The node.
#[derive(Debug, Clone)]
pub struct Facts {
    pub backends: backends::Facts,
    pub setup: setup::Facts,
    pub state: state::Facts,
    pub localhost: localhost::Facts,
    pub firewall: firewall::Facts,
    pub bypass: bypass::Facts,
    pub cilium: cilium::Facts,
}

/// Everything that was looked at, in the order of the report.
#[must_use]
pub fn examine(facts: &Facts) -> Vec<Finding> {
    let Facts { backends, setup, state, localhost, firewall, bypass, cilium } = facts;
    let configured = setup.configured_backend();
    let mut findings = backends::findings(backends, configured);
    findings.extend(setup::findings(setup, configured.or_else(|| backends.chosen())));
    findings.extend(state::findings(state));
    findings.extend(localhost::findings(localhost));
    findings.extend(firewall::findings(firewall));
    findings.extend(bypass::findings(bypass));
    findings.extend(cilium::findings(cilium));
    for finding in &mut findings {
        finding.fix = at_home(&finding.fix, &setup.dest, &setup.conf_dir, &state.dir);
    }
    findings.sort_by_key(|finding| finding.area);
    findings
}

/// A command with the directories that were looked at, where they are not those that it takes by
/// itself: what it settles must be what was found.
fn at_home(fix: &str, dest: &Path, conf_dir: &Path, state_dir: &Path) -> String {
    let option = |name: &str, dir: &Path, default: &str| {
        // Those that name a directory themselves have it already.
        let is_needed = dir != Path::new(default) && !fix.contains(name);
        if is_needed { format!(" {name} {}", dir.display()) } else { String::new() }
    };
    let dest = option("--dest", dest, DEFAULT_BIN_DIR);
    let state = option("--state-dir", state_dir, DEFAULT_DIR);
    let conf = option("--conf-dir", conf_dir, files::DEFAULT_DIR);
    // A list that is named needs no directory.
    let list = if fix.contains("--conflist auto") { conf.as_str() } else { "" };
    let mut told = fix.to_owned();
    for (command, options) in [
        ("portmap restore", state.clone()),
        ("portmap gc", state.clone()),
        ("portmap flush", state.clone()),
        ("portmap doctor", format!("{state}{dest}{conf}")),
        ("portmap install", format!("{dest}{list}")),
        ("portmap uninstall", format!("{dest}{list}{state}")),
    ] {
        told = told.replace(command, &format!("{command}{options}"));
    }
    told
}

/// `one` or `3 things`.
fn count(number: usize, one: &str, many: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        number => format!("{number} {many}"),
    }
}

/// The first few of a list, and how many more there are.
fn some_of<T: std::fmt::Display>(all: &[T]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    match all.len().saturating_sub(SHOWN) {
        0 => shown.join("; "),
        more => format!("{}; and {more} more", shown.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_and_say_so() {
        assert_eq!(some_of(&["a"]), "a");
        assert_eq!(some_of(&["a", "b", "c", "d", "e"]), "a; b; c; and 2 more");
        assert_eq!(
            (count(1, "rule", "rules"), count(0, "rule", "rules")),
            ("1 rule".into(), "0 rules".into())
        );
    }

    #[test]
    fn commands_act_where_doctor_has_looked() {
        let [bin, conf, state] = [DEFAULT_BIN_DIR, files::DEFAULT_DIR, DEFAULT_DIR].map(Path::new);
        let other = Path::new("/o");
        for fix in ["rm x && portmap restore", "portmap install --conflist auto", "portmap doctor"]
        {
            assert_eq!(at_home(fix, bin, conf, state), fix);
        }
        for (fix, told) in [
            ("rm x && portmap restore", "rm x && portmap restore --state-dir /o"),
            ("portmap flush --all --state-dir /x", "portmap flush --all --state-dir /x"),
            ("portmap install --conflist f", "portmap install --dest /o --conflist f"),
            ("portmap install --dest /o", "portmap install --dest /o"),
            (
                "portmap uninstall --conflist auto",
                "portmap uninstall --dest /o --conf-dir /o --state-dir /o --conflist auto",
            ),
            ("sudo portmap doctor", "sudo portmap doctor --state-dir /o --dest /o --conf-dir /o"),
        ] {
            assert_eq!(at_home(fix, other, other, other), told);
        }
        let told = "portmap install --conf-dir /o --conflist auto";
        assert_eq!(at_home("portmap install --conflist auto", bin, other, state), told);
    }

    #[test]
    fn areas_have_the_order_of_the_report() {
        assert!(Area::ALL.is_sorted());
    }
}
