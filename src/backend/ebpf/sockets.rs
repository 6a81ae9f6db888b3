//! Programs at the sockets of the node's own processes: `connect` and `sendmsg` to a hostPort go to the
//! pod at once, so that 127.0.0.1, ::1 and the node's addresses work without `route_localnet` and
//! without masquerading.
//!
//! They are attached to the root of cgroup v2 and act in the node's network namespace only, which they
//! know by its cookie; other nodes of the machine have theirs beside them. Where Cilium runs they go to
//! the root's children instead: its agent detaches others' programs from the root
//! (cilium/cilium#43877), and its own of old versions cannot be attached beside others. Kernels without the cookie (before 5.7) get them at cgroups that never hold pods.
//!
//! Without them everything works but calls by the node's own processes: that is worth a note, and no
//! reason to leave the pod without its hostPort.

use std::collections::BTreeSet;
use std::io;

use super::loaded::Loaded;
use super::owner::Own;
use crate::error::{Error, Result};
use crate::sys::Host;
use crate::sys::bpf::cgroup::{self, Cgroup};
use crate::sys::bpf::cookie;
use crate::sys::bpf::program::{Program, SocketHook};

/// Where systemd keeps the node's own processes, and never a pod's.
const HOST_ONLY: [&str; 3] = ["init.scope", "system.slice", "user.slice"];

/// The program for a hook, and where it acts: everywhere, or by the cookie.
fn program(hook: SocketHook, gated: bool) -> &'static str {
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

/// Puts every program that is missing or another version's in its place.
pub fn sync(host: &Host, loaded: &Loaded) -> Result<()> {
    let wanted = match wanted(host) {
        Ok(wanted) => wanted,
        Err(reason) => {
            note(host, &reason);
            return Ok(());
        }
    };
    let names: BTreeSet<&str> = wanted.hooks.iter().map(|(_, name)| *name).collect();
    let ids = loaded.load(&names)?;
    let mut missing = Vec::new();
    for place in &wanted.places {
        for (hook, name) in &wanted.hooks {
            let attached = place.query(*hook).map_err(|error| failed(place, name, error))?;
            if !ids.get(*name).is_some_and(|id| attached.programs.contains(id)) {
                missing.push((place, *hook, *name, attached.programs));
            }
        }
    }
    if !missing.is_empty() {
        let own = own(wanted.gated, &wanted.places, Some(loaded))?;
        for (place, hook, name, attached) in &missing {
            let done = loaded.with_program(name, |program| {
                put(place, *hook, attached, &own, program)
                    .map_err(|error| failed(place, name, error))
            });
            match done {
                // Somebody has attached one that allows no others: the error says where.
                Err(Error::Io { source, .. })
                    if source.kind() == io::ErrorKind::PermissionDenied =>
                {
                    note(host, &source.to_string());
                    return Ok(());
                }
                other => other?,
            }
        }
    }
    // Only now: a kernel that does not tell the cookie is asked through the programs.
    if wanted.gated && !configure(loaded)? {
        note(host, "the cookie of the node's network namespace cannot be learnt");
    }
    if !missing.is_empty() {
        clear(&wanted.places, wanted.gated, Some(loaded), &ids.into_values().collect())?;
    }
    clear(&wanted.left, wanted.gated, Some(loaded), &BTreeSet::new())
}

/// Tells the programs which network namespace is the node's; false if that could not be found out.
fn configure(loaded: &Loaded) -> Result<bool> {
    if let Some(cookie) = cookie::own().map_err(no_cookie)? {
        loaded.set_cookie(cookie)?;
        return Ok(true);
    }
    if loaded.cookie()?.is_none() {
        cookie::teach(|address| loaded.learn_from(address)).map_err(no_cookie)?;
        loaded.trust_learnt_cookie()?;
    }
    Ok(loaded.cookie()?.is_some())
}

/// Which programs are not effective where they should be, in words.
pub fn problems(host: &Host, loaded: &Loaded) -> Result<Vec<String>> {
    // What cannot be attached at all ADD has said.
    let Ok(wanted) = wanted(host) else {
        return Ok(Vec::new());
    };
    let names: BTreeSet<&str> = wanted.hooks.iter().map(|(_, name)| *name).collect();
    let ids = loaded.loaded(&names)?;
    let mut problems = Vec::new();
    for place in &wanted.places {
        for (hook, name) in &wanted.hooks {
            let effective = place.effective(*hook).map_err(|error| failed(place, name, error))?;
            if !ids.get(*name).is_some_and(|id| effective.contains(id)) {
                problems.push(format!(
                    "cgroup {}: program {name} is not effective: the node's own processes do not reach hostPorts",
                    place.name()
                ));
            }
        }
    }
    Ok(problems)
}

