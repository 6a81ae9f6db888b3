//! Whether the backend works on this node, and whether it should be chosen without being asked for.

use std::collections::{BTreeMap, BTreeSet};

use super::filters::Filters;
use super::loaded::{Found, Loaded, OWN};
use crate::backend::Unusable;
use crate::error::{Error, Result};
use crate::sys::Host;
use crate::sys::bpf::map::{Definition, Map};
use crate::sys::bpf::object::{self, Object};
use crate::sys::bpf::pins::Pins;
use crate::sys::bpf::program::{Program, SocketHook};
use crate::sys::bpf::{Direction, cgroup, require_capabilities};
use crate::sys::namespace::in_scratch_netns;
use crate::sys::netlink::rule;

/// The largest program: a kernel whose verifier takes it takes the others.
const SAMPLE: &str = "pm_pod_in";
/// Entries of the trial's maps. Big ones take time to make.
const ENTRIES: u32 = 64;
const LOOPBACK: u32 = 1;
/// The mark by which the AWS VPC CNI sends answers of connections back through the interface that
/// they came by, with its mask (aws-vpc-cni, `AWS_VPC_K8S_CNI_CONNMARK`).
const AWS_MARK: (u32, u32) = (0x80, 0x80);

/// Finds out whether there is what an ADD needs from its beginning. Changes nothing.
pub fn prepare(host: &Host) -> Result<()> {
    let failed = |error| Error::io("use eBPF", error);
    require_capabilities().map_err(failed)?;
    if !super::has_maps(host)? {
        Pins::open().and_then(|pins| pins.try_out()).map_err(failed)?;
    }
    Ok(())
}

/// Loads a program, and attaches it to the loopback device of a network namespace of its own. That
/// programs have been loaded before says nothing of what this process may do.
pub fn probe(host: &Host) -> Result<(), Unusable> {
    let broken = |error: Error| match error.details() {
        details if details.is_empty() => Unusable::Broken(error.to_string()),
        details => Unusable::Broken(format!("{error}: {details}")),
    };
    let kernel = host.kernel().map_err(broken)?;
    prepare(host).map_err(broken)?;
    if let Found::Loaded(loaded) =
        Loaded::open(&OWN, kernel.batches, &host.programs()).map_err(broken)?
        && !loaded.loaded(&BTreeSet::from([SAMPLE])).map_err(broken)?.is_empty()
    {
        let attach = || loaded.with_program(SAMPLE, |program| Ok(try_to_attach(program)));
        return attach().map_err(broken)?.map_err(Unusable::Broken);
    }
    try_out().map_err(Unusable::Broken)
}

fn try_out() -> Result<(), String> {
    let (_maps, programs) = load_apart(SAMPLE)?;
    try_to_attach(programs.first().ok_or("no program was loaded")?)
}

/// Loads a program with maps of its own, which are small and have no names.
pub fn load_apart(name: &str) -> Result<(BTreeMap<String, Map>, Vec<Program>), String> {
    let object = Object::parse(OWN.object).map_err(|error| format!("the eBPF object: {error}"))?;
    let make = |(name, definition): (String, Definition)| {
        let max_entries = definition.max_entries.min(ENTRIES);
        let map = Map::create(&Definition { max_entries, ..definition })
            .map_err(|error| format!("making map {name}: {error}"))?;
        Ok((name, map))
    };
    let maps = object.maps().into_iter().map(make).collect::<Result<BTreeMap<_, _>, String>>()?;
    let load = || object::load(&object.link(&maps, &[name])?);
    let programs = load().map_err(|error| format!("loading program {name}: {error}"))?;
    Ok((maps, programs))
}

fn try_to_attach(program: &Program) -> Result<(), String> {
    let attach = || Filters::open()?.attach(LOOPBACK, Direction::Ingress, program);
    in_scratch_netns(attach)?
        .map_err(|error| format!("attaching a program to a device (clsact, cls_bpf): {error}"))
}

/// What else on the node would be bypassed.
pub fn objection(host: &Host) -> Option<String> {
    const FORCE: &str = "set \"backend\": \"ebpf\" to use it all the same";
    if host.has_cilium() && cilium_balances().unwrap_or_default() {
        return Some(format!(
            "Cilium replaces kube-proxy here and forwards hostPorts itself; {FORCE}"
        ));
    }
    // Where rules cannot be read there is nothing to bypass.
    if rule::marks().is_ok_and(|marks| marks.contains(&AWS_MARK)) {
        return Some(format!(
            "the AWS VPC CNI marks connections in netfilter by the node's address, which packets to hostPorts no longer have there: answers of pods on secondary interfaces would leave by another one; {FORCE}"
        ));
    }
    None
}

/// Whether Cilium's programs translate the destinations of sockets: they do if it replaces kube-proxy,
/// and then it has hostPorts of its own.
///
/// # Errors
///
/// Why the programs of the root cgroup cannot be listed.
pub fn cilium_balances() -> std::io::Result<bool> {
    let programs = cgroup::root()?.effective(SocketHook::Connect4)?;
    Ok(programs.into_iter().any(|id| {
        Program::from_id(id).is_ok_and(|program| {
            program.is_some_and(|program| program.name().starts_with("cil_sock"))
        })
    }))
}
