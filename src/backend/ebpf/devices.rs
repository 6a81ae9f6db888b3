//! Programs at the node's devices: compared with what should be there, and put in place.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::filters::Filters;
use super::hooks::{self, Hook, Means, Mechanism};
use super::loaded::Loaded;
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::sys::Host;
use crate::sys::bpf::Direction;
use crate::sys::bpf::program::Program;
use crate::sys::bpf::tcx;
use crate::sys::netlink::route::Link;

/// Names of all programs for devices, by which this plugin's are known, whichever object they are from.
const PROGRAMS: [&str; 5] = ["pm_uplink_in", "pm_uplink_in_l3", "pm_pod_in", "pm_out", "pm_out_l3"];

/// Which devices to look at.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    All,
    /// Those with these names.
    Only(&'a [String]),
}

impl Scope<'_> {
    fn has(self, link: &Link) -> bool {
        match self {
            Scope::All => true,
            Scope::Only(names) => names.contains(&link.name),
        }
    }
}

/// Programs by tcx, in the order in which they run.
type Chains = BTreeMap<(u32, Direction), Vec<u32>>;

/// Puts every program that is missing, another version's or behind another one in its place.
pub fn sync(
    host: &Host,
    loaded: &Loaded,
    links: &[Link],
    facts: &NodeFacts,
    scope: Scope,
) -> Result<()> {
    let (hooks, chains) = plan(host, links, facts, scope)?;
    let names: BTreeSet<&str> = hooks.iter().map(|hook| hook.program).collect();
    let ids = loaded.load(&names)?;
    let mut filters = Filters::open().map_err(netlink)?;
    for hook in &hooks {
        let Some(id) = ids.get(hook.program).copied() else {
            continue;
        };
        let chain = chain_of(&chains, hook);
        let done = in_place(&mut filters, hook, chain, id).and_then(|there| match there {
            true => Ok(()),
            false => loaded.with_program(hook.program, |program| {
                put(&mut filters, hook, chain, program)
                    .map_err(|error| failed(hook, "attach", error))
            }),
        });
        match done {
            Err(Error::Io { source, .. }) if is_gone(&source) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Which programs are not where they should be, in words.
pub fn problems(
    host: &Host,
    loaded: &Loaded,
    links: &[Link],
    facts: &NodeFacts,
) -> Result<Vec<String>> {
    let (hooks, chains) = plan(host, links, facts, Scope::All)?;
    let names: BTreeSet<&str> = hooks.iter().map(|hook| hook.program).collect();
    let ids = loaded.loaded(&names)?;
    let mut filters = Filters::open().map_err(netlink)?;
    let mut problems = Vec::new();
    for hook in &hooks {
        let there = match ids.get(hook.program) {
            Some(id) => in_place(&mut filters, hook, chain_of(&chains, hook), *id)?,
            None => false,
        };
        if !there {
            let place = match hook.mechanism {
                Mechanism::Tcx => "at the head of tcx",
                Mechanism::Clsact => "as the first filter of clsact",
            };
            problems.push(format!(
                "{}: program {} expected {place} {}, found another or none",
                hook.device,
                hook.program,
                direction(hook.direction)
            ));
        }
    }
    Ok(problems)
}

/// Takes this plugin's programs off all devices, whichever version's they are.
pub fn detach(host: &Host, links: &[Link]) -> Result<()> {
    let mut filters = Filters::open().map_err(netlink)?;
    let tcx = host.kernel()?.tcx;
    for link in links.iter().filter(|link| !link.loopback) {
        let mut clear = || -> io::Result<()> {
            for direction in Direction::ALL {
                for id in chain(tcx, link.index, direction)? {
                    if let Some(program) = own(id)? {
                        tcx::detach(link.index, direction, &program)?;
                    }
                }
                filters.detach(link.index, direction)?;
            }
            Ok(())
        };
        match clear() {
            Err(error) if is_gone(&error) => {}
            other => other.map_err(|error| {
                Error::io(format!("take the eBPF programs off {}", link.name), error)
            })?,
        }
    }
    Ok(())
}

fn plan(
    host: &Host,
    links: &[Link],
    facts: &NodeFacts,
    scope: Scope,
) -> Result<(Vec<Hook>, Chains)> {
    let tcx = host.kernel()?.tcx;
    let mut means = Means { tcx, cilium: host.has_cilium(), taken: BTreeSet::new() };
    let mut chains = Chains::new();
    let mut known = BTreeMap::new();
    let looked_at: Vec<Link> = links.iter().filter(|link| scope.has(link)).cloned().collect();
    for link in looked_at.iter().filter(|link| !link.loopback) {
        for direction in Direction::ALL {
            let ids = match chain(tcx, link.index, direction) {
                Err(error) if is_gone(&error) => continue,
                other => other.map_err(|error| {
                    Error::io(format!("list the eBPF programs of {}", link.name), error)
                })?,
            };
            for id in &ids {
                let ours = match known.get(id) {
                    Some(ours) => *ours,
                    None => own(*id)
                        .map_err(|error| {
                            Error::io(format!("look at eBPF program {id} of {}", link.name), error)
                        })?
                        .is_some(),
                };
                known.insert(*id, ours);
                if !ours {
                    means.taken.insert(link.index);
                }
            }
            chains.insert((link.index, direction), ids);
        }
    }
    // Masters outside of the scope are still masters.
    let mut hooks = hooks::hooks(links, facts, &means);
    hooks.retain(|hook| looked_at.iter().any(|link| link.index == hook.index));
    Ok((hooks, chains))
}

fn chain(tcx: bool, device: u32, direction: Direction) -> io::Result<Vec<u32>> {
    if !tcx {
        return Ok(Vec::new());
    }
    Ok(tcx::query(device, direction)?.programs)
}

fn chain_of<'a>(chains: &'a Chains, hook: &Hook) -> &'a [u32] {
    chains.get(&(hook.index, hook.direction)).map_or(&[], Vec::as_slice)
}

/// The program with this number, if it is one of this plugin's.
fn own(id: u32) -> io::Result<Option<Program>> {
    let program = Program::from_id(id)?;
    Ok(program.filter(|program| PROGRAMS.contains(&program.name())))
}

fn in_place(filters: &mut Filters, hook: &Hook, chain: &[u32], id: u32) -> Result<bool> {
    match hook.mechanism {
        Mechanism::Tcx => Ok(chain.first() == Some(&id)),
        Mechanism::Clsact => {
            let found = filters
                .program(hook.index, hook.direction)
                .map_err(|error| failed(hook, "look at the filters", error))?;
            Ok(found == Some(id))
        }
    }
}

fn put(filters: &mut Filters, hook: &Hook, chain: &[u32], program: &Program) -> io::Result<()> {
    let mut former = Vec::new();
    for id in chain {
        former.extend(own(*id)?);
    }
    match hook.mechanism {
        Mechanism::Tcx => {
            // Behind others it is of no use, and cannot be attached twice.
            if let Some(index) = former.iter().position(|one| one.id() == program.id()) {
                tcx::detach(hook.index, hook.direction, &former.swap_remove(index))?;
            }
            match former.iter().position(|one| Some(&one.id()) == chain.first()) {
                // Another version's: no packet is without one of the two.
                Some(index) => {
                    let old = former.swap_remove(index);
                    tcx::replace(hook.index, hook.direction, &old, program, 0)?;
                }
                None => tcx::attach_first(hook.index, hook.direction, program)?,
            }
            filters.detach(hook.index, hook.direction)?;
        }
        Mechanism::Clsact => filters.attach(hook.index, hook.direction, program)?,
    }
    for old in former {
        tcx::detach(hook.index, hook.direction, &old)?;
    }
    Ok(())
}

/// The device went with its pod meanwhile.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

fn failed(hook: &Hook, action: &str, error: io::Error) -> Error {
    let way = direction(hook.direction);
    Error::io(format!("{action}: program {} at {} {way}", hook.program, hook.device), error)
}

fn netlink(error: io::Error) -> Error {
    Error::io("open a netlink socket for filters", error)
}
