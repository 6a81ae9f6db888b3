//! Attachments: those that live and are as recorded, those that do not, and rules that nobody asked for.

use std::path::PathBuf;

use super::{Area, Finding, Told, count, some_of};

/// An attachment with a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The pod, or the container, and its hostPorts.
    pub who: String,
    /// Path of its network namespace.
    pub netns: String,
    pub alive: bool,
    /// Where the kernel differs from the record. Of one that is not alive nobody asks.
    pub problems: Told<Vec<String>>,
}

/// Rules or entries that no record asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    pub what: String,
    /// The command that takes it away.
    pub removal: String,
}

#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub attachments: Vec<Attachment>,
    /// What is wrong with records that cannot be read.
    pub damaged: Vec<String>,
    /// Whether a step was begun and not finished.
    pub pending: bool,
    /// A list that keeps its records in another state directory, and which.
    pub elsewhere: Option<(PathBuf, PathBuf)>,
    pub orphans: Vec<Orphan>,
    /// Where orphans could not be looked for, and why.
    pub unread: Vec<(String, String)>,
}

const AREA: Area = Area::Attachments;

impl Facts {
    /// Why orphans are not looked for, and the command after which they can be: what seems to be nobody's
    /// may be a live pod's, whose record was not read, and nothing would bring it back.
    #[must_use]
    pub fn doubt(&self) -> Option<(String, String)> {
        if let Some((list, dir)) = &self.elsewhere {
            let (list, dir) = (list.display(), dir.display());
            return Some((
                format!("{list} keeps records in {dir}"),
                format!("portmap doctor --state-dir {dir}"),
            ));
        }
        (!self.damaged.is_empty()).then(|| {
            let unread = count(self.damaged.len(), "record", "records");
            (
                format!("{unread} cannot be read"),
                "portmap doctor, once every record can be read".into(),
            )
        })
    }
}

#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (live, dead): (Vec<&Attachment>, Vec<&Attachment>) =
        facts.attachments.iter().partition(|attachment| attachment.alive);
    findings.extend(wrong(&live));
    if !dead.is_empty() {
        let names: Vec<String> = dead
            .iter()
            .map(|attachment| {
                format!("{} (network namespace {})", attachment.who, attachment.netns)
            })
            .collect();
        findings.push(AREA.warning(
            "stale",
            format!("{} of pods that are gone: {}", count(dead.len(), "record", "records"), some_of(&names)),
            "their DEL never came: their hostPorts lead nowhere, and keep others from answering there",
            "portmap gc",
        ));
    }
    for problem in &facts.damaged {
        let newer = is_newer(problem);
        findings.push(AREA.warning(
            "record",
            problem.clone(),
            "what it asks for is neither checked nor put back",
            match newer {
                true => "portmap install with the newer version, which can read it",
                false => "portmap gc, if its pod is gone; if not, the next ADD or the DEL of its attachment clears it away",
            },
        ));
    }
    if let Some((reason, fix)) = facts.doubt() {
        findings.push(AREA.warning(
            "orphan",
            format!("rules and entries without a record were not looked for: {reason}"),
            "what no record asks for here may be that of a pod that lives",
            fix,
        ));
    }
    for orphan in &facts.orphans {
        findings.push(AREA.warning(
            "orphan",
            orphan.what.clone(),
            "no record here asks for it: upstream's plugin made it, the record was lost, or is in another stateDir. If its \
             pod lives it works, and ends with the pod; if not, the port leads nowhere",
            orphan.removal.clone(),
        ));
    }
    for (what, reason) in &facts.unread {
        findings.push(AREA.unread("orphan", what, reason));
    }
    if findings.is_empty() {
        let text = match live.len() {
            0 => "no attachment has hostPorts, and no rule is left of any; pods that were made before portmap was \
                  listed have none until they are made anew"
                .to_owned(),
            1 => "the one attachment is in the kernel as recorded".to_owned(),
            number => format!("all {number} attachments are in the kernel as recorded"),
        };
        findings.push(AREA.fine("rules", text));
    }
    findings
}

