//! bpf(2) on programs, pins and attachments; on maps in `element.rs`.
//!
//! `bpf_attr` is a union with one struct per command. bindgen numbers those that have no name in
//! linux/bpf.h, so each function says which one it fills. The rest of the union stays zero: kernels
//! refuse set bytes that they do not know, and take zeros (`bpf_check_uarg_tail_zero`), so the size
//! of the newest `bpf_attr` is right for all.
#![allow(unsafe_code, reason = "bpf(2) reads and writes memory through addresses in bpf_attr")]

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_insn, bpf_map_info, bpf_prog_info};

use super::refusal::explained;

/// asm-generic/socket.h
const SO_NETNS_COOKIE: libc::c_int = 71;

/// How often a load that a signal interrupted (`EAGAIN`) is begun again.
const LOAD_ATTEMPTS: usize = 5;

/// bpf(2). Returns a descriptor or 0.
///
/// # Safety
///
/// Every address in `attr` that `command` uses is 0 or points to memory that is large enough, and
/// writable where the kernel writes.
pub(super) unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` is as large as said; its addresses are the caller's word.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as u32,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    match i32::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(explained(io::Error::last_os_error())),
    }
}

/// As [`bpf`], for commands that return a descriptor. The kernel sets `O_CLOEXEC` on all of them.
///
/// # Safety
///
/// As [`bpf`]; `command` returns a descriptor.
pub(super) unsafe fn bpf_fd(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: the caller's word; a new descriptor belongs to nobody else.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attr)?)) }
}

pub(super) fn empty() -> bpf_attr {
    // SAFETY: integers and arrays of integers throughout.
    unsafe { zeroed() }
}

pub(super) fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as u64
}

pub(super) fn address_mut<T>(slice: &mut [T]) -> u64 {
    slice.as_mut_ptr() as u64
}

pub(super) fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Names in the kernel are 15 bytes and a NUL; longer ones are cut.
pub(super) fn kernel_name(name: &str) -> [c_char; 16] {
    let mut field = [0; 16];
    for (to, from) in field.iter_mut().take(15).zip(name.bytes()) {
        *to = from as c_char;
    }
    field
}

pub(super) fn text(field: &[c_char; 16]) -> String {
    let bytes: Vec<u8> = field.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Gives a map or program a name in a bpffs. Atomic: the name exists whole or not at all.
pub(super) fn pin(fd: BorrowedFd<'_>, to: &Path) -> io::Result<()> {
    let to = path(to)?;
    let mut attr = empty();
    // BPF_OBJ_*: __bindgen_anon_4.
    attr.__bindgen_anon_4.pathname = to.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = number(fd);
    // SAFETY: `to` is terminated and outlives the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens what a name in a bpffs stands for.
pub(super) fn open_pin(from: &Path) -> io::Result<OwnedFd> {
    let from = path(from)?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = from.as_ptr() as u64;
    // SAFETY: `from` is terminated and outlives the call.
    unsafe { bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr) }
}

/// Opens a map or program by its id, which needs `CAP_SYS_ADMIN`.
pub(super) fn open_id(command: bpf_cmd, id: u32) -> io::Result<OwnedFd> {
    let mut attr = empty();
    // BPF_*_GET_*_ID: __bindgen_anon_6.
    attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
    // SAFETY: no addresses.
    unsafe { bpf_fd(command, &mut attr) }
}

/// # Safety
///
/// `T` is an info struct of linux/bpf.h, with its addresses as in [`bpf`].
unsafe fn info<T>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = empty();
    attr.info.bpf_fd = number(fd);
    attr.info.info_len = size_of::<T>() as u32;
    attr.info.info = std::ptr::from_mut(info) as u64;
    // SAFETY: the kernel writes at most `info_len` bytes.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.map(drop)
}

/// What the kernel says of a map.
pub(super) fn map_info(fd: BorrowedFd<'_>) -> io::Result<bpf_map_info> {
    // SAFETY: integers and arrays of integers throughout.
    let mut found: bpf_map_info = unsafe { zeroed() };
    // SAFETY: no addresses.
    unsafe { info(fd, &mut found)? };
    Ok(found)
}

/// What the kernel says of a program, and the ids of its maps as far as there is room.
pub(super) fn program_info(fd: BorrowedFd<'_>, map_ids: &mut [u32]) -> io::Result<bpf_prog_info> {
    // SAFETY: integers and arrays of integers throughout.
    let mut found: bpf_prog_info = unsafe { zeroed() };
    found.nr_map_ids = map_ids.len() as u32;
    found.map_ids = address_mut(map_ids);
    // SAFETY: `map_ids` has room for `nr_map_ids`; all other addresses are 0, with lengths of 0.
    unsafe { info(fd, &mut found)? };
    Ok(found)
}

/// What the verifier is given.
pub(super) struct Load<'a> {
    pub program_type: u32,
    pub attach_type: u32,
    pub instructions: &'a [bpf_insn],
    pub license: &'a CStr,
    pub name: &'a str,
}

/// Loads a program. The verifier writes its log into `log`, with a NUL at the end, and takes longer
/// if there is any; a log that is too small makes it fail with `ENOSPC`.
pub(super) fn load(load: &Load<'_>, log: &mut [u8]) -> io::Result<OwnedFd> {
    let mut attr = empty();
    // BPF_PROG_LOAD: __bindgen_anon_3.
    attr.__bindgen_anon_3.prog_type = load.program_type;
    attr.__bindgen_anon_3.expected_attach_type = load.attach_type;
    attr.__bindgen_anon_3.insn_cnt = load.instructions.len() as u32;
    attr.__bindgen_anon_3.insns = address(load.instructions);
    attr.__bindgen_anon_3.license = load.license.as_ptr() as u64;
    attr.__bindgen_anon_3.prog_name = kernel_name(load.name);
    if !log.is_empty() {
        attr.__bindgen_anon_3.log_level = 1;
        attr.__bindgen_anon_3.log_size = log.len() as u32;
        attr.__bindgen_anon_3.log_buf = address_mut(log);
    }
    let mut attempts = 1..;
    loop {
        // SAFETY: instructions, license and log are as long as said.
        match unsafe { bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr) } {
            Err(error)
                if error.raw_os_error() == Some(libc::EAGAIN)
                    && attempts.next() < Some(LOAD_ATTEMPTS) => {}
            result => return result,
        }
    }
}

/// What [`test_run`] was told.
pub(super) struct Ran {
    pub verdict: u32,
    pub length: usize,
    pub nanoseconds: u32,
}

/// Runs a program `repeat` times on `packet`, and returns what came out of the last run, of which
/// `out` gets as much as fits. `context`: a struct of the program's own type, or empty.
pub(super) fn test_run(
    fd: BorrowedFd<'_>,
    packet: &[u8],
    context: &[u8],
    repeat: u32,
    out: &mut [u8],
) -> io::Result<Ran> {
    let mut attr = empty();
    attr.test.prog_fd = number(fd);
    attr.test.data_in = address(packet);
    attr.test.data_size_in = packet.len() as u32;
    attr.test.data_out = address_mut(out);
    attr.test.data_size_out = out.len() as u32;
    attr.test.repeat = repeat;
    if !context.is_empty() {
        attr.test.ctx_in = address(context);
        attr.test.ctx_size_in = context.len() as u32;
    }
    // SAFETY: all three are as long as said.
    unsafe {
        bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
        Ok(Ran {
            verdict: attr.test.retval,
            length: attr.test.data_size_out as usize,
            nanoseconds: attr.test.duration,
        })
    }
}

/// A place that programs are attached to: a device's index or a cgroup's descriptor, and which of
/// its hooks (`bpf_attach_type`).
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub number: u32,
    pub attach_type: u32,
}

/// What is attached to a place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attached {
    /// Ids of the programs, in the order in which they run.
    pub programs: Vec<u32>,
    /// `BPF_F_ALLOW_MULTI` and others, of a cgroup. On Linux 6.1 and later 0 for effective ones.
    pub flags: u32,
    /// Changes with every change, of tcx.
    pub revision: u64,
}

/// Attaches a program. `replace` is the one whose place it takes, with `BPF_F_REPLACE` in `flags`;
/// `revision` makes tcx refuse (`ESTALE`) if anything has changed meanwhile, and 0 does not.
pub(super) fn attach(
    target: Target,
    program: BorrowedFd<'_>,
    flags: u32,
    replace: Option<BorrowedFd<'_>>,
    revision: u64,
) -> io::Result<()> {
    let mut attr = empty();
    // BPF_PROG_ATTACH and BPF_PROG_DETACH: __bindgen_anon_5.
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = target.number;
    attr.__bindgen_anon_5.attach_type = target.attach_type;
    attr.__bindgen_anon_5.attach_bpf_fd = number(program);
    attr.__bindgen_anon_5.attach_flags = flags;
    attr.__bindgen_anon_5.replace_bpf_fd = replace.map_or(0, number);
    attr.__bindgen_anon_5.expected_revision = revision;
    // SAFETY: no addresses.
    unsafe { bpf(bpf_cmd::BPF_PROG_ATTACH, &mut attr) }.map(drop)
}

/// Detaches a program. Kernels before 6.6 refuse this command if flags are set.
pub(super) fn detach(target: Target, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty();
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = target.number;
    attr.__bindgen_anon_5.attach_type = target.attach_type;
    attr.__bindgen_anon_5.attach_bpf_fd = number(program);
    // SAFETY: no addresses.
    unsafe { bpf(bpf_cmd::BPF_PROG_DETACH, &mut attr) }.map(drop)
}

/// Asks what is attached. `flags`: 0 or `BPF_F_QUERY_EFFECTIVE`.
pub(super) fn query(target: Target, flags: u32) -> io::Result<Attached> {
    let mut ids = vec![0_u32; 16];
    loop {
        let mut attr = empty();
        attr.query.__bindgen_anon_1.target_fd = target.number;
        attr.query.attach_type = target.attach_type;
        attr.query.query_flags = flags;
        attr.query.prog_ids = address_mut(&mut ids);
        attr.query.__bindgen_anon_2.prog_cnt = ids.len() as u32;
        // SAFETY: `ids` has room for as many as said.
        let result = unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) };
        // SAFETY: both are integers, whether the kernel wrote them or not.
        let (count, attach_flags, revision) = unsafe {
            (
                attr.query.__bindgen_anon_2.prog_cnt as usize,
                attr.query.attach_flags,
                attr.query.revision,
            )
        };
        match result {
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && count > ids.len() => {
                ids.resize(count, 0);
            }
            Err(error) => return Err(error),
            Ok(_) => {
                ids.truncate(count);
                return Ok(Attached { programs: ids, flags: attach_flags, revision });
            }
        }
    }
}

/// `SO_NETNS_COOKIE` (Linux 5.14): `ENOPROTOOPT` before.
pub(super) fn netns_cookie(socket: &impl AsFd) -> io::Result<u64> {
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
