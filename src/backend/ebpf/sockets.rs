//! Programs at the sockets of the node's own processes: `connect` and `sendmsg` to a hostPort go to the
//! pod at once, so that 127.0.0.1, ::1 and the node's addresses work without `route_localnet` and
//! without masquerading.
//!
//! They act in the node's network namespace only, which they know by its cookie, and are attached to
//! cgroups that hold all of the node's processes.
//!
//! Without them everything works but calls by the node's own processes: that is worth a note, and no
//! reason to leave the pod without its hostPort.

use std::collections::BTreeSet;
use std::io;

use super::devices::Mode;
use super::loaded::Loaded;
use super::places;
use super::strangers::Strangers;
use crate::error::{Error, Result};
use crate::sys::Host;
use crate::sys::bpf::cgroup::Cgroup;
use crate::sys::bpf::cookie;
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
    let mut cookie = own_cookie(host, loaded)?;
    // Before anything is attached, as far as possible: by the cookie other nodes know whose it is.
    if places.gated
        && let Some(cookie) = cookie
    {
        loaded.set_cookie(cookie)?;
    }
    let mut todo = Vec::new();
    for place in &places.cgroups {
        let mut doubtful = Vec::new();
        for (hook, name) in &places.hooks {
            let attached = match place.query(*hook) {
                Err(error) if is_gone(&error) => continue,
                other => other.map_err(|error| failed(place, name, error))?.programs,
            };
            // Others beside it may be another version's only after a kill, which is a matter for
            // `Mode::Restore`.
            let is_right = ids.get(*name).is_some_and(|id| match mode {
                Mode::Extend => attached.contains(id),
                Mode::Restore => attached == [*id],
            });
            if !is_right {
                doubtful.push((*hook, *name, attached));
            }
        }
        if doubtful.is_empty() {
            continue;
        }
        let strangers = match Strangers::at(place, cookie) {
            Err(error) if is_gone(&error) => continue,
            other => other.map_err(|error| looking(place, error))?,
        };
        for (hook, name, attached) in doubtful {
            let mut former = strangers.own(&attached).map_err(|error| looking(place, error))?;
            former.retain(|program| ids.get(name) != Some(&program.id()));
            if !former.is_empty() && mode == Mode::Extend {
                return Ok(false);
            }
            if !former.is_empty() || ids.get(name).is_none_or(|id| !attached.contains(id)) {
                todo.push((place, hook, name, former));
            }
        }
    }
    let mut refused = places.reserved.clone();
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
    if places.gated && cookie.is_none() {
        cookie = learn(loaded)?;
        if cookie.is_none() {
            note(host, "the cookie of the node's network namespace cannot be learnt");
        }
    }
    for (place, hooks) in &places.barred {
        clear(place, hooks, cookie)?;
    }
    if let Some(reason) = refused {
        note(host, &reason);
    }
    Ok(true)
}

/// By what the programs know the node's network namespace, if that is known by now.
fn own_cookie(host: &Host, loaded: &Loaded) -> Result<Option<u64>> {
    if host.kernel()?.cookie_option {
        return cookie::own().map_err(no_cookie);
    }
    loaded.cookie()
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
            let Some(id) = ids.get(*name) else {
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
    if places.gated {
        let expected = own_cookie(host, loaded)?;
        let found = loaded.cookie()?;
        if found.is_none() || found != expected {
            let text = |cookie: Option<u64>| {
                cookie.map_or_else(|| "none".to_owned(), |cookie| cookie.to_string())
            };
            problems.push(format!(
                "the programs at sockets act in the network namespace {}, the node's is {}",
                text(found),
                text(expected)
            ));
        }
    }
    Ok(problems)
}

/// Takes this plugin's programs off all cgroups that they may be attached to.
pub fn detach(host: &Host, loaded: Option<&Loaded>) -> Result<()> {
    let places = places::all();
    if places.is_empty() {
        return Ok(());
    }
    let cookie = match loaded {
        Some(loaded) => own_cookie(host, loaded)?,
        None => cookie::own().map_err(no_cookie)?,
    };
    places.iter().try_for_each(|place| clear(place, &SocketHook::ALL, cookie))
}

/// Attaches a program, in the place of another version of it if there is one.
fn put(
    place: &Cgroup,
    hook: SocketHook,
    mut former: Vec<Program>,
    program: &Program,
) -> io::Result<()> {
    if !place.query(hook)?.programs.contains(&program.id()) {
        match former.pop() {
            Some(old) => place.replace(hook, &old, program)?,
            None => place.attach(hook, program)?,
        }
    }
    former.iter().try_for_each(|old| place.detach(hook, old).map(drop))
}

/// Takes this node's programs off some hooks of a cgroup.
fn clear(place: &Cgroup, hooks: &[SocketHook], cookie: Option<u64>) -> Result<()> {
    let clear = || -> io::Result<()> {
        let mut attached = Vec::new();
        for hook in hooks {
            match place.query(*hook) {
                // A kernel without the hook has nothing attached to it.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                other => attached.push((*hook, other?.programs)),
            }
        }
        // Only now: whoever has attached anything by then has attached what tells whose it is.
        let strangers = Strangers::at(place, cookie)?;
        for (hook, ids) in attached {
            for program in strangers.own(&ids)? {
                place.detach(hook, &program)?;
            }
        }
        Ok(())
    };
    match clear() {
        Err(error) if is_gone(&error) => Ok(()),
        other => other.map_err(|error| {
            Error::io(format!("take the eBPF programs off the cgroup {}", place.name()), error)
        }),
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
