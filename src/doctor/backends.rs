//! Which backends work here, why others do not, and which one `auto` takes.

use super::{Area, Finding, Told};
use crate::model::BackendKind;

/// What became of trying a backend out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    Works,
    /// It works, and `auto` does not choose it: why not, and how to ask for it.
    Objection(String),
    /// Somebody else has what the trial needs.
    Busy(String),
    Broken(String),
}

/// A backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    pub kind: BackendKind,
    /// Its tool, or what it has instead, in words; empty if it has none.
    pub tool: String,
    pub trial: Trial,
}

/// What was found out.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Without rights every trial fails, which says nothing of the node.
    pub privileged: bool,
    /// In the order of `auto`.
    pub tried: Vec<Tried>,
    /// What former calls have found to work, for pods without an IPv6 address and for those with one, and all
    /// after them take without trying; with the file that says it.
    pub remembered: Vec<(BackendKind, String)>,
    /// Where programs at sockets are attached (the root of cgroup v2), or why nowhere.
    pub sockets: Told<String>,
    /// Whether attachments use eBPF.
    pub ebpf_in_use: bool,
}

const AREA: Area = Area::Backends;

impl Facts {
    /// What `auto` takes if it has to find out.
    #[must_use]
    pub fn chosen(&self) -> Option<BackendKind> {
        let found = self.tried.iter().find_map(|tried| match tried.trial {
            Trial::Works => Some(Some(tried.kind)),
            // An ADD would wait for it, and not pass it over.
            Trial::Busy(_) => Some(None),
            Trial::Objection(_) | Trial::Broken(_) => None,
        });
        found.flatten()
    }

    fn of(&self, kind: BackendKind) -> Option<&Trial> {
        self.tried.iter().find(|tried| tried.kind == kind).map(|tried| &tried.trial)
    }
}

/// `configured` is what the list says, if it says anything but `auto`.
#[must_use]
pub fn findings(facts: &Facts, configured: Option<BackendKind>) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        facts.tried.iter().map(|tried| tried_out(facts, tried)).collect();
    findings.push(choice(facts, configured));
    findings.extend(remembered(facts, configured));
    findings.push(sockets(facts, configured));
    findings
}

fn check(kind: BackendKind) -> &'static str {
    match kind {
        BackendKind::Iptables => "iptables",
        BackendKind::Nftables => "nftables",
        BackendKind::Ebpf => "ebpf",
    }
}

fn tried_out(facts: &Facts, Tried { kind, tool, trial }: &Tried) -> Finding {
    let tool = if tool.is_empty() { String::new() } else { format!(" ({tool})") };
    match trial {
        Trial::Works => AREA.fine(check(*kind), format!("{kind} works{tool}")),
        Trial::Objection(reason) => AREA.fine(
            check(*kind),
            format!("{kind} works{tool}, and auto does not choose it: {reason}"),
        ),
        Trial::Busy(reason) => AREA.warning(
            check(*kind),
            format!("{kind} could not be tried out: {reason}"),
            "every call of the plugin waits for the same",
            "lsof /run/xtables.lock",
        ),
        Trial::Broken(reason) if !facts.privileged => {
            AREA.unread(check(*kind), &format!("whether {kind} works"), reason)
        }
        Trial::Broken(reason) if facts.chosen().is_some() => {
            AREA.fine(check(*kind), format!("{kind} does not work here, and need not: {reason}"))
        }
        // What that means stands with the choice.
        Trial::Broken(reason) => {
            AREA.fine(check(*kind), format!("{kind} does not work here: {reason}"))
        }
    }
}

fn choice(facts: &Facts, configured: Option<BackendKind>) -> Finding {
    const CHECK: &str = "choice";
    match (configured, facts.chosen()) {
        (Some(kind), _) => match facts.of(kind) {
            Some(Trial::Broken(_)) if facts.privileged => AREA.broken(
                CHECK,
                format!("the list asks for {kind}, which does not work here"),
                "every ADD with hostPorts fails",
                match facts.chosen() {
                    Some(other) => {
                        format!("say \"backend\": \"{other}\" in the list, or leave it out")
                    }
                    None => install(),
                },
            ),
            _ => AREA.fine(CHECK, format!("the list asks for {kind}")),
        },
        (None, Some(kind)) => AREA.fine(CHECK, format!("auto takes {kind}")),
        (None, None) if !facts.privileged => {
            AREA.unread(CHECK, "which backend auto takes", "it takes root to try them")
        }
        (None, None) if facts.tried.iter().any(|tried| matches!(tried.trial, Trial::Busy(_))) => {
            AREA.warning(
                CHECK,
                "what auto takes cannot be told: a backend is busy",
                "auto does not pass over a backend that may well work",
                "portmap doctor",
            )
        }
        (None, None) => {
            let objected =
                facts.tried.iter().find(|tried| matches!(tried.trial, Trial::Objection(_)));
            AREA.broken(
                CHECK,
                "auto finds no backend",
                "every ADD with hostPorts fails",
                objected.map_or_else(install, |tried| {
                    format!("set \"backend\": \"{}\" in the list, or {}", tried.kind, install())
                }),
            )
        }
    }
}

fn install() -> String {
    "apt-get install nftables (or dnf install nftables)".into()
}