/// Takes this node's programs off all cgroups that they may be attached to.
pub fn detach(host: &Host) -> Result<()> {
    let Ok(root) = cgroup::root() else {
        return Ok(());
    };
    let loaded = Loaded::open(true)?;
    let mut places = children(&root);
    places.push(root);
    clear(&places, host.kernel()?.cookie_helper, loaded.as_ref(), &BTreeSet::new())
}

/// What belongs where on this node.
struct Wanted {
    places: Vec<Cgroup>,
    hooks: Vec<(SocketHook, &'static str)>,
    /// By cookie.
    gated: bool,
    /// Where programs may be attached from before Cilium came.
    left: Vec<Cgroup>,
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
        (true, false) => (vec![root], Vec::new()),
        (true, true) => (children(&root), vec![root]),
        (false, _) => {
            let mut places = children(&root);
            places.retain(|place| HOST_ONLY.contains(&place.name()));
            (places, Vec::new())
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

/// How this node's programs at these cgroups are known.
fn own(gated: bool, places: &[Cgroup], loaded: Option<&Loaded>) -> Result<Own> {
    if !gated {
        return Ok(Own::all());
    }
    let cookie = match cookie::own().map_err(no_cookie)? {
        None => loaded.map_or(Ok(None), Loaded::cookie)?,
        told => told,
    };
    Own::find(places, cookie)
}

/// Attaches a program, in the place of another version of it if there is one.
fn put(
    place: &Cgroup,
    hook: SocketHook,
    attached: &[u32],
    own: &Own,
    program: &Program,
) -> io::Result<()> {
    for id in attached {
        if let Some(old) = Program::from_id(*id)?.filter(has_own_name)
            && own.has(&old)?
        {
            return place.replace(hook, &old, program);
        }
    }
    place.attach(hook, program)
}

/// Takes this node's programs but `keep` off cgroups.
fn clear(
    places: &[Cgroup],
    gated: bool,
    loaded: Option<&Loaded>,
    keep: &BTreeSet<u32>,
) -> Result<()> {
    let mut found = Vec::new();
    for place in places {
        for hook in SocketHook::ALL {
            found.extend(candidates(place, hook, keep).map_err(|error| unclear(place, error))?);
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    let own = own(gated, places, loaded)?;
    for (place, hook, program) in &found {
        let detach = || Ok(own.has(program)? && place.detach(*hook, program)?);
        detach().map_err(|error| unclear(place, error))?;
    }
    Ok(())
}

/// Programs with this plugin's names at a hook, those of other nodes among them.
fn candidates<'a>(
    place: &'a Cgroup,
    hook: SocketHook,
    keep: &BTreeSet<u32>,
) -> io::Result<Vec<(&'a Cgroup, SocketHook, Program)>> {
    let attached = match place.query(hook) {
        // A kernel without the hook has nothing attached to it.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for id in attached.programs.into_iter().filter(|id| !keep.contains(id)) {
        let program = Program::from_id(id)?.filter(has_own_name);
        found.extend(program.map(|program| (place, hook, program)));
    }
    Ok(found)
}

fn has_own_name(program: &Program) -> bool {
    SocketHook::ALL
        .into_iter()
        .flat_map(|hook| [true, false].map(|gated| self::program(hook, gated)))
        .any(|name| name == program.name())
}

fn note(host: &Host, reason: &str) {
    host.warn(format!(
        "processes of the node itself do not reach hostPorts by 127.0.0.1, ::1 or its addresses: {reason}"
    ));
}

fn unclear(place: &Cgroup, error: io::Error) -> Error {
    Error::io(format!("take the eBPF programs off the cgroup {}", place.name()), error)
}

fn no_cookie(error: io::Error) -> Error {
    Error::io("find the cookie of the network namespace", error)
}

fn failed(place: &Cgroup, name: &str, error: io::Error) -> Error {
    Error::io(format!("attach eBPF program {name} to the cgroup {}", place.name()), error)
}
