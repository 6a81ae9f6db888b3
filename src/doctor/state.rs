//! The state directory: whether records can be kept there, and who holds its lock.

use std::path::PathBuf;

use super::{Area, Finding, Told, attachments, count};

/// The directory itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    /// Why calls refuse it, if they do.
    pub refused: Option<String>,
    /// Whether this process could write there.
    pub writable: bool,
    /// What there is none left of, if so.
    pub full: Option<&'static str>,
    /// The file system's type where it is not one in memory.
    pub on_disk: bool,
}

/// What is in it.
#[derive(Debug, Clone)]
pub enum Look {
    Read(attachments::Facts),
    /// It is of an earlier boot, with so many records.
    OtherBoot(usize),
    /// Another process has the lock, and did not give it back in so many seconds.
    Busy {
        holder: Option<String>,
        seconds: u64,
    },
}

#[derive(Debug, Clone)]
pub struct Facts {
    pub dir: PathBuf,
    /// `None` if there is none yet.
    pub directory: Told<Option<Directory>>,
    pub look: Told<Look>,
}

const AREA: Area = Area::State;

#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let dir = facts.dir.display();
    let mut findings = match &facts.directory {
        Err(reason) => vec![AREA.unread("directory", &dir.to_string(), reason)],
        Ok(None) => {
            vec![AREA.fine(
                "directory",
                format!("{dir} does not exist: no pod has had hostPorts since boot"),
            )]
        }
        Ok(Some(directory)) => directory_findings(facts, directory),
    };
    match &facts.look {
        Err(reason) => findings.push(AREA.unread("records", "the records", reason)),
        Ok(Look::Read(attachments)) => {
            if attachments.pending {
                findings.push(AREA.warning(
                    "pending",
                    "a call was killed half-way, or failed, and nothing has come after it",
                    "the kernel may be in any state between before and after it; the next call puts it right",
                    "portmap restore",
                ));
            }
            findings.extend(attachments::findings(attachments));
        }
        Ok(Look::OtherBoot(records)) => findings.push(AREA.warning(
            "boot",
            format!("{dir} is of an earlier boot ({})", count(*records, "record", "records")),
            "what it says is in the kernel went with that boot; the next call discards it",
            "portmap restore",
        )),
        Ok(Look::Busy { holder, seconds }) => findings.push(AREA.warning(
            "lock",
            format!(
                "{} has held the lock for more than {seconds} s, so that the records were not looked at",
                holder.as_deref().unwrap_or("another process")
            ),
            "every ADD and DEL with hostPorts waits for it, and fails after a minute",
            match holder.as_deref().and_then(|holder| holder.split(' ').nth(1)) {
                Some(pid) => format!("ps -o pid,etime,args -p {pid}"),
                None => format!("lsof {dir}/lock"),
            },
        )),
    }
    findings
}

fn directory_findings(facts: &Facts, directory: &Directory) -> Vec<Finding> {
    const CHECK: &str = "directory";
    let dir = facts.dir.display();
    let mut findings = Vec::new();
    if let Some(reason) = &directory.refused {
        findings.push(AREA.broken(
            CHECK,
            reason.clone(),
            "records become rules: calls refuse a directory that others could write to",
            format!("chown root: {dir} && chmod 700 {dir}"),
        ));
    } else if !directory.writable {
        findings.push(AREA.broken(
            CHECK,
            format!("{dir} is not writable for this process"),
            "an ADD with hostPorts fails: its record cannot be kept",
            format!("findmnt -T {dir}"),
        ));
    }
    if let Some(what) = directory.full {
        findings.push(AREA.broken(
            "space",
            format!("the file system of {dir} has no {what} left"),
            "an ADD with hostPorts fails: its record cannot be kept",
            match what {
                "inodes" => format!("df -i {dir}"),
                _ => format!("df -h {dir}"),
            },
        ));
    }
    if directory.on_disk {
        findings.push(AREA.warning(
            "memory",
            format!("{dir} is not on a file system in memory (tmpfs)"),
            "each ADD and DEL waits for the disk",
            "leave stateDir out of the list (portmap check-config shows it), or mount a tmpfs there",
        ));
    }
    if findings.is_empty() {
        findings.push(AREA.fine(CHECK, format!("{dir} is writable, in memory, and has room")));
    }
    findings
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::super::Severity;
    use super::*;

    fn facts(directory: Directory, look: Look) -> Facts {
        Facts { dir: "/run/x".into(), directory: Ok(Some(directory)), look: Ok(look) }
    }

    fn read() -> Look {
        Look::Read(attachments::Facts::default())
    }

    fn writable() -> Directory {
        Directory { writable: true, ..Directory::default() }
    }

    #[track_caller]
    fn found(facts: &Facts, check: &str) -> Finding {
        findings(facts).into_iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_directory_is_sound_absent_or_says_what_is_wrong() {
        assert_eq!(found(&facts(writable(), read()), "directory").severity, Severity::Fine);
        let absent = Facts { directory: Ok(None), ..facts(writable(), read()) };
        assert_eq!(found(&absent, "directory").severity, Severity::Fine);
        let denied = Directory { writable: false, ..writable() };
        assert_eq!(found(&facts(denied, read()), "directory").severity, Severity::Broken);
        let refused = Directory { refused: Some("mode 777".into()), ..writable() };
        assert!(found(&facts(refused, read()), "directory").fix.starts_with("chown root: /run/x"));
        let full = Directory { full: Some("inodes"), ..writable() };
        assert_eq!(found(&facts(full, read()), "space").fix, "df -i /run/x");
        let disk = Directory { on_disk: true, ..writable() };
        assert_eq!(found(&facts(disk, read()), "memory").severity, Severity::Warning);
    }

    #[test]
    fn locks_boots_and_notes() {
        let busy = Look::Busy { holder: Some("process 12 (sleep)".into()), seconds: 3 };
        let lock = found(&facts(writable(), busy), "lock");
        assert!(lock.found.starts_with("process 12 (sleep) has held the lock for more than 3 s"));
        assert_eq!(lock.fix, "ps -o pid,etime,args -p 12");
        assert_eq!(
            found(&facts(writable(), Look::OtherBoot(1)), "boot").severity,
            Severity::Warning
        );
        let pending = attachments::Facts { pending: true, ..attachments::Facts::default() };
        assert_eq!(
            found(&facts(writable(), Look::Read(pending)), "pending").fix,
            "portmap restore"
        );
        let unread = Facts { look: Err("Permission denied".into()), ..facts(writable(), read()) };
        assert_eq!(found(&unread, "records").severity, Severity::Warning);
    }
}
