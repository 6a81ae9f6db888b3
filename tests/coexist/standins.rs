//! Programs of others, and how others attach them.
#![allow(unsafe_code, reason = "bpf(2) with flags that the plugin does not use")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;

use aya_obj::generated::{BPF_F_AFTER, bpf_attach_type, bpf_attr, bpf_cmd};
use portmap::demo::links::{Link, Links};
use portmap::demo::netns::Netns;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::object::{Aligned, Object, load};
use portmap::sys::bpf::program::{Program, SocketHook};
use portmap::sys::bpf::{Direction, tcx};

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!("../../testdata/bpf/standins.bpf.o"));

/// Programs of `testdata/bpf/standins.bpf.c`, in the order of their counters.
const PROGRAMS: [&str; 4] =
    ["cil_from_container", "cil_from_netdev", "cil_to_netdev", "cil_sock4_connect"];

/// What Cilium's agent has loaded.
pub struct Cilium {
    maps: BTreeMap<String, Map>,
    programs: BTreeMap<&'static str, Program>,
}

/// Where a packet goes that Cilium's programs send on past the stack.
pub enum Way<'a> {
    /// Out of a device of the node, to whoever its routes and neighbours say.
    Neighbour(&'a str),
    /// Into a pod, through its link's end on the node; frames get both addresses.
    Peer(&'a str, [u8; 6]),
}

impl Cilium {
    pub fn load() -> Self {
        let object = Object::parse(&OBJECT.0).unwrap();
        let create = |(name, definition)| (name, Map::create(&definition).unwrap());
        let maps: BTreeMap<String, Map> = object.maps().into_iter().map(create).collect();
        let programs = load(&object.link(&maps, &PROGRAMS).unwrap()).unwrap();
        Cilium { maps, programs: PROGRAMS.into_iter().zip(programs).collect() }
    }

    pub fn program(&self, name: &str) -> &Program {
        &self.programs[name]
    }

    /// How often a program has run.
    pub fn runs(&self, name: &str) -> u64 {
        let index = PROGRAMS.iter().position(|known| *known == name).unwrap() as u32;
        let value = self.maps["cil_runs"].get(&index.to_ne_bytes()).unwrap().unwrap();
        u64::from_ne_bytes(value.try_into().unwrap())
    }

    /// What comes in by `from` for `destination` goes this way.
    pub fn send_on(&self, node: &Netns, from: &str, destination: IpAddr, way: &Way) {
        let mut key = match destination {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        }
        .octets()
        .to_vec();
        key.extend(link(node, from).index.to_ne_bytes());
        let (to, kind, destination) = match way {
            Way::Neighbour(to) => (link(node, to), 1_u32, [0; 6]),
            Way::Peer(to, mac) => (link(node, to), 2, *mac),
        };
        let mut value = to.index.to_ne_bytes().to_vec();
        value.extend(kind.to_ne_bytes());
        value.extend(destination);
        value.extend(to.mac);
        self.maps["cil_ways"].put(&key, &value).unwrap();
    }

    /// Attaches to both ends of what goes through the uplink, as the agent does by tcx.
    pub fn take_uplink(&self, node: &Netns, name: &str) {
        let index = link(node, name).index;
        node.run(|| {
            attach_last(index, Direction::Ingress, self.program("cil_from_netdev"));
            attach_last(index, Direction::Egress, self.program("cil_to_netdev"));
        })
        .unwrap();
    }

    /// Attaches to what comes out of a pod.
    pub fn take_pod(&self, node: &Netns, name: &str) {
        let index = link(node, name).index;
        node.run(|| attach_last(index, Direction::Ingress, self.program("cil_from_container")))
            .unwrap();
    }
}

pub fn link(netns: &Netns, name: &str) -> Link {
    Links::open(netns).unwrap().link(name).unwrap()
}

/// Attaches by tcx behind all others, as Cilium does ("anchor tail").
pub fn attach_last(device: u32, direction: Direction, program: &Program) {
    let hook = match direction {
        Direction::Ingress => bpf_attach_type::BPF_TCX_INGRESS,
        Direction::Egress => bpf_attach_type::BPF_TCX_EGRESS,
    };
    attach(device, hook as u32, program, BPF_F_AFTER).unwrap();
}

/// Attaches to a cgroup so that no other program can be attached there or below.
pub fn attach_alone(cgroup: &Path, hook: SocketHook, program: &Program) -> std::io::Result<()> {
    let types = [
        (SocketHook::Connect4, bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
        (SocketHook::Connect6, bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
        (SocketHook::Sendmsg4, bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG),
        (SocketHook::Recvmsg4, bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG),
    ];
    let (_, hook) = types.iter().find(|(known, _)| *known == hook).unwrap();
    let dir = std::fs::File::open(cgroup).unwrap();
    attach(dir.as_raw_fd() as u32, *hook as u32, program, 0)
}

fn attach(target: u32, hook: u32, program: &Program, flags: u32) -> std::io::Result<()> {
    // SAFETY: integers throughout.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = target;
    attr.__bindgen_anon_5.attach_type = hook;
    attr.__bindgen_anon_5.attach_bpf_fd = program.fd().as_raw_fd() as u32;
    attr.__bindgen_anon_5.attach_flags = flags;
    let (command, size) = (bpf_cmd::BPF_PROG_ATTACH, std::mem::size_of::<bpf_attr>());
    // SAFETY: the command reads `attr` and no other memory.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as u32, &raw mut attr, size) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Names of the programs that a device has by tcx, in the order in which they run.
pub fn chain(node: &Netns, device: &str, direction: Direction) -> Vec<String> {
    let index = link(node, device).index;
    let ids = node.run(|| tcx::query(index, direction).unwrap().programs).unwrap();
    ids.into_iter().map(|id| Program::from_id(id).unwrap().unwrap().name().to_owned()).collect()
}
