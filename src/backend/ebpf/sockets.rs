//! Programs at the sockets of the node's own processes: `connect` and `sendmsg` to a hostPort go to the
//! pod at once, so that 127.0.0.1, ::1 and the node's addresses work without `route_localnet` and
//! without masquerading.
//!
//! They act in the node's network namespace only, which they know by its cookie, and are attached to
//! cgroups that hold all of the node's processes.
//!
//! Without them everything works but calls by the node's own processes: that is worth a note, and no
//! reason to leave the pod without its hostPort.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::devices::Mode;
use super::loaded::Loaded;
use super::places::{self, Places};
use super::strangers::{self, Own, Strangers};
use super::teacher;
use crate::error::{Error, Result};
use crate::sys::Host;
use crate::sys::bpf::cgroup::Cgroup;
use crate::sys::bpf::cookie;
use crate::sys::bpf::name::Name;
use crate::sys::bpf::program::{Program, SocketHook};

/// Puts programs in their places. Says false, and has changed nothing, if [`Mode::Extend`] is not
/// enough.
pub fn sync(host: &Host, loaded: &Loaded, mode: Mode) -> Result<bool> {
    let places = match places::find(host) {
        Ok(places) => places,
        Err(reason) => {
            note(host, &reason);
            return Ok(true);
        }
    };
    let names: BTreeSet<&str> = places.hooks.iter().map(|(_, name)| *name).collect();
    let ids = loaded.load(&names)?;
    let mut own = own(host, Some(loaded))?;
    if let Own::Cookie(cookie) = own {
        // Before anything is attached: by it other nodes know whose it is.
        loaded.set_cookie(cookie)?;
    }
    let mut refused = places.reserved.clone();
    if !attach(loaded, &places, &ids, own, mode, &mut refused)? {
        return Ok(false);
    }
    if own == Own::Unknown {
        match learn(loaded)? {
            Some(cookie) => {
                own = Own::Cookie(cookie);
                // What was attached beside can be told from other nodes' now.
                attach(loaded, &places, &ids, own, Mode::Restore, &mut refused)?;
            }
            None => note(host, "the cookie of the node's network namespace cannot be learnt"),
        }
    }
    for (place, hooks) in &places.barred {
        clear(place, hooks, own)?;
    }
    if let Some(reason) = refused {
        note(host, &reason);
    }
    Ok(true)
}

/// Puts programs at all cgroups. What cannot be attached where others leave no room is told in
/// `refused`.
fn attach(
    loaded: &Loaded,
    places: &Places,
    ids: &BTreeMap<Name, u32>,
    own: Own,
    mode: Mode,
    refused: &mut Option<String>,
) -> Result<bool> {
    let mut todo = Vec::new();
    for place in &places.cgroups {
        let query = |hook: SocketHook, name: &str| match place.query(hook) {
            Err(error) if is_gone(&error) => Ok(None),
            other => Ok(Some(other.map_err(|error| failed(place, name, error))?.programs)),
        };
        let mut doubtful = Vec::new();
        for (hook, name) in &places.hooks {
            let Some(attached) = query(*hook, name)? else {
                continue;
            };
            // Others beside it may be another version's only after a kill, which is a matter for
            // `Mode::Restore`.
            let is_right = ids.get(&Name::of(name)).is_some_and(|id| match mode {
                Mode::Extend => attached.contains(id),
                Mode::Restore => attached == [*id],
            });
            if !is_right {
                doubtful.push((*hook, *name));
            }
        }
        if doubtful.is_empty() {
            continue;
        }
        let mut listed = Vec::new();
        let looked = Strangers::around(place, own, || {
            for (hook, name) in doubtful {
                listed.extend(query(hook, name)?.map(|attached| (hook, name, attached)));
            }
            Ok(())
        });
        let strangers = match looked {
            Err(Error::Io { source, .. }) if is_gone(&source) => continue,
            other => other?,
        };
        for (hook, name, attached) in listed {
            let mut former = match own {
                // Perhaps another node's: there is room beside it.
                Own::Unknown => Vec::new(),
                _ => strangers.own(&attached).map_err(|error| looking(place, error))?,
            };
            former.retain(|program| ids.get(&Name::of(name)) != Some(&program.id()));
            if !former.is_empty() && mode == Mode::Extend {
                return Ok(false);
            }
            if !former.is_empty()
                || ids.get(&Name::of(name)).is_none_or(|id| !attached.contains(id))
            {
                todo.push((place, hook, name, former));
            }
        }
    }
    // Other nodes know by some hooks whose the others are: in an upgrade one of these has the new
    // program before any of those has, and another the former one until all have changed.
    if todo.iter().any(|(_, hook, _, former)| *hook == strangers::FIRST && !former.is_empty()) {
        todo.sort_by_key(|(_, hook, _, _)| match hook {
            hook if *hook == strangers::FIRST => 2,
            hook if strangers::TELLING.contains(hook) => 0,
            _ => 1,
        });
    }
    for (place, hook, name, former) in todo {
        let done = loaded.with_program(name, |program| {
            put(place, hook, former, program).map_err(|error| failed(place, name, error))
        });
        match done {
            Err(Error::Io { source, .. }) if is_gone(&source) => {}
            // Somebody has attached one that allows no others: the error says where.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                refused.get_or_insert(source.to_string());
            }
            other => other?,
        }
    }
    Ok(true)
}

