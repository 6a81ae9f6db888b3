//! What is to be at the node's devices, and what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::super::filters::Filters;
use super::super::hooks::{self, Hook, Means, Mechanism};
use super::{Scope, detach_by_id, failed, is_gone, own, unless_gone};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::sys::Host;
use crate::sys::bpf::Direction;
use crate::sys::bpf::tcx;
use crate::sys::netlink::route::Link;

/// A program by tcx, and whether it is one of this plugin's.
#[derive(Debug, Clone, Copy)]
pub struct Chained {
    pub id: u32,
    pub ours: bool,
}

/// What is to be where, and what is there.
pub struct Plan {
    /// The kernel has tcx.
    pub tcx: bool,
    pub hooks: Vec<Hook>,
    /// Programs by tcx, in the order in which they run.
    chains: BTreeMap<(u32, Direction), Vec<Chained>>,
    /// Devices that need no program (any more).
    others: Vec<(u32, String)>,
}

/// What is found in a hook's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Right,
    Nothing,
    /// The program, behind others' of tcx, of which this is the first one.
    Behind(u32),
    /// Another version's program.
    Former(u32),
    /// The program, and by the other mechanism one more.
    Twice,
}

impl Plan {
    pub fn make(host: &Host, links: &[Link], facts: &NodeFacts, scope: Scope) -> Result<Self> {
        let tcx = host.kernel()?.tcx;
        let mut means = Means { tcx, cilium: host.has_cilium(), taken: BTreeSet::new() };
        let mut chains = BTreeMap::new();
        // Numbers are not used again, so that what an earlier call has seen was and is this plugin's.
        let mut known: BTreeMap<u32, bool> =
            host.programs().programs.values().map(|id| (*id, true)).collect();
        let looked_at: Vec<&Link> =
            links.iter().filter(|link| scope.has(link) && !link.loopback).collect();
        for link in &looked_at {
            for direction in Direction::ALL {
                let ids = match chain(tcx, link.index, direction) {
                    Err(error) if is_gone(&error) => continue,
                    other => other.map_err(|error| {
                        Error::io(format!("list the eBPF programs of {}", link.name), error)
                    })?,
                };
                let mut chained = Vec::new();
                for id in ids {
                    let ours = match known.get(&id) {
                        Some(ours) => *ours,
                        None => own(id)
                            .map_err(|error| {
                                Error::io(
                                    format!("look at eBPF program {id} of {}", link.name),
                                    error,
                                )
                            })?
                            .is_some(),
                    };
                    known.insert(id, ours);
                    if !ours {
                        means.taken.insert(link.index);
                    }
                    chained.push(Chained { id, ours });
                }
                if !chained.is_empty() {
                    chains.insert((link.index, direction), chained);
                }
            }
        }
        // Masters outside of the scope are still masters.
        let mut hooks = hooks::hooks(links, facts, &means);
        let within: BTreeSet<u32> = looked_at.iter().map(|link| link.index).collect();
        hooks.retain(|hook| within.contains(&hook.index));
        let hooked: BTreeSet<u32> = hooks.iter().map(|hook| hook.index).collect();
        let others = looked_at
            .iter()
            .filter(|link| !hooked.contains(&link.index))
            .map(|link| (link.index, link.name.clone()))
            .collect();
        Ok(Plan { tcx, hooks, chains, others })
    }

    pub fn programs(&self) -> BTreeSet<&'static str> {
        self.hooks.iter().map(|hook| hook.program).collect()
    }

    pub fn chain(&self, hook: &Hook) -> &[Chained] {
        self.chains.get(&(hook.index, hook.direction)).map_or(&[], Vec::as_slice)
    }

    /// Whether the program is in its place by tcx, and none of another version beside it.
    pub fn leads(&self, hook: &Hook, id: u32) -> bool {
        let mut ours = self.chain(hook).iter().filter(|one| one.ours);
        hook.mechanism == Mechanism::Tcx
            && self.chain(hook).first().is_some_and(|first| first.id == id)
            && ours.all(|one| one.id == id)
    }

    pub fn look(&self, filters: &mut Filters, hook: &Hook, id: u32) -> Result<Found> {
        let filter = filters
            .program(hook.index, hook.direction)
            .map_err(|error| failed(hook, "look at the filters", error))?;
        let chain = self.chain(hook);
        let former = chain.iter().find(|one| one.ours && one.id != id).map(|one| one.id);
        if let Some(former) = former.or(filter.filter(|filter| *filter != id)) {
            return Ok(Found::Former(former));
        }
        let in_chain = chain.iter().any(|one| one.ours);
        Ok(match (hook.mechanism, chain.first()) {
            _ if in_chain && filter.is_some() => Found::Twice,
            (Mechanism::Clsact, _) if filter.is_some() => Found::Right,
            // Where there was no room for a filter.
            (Mechanism::Clsact, Some(first)) if first.id == id => Found::Right,
            (Mechanism::Tcx, Some(first)) if first.id == id => Found::Right,
            (Mechanism::Tcx, Some(first)) if in_chain => Found::Behind(first.id),
            _ => Found::Nothing,
        })
    }

    /// Whether there are programs where none is needed: by tcx on any device, by filters on those that
    /// lead out, which have got no others without tcx.
    pub fn has_strays(&self, filters: &mut Filters, facts: &NodeFacts) -> Result<bool> {
        for (device, name) in &self.others {
            let has_any = match self.tcx || !facts.uplinks.contains(name) {
                true => self.is_chained(*device),
                false => self.has_any(filters, *device, name)?,
            };
            if has_any {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the device has any of this plugin's programs, wherever among others'.
    pub fn has_any(&self, filters: &mut Filters, device: u32, name: &str) -> Result<bool> {
        let failed = |error| Error::io(format!("look at the filters of {name}"), error);
        Ok(self.is_chained(device) || filters.have_own(device).map_err(failed)?)
    }

    fn is_chained(&self, device: u32) -> bool {
        let mut chains = Direction::ALL.iter().filter_map(|way| self.chains.get(&(device, *way)));
        chains.any(|chain| chain.iter().any(|one| one.ours))
    }

    /// A port that has come to a bridge, a device that has lost its addresses: where packets pass
    /// two programs, the second one takes them for direct connections to the pod.
    pub fn clear_others(&self, filters: &mut Filters, directions: &[Direction]) -> Result<()> {
        for (device, name) in &self.others {
            let mut clear = || -> io::Result<()> {
                for direction in directions {
                    let chain = self.chains.get(&(*device, *direction));
                    for one in chain.into_iter().flatten().filter(|one| one.ours) {
                        detach_by_id(*device, *direction, one.id)?;
                    }
                }
                match directions {
                    [only] => filters.detach_from(*device, *only),
                    _ => filters.detach(*device),
                }
            };
            unless_gone(name, clear())?;
        }
        Ok(())
    }
}

pub fn chain(tcx: bool, device: u32, direction: Direction) -> io::Result<Vec<u32>> {
    if !tcx {
        return Ok(Vec::new());
    }
    Ok(tcx::query(device, direction)?.programs)
}
