//! Which of this plugin's programs at a cgroup are this node's.
//!
//! Nodes in containers share the machine's cgroups, and each has programs of its own there, which act in
//! its network namespace. They have the same names; what tells them apart is the maps they use.

use std::collections::BTreeSet;
use std::io;

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{Config, config_flags};
use super::loaded;
use crate::error::{Error, Result};
use crate::sys::bpf::cgroup::Cgroup;
use crate::sys::bpf::map::Map;
use crate::sys::bpf::program::{Program, SocketHook};

/// A map that all programs for sockets use.
const SHARED: &str = "pm_sockets";
/// The program on connect4 that looks at the network namespace, and the map which says at which.
const GATED: &str = "pm_connect4";
const CONFIG: &str = "pm_config";

/// What this node's programs are known by.
#[derive(Debug)]
pub struct Own {
    /// Numbers of maps; `None` if all programs are this node's.
    maps: Option<BTreeSet<u32>>,
}

impl Own {
    /// Programs at these cgroups that use a pinned map, and those that act in the network namespace
    /// with this cookie: their maps may have lost their names with a bpffs that was unmounted.
    pub fn find(places: &[Cgroup], cookie: Option<u64>) -> Result<Self> {
        let mut maps = loaded::ids(SHARED)?;
        for place in places {
            maps.extend(acting_in(place, cookie).map_err(failed(place))?);
        }
        Ok(Own { maps: Some(maps) })
    }

    /// Whatever has a name of this plugin's: where programs do not look at the network namespace, a
    /// cgroup holds processes of one node only.
    pub fn all() -> Self {
        Own { maps: None }
    }

    /// Whether a program, which has a name of this plugin's, is one of them.
    pub fn has(&self, program: &Program) -> io::Result<bool> {
        match &self.maps {
            Some(maps) => Ok(program.map_ids()?.iter().any(|id| maps.contains(id))),
            None => Ok(true),
        }
    }
}

/// Numbers of the shared maps of programs that act in a network namespace.
fn acting_in(place: &Cgroup, cookie: Option<u64>) -> io::Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    let Some(cookie) = cookie else {
        return Ok(found);
    };
    for id in place.query(SocketHook::Connect4)?.programs {
        // Others' programs have maps that are none of our business.
        let program = Program::from_id(id)?.filter(|program| program.name() == GATED);
        let maps = program.as_ref().map_or(Ok(Vec::new()), maps)?;
        if maps.iter().any(|map| acts_in(map, cookie)) {
            found.extend(maps.iter().filter(|map| is_called(map, SHARED)).map(Map::id));
        }
    }
    Ok(found)
}

fn maps(program: &Program) -> io::Result<Vec<Map>> {
    program.map_ids()?.into_iter().filter_map(|id| Map::from_id(id).transpose()).collect()
}

fn is_called(map: &Map, name: &str) -> bool {
    map.definition().name == name
}

fn acts_in(map: &Map, cookie: u64) -> bool {
    if !is_called(map, CONFIG) {
        return false;
    }
    // Newer layouts have more behind it.
    let value = map.get(0_u32.as_bytes()).ok().flatten().unwrap_or_default();
    Config::read_from_prefix(&value).is_ok_and(|(config, _)| {
        config.flags & config_flags::COOKIE != 0 && config.netns_cookie == cookie
    })
}

fn failed(place: &Cgroup) -> impl Fn(io::Error) -> Error {
    move |error| {
        Error::io(format!("look at the eBPF programs of the cgroup {}", place.name()), error)
    }
}
