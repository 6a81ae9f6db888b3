//! A mount of cgroup v2 that nobody else sees and that no mount point is needed for.
#![allow(unsafe_code, reason = "fsopen(2), fsconfig(2) and fsmount(2) are in no crate")]

use std::ffi::c_long;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null;

// linux/mount.h
const FSOPEN_CLOEXEC: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSMOUNT_CLOEXEC: u32 = 1;

/// Opens the root of cgroup v2, as far as the cgroup namespace of this thread shows it. It is
/// unmounted when the descriptor is closed.
///
/// # Errors
///
/// What the three return: `ENOSYS` before Linux 5.2, `ENODEV` from a kernel without cgroup v2,
/// `EPERM` without `CAP_SYS_ADMIN`.
pub(super) fn mount() -> io::Result<OwnedFd> {
    // SAFETY: the name is terminated; the others have no addresses.
    unsafe {
        let context =
            descriptor(libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), FSOPEN_CLOEXEC))?;
        let fd = context.as_raw_fd();
        let (none, zero) = (null::<u8>(), 0_i32);
        let made = libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, none, none, zero);
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        descriptor(libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, 0_u32))
    }
}

/// # Safety
///
/// `result` comes from a system call that returns a new descriptor.
unsafe fn descriptor(result: c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: it belongs to nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
