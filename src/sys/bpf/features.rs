//! What this kernel can do of that which not every kernel can, found out by doing it: distributions
//! carry features back, and leave modules out.

use std::io;

use aya_obj::generated::{
    BPF_ALU64, BPF_CALL, BPF_EXIT, BPF_F_ALLOW_MULTI, BPF_F_REPLACE, BPF_JMP, BPF_MOV, bpf_func_id,
    bpf_insn, bpf_map_type,
};
use serde::{Deserialize, Serialize};

use super::clsact::{Clsact, Slot};
use super::map::{Definition, Map};
use super::program::{Hook, Program, SocketHook};
use super::syscall::{self, Target};
use super::{Direction, cgroup, cookie, object, tcx};
use crate::sys::namespace;

/// Index of the loopback device of every network namespace.
const LOOPBACK: u32 = 1;

/// What the kernel can do. It may be remembered until the next boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Programs on devices by tcx (Linux 6.6).
    pub tcx: bool,
    /// Programs on devices as filters of a clsact qdisc: `sch_ingress` and `cls_bpf` are there.
    pub clsact: bool,
    /// Programs on socket calls see the cookie of the network namespace (5.7).
    pub cookie_helper: bool,
    /// Processes see it (5.14).
    pub cookie_option: bool,
    /// Maps are read, written and emptied in batches (5.6).
    pub batches: bool,
    /// A cgroup's program is replaced in its place (5.6).
    pub cgroup_replace: bool,
    /// Programs on getpeername (5.8).
    pub getpeername: bool,
    /// Why this kernel cannot have programs on socket calls; `None` if it can, as far as can be told.
    /// Whether a process finds the cgroup to attach them to is its own affair, and not said here.
    pub no_socket_hooks: Option<String>,
}

impl Features {
    /// Tries everything, and leaves nothing behind. Takes a few milliseconds.
    ///
    /// # Errors
    ///
    /// If eBPF does not work at all for this process, with the reason.
    pub fn probe() -> io::Result<Self> {
        object::lift_memory_limit();
        let map = Map::create(&Definition {
            name: "pm_probe".into(),
            kind: bpf_map_type::BPF_MAP_TYPE_HASH as u32,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            flags: 0,
        })?;
        let classifier = load(Hook::Classifier, &[set_result(0), exit()])?;
        let socket = |hook, instructions: &[bpf_insn]| load(Hook::Socket(hook), instructions);
        let connect = lasting(socket(SocketHook::Connect4, &[set_result(1), exit()]))?;
        let cookie = [call(bpf_func_id::BPF_FUNC_get_netns_cookie), set_result(1), exit()];
        let peername = socket(SocketHook::Getpeername4, &[set_result(1), exit()]);
        Ok(Self {
            tcx: lasting(tcx::query(LOOPBACK, Direction::Ingress))?.is_ok(),
            clsact: has_clsact(&classifier)?,
            cookie_helper: lasting(socket(SocketHook::Connect4, &cookie))?.is_ok(),
            cookie_option: cookie::own()?.is_some(),
            batches: map.has_batches()?,
            cgroup_replace: connect.as_ref().map_or(Ok(false), replaces)?,
            getpeername: lasting(peername)?.is_ok(),
            no_socket_hooks: match connect {
                Ok(_) => not_at_cgroups()?,
                Err(error) => Some(format!("this kernel has no programs on socket calls: {error}")),
            },
        })
    }
}

/// A result that will be the same the next time. What fails for want of memory and the like says
/// nothing of the kernel, and must not be remembered.
fn lasting<T>(result: io::Result<T>) -> io::Result<io::Result<T>> {
    use libc::{EAGAIN, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM};
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(EAGAIN | EINTR | EMFILE | ENFILE | ENOBUFS | ENOMEM)
            ) =>
        {
            Err(error)
        }
        other => Ok(other),
    }
}

/// Why programs cannot be attached to cgroups.
fn not_at_cgroups() -> io::Result<Option<String>> {
    let Ok(root) = cgroup::root() else {
        return Ok(None);
    };
    // EINVAL without CONFIG_CGROUP_BPF.
    let queried = lasting(root.query(SocketHook::Connect4))?;
    let reason = |error| format!("programs of the root of cgroup v2 cannot be read: {error}");
    Ok(queried.err().map(reason))
}

/// Modules that are missing answer with `ENOENT`. Whatever else fails will be reported when filters
/// are used.
fn has_clsact(program: &Program) -> io::Result<bool> {
    let tried = namespace::in_scratch_netns(|| {
        let mut clsact = Clsact::open()?;
        clsact.ensure(LOOPBACK)?;
        let slot = Slot { priority: 1, handle: 1 };
        clsact.put(LOOPBACK, Direction::Ingress, slot, "pm_probe", program)
    });
    let Ok(tried) = tried else {
        return Ok(true);
    };
    Ok(!lasting(tried)?.is_err_and(|error| error.kind() == io::ErrorKind::NotFound))
}

/// A kernel that does not know the flag refuses it (`EINVAL`) before it looks at the cgroup, of
/// which the descriptor is none (`EBADF`).
fn replaces(program: &Program) -> io::Result<bool> {
    let target = Target { number: u32::MAX, attach_type: SocketHook::Connect4.attach_type() };
    let flags = BPF_F_ALLOW_MULTI | BPF_F_REPLACE;
    let refused = lasting(syscall::attach(target, program.fd(), flags, Some(program.fd()), 0))?;
    Ok(refused.is_err_and(|error| error.raw_os_error() == Some(libc::EBADF)))
}

fn load(hook: Hook, instructions: &[bpf_insn]) -> io::Result<Program> {
    Program::try_load(hook, "pm_probe", instructions, c"GPL")
}

fn instruction(code: u32, value: i32) -> bpf_insn {
    bpf_insn {
        code: code as u8,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off: 0,
        imm: value,
    }
}

fn set_result(value: i32) -> bpf_insn {
    instruction(BPF_ALU64 | BPF_MOV, value)
}

fn exit() -> bpf_insn {
    instruction(BPF_JMP | BPF_EXIT, 0)
}

/// With what the program was called with.
fn call(helper: bpf_func_id) -> bpf_insn {
    instruction(BPF_JMP | BPF_CALL, helper as i32)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn want_of_memory_says_nothing_of_the_kernel() {
        let tried = |number| lasting::<()>(Err(io::Error::from_raw_os_error(number)));
        for passing in [libc::ENOMEM, libc::EMFILE, libc::ENOBUFS, libc::EINTR] {
            assert_eq!(tried(passing).unwrap_err().raw_os_error(), Some(passing));
        }
        for lasting in [libc::EINVAL, libc::EPERM, libc::ENOENT] {
            assert_eq!(tried(lasting).unwrap().unwrap_err().raw_os_error(), Some(lasting));
        }
    }
}
