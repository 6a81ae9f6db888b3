//! Programs at the sockets of the node's own processes: `connect` and `sendmsg` to a hostPort go to the
//! pod at once, so that 127.0.0.1, ::1 and the node's addresses work without `route_localnet` and
//! without masquerading.
//!
//! They are attached to the root of cgroup v2 and act in the node's network namespace only, which they
//! know by its cookie. Where Cilium runs they go to the root's children instead: its agent detaches
//! others' programs from the root (cilium/cilium#43877), and its own of old versions cannot be attached
//! beside others. Kernels without the cookie (before 5.7) get them at cgroups that never hold pods.
//!
//! Without them everything works but calls by the node's own processes: that is worth a note, and no
//! reason to leave the pod without its hostPort.

use std::collections::BTreeSet;
use std::io;

use super::devices::Mode;
use super::loaded::Loaded;
use super::strangers::Strangers;
use crate::error::{Error, Result};
use crate::sys::Host;
use crate::sys::bpf::cgroup::{self, Cgroup};
use crate::sys::bpf::cookie;
use crate::sys::bpf::program::{Program, SocketHook};

/// Where systemd keeps the node's own processes, and never a pod's.
const HOST_ONLY: [&str; 3] = ["init.scope", "system.slice", "user.slice"];

/// The program for a hook, and where it acts: everywhere, or by the cookie.
pub(super) fn program(hook: SocketHook, gated: bool) -> &'static str {
    match (hook, gated) {
        (SocketHook::Connect4, true) => "pm_connect4",
        (SocketHook::Connect6, true) => "pm_connect6",
        (SocketHook::Sendmsg4, true) => "pm_sendmsg4",
        (SocketHook::Sendmsg6, true) => "pm_sendmsg6",
        (SocketHook::Connect4, false) => "pm_connect4_any",
        (SocketHook::Connect6, false) => "pm_connect6_any",
        (SocketHook::Sendmsg4, false) => "pm_sendmsg4_any",
        (SocketHook::Sendmsg6, false) => "pm_sendmsg6_any",
        (SocketHook::Recvmsg4, _) => "pm_recvmsg4",
        (SocketHook::Recvmsg6, _) => "pm_recvmsg6",
        (SocketHook::Getpeername4, _) => "pm_peername4",
        (SocketHook::Getpeername6, _) => "pm_peername6",
    }
}

/// Puts programs in their places. Says false, and has changed nothing, if [`Mode::Extend`] is not
/// enough.
pub fn sync(host: &Host, loaded: &Loaded, mode: Mode) -> Result<bool> {
    let wanted = match wanted(host) {
        Ok(wanted) => wanted,
        Err(reason) => {
            note(host, &reason);
            return Ok(true);
        }
    };
    let names: BTreeSet<&str> = wanted.hooks.iter().map(|(_, name)| *name).collect();
    let ids = loaded.load(&names)?;
    let mut cookie = own_cookie(host, loaded)?;
    // Before anything is attached, as far as possible: by the cookie other nodes know whose it is.
    if wanted.gated
        && let Some(cookie) = cookie
    {
        loaded.set_cookie(cookie)?;
    }
    let mut todo = Vec::new();
    for place in &wanted.places {
        let mut doubtful = Vec::new();
        for (hook, name) in &wanted.hooks {
            let attached = place.query(*hook).map_err(|error| failed(place, name, error))?.programs;
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
        let strangers = Strangers::at(place, cookie).map_err(|error| looking(place, error))?;
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
    for (place, hook, name, former) in todo {
        let done = loaded.with_program(name, |program| {
            put(place, hook, former, program).map_err(|error| failed(place, name, error))
        });
        match done {
            // Somebody has attached one that allows no others: the error says where.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                note(host, &source.to_string());
                return Ok(true);
            }
            other => other?,
        }
    }
    if wanted.gated && cookie.is_none() {
        cookie = learn(loaded)?;
        if cookie.is_none() {
            note(host, "the cookie of the node's network namespace cannot be learnt");
        }
    }
    wanted.left.as_ref().map_or(Ok(()), |left| clear(left, cookie))?;
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
    let Ok(wanted) = wanted(host) else {
        return Ok(Vec::new());
    };
    let names: BTreeSet<&str> = wanted.hooks.iter().map(|(_, name)| *name).collect();
    let ids = loaded.loaded(&names)?;
    let mut problems = loaded.unpinned(&names, &ids);
    for place in &wanted.places {
        for (hook, name) in &wanted.hooks {
            let Some(id) = ids.get(*name) else {
                continue;
            };
            let effective = place.effective(*hook).map_err(|error| failed(place, name, error))?;
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
    if wanted.gated {
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
    let Ok(root) = cgroup::root() else {
        return Ok(());
    };
    let cookie = match loaded {
        Some(loaded) => own_cookie(host, loaded)?,
        None => cookie::own().map_err(no_cookie)?,
    };
    children(&root).iter().chain([&root]).try_for_each(|place| clear(place, cookie))
}

/// What belongs where on this node.
struct Wanted {
    places: Vec<Cgroup>,
    hooks: Vec<(SocketHook, &'static str)>,
    /// By cookie.
    gated: bool,
    /// A cgroup that programs may be attached to from before Cilium came.
    left: Option<Cgroup>,
}

fn wanted(host: &Host) -> Result<Wanted, String> {
    let kernel = host.kernel().map_err(|error| error.to_string())?;
    if let Some(reason) = &kernel.no_socket_hooks {
        return Err(reason.clone());
    }
    let gated = kernel.cookie_helper;
    let root = cgroup::root().map_err(|error| error.to_string())?;
    let hooks = SocketHook::ALL
        .into_iter()
        .filter(|hook| {
            kernel.getpeername
                || !matches!(hook, SocketHook::Getpeername4 | SocketHook::Getpeername6)
        })
        .map(|hook| (hook, program(hook, gated)))
        .collect();
    let (places, left) = match (gated, host.has_cilium()) {
        // What may be left at children since Cilium went does no harm: the second one finds nothing
        // to translate.
        (true, false) => (vec![root], None),
        (true, true) => (children(&root), Some(root)),
        (false, _) => {
            let mut places = children(&root);
            places.retain(|place| HOST_ONLY.contains(&place.name()));
            (places, None)
        }
    };
    if places.is_empty() {
        return Err("no cgroup is known to hold the node's own processes and no pods".into());
    }
    Ok(Wanted { places, hooks, gated, left })
}

fn children(root: &Cgroup) -> Vec<Cgroup> {
    root.children().unwrap_or_default()
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

fn clear(place: &Cgroup, cookie: Option<u64>) -> Result<()> {
    let clear = || -> io::Result<()> {
        let strangers = Strangers::at(place, cookie)?;
        for hook in SocketHook::ALL {
            let attached = match place.query(hook) {
                // A kernel without the hook has nothing attached to it.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
                other => other?,
            };
            for program in strangers.own(&attached.programs)? {
                place.detach(hook, &program)?;
            }
        }
        Ok(())
    };
    clear().map_err(|error| {
        Error::io(format!("take the eBPF programs off the cgroup {}", place.name()), error)
    })
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