/// Whether a record cannot be read because a newer version wrote it, by the store's words.
#[must_use]
pub fn is_newer(problem: &str) -> bool {
    problem.contains("newer portmap")
}

/// Live attachments that are not in the kernel as recorded, and those of which it could not be told.
fn wrong(live: &[&Attachment]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (mut different, mut unread) = (Vec::new(), Vec::new());
    for attachment in live {
        match &attachment.problems {
            Ok(problems) => different
                .extend(problems.first().map(|problem| format!("{}: {problem}", attachment.who))),
            Err(reason) => unread.push((attachment.who.as_str(), reason.as_str())),
        }
    }
    if !different.is_empty() {
        findings.push(AREA.broken(
            "rules",
            format!("{} of {} not in the kernel as recorded: {}",
                different.len(), count(live.len(), "attachment is", "attachments are"), some_of(&different)),
            "something has changed or removed rules, programs or map entries: these hostPorts do not work, or not as they should",
            "portmap restore",
        ));
    }
    if let Some((who, reason)) = unread.first() {
        let more = match unread.len() {
            1 => String::new(),
            number => format!(" and {} others", number - 1),
        };
        findings.push(AREA.unread("rules", &format!("what the kernel has of {who}{more}"), reason));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn attachment(who: &str, alive: bool, problems: Told<Vec<String>>) -> Attachment {
        Attachment { who: who.into(), netns: "/run/netns/x".into(), alive, problems }
    }

    fn checks(facts: &Facts) -> Vec<(&'static str, Severity)> {
        findings(facts).iter().map(|finding| (finding.check, finding.severity)).collect()
    }

    #[test]
    fn what_is_sound_is_counted() {
        let mut facts = Facts::default();
        assert_eq!(checks(&facts), [("rules", Severity::Fine)]);
        facts.attachments.push(attachment("a", true, Ok(Vec::new())));
        facts.attachments.push(attachment("b", true, Ok(Vec::new())));
        assert!(
            findings(&facts).iter().all(|finding| finding.found.starts_with("all 2 attachments"))
        );
    }

    #[test]
    fn everything_else_has_its_finding() {
        let facts = Facts {
            attachments: vec![
                attachment("a", true, Ok(vec!["no chain".into()])),
                attachment("b", true, Err("no nft".into())),
                attachment("c", false, Ok(Vec::new())),
            ],
            damaged: vec![
                "record 1 is damaged".into(),
                "record 2 … written by a newer portmap".into(),
            ],
            elsewhere: None,
            orphans: vec![Orphan { what: "chain".into(), removal: "iptables".into() }],
            unread: vec![("nftables".into(), "no nft".into())],
            pending: false,
        };
        assert_eq!(
            checks(&facts),
            [
                ("rules", Severity::Broken),
                ("rules", Severity::Warning),
                ("stale", Severity::Warning),
                ("record", Severity::Warning),
                ("record", Severity::Warning),
                ("orphan", Severity::Warning),
                ("orphan", Severity::Warning),
                ("orphan", Severity::Warning),
            ]
        );
        let all = findings(&facts);
        assert!(all.first().is_some_and(
            |first| first.found.contains("a: no chain") && first.fix == "portmap restore"
        ));
        assert!(all.iter().any(|finding| finding.fix == "portmap gc"));
    }

    #[test]
    fn records_that_were_not_read_keep_orphans_from_being_looked_for() {
        let mut facts = Facts::default();
        assert_eq!(facts.doubt(), None);
        facts.damaged.push("record 1 is damaged".into());
        let found = findings(&facts).pop().map(|finding| finding.found).unwrap_or_default();
        assert!(found.ends_with("not looked for: 1 record cannot be read"), "{found}");
        facts.elsewhere = Some(("/etc/cni/net.d/10-pods.conflist".into(), "/run/x".into()));
        let (reason, fix) = facts.doubt().unwrap_or_default();
        assert_eq!(reason, "/etc/cni/net.d/10-pods.conflist keeps records in /run/x");
        assert_eq!(fix, "portmap doctor --state-dir /run/x");
    }
}