/// Calls trust the memory, so that something that has stopped working since makes each of them fail.
fn remembered(facts: &Facts, configured: Option<BackendKind>) -> Option<Finding> {
    let misleads = |(kind, _): &&(BackendKind, String)| {
        facts.of(*kind).is_some_and(|trial| matches!(trial, Trial::Broken(_)))
    };
    let misleading: Vec<_> = facts.remembered.iter().filter(misleads).collect();
    let (kind, _) = misleading.first()?;
    let files: Vec<&str> = misleading.iter().map(|(_, file)| file.as_str()).collect();
    (configured.is_none() && facts.privileged).then(|| {
        AREA.broken(
            "remembered",
            format!("an earlier call found {kind} to work, which it does no more"),
            "auto goes by that until the next boot, and every ADD fails",
            format!("rm {}", files.join(" ")),
        )
    })
}

fn sockets(facts: &Facts, configured: Option<BackendKind>) -> Finding {
    const CHECK: &str = "sockets";
    let chosen = configured.or_else(|| facts.chosen());
    let needed = facts.ebpf_in_use || chosen == Some(BackendKind::Ebpf);
    match (&facts.sockets, needed) {
        (Ok(place), true) => AREA.fine(CHECK, format!("eBPF serves the node's own processes from {place}")),
        (Ok(place), false) => {
            AREA.fine(CHECK, format!("eBPF could serve the node's own processes from {place}"))
        }
        (Err(reason), _) if !facts.privileged => {
            AREA.unread(CHECK, "where eBPF could serve the node's own processes", reason)
        }
        (Err(reason), true) => AREA.warning(
            CHECK,
            format!("eBPF cannot serve the node's own processes: {reason}"),
            "they do not reach hostPorts by 127.0.0.1, ::1 or the node's addresses; everybody else does",
            format!("{}: rules serve them as well", install()),
        ),
        (Err(reason), false) => AREA.fine(
            CHECK,
            format!("eBPF, which nothing here uses, could not serve the node's own processes: {reason}"),
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::super::Severity;
    use super::*;

    pub fn facts(trials: [Trial; 3]) -> Facts {
        let tried = BackendKind::ALL
            .into_iter()
            .zip(trials)
            .map(|(kind, trial)| Tried { kind, tool: String::new(), trial })
            .collect();
        Facts {
            privileged: true,
            tried,
            remembered: Vec::new(),
            sockets: Ok("/x".into()),
            ebpf_in_use: false,
        }
    }

    fn broken() -> Trial {
        Trial::Broken("no".into())
    }

    #[track_caller]
    fn worst(facts: &Facts, configured: Option<BackendKind>) -> (Severity, &'static str) {
        let all = findings(facts, configured);
        let worst = all.iter().max_by_key(|finding| finding.severity).unwrap();
        (worst.severity, worst.check)
    }

    #[test]
    fn one_that_works_is_enough_and_the_others_say_why_not() {
        let one = facts([broken(), Trial::Works, broken()]);
        assert_eq!(one.chosen(), Some(BackendKind::Nftables));
        assert_eq!(worst(&one, None).0, Severity::Fine);
        assert!(
            findings(&one, None)[0].found.contains("iptables does not work here, and need not: no")
        );
        assert_eq!(worst(&one, Some(BackendKind::Ebpf)), (Severity::Broken, "choice"));
    }

    #[test]
    fn none_an_objection_and_a_busy_one() {
        assert_eq!(
            worst(&facts([broken(), broken(), broken()]), None),
            (Severity::Broken, "choice")
        );
        let objected = facts([broken(), broken(), Trial::Objection("Cilium".into())]);
        let all = findings(&objected, None);
        assert!(all[3].fix.starts_with("set \"backend\": \"ebpf\""), "{all:?}");
        let busy = facts([Trial::Busy("lock".into()), Trial::Works, Trial::Works]);
        assert_eq!(busy.chosen(), None);
        assert_eq!(worst(&busy, None).0, Severity::Warning);
    }

    #[test]
    fn without_rights_nothing_is_called_broken() {
        let mut denied = facts([broken(), broken(), broken()]);
        denied.privileged = false;
        assert_eq!(worst(&denied, Some(BackendKind::Iptables)).0, Severity::Warning);
        assert_eq!(worst(&denied, None).0, Severity::Warning);
    }

    #[test]
    fn a_memory_that_misleads_is_named_with_its_file() {
        let mut facts = facts([broken(), Trial::Works, broken()]);
        let of = |kind, file: &str| (kind, file.to_owned());
        facts.remembered =
            vec![of(BackendKind::Iptables, "/run/x"), of(BackendKind::Nftables, "/run/y")];
        let found = findings(&facts, None);
        let found = found.iter().find(|finding| finding.check == "remembered").unwrap();
        assert_eq!((found.severity, found.fix.as_str()), (Severity::Broken, "rm /run/x"));
        facts.remembered[1].0 = BackendKind::Iptables;
        let found = findings(&facts, None);
        assert!(found.iter().any(|finding| finding.fix == "rm /run/x /run/y"), "{found:?}");
    }

    #[test]
    fn sockets_matter_to_ebpf_alone() {
        let mut facts = facts([Trial::Works, Trial::Works, Trial::Works]);
        facts.sockets = Err("no cgroup v2".into());
        assert_eq!(worst(&facts, None).0, Severity::Fine);
        assert_eq!(worst(&facts, Some(BackendKind::Ebpf)), (Severity::Warning, "sockets"));
        facts.ebpf_in_use = true;
        assert_eq!(worst(&facts, None), (Severity::Warning, "sockets"));
    }
}
