//! Which programs are not where they should be, in words.

use std::collections::BTreeSet;

use super::super::filters::Filters;
use super::super::hooks::{Hook, Mechanism};
use super::super::loaded::Loaded;
use super::plan::{Found, Plan};
use super::{Scope, direction, failed, is_gone, name_of, netlink, no_room};
use crate::error::{Error, Result};
use crate::facts::{NodeFacts, is_pod_port};
use crate::sys::Host;
use crate::sys::bpf::name::Name;
use crate::sys::netlink::route::Link;

/// Whose problems are asked for.
#[derive(Debug, Clone)]
pub enum Matter {
    /// Those of the whole node.
    All,
    /// Those of an attachment whose packets pass these devices, by their indices, and the uplinks. Another
    /// pod's link has nothing of ours until that pod's own ADD.
    Of(BTreeSet<u32>),
}

/// Which programs are not where they should be. Devices that have gone since `links` were listed have no
/// problems.
pub fn problems(
    host: &Host,
    loaded: &Loaded,
    links: &[Link],
    facts: &NodeFacts,
    matter: &Matter,
) -> Result<Vec<String>> {
    let plan = Plan::make(host, links, facts, Scope::All)?;
    let names = plan.programs();
    let ids = loaded.loaded(&names)?;
    let filters = Filters::open().map_err(netlink)?;
    let mut look = Look { plan: &plan, links, facts, matter, filters };
    let mut found = Vec::new();
    for hook in &plan.hooks {
        let Some(id) = ids.get(&Name::of(hook.program)) else {
            continue;
        };
        match look.problem(hook, *id) {
            Err(Error::Io { source, .. }) if is_gone(&source) => {}
            other => found.extend(other?.map(|problem| (hook.index, problem))),
        }
    }
    let mut problems = loaded.unpinned(&names, &ids);
    // A device that has gone has no filters, which is all that the kernel says of it.
    if !found.is_empty() {
        let there = host.devices_now()?;
        found.retain(|(device, _)| there.contains(device));
    }
    problems.extend(found.into_iter().map(|(_, problem)| problem));
    Ok(problems)
}

struct Look<'a> {
    plan: &'a Plan,
    links: &'a [Link],
    facts: &'a NodeFacts,
    matter: &'a Matter,
    filters: Filters,
}

impl Look<'_> {
    fn problem(&mut self, hook: &Hook, id: u32) -> Result<Option<String>> {
        let found = match self.plan.look(&mut self.filters, hook, id)? {
            Found::Right => return Ok(None),
            Found::Nothing if !self.matters(hook)? => return Ok(None),
            Found::Nothing if !self.has_room(hook)? => {
                // Of a pod's link ADD has said so, and other attachments are none the worse for it.
                return Ok(hook.uplink.then(|| no_room(hook)));
            }
            Found::Nothing => "nothing".to_owned(),
            Found::Behind(first) => format!("it behind {}", name_of(first)?),
            Found::Former(other) => format!("another version's ({})", name_of(other)?),
            Found::Twice => "it twice, by tcx and as a filter".to_owned(),
        };
        let place = match hook.mechanism {
            Mechanism::Tcx => "at the head of tcx",
            Mechanism::Clsact => "as the first filter of clsact",
        };
        Ok(Some(format!(
            "{}: program {} expected {place} {}, found {found}",
            hook.device,
            hook.program,
            direction(hook.direction)
        )))
    }

    /// Whether it is a problem that the hook has nothing.
    fn matters(&mut self, hook: &Hook) -> Result<bool> {
        if !hook.uplink {
            return match self.matter {
                Matter::All => Ok(true),
                Matter::Of(own) if own.contains(&hook.index) => Ok(true),
                Matter::Of(_) => self.has_any(hook.index),
            };
        }
        // The next ADD moves programs between a bridge and its ports when the first pod's link has come
        // to it, or the last one has gone. Ports can stand for the bridge always, the bridge for its
        // ports as long as no pod there is concerned.
        let leads_out = |port: &&Link| {
            port.master == Some(hook.index)
                && !is_pod_port(port)
                && self.facts.uplinks.contains(&port.name)
        };
        let ports: Vec<u32> = self.links.iter().filter(leads_out).map(|port| port.index).collect();
        if !ports.is_empty() {
            for port in ports {
                if !self.has_any(port)? {
                    return Ok(true);
                }
            }
            return Ok(false);
        }
        let master = self.links.iter().find(|link| link.index == hook.index);
        match (self.matter, master.and_then(|link| link.master)) {
            (Matter::Of(own), Some(bridge)) if !own.contains(&bridge) => Ok(!self.has_any(bridge)?),
            _ => Ok(true),
        }
    }

    fn has_any(&mut self, device: u32) -> Result<bool> {
        let link = self.links.iter().find(|link| link.index == device);
        let name = link.map_or("", |link| link.name.as_str());
        self.plan.has_any(&mut self.filters, device, name)
    }

    /// Whether a program could be attached, by either mechanism.
    fn has_room(&mut self, hook: &Hook) -> Result<bool> {
        let by_filter = hook.mechanism == Mechanism::Clsact && !self.plan.tcx;
        let room = |error| failed(hook, "look at the qdisc", error);
        Ok(!by_filter || self.filters.have_room(hook.index).map_err(room)?)
    }
}
