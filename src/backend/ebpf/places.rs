//! Which programs at sockets belong to which cgroups.

use std::io;

use crate::sys::Host;
use crate::sys::bpf::cgroup::{self, Cgroup};
use crate::sys::bpf::program::SocketHook;

/// Where systemd keeps the node's own processes, and never a pod's.
const HOST_ONLY: [&str; 3] = ["init.scope", "system.slice", "user.slice"];

/// What belongs where on this node.
pub struct Places {
    pub cgroups: Vec<Cgroup>,
    /// What each of them gets, by the names of the programs.
    pub hooks: Vec<(SocketHook, &'static str)>,
    /// Cgroups at which nothing of ours may be, and at which hooks of theirs.
    pub barred: Vec<(Cgroup, Vec<SocketHook>)>,
    /// Why some hooks are left out, if any are.
    pub reserved: Option<String>,
}

/// Finds out what belongs where.
///
/// It is the root of cgroup v2; where Cilium runs, the root's children, since its agent detaches
/// others' programs from the root (cilium/cilium#43877). Kernels without the cookie (before 5.7) get
/// programs at cgroups that never hold pods.
///
/// # Errors
///
/// Why there is no such place, in words.
pub fn find(host: &Host) -> Result<Places, String> {
    let kernel = host.kernel().map_err(|error| error.to_string())?;
    if let Some(reason) = &kernel.no_socket_hooks {
        return Err(reason.clone());
    }
    let gated = kernel.cookie_helper;
    let mut hooks: Vec<(SocketHook, &'static str)> =
        SocketHook::ALL.into_iter().map(|hook| (hook, program(hook, gated))).collect();
    hooks.retain(|(hook, _)| kernel.getpeername || !is_getpeername(*hook));
    let root = cgroup::root().map_err(|error| error.to_string())?;
    let cilium = host.has_cilium();
    if gated && !cilium {
        // What may be left at children since Cilium went does no harm: the second one finds nothing
        // to translate.
        let (cgroups, barred) = (vec![root], Vec::new());
        return Ok(Places { cgroups, hooks, barred, reserved: None });
    }
    let mut cgroups = children(&root);
    if !gated {
        cgroups.retain(|place| HOST_ONLY.contains(&place.name()));
    }
    if cgroups.is_empty() {
        return Err("no cgroup is known to hold the node's own processes and no pods".into());
    }
    let reserved = reserved(&root, &hooks).map_err(|error| error.to_string())?;
    hooks.retain(|(hook, _)| !reserved.contains(hook));
    let mut barred = Vec::new();
    if !reserved.is_empty() {
        barred.extend(children(&root).into_iter().map(|child| (child, reserved.clone())));
    }
    if cilium {
        barred.push((root, SocketHook::ALL.to_vec()));
    }
    let reserved = reserved.first().map(|hook| {
        format!(
            "the root cgroup has a program without BPF_F_ALLOW_MULTI at the hook {hook:?}, which others below it would keep from running"
        )
    });
    Ok(Places { cgroups, hooks, barred, reserved })
}

/// Everywhere that this plugin's programs may be attached.
pub fn all() -> Vec<Cgroup> {
    let Ok(root) = cgroup::root() else {
        return Vec::new();
    };
    let mut all = children(&root);
    all.push(root);
    all
}

/// The program for a hook, and where it acts: everywhere, or by the cookie.
pub fn program(hook: SocketHook, gated: bool) -> &'static str {
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

/// Hooks that somebody has reserved at the root, as Cilium does before 1.14 or on kernels before 5.7.
fn reserved(root: &Cgroup, hooks: &[(SocketHook, &str)]) -> io::Result<Vec<SocketHook>> {
    let mut reserved = Vec::new();
    for (hook, _) in hooks {
        if root.is_reserved(*hook)? {
            reserved.push(*hook);
        }
    }
    Ok(reserved)
}

fn children(root: &Cgroup) -> Vec<Cgroup> {
    root.children().unwrap_or_default()
}

fn is_getpeername(hook: SocketHook) -> bool {
    matches!(hook, SocketHook::Getpeername4 | SocketHook::Getpeername6)
}
