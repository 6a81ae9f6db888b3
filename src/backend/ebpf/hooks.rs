//! Which program belongs on which device. Pure.
//!
//! Uplinks are hooked at the device that carries the address, not at the ports beneath it, so that no
//! packet passes two hooks of the node. Pods are hooked at the host's ends of their links, also where
//! these are ports of a bridge: packets between two ports never pass the bridge's own hooks. So a bridge
//! that has both pods' links and the way out as ports is hooked at all of these, and not itself: a
//! port's ingress hook comes before the bridge, and its egress hook sees all that leaves by it.

use std::collections::BTreeSet;

use crate::facts::{NodeFacts, is_bridge_of_pods, is_pod_port};
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
    /// It is for what comes from outside and goes there, not for a pod.
    pub uplink: bool,
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
                uplink: role == Role::Uplink,
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
    let master = master(link, links);
    let is_uplink = facts.uplinks.contains(&link.name);
    match master {
        // Also of a virtual machine (KubeVirt, Kata).
        Some(master) if is_bridge(master) && is_pod_port(link) => Some(Role::Pod),
        _ if !is_uplink => is_pod_port(link).then_some(Role::Pod),
        // Ports hand packets to their master, which is hooked itself.
        Some(master) if facts.uplinks.contains(&master.name) && !is_vrf(master) => {
            is_hooked_at_ports(master, links).then_some(Role::Uplink)
        }
        // Members of a VRF keep their packets.
        Some(master) if !is_vrf(master) => is_pod_port(link).then_some(Role::Pod),
        _ => (!is_hooked_at_ports(link, links)).then_some(Role::Uplink),
    }
}

/// Whether the ports of a bridge are hooked in its place. A bridge's port is no member of the VRF that
/// the bridge is in: the route lookup for packets there would ask the wrong table.
fn is_hooked_at_ports(link: &Link, links: &[Link]) -> bool {
    is_bridge_of_pods(link, links) && !master(link, links).is_some_and(is_vrf)
}

fn master<'a>(link: &Link, links: &'a [Link]) -> Option<&'a Link> {
    let index = link.master?;
    links.iter().find(|other| other.index == index)
}

fn is_bridge(link: &Link) -> bool {
    link.kind.as_deref() == Some("bridge")
}

fn is_vrf(link: &Link) -> bool {
    link.kind.as_deref() == Some("vrf")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::model::Family;
    use crate::sys::netlink::route::tests::a_link as link;
    use crate::sys::netlink::route::{Address, DefaultRoute};

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

    /// Devices and programs, one for both directions.
    fn roles(links: &[Link], addresses: &[(u32, &str)], default: u32) -> Vec<String> {
        let addresses: Vec<Address> = addresses
            .iter()
            .map(|(index, text)| {
                let network: ipnetwork::IpNetwork = text.parse().unwrap();
                Address { index: *index, ip: network.ip(), prefix: network.prefix(), global: true }
            })
            .collect();
        let routes = [DefaultRoute { family: Family::V4, index: default }];
        let facts = NodeFacts::new(links, &addresses, &routes);
        hooks(links, &facts, &Means::default())
            .iter()
            .filter(|hook| hook.direction == Direction::Ingress)
            .map(|hook| format!("{} {}", hook.device, hook.program))
            .collect()
    }

    /// Azure CNI in bridge mode, and a node's bridge of the LAN that the `bridge` plugin joins.
    #[test]
    fn a_bridge_of_pods_that_leads_out_is_hooked_at_its_ports() {
        let mut links = vec![
            link(1, "lo", None, None),
            link(2, "eth0", None, Some(3)),
            link(3, "azure0", Some("bridge"), None),
        ];
        let addresses = [(3, "10.240.0.4/16")];
        assert_eq!(roles(&links, &addresses, 3), ["azure0 pm_uplink_in"]);
        links.push(link(4, "azv1", Some("veth"), Some(3)));
        links.push(link(5, "keep-up", Some("dummy"), Some(3)));
        assert_eq!(roles(&links, &addresses, 3), ["eth0 pm_uplink_in", "azv1 pm_pod_in"]);
        links[3] = link(4, "vnet0", Some("tun"), Some(3));
        assert_eq!(roles(&links, &addresses, 3), ["eth0 pm_uplink_in", "vnet0 pm_pod_in"]);
    }

    #[test]
    fn a_bridge_of_pods_keeps_the_devices_around_it_apart() {
        // Tagged packets are those of the VLAN's device; a bond is hooked, and not what is beneath it.
        let links = [
            link(2, "eth0", None, Some(4)),
            link(3, "eth1", None, Some(4)),
            link(4, "bond0", Some("bond"), Some(5)),
            link(5, "br0", Some("bridge"), None),
            link(6, "br0.7", Some("vlan"), None),
            link(7, "veth1", Some("veth"), Some(5)),
        ];
        let expected = ["bond0 pm_uplink_in", "br0.7 pm_uplink_in", "veth1 pm_pod_in"];
        assert_eq!(roles(&links, &[(5, "192.0.2.1/24"), (6, "198.51.100.1/24")], 5), expected);

        // A bridge per VLAN, one of them with pods.
        let links = [
            link(2, "eth0", None, None),
            link(3, "eth0.7", Some("vlan"), Some(5)),
            link(4, "eth0.8", Some("vlan"), Some(6)),
            link(5, "br7", Some("bridge"), None),
            link(6, "br8", Some("bridge"), None),
            link(7, "veth1", Some("veth"), Some(5)),
        ];
        let expected =
            ["eth0 pm_uplink_in", "eth0.7 pm_uplink_in", "br8 pm_uplink_in", "veth1 pm_pod_in"];
        assert_eq!(roles(&links, &[(2, "192.0.2.1/24"), (5, "198.51.100.1/24")], 2), expected);

        // The routes of a VRF are looked up for its members, which a bridge's port is none of.
        let links = [
            link(2, "eth0", None, Some(3)),
            link(3, "br0", Some("bridge"), Some(4)),
            link(4, "red", Some("vrf"), None),
            link(5, "veth1", Some("veth"), Some(3)),
        ];
        let expected = ["br0 pm_uplink_in", "red pm_uplink_in", "veth1 pm_pod_in"];
        assert_eq!(roles(&links, &[(3, "192.0.2.1/24")], 3), expected);
    }

    /// A node that is a container, whose uplink is a veth: one port is like the other.
    #[test]
    fn the_bridge_of_a_nested_node_is_hooked_at_its_ports() {
        let links = [
            link(2, "eth0", Some("veth"), Some(3)),
            link(3, "br0", Some("bridge"), None),
            link(4, "veth1", Some("veth"), Some(3)),
        ];
        let expected = ["eth0 pm_pod_in", "veth1 pm_pod_in"];
        assert_eq!(roles(&links, &[(3, "172.18.0.2/16")], 3), expected);
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
