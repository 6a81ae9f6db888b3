//! Programs: loading, pins, and trials on a packet.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_insn, bpf_prog_type};

use super::map::absent;
use super::syscall::{self, Load};

/// Room for the verifier's log, the most that Linux 4.19 takes. The kernel touches what it writes.
const LOG: usize = (u32::MAX >> 8) as usize;
/// How much of the log an error carries. The reason stands at the end.
const LOG_LINES: usize = 20;
/// Offset of `ingress_ifindex` in `struct __sk_buff`, which `ifindex` follows.
const SK_BUFF_INGRESS_IFINDEX: usize = 36;
/// Room for what comes out of a trial, which can be larger than what goes in.
const PACKET: usize = 64 * 1024;

/// Where a program can be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Packets of a device: tcx, or a filter of its clsact qdisc.
    Classifier,
    /// Calls on sockets by the processes of a cgroup.
    Socket(SocketHook),
}

/// Calls on sockets that a program can change addresses of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SocketHook {
    Connect4,
    Connect6,
    Sendmsg4,
    Sendmsg6,
    Recvmsg4,
    Recvmsg6,
    /// Linux 5.8, as the one below.
    Getpeername4,
    Getpeername6,
}

impl SocketHook {
    pub const ALL: [SocketHook; 8] = [
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Getpeername4,
        Self::Getpeername6,
    ];

    pub(super) fn attach_type(self) -> u32 {
        let hook = match self {
            Self::Connect4 => bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
            Self::Connect6 => bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
            Self::Sendmsg4 => bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
            Self::Sendmsg6 => bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
            Self::Recvmsg4 => bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
            Self::Recvmsg6 => bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
            Self::Getpeername4 => bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
            Self::Getpeername6 => bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
        };
        hook as u32
    }
}

impl Hook {
    /// Program type, and the attach type that the verifier has to know.
    fn types(self) -> (u32, u32) {
        match self {
            Hook::Classifier => (bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32, 0),
            Hook::Socket(hook) => {
                (bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32, hook.attach_type())
            }
        }
    }
}

/// The verifier does not accept a program.
#[derive(Debug, thiserror::Error)]
#[error("program {program}: {reason}{log}")]
pub struct Rejected {
    pub program: String,
    pub reason: io::Error,
    /// The end of the verifier's log, each line after a line break. Empty if it said nothing.
    pub log: String,
}

/// What a trial of a classifier came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// What the program returned: `TC_ACT_*`.
    pub verdict: u32,
    /// The frame as the program left it.
    pub packet: Vec<u8>,
    /// Mean duration of a run.
    pub nanoseconds: u32,
}

/// An open program. It lives until nobody has it open or pinned and it is attached nowhere.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    id: u32,
    tag: [u8; 8],
    name: String,
}

impl Program {
    /// Loads a program whose maps are filled in already.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns; with a [`Rejected`] inside where the verifier has said why.
    pub fn load(
        hook: Hook,
        name: &str,
        instructions: &[bpf_insn],
        license: &CStr,
    ) -> io::Result<Self> {
        // Without a log the verifier is faster.
        Self::try_load(hook, name, instructions, license).map_err(|error| {
            match error.raw_os_error() {
                // The verifier has not been reached.
                None => error,
                Some(_) => rejected(&request(hook, name, instructions, license), error),
            }
        })
    }

    /// As [`Program::load`], without asking why it fails.
    pub(super) fn try_load(
        hook: Hook,
        name: &str,
        instructions: &[bpf_insn],
        license: &CStr,
    ) -> io::Result<Self> {
        Self::adopt(syscall::load(&request(hook, name, instructions, license), &mut [])?)
    }

    /// Opens a pinned program; `None` if there is no such name.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns.
    pub fn from_pin(path: &Path) -> io::Result<Option<Self>> {
        absent(syscall::open_pin(path))?.map(Self::adopt).transpose()
    }

    /// Opens a program by its id; `None` if it is gone. Needs `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns.
    pub fn from_id(id: u32) -> io::Result<Option<Self>> {
        absent(syscall::open_id(bpf_cmd::BPF_PROG_GET_FD_BY_ID, id))?.map(Self::adopt).transpose()
    }

    fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let info = syscall::program_info(fd.as_fd(), &mut [])?;
        Ok(Self { fd, id: info.id, tag: info.tag, name: syscall::text(&info.name) })
    }

    /// Gives the program a name in a bpffs; `EEXIST` if that is taken.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns. `EPERM` also for a name with a dot in it.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        syscall::pin(self.fd(), path)
    }

    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The kernel's number for it, unique until the next boot.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The kernel's hash of the instructions, without references to maps: equal for equal programs.
    #[must_use]
    pub fn tag(&self) -> [u8; 8] {
        self.tag
    }

    /// At most 15 bytes.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Ids of the maps that it uses.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns.
    pub fn map_ids(&self) -> io::Result<Vec<u32>> {
        // The kernel allows 64 maps a program (`MAX_USED_MAPS`).
        let mut ids = vec![0; 64];
        let count = syscall::program_info(self.fd(), &mut ids)?.nr_map_ids as usize;
        ids.truncate(count);
        Ok(ids)
    }

    /// Runs a classifier `repeat` times on an Ethernet frame, as if it were at the device with index
    /// `device` of this network namespace, and had come in by the one with index `from` (0: by none).
    /// Nothing is sent.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns: `EINVAL` for a frame of less than 14 bytes, and before Linux 5.9 for
    /// any device but 0, which stands for the loopback device. Linux 5.10 takes no other `from` than 0,
    /// 6.1 does.
    pub fn test_run(
        &self,
        packet: &[u8],
        device: u32,
        from: u32,
        repeat: u32,
    ) -> io::Result<Trial> {
        let mut context = Vec::new();
        if device != 0 {
            context.resize(SK_BUFF_INGRESS_IFINDEX, 0);
            context.extend(from.to_ne_bytes());
            context.extend(device.to_ne_bytes());
        }
        let mut out = vec![0; PACKET];
        let ran = syscall::test_run(self.fd(), packet, &context, repeat, &mut out)?;
        out.truncate(ran.length);
        Ok(Trial { verdict: ran.verdict, packet: out, nanoseconds: ran.nanoseconds })
    }
}

fn request<'a>(
    hook: Hook,
    name: &'a str,
    instructions: &'a [bpf_insn],
    license: &'a CStr,
) -> Load<'a> {
    let (program_type, attach_type) = hook.types();
    Load { program_type, attach_type, instructions, license, name }
}

/// Loads once more, for the log's sake.
fn rejected(load: &Load<'_>, error: io::Error) -> io::Error {
    let mut log = vec![0; LOG];
    drop(syscall::load(load, &mut log));
    let text: Vec<u8> = log.into_iter().take_while(|byte| *byte != 0).collect();
    let kind = error.kind();
    let program = load.name.to_owned();
    let log = end(&String::from_utf8_lossy(&text));
    io::Error::new(kind, Rejected { program, reason: error, log })
}

fn end(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
    let first = lines.len().saturating_sub(LOG_LINES);
    lines[first..].iter().flat_map(|line| ["\n", line]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_carries_the_end_of_the_log() {
        assert_eq!(end(""), "");
        assert_eq!(end("0: (95) exit\nR0 !read_ok\n"), "\n0: (95) exit\nR0 !read_ok");
        let long: String = (0..100).map(|n| format!("line {n}\n\n")).collect();
        let end = end(&long);
        assert_eq!(end.lines().count(), LOG_LINES + 1);
        assert!(end.ends_with("\nline 99") && !end.contains("line 79"));
    }
}
