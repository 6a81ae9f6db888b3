//! Programs at the node's devices: compared with what should be there, and put in place.

mod plan;
mod problems;

use std::io;

use super::filters::Filters;
use super::hooks::{Hook, Mechanism};
use super::loaded::Loaded;
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::sys::Host;
use crate::sys::bpf::Direction;
use crate::sys::bpf::name::Name;
use crate::sys::bpf::program::Program;
use crate::sys::bpf::tcx;
use crate::sys::netlink::route::Link;
use plan::{Chained, Found, Plan, chain};
pub use problems::{Matter, problems};

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

/// What to do about programs of this plugin that are not those that are pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Only add what is missing, and take off what is in the wrong place. Another version's program is
    /// at work with other maps, which makes it a matter of more than programs.
    Extend,
    /// Replace them.
    Restore,
}

/// Puts programs in their places, and takes those off that have none any more. Says false, and has
/// changed nothing, if [`Mode::Extend`] is not enough.
pub fn sync(
    host: &Host,
    loaded: &Loaded,
    links: &[Link],
    facts: &NodeFacts,
    scope: Scope,
    mode: Mode,
) -> Result<bool> {
    let plan = Plan::make(host, links, facts, scope)?;
    let ids = loaded.load(&plan.programs())?;
    let mut filters = Filters::open().map_err(netlink)?;
    let (mut todo, mut upgrades) = (Vec::new(), false);
    for hook in &plan.hooks {
        let Some(id) = ids.get(&Name::of(hook.program)).copied() else {
            continue;
        };
        // Not a word with the kernel about filters for each of the node's devices, at every ADD: what a
        // killed call may have left as a filter, too, goes by what restores after it.
        if mode == Mode::Extend && plan.leads(hook, id) {
            continue;
        }
        match plan.look(&mut filters, hook, id)? {
            Found::Right => {}
            Found::Former(_) | Found::Twice if mode == Mode::Extend => return Ok(false),
            found => {
                upgrades |= matches!(found, Found::Former(_));
                todo.push(hook);
            }
        }
    }
    let moves = plan.has_strays(&mut filters, facts)?;
    if upgrades {
        loaded.hold()?;
    }
    let mut put_all = |direction: Direction| {
        let mut todo: Vec<&Hook> =
            todo.iter().filter(|hook| hook.direction == direction).copied().collect();
        todo.sort_by_key(|hook| hook.uplink);
        todo.into_iter().try_for_each(|hook| attach(host, loaded, &plan, &mut filters, hook))?;
        match moves {
            true => plan.clear_others(&mut filters, &[direction]),
            false => Ok(()),
        }
    };
    // In an upgrade those at egress hold what they do not know. Before them, a program at ingress would
    // make connections that the former one at egress does not know, and does not hold.
    // From a bridge to its ports or back, packets meet two programs of a direction for a while, since
    // without any the node would reset their connections. At ingress the second one takes them for a
    // direct call, with a port of its own; the pod's RST to that must not be translated twice, to one
    // of the connection.
    match moves && !upgrades {
        true => [Direction::Ingress, Direction::Egress],
        false => [Direction::Egress, Direction::Ingress],
    }
    .into_iter()
    .try_for_each(&mut put_all)?;
    if mode == Mode::Restore {
        plan.clear_others(&mut filters, &Direction::ALL)?;
    }
    if upgrades {
        loaded.release()?;
    }
    Ok(true)
}

/// Puts one program in its place, unless the device has gone.
fn attach(
    host: &Host,
    loaded: &Loaded,
    plan: &Plan,
    filters: &mut Filters,
    hook: &Hook,
) -> Result<()> {
    let done = loaded.with_program(hook.program, |program| {
        let mut put = |mechanism| put(filters, hook, mechanism, plan.chain(hook), program);
        match put(hook.mechanism) {
            Err(error) if is_taken(&error) && plan.tcx => put(Mechanism::Tcx),
            Err(error) if is_taken(&error) => {
                if hook.direction == Direction::Ingress {
                    host.warn(no_room(hook));
                }
                Ok(())
            }
            other => other,
        }
        .map_err(|error| failed(hook, "attach", error))
    });
    match done {
        Err(Error::Io { source, .. }) if is_gone(&source) => Ok(()),
        other => other,
    }
}

