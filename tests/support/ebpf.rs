//! What an eBPF node has in the kernel, and ways to damage it. Everything here enters the node.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use portmap::backend::ebpf::layout::{ClaimValue, LAYOUT};
use portmap::demo::netns::Netns;
use portmap::sys::bpf::cgroup::{self, Cgroup};
use portmap::sys::bpf::clsact::Clsact;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::program::{Program, SocketHook};
use portmap::sys::bpf::{Direction, cookie, tcx};
use portmap::sys::netlink::route::{Link, RouteReader};
use zerocopy::{FromBytes, IntoBytes};

/// Where the plugin's pins are, as the node sees them.
pub const PINS: &str = "/sys/fs/bpf/portmap";

/// The maps that only the plugin writes to.
const WRITTEN: [&str; 4] = ["pm_claims", "pm_ports", "pm_port_uses", "pm_addresses"];

/// Path of a map's pin.
pub fn map_path(name: &str) -> PathBuf {
    PathBuf::from(format!("{PINS}/m{LAYOUT}/{name}"))
}

/// A pinned map, from within the node.
pub fn map(name: &str) -> Map {
    Map::from_pin(&map_path(name)).unwrap().unwrap_or_else(|| panic!("{name} is not pinned"))
}

/// Everything that the plugin has put into maps and attached, one line each: to be compared. Without
/// the numbers that each load gives anew.
pub fn state(node: &Netns) -> Vec<String> {
    let mut lines = entries(node);
    lines.extend(hooks(node));
    lines
}

/// The entries of the maps that the plugin writes; none if they are not there. What programs say of
/// connections is left out: of a claim that there have been any, and counters, but for those of no claim.
pub fn entries(node: &Netns) -> Vec<String> {
    let read = || {
        let (mut lines, mut claims) = (Vec::new(), BTreeSet::new());
        for name in WRITTEN {
            let Some(map) = Map::from_pin(&map_path(name)).unwrap() else {
                continue;
            };
            for (key, mut value) in map.entries().unwrap() {
                if name == "pm_claims" {
                    let claim = ClaimValue::read_from_bytes(&value).unwrap();
                    value = claim.with_used(false).as_bytes().to_vec();
                    claims.insert(key.clone());
                }
                if name != "pm_ports" || value.iter().any(|byte| *byte != 0) {
                    lines.push(format!("{name} {} {}", hex(&key), hex(&value)));
                }
            }
        }
        if let Some(map) = Map::from_pin(&map_path("pm_traffic")).unwrap() {
            let entries = map.entries().unwrap();
            let strays = entries.iter().filter(|(key, _)| !claims.contains(key));
            lines.extend(strays.map(|(key, _)| format!("pm_traffic {}", hex(key))));
        }
        lines.sort();
        lines
    };
    node.run(read).unwrap()
}

/// All programs at the node's devices, and this node's at sockets, in the order in which they run.
pub fn hooks(node: &Netns) -> Vec<String> {
    let mut lines = node.run(at_devices).unwrap();
    lines.extend(at_sockets(node));
    lines
}

fn at_devices() -> Vec<String> {
    let mut lines = Vec::new();
    let mut clsact = Clsact::open().unwrap();
    let qdiscs = std::process::Command::new("tc").args(["qdisc", "show"]).output().unwrap();
    let qdiscs = String::from_utf8(qdiscs.stdout).unwrap();
    for line in qdiscs.lines().filter(|line| line.contains(" clsact ")) {
        let device = line.split_whitespace().skip_while(|word| *word != "dev").nth(1);
        lines.push(format!("{} clsact", device.unwrap()));
    }
    for link in links().iter().filter(|link| !link.loopback) {
        for direction in Direction::ALL {
            for id in tcx::query(link.index, direction).unwrap().programs {
                lines.push(format!("{} {direction:?} tcx {}", link.name, name(id)));
            }
            for filter in clsact.filters(link.index, direction).unwrap() {
                let program = filter.program.map(name).unwrap_or_default();
                lines.push(format!("{} {direction:?} {} {program}", link.name, filter.kind));
            }
        }
    }
    lines
}

/// This node's programs at cgroups. Those of other nodes, which tests of other processes may have at
/// the same time, have another cookie in their configuration.
pub fn at_sockets(node: &Netns) -> Vec<String> {
    node.run(|| {
        let own = cookie::own().unwrap();
        let root = cgroup::root().unwrap();
        let children = root.children().unwrap();
        let mut lines = Vec::new();
        for place in children.iter().chain([&root]) {
            let ours = maps_of(place, own);
            for hook in SocketHook::ALL {
                for program in programs(place, hook) {
                    if program.map_ids().unwrap().iter().any(|id| ours.contains(id)) {
                        lines.push(format!("{} {hook:?} {}", place.name(), program.name()));
                    }
                }
            }
        }
        lines
    })
    .unwrap()
}

/// Ids of the maps of programs whose configuration has this cookie.
fn maps_of(place: &Cgroup, own: Option<u64>) -> BTreeSet<u32> {
    let mut maps = BTreeSet::new();
    for program in SocketHook::ALL.into_iter().flat_map(|hook| programs(place, hook)) {
        let ids = program.map_ids().unwrap();
        let config = ids.iter().find_map(|id| {
            let map = Map::from_id(*id).unwrap()?;
            (map.definition().name == "pm_config").then(|| map.get(&[0; 4]).unwrap().unwrap())
        });
        let cookie = config.map(|config| u64::from_ne_bytes(config[..8].try_into().unwrap()));
        if cookie.is_some() && cookie == own {
            maps.extend(ids);
        }
    }
    maps
}

/// This plugin's programs, whichever node's, at one hook of a cgroup. A kernel without the hook has
/// none.
fn programs(place: &Cgroup, hook: SocketHook) -> Vec<Program> {
    let ids = place.query(hook).map(|attached| attached.programs).unwrap_or_default();
    let programs = ids.into_iter().filter_map(|id| Program::from_id(id).unwrap());
    programs.filter(|program| program.name().starts_with("pm_")).collect()
}

/// Takes this node's programs off the hooks of the root cgroup.
pub fn detach_from_sockets(hooks: &[SocketHook]) {
    let root = cgroup::root().unwrap();
    let ours = maps_of(&root, cookie::own().unwrap());
    for hook in hooks {
        for program in programs(&root, *hook) {
            if program.map_ids().unwrap().iter().any(|id| ours.contains(id)) {
                assert!(root.detach(*hook, &program).unwrap());
            }
        }
    }
}

/// Takes all programs off devices, whosever they are, and this node's off the root cgroup.
pub fn detach_everywhere() {
    for link in links().iter().filter(|link| !link.loopback) {
        for direction in Direction::ALL {
            for id in tcx::query(link.index, direction).unwrap().programs {
                let program = Program::from_id(id).unwrap().unwrap();
                tcx::detach(link.index, direction, &program).unwrap();
            }
        }
        // A device without the qdisc has no filters.
        std::process::Command::new("tc")
            .args(["qdisc", "del", "dev", &link.name, "clsact"])
            .output()
            .unwrap();
    }
    detach_from_sockets(&SocketHook::ALL);
}

pub fn links() -> Vec<Link> {
    RouteReader::open().unwrap().links().unwrap()
}

pub fn index_of(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).unwrap()
}

pub fn name(program: u32) -> String {
    Program::from_id(program).unwrap().map_or_else(String::new, |one| one.name().to_owned())
}

/// What is pinned below a directory, by its last two names.
pub fn pinned(dir: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(pinned(&path));
        } else {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            found.insert(name, path);
        }
    }
    found
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
