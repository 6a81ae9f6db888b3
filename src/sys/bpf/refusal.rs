//! Why the kernel does not let this process use eBPF.
//!
//! `EPERM` has many causes, and the kernel names none. Whoever has to set a node up is told which
//! of them hold.

use std::fs;
use std::io::{self, Read};

use nix::sys::resource::{Resource, getrlimit};

// Bits of CapEff in proc_pid_status(5).
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;
/// A limit under which not all maps fit.
const MEMORY: u64 = 64 << 20;

/// The error with what explains it behind it, if it is one of those that need it; it has no number
/// then.
pub(super) fn explained(error: io::Error) -> io::Error {
    let reason = match error.raw_os_error() {
        Some(libc::ENOSYS) => {
            "this kernel has no bpf(2) (CONFIG_BPF_SYSCALL), or a seccomp filter hides it".into()
        }
        Some(libc::EPERM) => Causes::read().describe(),
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}: {reason}"))
}

/// Fails if this process lacks a capability that some step on the way will need: better before the
/// first one than half-way.
///
/// # Errors
///
/// `PermissionDenied`, with what is missing.
pub fn require_capabilities() -> io::Result<()> {
    let causes = Causes { effective: effective(), ..Causes::default() };
    let missing = [CAP_NET_ADMIN, CAP_SYS_ADMIN].into_iter().any(|number| !causes.has(number));
    match missing {
        true => Err(io::Error::new(io::ErrorKind::PermissionDenied, Causes::read().describe())),
        false => Ok(()),
    }
}

/// The thread's effective capabilities, as [`Causes::effective`].
fn effective() -> u64 {
    rustix::thread::capabilities(None).map_or(u64::MAX, |sets| sets.effective.bits())
}

/// A file of /proc or of securityfs; nothing if it cannot be read.
fn text(path: &str) -> String {
    // Such files have no size, and would be read in small pieces.
    let mut text = String::with_capacity(4096);
    let read = fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text));
    read.map_or_else(|_| String::new(), |_| text)
}

/// What is known of this process and the kernel that can be a cause.
#[derive(Debug, Clone, Default)]
struct Causes {
    /// Bits of the thread's effective capabilities; all where the kernel does not tell.
    effective: u64,
    /// The highest capability that the kernel knows.
    last_capability: u32,
    in_user_namespace: bool,
    /// "integrity" or "confidentiality".
    lockdown: Option<String>,
    /// In bytes, if it is small.
    memory_limit: Option<u64>,
}

impl Causes {
    fn read() -> Self {
        let limit = getrlimit(Resource::RLIMIT_MEMLOCK).ok().map(|(soft, _)| soft);
        Self {
            effective: effective(),
            last_capability: text("/proc/sys/kernel/cap_last_cap")
                .trim()
                .parse()
                .unwrap_or_default(),
            in_user_namespace: is_mapped(&text("/proc/self/uid_map")),
            lockdown: lockdown_mode(&text("/sys/kernel/security/lockdown")),
            memory_limit: limit.filter(|limit| *limit < MEMORY && counts_locked_memory()),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.effective >> capability & 1 == 1
    }

    fn describe(&self) -> String {
        let has = |capability| self.has(capability);
        let mut reasons = Vec::new();
        if !has(CAP_NET_ADMIN) {
            reasons.push("this process lacks CAP_NET_ADMIN".to_owned());
        }
        if !has(CAP_SYS_ADMIN) {
            reasons.push(match has(CAP_BPF) {
                // Enough for most, but neither for mounting nor for opening by id.
                true => "this process lacks CAP_SYS_ADMIN".to_owned(),
                false if self.last_capability < CAP_BPF => {
                    "this process lacks CAP_SYS_ADMIN".to_owned()
                }
                false => "this process lacks CAP_BPF, or CAP_SYS_ADMIN".to_owned(),
            });
        }
        if self.in_user_namespace {
            reasons.push("it is in a user namespace, and eBPF is for the first one".to_owned());
        }
        if let Some(mode) = &self.lockdown {
            reasons.push(format!("the kernel is locked down ({mode})"));
        }
        match self.memory_limit {
            _ if !reasons.is_empty() => reasons.join("; "),
            Some(limit) => format!(
                "RLIMIT_MEMLOCK, against which maps count before Linux 5.11, is {limit} bytes"
            ),
            None => "a security module or a seccomp filter may forbid it".to_owned(),
        }
    }
}

/// Whether maps and programs count against `RLIMIT_MEMLOCK`.
fn counts_locked_memory() -> bool {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_owned());
    let release = release.unwrap_or_default();
    let release = release.to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < (5, 11)
}

/// `text`: user_namespaces(7), uid_map; the first namespace maps everything to itself.
fn is_mapped(text: &str) -> bool {
    !text.is_empty() && text.split_whitespace().ne(["0", "0", "4294967295"])
}

/// `text`: the chosen mode is in brackets, `none [integrity] confidentiality`.
fn lockdown_mode(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    (mode != "none").then(|| mode.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(effective: u64, last_capability: u32) -> String {
        Causes { effective, last_capability, ..Causes::default() }.describe()
    }

    #[test]
    fn capabilities_are_named_as_the_kernel_has_them() {
        let (net, sys, bpf) = (1 << CAP_NET_ADMIN, 1 << CAP_SYS_ADMIN, 1 << CAP_BPF);
        assert_eq!(text(net, 40), "this process lacks CAP_BPF, or CAP_SYS_ADMIN");
        assert_eq!(text(net, 37), "this process lacks CAP_SYS_ADMIN");
        assert_eq!(text(net | bpf, 40), "this process lacks CAP_SYS_ADMIN");
        assert_eq!(text(sys, 40), "this process lacks CAP_NET_ADMIN");
        assert_eq!(
            text(0, 40),
            "this process lacks CAP_NET_ADMIN; this process lacks CAP_BPF, or CAP_SYS_ADMIN"
        );
        assert_eq!(text(net | sys, 40), "a security module or a seccomp filter may forbid it");
    }

    #[test]
    fn other_causes() {
        let all = Causes { effective: u64::MAX, ..Causes::default() };
        let limited = Causes { memory_limit: Some(65536), ..all.clone() };
        let expected = "RLIMIT_MEMLOCK, against which maps count before Linux 5.11, is 65536 bytes";
        assert_eq!(limited.describe(), expected);
        let locked = Causes { lockdown: Some("integrity".into()), ..all.clone() };
        assert_eq!(locked.describe(), "the kernel is locked down (integrity)");
        let inside = Causes { in_user_namespace: true, ..all };
        assert_eq!(inside.describe(), "it is in a user namespace, and eBPF is for the first one");
    }

    #[test]
    fn what_the_files_say() {
        assert_eq!(lockdown_mode("none [integrity] confidentiality\n"), Some("integrity".into()));
        assert_eq!(lockdown_mode("[none] integrity confidentiality\n"), None);
        assert_eq!(lockdown_mode(""), None);
        assert!(!is_mapped("         0          0 4294967295\n"));
        assert!(is_mapped("         0       1000          1\n"));
        assert!(!is_mapped(""));
    }

    #[test]
    fn only_refusals_are_explained() {
        // EACCES is the verifier's.
        for number in [libc::E2BIG, libc::EACCES] {
            let other = explained(io::Error::from_raw_os_error(number));
            assert_eq!(other.raw_os_error(), Some(number));
        }
        let missing = explained(io::Error::from_raw_os_error(libc::ENOSYS));
        assert!(missing.to_string().contains("no bpf(2)"), "{missing}");
    }
}
