//! Who has the lock of the state directory.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Who has the lock: `process 12 (portmap)`, or `process 13 (nft)` where a call was killed and the tool
/// that it had started goes on. `None` if /proc does not tell.
pub(super) fn holder(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let inode = meta.ino().to_string();
    let lines = locks.lines().filter_map(Line::parse).filter(|line| line.inode == inode);
    let (waiting, taken): (Vec<Line>, Vec<Line>) = lines.partition(|line| line.waits);
    let openers = openers(&meta);
    let is_taker = |pid: &&u32| taken.iter().any(|line| line.pid == **pid);
    let has_inherited =
        |pid: &&u32| **pid != std::process::id() && !waiting.iter().any(|line| line.pid == **pid);
    // The kernel goes on naming who has taken the lock when that process is gone.
    let pid = openers.iter().find(is_taker).or_else(|| openers.iter().find(has_inherited))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim()))
}

/// Processes that have the file open.
fn openers(file: &fs::Metadata) -> Vec<u32> {
    let is_file = |entry: fs::DirEntry| {
        fs::metadata(entry.path())
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (file.dev(), file.ino()))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            open.into_iter().any(is_file)
        })
        .collect()
}

/// A line of proc_locks(5) about an flock(2).
#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    /// It is not locked by this process yet.
    waits: bool,
    pid: u32,
    inode: &'a str,
}

impl<'a> Line<'a> {
    /// `1: FLOCK  ADVISORY  WRITE 708 00:13:8342 0 EOF`: number, kind, mode, access, process, file, range.
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(1).peekable();
        let waits = words.next_if(|word| *word == "->").is_some();
        let kind = words.next()?;
        let pid = words.nth(2)?.parse().ok()?;
        let (_, inode) = words.next()?.rsplit_once(':')?;
        (kind == "FLOCK").then_some(Line { waits, pid, inode })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn locks_of_other_kinds_are_not_meant() {
        let line = "1: FLOCK  ADVISORY  WRITE 708 00:13:8342 0 EOF";
        let expected = Line { waits: false, pid: 708, inode: "8342" };
        assert_eq!(Line::parse(line), Some(expected));
        assert_eq!(Line::parse("2: POSIX  ADVISORY  READ 5 fd:00:8342 0 EOF"), None);
        let line = "1: -> FLOCK  ADVISORY  WRITE 9 00:13:8342 0 EOF";
        assert_eq!(Line::parse(line), Some(Line { waits: true, pid: 9, inode: "8342" }));
        for line in ["", "1:", "1: ->", "1: FLOCK", "1: FLOCK ADVISORY WRITE x 0:0:1 0 EOF"] {
            assert_eq!(Line::parse(line), None, "{line}");
        }
    }

    /// Who has taken the lock is gone, and what it has started has inherited it.
    #[test]
    fn a_lock_that_has_outlived_its_taker_is_found() {
        let path = std::env::temp_dir().join(format!("portmap-holder-{}", std::process::id()));
        let script = format!("exec 9>{}; flock 9; sleep 60 & echo $!", path.display());
        // The output has no end while anybody has it.
        let mut shell =
            Command::new("sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        assert!(shell.wait().unwrap().success());
        let mut pid = [0; 16];
        let length = shell.stdout.take().unwrap().read(&mut pid).unwrap();
        let pid = String::from_utf8_lossy(&pid[..length]).trim().to_owned();
        let found = holder(&path);
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        fs::remove_file(&path).unwrap();
        assert_eq!(found, Some(format!("process {pid} (sleep)")));
    }
}
