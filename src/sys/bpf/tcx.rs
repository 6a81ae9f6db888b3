//! Programs on a device's packets by tcx (Linux 6.6), where they run before the filters of the
//! device's qdiscs. They are gone with the device.

use std::io;

use aya_obj::generated::{BPF_F_BEFORE, BPF_F_REPLACE, bpf_attach_type};

use super::Direction;
use super::program::Program;
use super::syscall::{self, Attached, Target};

fn target(device: u32, direction: Direction) -> Target {
    let hook = match direction {
        Direction::Ingress => bpf_attach_type::BPF_TCX_INGRESS,
        Direction::Egress => bpf_attach_type::BPF_TCX_EGRESS,
    };
    Target { number: device, attach_type: hook as u32 }
}

/// What is attached to the device with index `device`, in the order in which it runs.
///
/// # Errors
///
/// What bpf(2) returns: `EINVAL` from a kernel without tcx, `ENODEV`. So do all below.
pub fn query(device: u32, direction: Direction) -> io::Result<Attached> {
    syscall::query(target(device, direction), 0)
}

/// Attaches a program before all others. The kernel waits for a grace period of RCU, some 15 ms;
/// replacing does not.
pub fn attach_first(device: u32, direction: Direction, program: &Program) -> io::Result<()> {
    syscall::attach(target(device, direction), program.fd(), BPF_F_BEFORE, None, 0)
}

/// Puts `new` in the place of `old`; no packet is without one of the two. `ENOENT` if `old` is not
/// attached, and `ESTALE` if anything has changed since the query that returned `revision`; 0 does
/// not care.
pub fn replace(
    device: u32,
    direction: Direction,
    old: &Program,
    new: &Program,
    revision: u64,
) -> io::Result<()> {
    let target = target(device, direction);
    syscall::attach(target, new.fd(), BPF_F_REPLACE, Some(old.fd()), revision)
}

/// Detaches a program; says whether it was attached.
pub fn detach(device: u32, direction: Direction, program: &Program) -> io::Result<bool> {
    let detached = syscall::detach(target(device, direction), program.fd());
    Ok(super::map::absent(detached)?.is_some())
}
