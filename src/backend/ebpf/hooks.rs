//! Which program belongs on which device. Pure.
//!
//! Uplinks are hooked at the device that carries the address, not at the ports beneath it, so that no
//! packet passes two hooks of the node. Pods are hooked at the host's ends of their links, also where
//! these are ports of a bridge: packets between two ports never pass the bridge's own hooks.

use std::collections::BTreeSet;

use crate::facts::NodeFacts;
use crate::sys::bpf::Direction;
use crate::sys::netlink::route::Link;

/// How a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mechanism {
    /// At the head of the device's chain of programs (Linux 6.6). Filters of the older kind may be
    /// removed by others: Cilium clears them from every device that it takes over with tcx.
    Tcx,
    /// A filter of the clsact qdisc. On Linux 6.18 attaching takes 0.03 ms, with tcx 15 ms (the kernel
    /// waits for all readers).
    Clsact,
}

/// A program in its place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hook {
    pub index: u32,
    pub device: String,
    pub direction: Direction,
    pub mechanism: Mechanism,
    pub program: &'static str,
}

/// What decides how programs are attached.
#[derive(Debug, Clone, Default)]
pub struct Means {
    /// The kernel has tcx.
    pub tcx: bool,
    /// Cilium runs on the node.
    pub cilium: bool,
    /// Indices of devices that have others' tcx programs, which may end a packet's way before any
    /// filter.
    pub taken: BTreeSet<u32>,
}

/// The hooks that a node needs, by device.
#[must_use]
pub fn hooks(links: &[Link], facts: &NodeFacts, means: &Means) -> Vec<Hook> {
    let mut hooks = Vec::new();
    for link in links {
        let Some(role) = role(link, links, facts) else {
            continue;
        };
        let preferred = role == Role::Uplink || means.cilium || means.taken.contains(&link.index);
        let mechanism = if means.tcx && preferred { Mechanism::Tcx } else { Mechanism::Clsact };
        let (ingress, egress) = match (role, link.has_frames()) {
            (Role::Uplink, true) => ("pm_uplink_in", "pm_out"),
            (Role::Pod, true) => ("pm_pod_in", "pm_out"),
            // A packet that turns round at its link needs an Ethernet header.
            (_, false) => ("pm_uplink_in_l3", "pm_out_l3"),
        };
        for (direction, program) in [(Direction::Ingress, ingress), (Direction::Egress, egress)] {
            hooks.push(Hook {
                index: link.index,
                device: link.name.clone(),
                direction,
                mechanism,
                program,
            });
        }
    }
    hooks
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Uplink,
    Pod,
}

fn role(link: &Link, links: &[Link], facts: &NodeFacts) -> Option<Role> {
    if link.loopback {
        return None;
    }
    let master = link.master.and_then(|index| links.iter().find(|other| other.index == index));
    let pods = matches!(link.kind.as_deref(), Some("veth" | "netkit" | "tun"));
    if !facts.uplinks.contains(&link.name) {
        return pods.then_some(Role::Pod);
    }
    match master {
        None => Some(Role::Uplink),
        // Members of a VRF keep their packets.
        Some(master) if master.kind.as_deref() == Some("vrf") => Some(Role::Uplink),
        // Ports hand packets to their master, which is hooked itself.
        Some(master) if facts.uplinks.contains(&master.name) => None,
        // A virtual machine (KubeVirt, Kata) in the pods' bridge.
        Some(_) => pods.then_some(Role::Pod),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netlink::route::tests::a_link as link;

    fn texts(links: &[Link], uplinks: &[&str], means: &Means) -> Vec<String> {
        let facts = NodeFacts {
            uplinks: uplinks.iter().map(|name| (*name).to_owned()).collect(),
            ..NodeFacts::default()
        };
        hooks(links, &facts, means)
            .iter()
            .map(|hook| {
                format!(
                    "{} {:?} {:?} {}",
                    hook.device, hook.direction, hook.mechanism, hook.program
                )
            })
            .collect()
    }

    #[test]
    fn uplinks_by_tcx_and_pods_by_filters() {
        let links = [
            link(1, "lo", None, None),
            link(2, "eth0", None, None),
            link(3, "cni0", Some("bridge"), None),
            link(4, "veth1", Some("veth"), Some(3)),
            link(5, "wg0", Some("wireguard"), None),
            link(6, "vmtap0", Some("tun"), Some(3)),
        ];
        assert_eq!(
            texts(&links, &["eth0", "wg0", "vmtap0"], &Means { tcx: true, ..Means::default() }),
            [
                "eth0 Ingress Tcx pm_uplink_in",
                "eth0 Egress Tcx pm_out",
                "veth1 Ingress Clsact pm_pod_in",
                "veth1 Egress Clsact pm_out",
                "wg0 Ingress Tcx pm_uplink_in_l3",
                "wg0 Egress Tcx pm_out_l3",
                "vmtap0 Ingress Clsact pm_pod_in",
                "vmtap0 Egress Clsact pm_out",
            ]
        );
        let without =
            texts(&links, &["eth0", "wg0", "vmtap0"], &Means { cilium: true, ..Means::default() });
        assert!(without.iter().all(|text| text.contains("Clsact")), "{without:?}");
    }

    #[test]
    fn a_device_is_hooked_once() {
        let links = [
            link(2, "ens5", None, Some(3)),
            link(3, "bond0", Some("bond"), None),
            link(4, "bond0.7", Some("vlan"), None),
            link(5, "ens6", None, Some(6)),
            link(6, "red", Some("vrf"), None),
        ];
        let hooked = texts(&links, &["ens5", "bond0", "bond0.7", "ens6", "red"], &Means::default());
        let devices: Vec<&str> =
            hooked.iter().step_by(2).filter_map(|text| text.split(' ').next()).collect();
        assert_eq!(devices, ["bond0", "bond0.7", "ens6", "red"]);
    }

    #[test]
    fn others_programs_are_preceded_by_tcx() {
        let links = [link(4, "lxc1", Some("veth"), None)];
        let mechanisms = |cilium, taken: &[u32]| {
            let means = Means { tcx: true, cilium, taken: taken.iter().copied().collect() };
            texts(&links, &[], &means)
        };
        assert!(mechanisms(false, &[4]).iter().all(|text| text.contains("Tcx")));
        assert!(mechanisms(true, &[]).iter().all(|text| text.contains("Tcx")));
        assert!(mechanisms(false, &[]).iter().all(|text| text.contains("Clsact")));
    }
}
