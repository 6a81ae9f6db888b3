//! What an eBPF node's maps say, taken apart.

use std::collections::{BTreeMap, BTreeSet};

use portmap::backend::ebpf::layout::{ClaimKey, ClaimValue, FlowValue, port_bit};
use portmap::backend::ebpf::loaded::{Flows, Found, Loaded, Maps, OWN};
use portmap::backend::ebpf::objects::Claims;
use portmap::demo::netns::Netns;
use portmap::sys::bpf::cgroup;
use portmap::sys::bpf::numbers::Numbers;
use portmap::sys::bpf::pins::Pins;
use portmap::sys::bpf::program::{Program, SocketHook};
use zerocopy::FromBytes;

/// What the eBPF backend's maps say of claims. Addresses of the node, and connections of its own, are not
/// claims'.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Entries {
    pub claims: Claims,
    /// How many claims have a port, by port, and the ports that programs look at.
    pub port_uses: BTreeMap<u16, u32>,
    pub ports: Vec<u16>,
    /// Claims that are counted for.
    pub traffic: BTreeSet<ClaimKey>,
    /// Owners of connections.
    pub flows: BTreeSet<u32>,
}

/// The maps of a node, if it has them.
pub fn maps(node: &Netns) -> Option<(Maps, Flows)> {
    let open = || {
        let Found::Loaded(loaded) = Loaded::open(&OWN, true, &Numbers::default()).unwrap() else {
            return None;
        };
        let flows = loaded.flows().unwrap();
        Some((loaded.maps, flows))
    };
    node.run(open).unwrap()
}

/// The entries of a node's maps; none if it has no maps.
pub fn entries(node: &Netns) -> Entries {
    let Some((maps, flows)) = maps(node) else {
        return Entries::default();
    };
    let word = |(key, value): (Vec<u8>, Vec<u8>)| {
        (u32::read_from_bytes(&key).unwrap(), u64::read_from_bytes(&value).unwrap())
    };
    let words: BTreeMap<u32, u64> = maps.ports.entries().unwrap().into_iter().map(word).collect();
    let watched = |port: &u16| {
        let (index, bit) = port_bit(*port);
        words[&index] & bit != 0
    };
    let read = |(key, value): (Vec<u8>, Vec<u8>)| {
        (ClaimKey::read_from_bytes(&key).unwrap(), ClaimValue::read_from_bytes(&value).unwrap())
    };
    let uses = |(key, value): (Vec<u8>, Vec<u8>)| {
        (u16::read_from_bytes(&key).unwrap(), u32::read_from_bytes(&value).unwrap())
    };
    let owner = |(_, value): (Vec<u8>, Vec<u8>)| FlowValue::read_from_bytes(&value).unwrap().owner;
    Entries {
        claims: maps.claims.entries().unwrap().into_iter().map(read).collect(),
        port_uses: maps.port_uses.entries().unwrap().into_iter().map(uses).collect(),
        ports: (0..=u16::MAX).filter(watched).collect(),
        traffic: maps
            .traffic
            .entries()
            .unwrap()
            .iter()
            .map(|(key, _)| ClaimKey::read_from_bytes(key).unwrap())
            .collect(),
        flows: flows
            .flows
            .entries()
            .unwrap()
            .into_iter()
            .map(owner)
            .filter(|owner| *owner != 0)
            .collect(),
    }
}

/// Ids of the node's own programs among those at the root cgroup, which all nodes share: they use a map
/// that the node has pinned.
pub fn socket_programs(node: &Netns) -> BTreeSet<u32> {
    let own = node
        .run(|| {
            let pins = Pins::open().unwrap();
            let map = |layout: u32| pins.map(layout, "pm_sockets").unwrap();
            let layouts = pins.list().unwrap().layouts;
            layouts.into_iter().filter_map(map).map(|map| map.id()).collect::<BTreeSet<u32>>()
        })
        .unwrap();
    let uses = |id: &u32| {
        let program = Program::from_id(*id).unwrap();
        program.is_some_and(|program| program.map_ids().unwrap().iter().any(|id| own.contains(id)))
    };
    attached().into_iter().filter(uses).collect()
}

/// Ids of all programs for sockets at the root cgroup.
fn attached() -> BTreeSet<u32> {
    let root = cgroup::root().unwrap();
    SocketHook::ALL.into_iter().flat_map(|hook| root.query(hook).unwrap().programs).collect()
}