/// Whose programs are this node's.
fn own(host: &Host, loaded: Option<&Loaded>) -> Result<Own> {
    let kernel = host.kernel()?;
    if !kernel.cookie_helper {
        return Ok(Own::Everywhere);
    }
    let cookie = match loaded {
        _ if kernel.cookie_option => host.netns_cookie()?,
        Some(loaded) => loaded.cookie()?,
        None => None,
    };
    Ok(cookie.map_or(Own::Unknown, Own::Cookie))
}

/// Kernels that do not tell the cookie are asked through the programs.
fn learn(loaded: &Loaded) -> Result<Option<u64>> {
    cookie::teach(|address| loaded.learn_from(address)).map_err(no_cookie)?;
    loaded.trust_learnt_cookie()?;
    loaded.cookie()
}

fn no_cookie(error: io::Error) -> Error {
    Error::io("find the cookie of the network namespace", error)
}

/// Which programs are not effective where they should be, in words.
pub fn problems(host: &Host, loaded: &Loaded) -> Result<Vec<String>> {
    // What cannot be attached at all ADD has said.
    let Ok(places) = places::find(host) else {
        return Ok(Vec::new());
    };
    let names: BTreeSet<&str> = places.hooks.iter().map(|(_, name)| *name).collect();
    let ids = loaded.loaded(&names)?;
    let mut problems = loaded.unpinned(&names, &ids);
    problems.extend(
        places
            .reserved
            .iter()
            .map(|reason| format!("{reason}: the node's own processes do not reach hostPorts")),
    );
    for place in &places.cgroups {
        for (hook, name) in &places.hooks {
            let Some(id) = ids.get(&Name::of(name)) else {
                continue;
            };
            let effective = match place.effective(*hook) {
                Err(error) if is_gone(&error) => continue,
                other => other.map_err(|error| failed(place, name, error))?,
            };
            if !effective.contains(id) {
                problems.push(format!(
                    "cgroup {}: program {name} expected, found {}: the node's own processes do not reach hostPorts",
                    place.name(),
                    match effective.len() {
                        0 => "nothing",
                        _ => "others alone",
                    }
                ));
            }
        }
    }
    let found = loaded.cookie()?;
    let is_right = match own(host, Some(loaded))? {
        Own::Cookie(cookie) => found == Some(cookie),
        Own::Unknown => false,
        Own::Everywhere => true,
    };
    if !is_right {
        problems.push(format!(
            "the programs at sockets act in {}, which is not the node's",
            match found {
                Some(cookie) => format!("the network namespace with the cookie {cookie}"),
                None => "no network namespace".to_owned(),
            }
        ));
    }
    Ok(problems)
}

