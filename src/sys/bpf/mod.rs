//! eBPF in the kernel: maps, programs, their names in a bpffs, and where programs are attached.
//!
//! `aya-obj` takes the object file apart; everything else is bpf(2) and rtnetlink. Whatever is made
//! here outlives the process: maps and programs through their pins, attachments because they are
//! made by `BPF_PROG_ATTACH` and by filters, not by links, which would end with the process or,
//! pinned, stay behind when their device is gone.
//!
//! Errors are those of the kernel, as [`std::io::Error`] with its `errno`; [`explained`] tells what a
//! refusal comes from.

pub mod cgroup;
pub mod clsact;
pub mod cookie;
mod element;
pub mod features;
pub mod map;
pub mod object;
pub mod pins;
pub mod program;
mod refusal;
mod syscall;
pub mod tcx;

pub use refusal::explained;
pub use syscall::Attached;

/// Which packets of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Those that come in by the device.
    Ingress,
    /// Those that go out by it.
    Egress,
}

impl Direction {
    pub const ALL: [Direction; 2] = [Self::Ingress, Self::Egress];
}
