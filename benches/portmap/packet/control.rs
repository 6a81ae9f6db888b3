//! Programs that do nothing, as filters of the devices that the measured ones are at. Beside these, what they
//! are counted with in real traffic is what counting takes there; alone, they show what calling any takes.

use std::collections::BTreeMap;

use aya_obj::generated::{BPF_ALU64, BPF_EXIT, BPF_JMP, BPF_K, BPF_MOV, bpf_insn};
use nix::net::if_::if_nametoindex;
use portmap::sys::bpf::Direction;
use portmap::sys::bpf::clsact::{Clsact, Slot};
use portmap::sys::bpf::program::{Hook, Program};

use crate::Res;

/// Behind the measured program, where there is one, whose filter has the first priority or is before all filters (tcx):
/// the packet is in the caches then, as it would not be for the first program.
const SLOT: Slot = Slot { priority: 60_000, handle: 1 };

/// Names, and where they are.
const CONTROLS: [(&str, Direction, &[&str]); 3] = [
    ("empty_uplink_in", Direction::Ingress, &["uplink"]),
    ("empty_pod_in", Direction::Ingress, &["pod-a", "pod-b"]),
    ("empty_out", Direction::Egress, &["uplink", "pod-a", "pod-b"]),
];

/// Attaches them. To be called on the node.
pub fn attach() -> Res<BTreeMap<String, Program>> {
    let mut clsact = Clsact::open()?;
    let mut programs = BTreeMap::new();
    for (name, direction, devices) in CONTROLS {
        let program = Program::load(Hook::Classifier, name, &pass(), c"GPL")
            .map_err(|error| format!("loading {name}: {error}"))?;
        for device in devices {
            let index = if_nametoindex(*device)?;
            clsact.ensure(index)?;
            clsact
                .put(index, direction, SLOT, name, &program)
                .map_err(|error| format!("attaching {name} to {device}: {error}"))?;
        }
        programs.insert(name.to_owned(), program);
    }
    Ok(programs)
}

/// `return TC_ACT_UNSPEC`
fn pass() -> [bpf_insn; 2] {
    let instruction = |code: u32, imm| bpf_insn {
        code: code as u8,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off: 0,
        imm,
    };
    [instruction(BPF_ALU64 | BPF_MOV | BPF_K, -1), instruction(BPF_JMP | BPF_EXIT, 0)]
}
