//! Which processes have sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;

/// A process, as /proc shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub pid: u32,
    /// Name of the program, at most 15 bytes.
    pub name: String,
}

/// Who has a socket of these inodes open. Processes of others, which only root can look into, are
/// left out, as are those that end meanwhile.
///
/// # Errors
///
/// What reading /proc returns.
pub fn owners(inodes: &BTreeSet<u32>) -> io::Result<BTreeMap<u32, BTreeSet<Process>>> {
    let mut owners: BTreeMap<u32, BTreeSet<Process>> = BTreeMap::new();
    if inodes.is_empty() {
        return Ok(owners);
    }
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for file in files.flatten() {
            let inode = fs::read_link(file.path()).ok().and_then(|target| {
                let number = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
                number.parse::<u32>().ok()
            });
            if let Some(inode) = inode.filter(|inode| inodes.contains(inode)) {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                let process = Process { pid, name: name.trim_end().to_owned() };
                owners.entry(inode).or_default().insert(process);
            }
        }
    }
    Ok(owners)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_socket_of_this_process_is_this_process_s() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let text = link.to_str().unwrap();
        let inode: u32 = text.trim_start_matches("socket:[").trim_end_matches(']').parse().unwrap();
        let pids = |inode| -> Vec<u32> {
            let found = owners(&BTreeSet::from([inode])).unwrap();
            found.values().flatten().map(|process| process.pid).collect()
        };
        assert_eq!(pids(inode), [std::process::id()]);
        drop(socket);
        assert_eq!(pids(inode), Vec::<u32>::new());
    }
}
