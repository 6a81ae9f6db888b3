//! Whose the programs at a cgroup are.
//!
//! Nodes that are containers of one machine (kind, on a machine with cgroup v1) share the root of its
//! cgroup v2, and their programs have the same names. Each node's act in its own network namespace,
//! whose cookie is in their configuration.

use std::collections::BTreeSet;
use std::io;

use zerocopy::FromBytes;

use super::layout::{Config, config_flags};
use crate::error::{Error, Result};
use crate::sys::bpf::cgroup::Cgroup;
use crate::sys::bpf::map::Map;
use crate::sys::bpf::program::{Program, SocketHook};

/// The hook whose program a node attaches before all others, and takes away after all others.
pub const FIRST: SocketHook = SocketHook::Connect4;
/// The hooks whose programs tell whose they are, by their names or by the configuration that they use.
pub const TELLING: [SocketHook; 4] =
    [SocketHook::Connect4, SocketHook::Connect6, SocketHook::Sendmsg4, SocketHook::Sendmsg6];
const CONFIG: &str = "pm_config";

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    /// The node whose network namespace has this cookie.
    Cookie(u64),
    /// Nobody knows: kernels before 5.14 keep it to themselves until it has been learnt.
    Unknown,
    /// The node has programs that act everywhere (kernels before 5.7).
    Everywhere,
}

/// What belongs to other nodes.
#[derive(Debug, Default)]
pub struct Strangers {
    /// Ids of the maps that their programs use. No two nodes share any.
    maps: BTreeSet<u32>,
}

impl Strangers {
    /// Looks at what is attached to a cgroup before and after `list` lists programs there, since other
    /// nodes come, go and are upgraded meanwhile: [`FIRST`] is there as long as any other program of a
    /// node is, so that one of the two looks has seen it.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns, and what `list` does.
    pub fn around(place: &Cgroup, own: Own, list: impl FnOnce() -> Result<()>) -> Result<Self> {
        let looking = |error| {
            Error::io(format!("look at the eBPF programs of the cgroup {}", place.name()), error)
        };
        let mut strangers = Self::default();
        strangers.look(place, own).map_err(looking)?;
        list()?;
        strangers.look(place, own).map_err(looking)?;
        Ok(strangers)
    }

    fn look(&mut self, place: &Cgroup, own: Own) -> io::Result<()> {
        for hook in TELLING {
            for id in place.query(hook)?.programs {
                let Some(program) = Program::from_id(id)?.filter(is_named_as_ours) else {
                    continue;
                };
                let maps = program.map_ids()?;
                let gated = program.name() == super::places::program(hook, true);
                let strange = match own {
                    Own::Cookie(cookie) => !gated || acts_in(&maps)?.is_some_and(|it| it != cookie),
                    // One that acts somewhere is another node's, which has learnt where.
                    Own::Unknown => !gated || acts_in(&maps)?.is_some(),
                    Own::Everywhere => gated,
                };
                if strange {
                    self.maps.extend(maps);
                }
            }
        }
        Ok(())
    }

    /// Those of the programs with these ids that are this plugin's and this node's.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns.
    pub fn own(&self, ids: &[u32]) -> io::Result<Vec<Program>> {
        let mut own = Vec::new();
        for id in ids {
            if let Some(program) = Program::from_id(*id)?.filter(is_named_as_ours)
                && program.map_ids()?.iter().all(|map| !self.maps.contains(map))
            {
                own.push(program);
            }
        }
        Ok(own)
    }
}

/// The network namespace in the configuration that is one of these maps.
fn acts_in(maps: &[u32]) -> io::Result<Option<u64>> {
    for id in maps {
        let Some(map) = Map::from_id(*id)?.filter(|map| map.definition().name == CONFIG) else {
            continue;
        };
        let value = map.get(&0_u32.to_ne_bytes())?.unwrap_or_default();
        let config = Config::read_from_prefix(&value).map(|(config, _)| config).unwrap_or_default();
        return Ok((config.flags & config_flags::COOKIE != 0).then_some(config.netns_cookie));
    }
    Ok(None)
}

/// Whether any of the programs with these ids is this plugin's, whichever node's.
///
/// # Errors
///
/// What bpf(2) returns.
pub fn are_any_ours(ids: &[u32]) -> io::Result<bool> {
    for id in ids {
        if Program::from_id(*id)?.is_some_and(|program| is_named_as_ours(&program)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_named_as_ours(program: &Program) -> bool {
    SocketHook::ALL
        .into_iter()
        .flat_map(|hook| [true, false].map(|gated| super::places::program(hook, gated)))
        .any(|name| name == program.name())
}