/// What should be attached to cgroups, and whether it is effective: cgroup, hook, program. None where
/// nothing can be attached.
pub fn hooked(
    host: &Host,
    loaded: &Loaded,
) -> Result<Vec<(String, SocketHook, &'static str, bool)>> {
    let Ok(places) = places::find(host) else {
        return Ok(Vec::new());
    };
    let ids = loaded.loaded(&places.hooks.iter().map(|(_, name)| *name).collect())?;
    let mut hooked = Vec::new();
    for place in &places.cgroups {
        for (hook, name) in &places.hooks {
            let effective = match place.effective(*hook) {
                Err(error) if is_gone(&error) => continue,
                other => other.map_err(|error| looking(place, error))?,
            };
            let there = ids.get(&Name::of(name)).is_some_and(|id| effective.contains(id));
            hooked.push((place.name().to_owned(), *hook, *name, there));
        }
    }
    Ok(hooked)
}

/// Takes this plugin's programs off all cgroups that they may be attached to.
pub fn detach(host: &Host, loaded: Option<&Loaded>) -> Result<()> {
    let places = places::all();
    if places.is_empty() {
        return Ok(());
    }
    let mut own = own(host, loaded)?;
    // Without it, programs whose maps have lost their names would pass for another node's.
    if own == Own::Unknown && has_any(&places)? {
        match teacher::ask(host) {
            Ok(cookie) => own = Own::Cookie(cookie),
            Err(reason) => host.warn(format!(
                "programs at sockets may stay, because it is not known which are this node's: {reason}"
            )),
        }
    }
    places.iter().try_for_each(|place| clear(place, &SocketHook::ALL, own))
}

/// Whether any node has programs of this plugin there.
fn has_any(places: &[Cgroup]) -> Result<bool> {
    for place in places {
        match place.query(strangers::FIRST) {
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(looking(place, error)),
            Ok(attached) => {
                let named = strangers::are_any_ours(&attached.programs);
                if named.map_err(|error| looking(place, error))? {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

/// Attaches a program, in the place of another version of it if there is one.
fn put(
    place: &Cgroup,
    hook: SocketHook,
    mut former: Vec<Program>,
    program: &Program,
) -> io::Result<()> {
    // The number by which it was looked for may have been an earlier one's.
    former.retain(|old| old.id() != program.id());
    if !place.query(hook)?.programs.contains(&program.id()) {
        match former.pop().map(|old| place.replace(hook, &old, program)) {
            // It has gone meanwhile.
            Some(Err(error)) if is_gone(&error) => place.attach(hook, program)?,
            Some(replaced) => replaced?,
            None => place.attach(hook, program)?,
        }
    }
    former.iter().try_for_each(|old| place.detach(hook, old).map(drop))
}

/// Takes this node's programs off some hooks of a cgroup.
fn clear(place: &Cgroup, hooks: &[SocketHook], own: Own) -> Result<()> {
    let failed =
        |error| Error::io(format!("take the eBPF programs off the cgroup {}", place.name()), error);
    let clear = || -> Result<()> {
        let mut attached = Vec::new();
        let strangers = Strangers::around(place, own, || {
            for hook in hooks {
                match place.query(*hook) {
                    // A kernel without the hook has nothing attached to it.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                    other => attached.push((*hook, other.map_err(failed)?.programs)),
                }
            }
            Ok(())
        })?;
        // The first one goes last: it tells other nodes whose the others are.
        for (hook, ids) in attached.into_iter().rev() {
            for program in strangers.own(&ids).map_err(failed)? {
                place.detach(hook, &program).map_err(failed)?;
            }
        }
        Ok(())
    };
    match clear() {
        Err(Error::Io { source, .. }) if is_gone(&source) => Ok(()),
        other => other,
    }
}

/// The cgroup has been removed meanwhile, with all that was attached to it.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

fn note(host: &Host, reason: &str) {
    host.warn(format!(
        "processes of the node itself do not reach hostPorts by 127.0.0.1, ::1 or its addresses: {reason}"
    ));
}

fn looking(place: &Cgroup, error: io::Error) -> Error {
    Error::io(format!("look at the eBPF programs of the cgroup {}", place.name()), error)
}

fn failed(place: &Cgroup, name: &str, error: io::Error) -> Error {
    Error::io(format!("attach eBPF program {name} to the cgroup {}", place.name()), error)
}