/// What does not work where another qdisc has the place.
fn no_room(hook: &Hook) -> String {
    const WHY: &str = "beside which Linux before 6.6 has no room for programs";
    match hook.uplink {
        true => format!(
            "{} leads out of the node and has an ingress qdisc, {WHY}: no hostPort of the node is reached by it; remove the qdisc (tc qdisc del dev {} ingress)",
            hook.device, hook.device
        ),
        false => format!(
            "{} has an ingress qdisc (as the bandwidth plugin makes), {WHY}: hostPorts of its pod are not forwarded",
            hook.device
        ),
    }
}

/// What should be attached to devices that are there, and whether it is effective.
pub fn hooked(
    host: &Host,
    loaded: &Loaded,
    links: &[Link],
    facts: &NodeFacts,
) -> Result<Vec<(Hook, bool)>> {
    let plan = Plan::make(host, links, facts, Scope::All)?;
    let ids = loaded.loaded(&plan.programs())?;
    let mut filters = Filters::open().map_err(netlink)?;
    let is_there = |hook: &Hook| match ids.get(&Name::of(hook.program)) {
        Some(id) => Ok(plan.look(&mut filters, hook, *id)? == Found::Right),
        None => Ok(false),
    };
    let found: Vec<bool> = plan.hooks.iter().map(is_there).collect::<Result<_>>()?;
    let mut hooked: Vec<(Hook, bool)> = plan.hooks.into_iter().zip(found).collect();
    if hooked.iter().any(|(_, found)| !found) {
        let there = host.devices_now()?;
        hooked.retain(|(hook, _)| there.contains(&hook.index));
    }
    Ok(hooked)
}

/// Takes this plugin's programs off all devices, whichever version's they are.
pub fn detach(host: &Host, links: &[Link]) -> Result<()> {
    let mut filters = Filters::open().map_err(netlink)?;
    let tcx = host.kernel()?.tcx;
    for link in links.iter().filter(|link| !link.loopback) {
        let mut detach = || -> io::Result<()> {
            for direction in Direction::ALL {
                for id in chain(tcx, link.index, direction)? {
                    detach_by_id(link.index, direction, id)?;
                }
            }
            filters.detach(link.index)
        };
        unless_gone(&link.name, detach())?;
    }
    Ok(())
}

/// Takes a program off, if it is one of this plugin's.
fn detach_by_id(device: u32, direction: Direction, id: u32) -> io::Result<()> {
    own(id)?.map_or(Ok(()), |program| tcx::detach(device, direction, &program).map(drop))
}

fn unless_gone(device: &str, result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if is_gone(&error) => Ok(()),
        other => {
            other.map_err(|error| Error::io(format!("take the eBPF programs off {device}"), error))
        }
    }
}

/// The program with this number, if it is one of this plugin's.
fn own(id: u32) -> io::Result<Option<Program>> {
    let program = Program::from_id(id)?;
    Ok(program.filter(|program| PROGRAMS.contains(&program.name())))
}

/// How an operator finds it with bpftool.
fn name_of(id: u32) -> Result<String> {
    let program = Program::from_id(id)
        .map_err(|error| Error::io(format!("look at eBPF program {id}"), error))?;
    Ok(program.map_or_else(|| id.to_string(), |program| format!("{id} {}", program.name())))
}

fn put(
    filters: &mut Filters,
    hook: &Hook,
    mechanism: Mechanism,
    chain: &[Chained],
    program: &Program,
) -> io::Result<()> {
    let mut former = Vec::new();
    for one in chain.iter().filter(|one| one.ours) {
        former.extend(own(one.id)?);
    }
    match mechanism {
        Mechanism::Tcx => {
            // Behind others it is of no use, and cannot be attached twice.
            if let Some(index) = former.iter().position(|one| one.id() == program.id()) {
                tcx::detach(hook.index, hook.direction, &former.swap_remove(index))?;
            }
            match former
                .iter()
                .position(|one| chain.first().is_some_and(|first| first.id == one.id()))
            {
                // Another version's: no packet is without one of the two.
                Some(index) => {
                    let old = former.swap_remove(index);
                    tcx::replace(hook.index, hook.direction, &old, program, 0)?;
                }
                None => tcx::attach_first(hook.index, hook.direction, program)?,
            }
            filters.detach_from(hook.index, hook.direction)?;
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

/// Another qdisc has the place of clsact's.
fn is_taken(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

pub(super) fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

fn failed(hook: &Hook, action: &str, error: io::Error) -> Error {
    let way = direction(hook.direction);
    let what = format!("{action}: program {} at {} {way}", hook.program, hook.device);
    Error::io(what, error)
}

fn netlink(error: io::Error) -> Error {
    Error::io("open a netlink socket for filters", error)
}
