//! eBPF programs of a few instructions, as somebody else's.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses a part, and fails by panicking"
)]

use aya_obj::generated::bpf_insn;
use portmap::sys::bpf::program::{Hook, Program, SocketHook};

/// An instruction: code, destination and source register, offset, immediate value.
pub fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> bpf_insn {
    bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off: offset,
        imm: value,
    }
}

/// `return value`.
pub fn returning(value: i32) -> [bpf_insn; 2] {
    [instruction(0xb7, 0, 0, 0, value), instruction(0x95, 0, 0, 0, 0)]
}

/// A program for packets that always returns the same.
pub fn classifier(name: &str, verdict: i32) -> Program {
    Program::load(Hook::Classifier, name, &returning(verdict), c"GPL").unwrap()
}

/// A program for a call on sockets that lets it pass.
pub fn socket_program(name: &str, hook: SocketHook) -> Program {
    Program::load(Hook::Socket(hook), name, &returning(1), c"GPL").unwrap()
}
