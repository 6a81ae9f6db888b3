//! eBPF in the kernel: maps, programs, their names in a bpffs, and where programs are attached.
//!
//! `aya-obj` takes the object file apart; everything else is bpf(2) and rtnetlink. Whatever is made
//! here outlives the process: maps and programs through their pins, attachments because they are
//! made by `BPF_PROG_ATTACH` and by filters, not by links, which would end with the process or,
//! pinned, stay behind when their device is gone.
//!
//! Errors are those of the kernel, as [`std::io::Error`] with its `errno`.

mod element;
pub mod map;
pub mod object;
pub mod pins;
pub mod program;
mod syscall;
pub mod tcx;

pub use syscall::Attached;
