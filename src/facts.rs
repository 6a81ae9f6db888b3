//! What planning needs to know of the node: its addresses, and which devices lead out of it. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::Ipv4Network;
use serde::{Deserialize, Serialize};

use crate::model::Family;
use crate::sys::netlink::route::{Address, DefaultRoute, Link};

/// The node as the rules see it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeFacts {
    /// Devices that lead out of the node. Packets that arrive over any other one come from local pods.
    pub uplinks: BTreeSet<String>,
    /// The node's own addresses, of both families. IPv6 link-local ones are left out: every pod's
    /// link has one, and none can be called from another link.
    pub addresses: BTreeSet<IpAddr>,
    /// Addresses that the kernel's routes call local, or are broadcast addresses of the node's subnets
    /// (IPv4), and that are nobody's to call by a hostPort.
    pub foreign: BTreeSet<IpAddr>,
    /// Services' addresses are bound to a device of the node. New ones come at any time, so that they are
    /// not among `foreign`: what is not in `addresses` is none of the node's.
    pub binds_services: bool,
}

/// What is wrong where `binds_services` has come true and nobody has told the kernel's part.
pub const SERVICES_UNKNOWN: &str = "hostPorts take the ports of Services: these have their addresses on the node by now (IPVS), which is not known to what forwards";

/// kube-proxy in IPVS mode binds the address of every Service to this device: they are no node
/// addresses.
const IPVS_DEVICE: &str = "kube-ipvs0";
/// Kubernetes' NodeLocal DNSCache binds the address of the cluster's DNS Service to this one.
const DNS_DEVICE: &str = "nodelocaldns";
/// Devices whose addresses are not the node's own.
pub const SPECIAL_DEVICES: [&str; 2] = [IPVS_DEVICE, DNS_DEVICE];

impl NodeFacts {
    /// Sorts devices by where they lead: out of the node are those with the default route, and those
    /// of any kind that pods are not connected with. A veth or netkit pair is a pod's link unless it
    /// carries a subnet (as the uplink of a nested node does); a bridge belongs to the pods unless
    /// something else than a pod's link is its port.
    #[must_use]
    pub fn new(links: &[Link], addresses: &[Address], default_routes: &[DefaultRoute]) -> Self {
        let has_default =
            |link: &Link| default_routes.iter().any(|route| route.index == link.index);
        let has_subnet = |link: &Link| {
            addresses.iter().any(|address| {
                let full = Family::of(&address.ip).max_prefix();
                address.index == link.index && address.global && address.prefix < full
            })
        };
        let leads_out = |link: &Link| match link.kind.as_deref() {
            _ if link.loopback => false,
            _ if has_default(link) => true,
            Some("veth" | "netkit") => has_subnet(link),
            Some("dummy" | "ifb") => false,
            Some("bridge") => ports(link, links).any(|port| {
                !is_pod_port(port) && !matches!(port.kind.as_deref(), Some("dummy" | "ifb"))
            }),
            _ => true,
        };
        let special = SPECIAL_DEVICES.map(|name| {
            let link = links.iter().find(|link| link.name == name);
            link.map(|link| link.index)
        });
        NodeFacts {
            uplinks: links
                .iter()
                .filter(|link| leads_out(link))
                .map(|link| link.name.clone())
                .collect(),
            ..NodeFacts::of_addresses(addresses, special)
        }
    }

    /// What addresses tell, without `uplinks`. `special` are the indices of [`SPECIAL_DEVICES`], as far as
    /// they are there.
    #[must_use]
    pub fn of_addresses(addresses: &[Address], special: [Option<u32>; 2]) -> Self {
        let [services, dns] = special;
        let is_on = |address: &Address, device: Option<u32>| device == Some(address.index);
        NodeFacts {
            uplinks: BTreeSet::new(),
            addresses: addresses
                .iter()
                .filter(|address| !is_on(address, services) && !is_on(address, dns))
                .filter(|address| !is_link_local(&address.ip))
                .map(|address| address.ip)
                .collect(),
            foreign: addresses
                .iter()
                .filter(|address| is_on(address, dns))
                .map(|address| address.ip)
                .chain(addresses.iter().filter_map(broadcast))
                .collect(),
            binds_services: services.is_some(),
        }
    }

    /// Whether the node has the address. All of 127.0.0.0/8 is local, whatever `lo` is given.
    #[must_use]
    pub fn is_local(&self, ip: &IpAddr) -> bool {
        ip.is_loopback() || self.addresses.contains(ip)
    }
}

/// What is attached to a bridge.
fn ports<'a>(bridge: &Link, links: &'a [Link]) -> impl Iterator<Item = &'a Link> {
    let index = bridge.index;
    links.iter().filter(move |port| port.master == Some(index) && !port.loopback)
}

/// Whether a pod is behind this port of a bridge. Behind a tap is a virtual machine (KubeVirt, Kata).
#[must_use]
pub fn is_pod_port(port: &Link) -> bool {
    matches!(port.kind.as_deref(), Some("veth" | "netkit" | "tun"))
}

/// Whether the device is a bridge that has pods' links as ports. What else is its port leads out of the
/// node past the bridge's own device, in both directions.
#[must_use]
pub fn is_bridge_of_pods(link: &Link, links: &[Link]) -> bool {
    link.kind.as_deref() == Some("bridge") && ports(link, links).any(is_pod_port)
}

/// The highest address of a subnet. Links of two and host addresses have none (RFC 3021).
fn broadcast(address: &Address) -> Option<IpAddr> {
    let IpAddr::V4(ip) = address.ip else {
        return None;
    };
    let network = Ipv4Network::new(ip, address.prefix).ok()?;
    (address.prefix < 31 && !ip.is_loopback()).then(|| network.broadcast().into())
}

fn is_link_local(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::sys::netlink::route::tests::a_link as link;

    fn address(index: u32, text: &str) -> Address {
        let (ip, prefix) = text.split_once('/').unwrap();
        Address {
            index,
            ip: ip.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
            global: !text.starts_with("fe80"),
        }
    }

    #[test]
    fn devices_are_told_apart_by_where_they_lead() {
        let links = [
            link(1, "lo", None, None),
            link(2, "ens5", None, None),
            link(3, "cni0", Some("bridge"), None),
            link(4, "veth1", Some("veth"), Some(3)),
            link(5, "lxc1", Some("veth"), None),
            link(6, "cilium_host", Some("veth"), None),
            link(7, "cilium_vxlan", Some("vxlan"), None),
            link(8, "br-ex", Some("bridge"), None),
            link(9, "ens6", None, Some(8)),
            link(10, "kube-ipvs0", Some("dummy"), None),
            link(11, "eth9", Some("veth"), None),
            link(12, "nodelocaldns", Some("dummy"), None),
        ];
        let addresses = [
            address(1, "127.0.0.1/8"),
            address(2, "192.0.2.1/24"),
            address(3, "10.88.0.1/24"),
            address(5, "fe80::1/64"),
            address(6, "10.0.1.254/32"),
            address(10, "10.96.0.1/32"),
            address(11, "198.51.100.1/24"),
            address(12, "10.96.0.10/32"),
        ];
        let facts =
            NodeFacts::new(&links, &addresses, &[DefaultRoute { family: Family::V4, index: 2 }]);
        let uplinks: Vec<&str> = facts.uplinks.iter().map(String::as_str).collect();
        assert_eq!(uplinks, ["br-ex", "cilium_vxlan", "ens5", "ens6", "eth9"]);
        assert!(facts.is_local(&"10.88.0.1".parse().unwrap()));
        assert!(facts.is_local(&"127.1.2.3".parse().unwrap()));
        assert!(!facts.is_local(&"10.96.0.1".parse().unwrap()));
        assert!(!facts.is_local(&"fe80::1".parse().unwrap()));
        assert!(!facts.is_local(&"10.96.0.10".parse().unwrap()));
        let foreign: Vec<String> = facts.foreign.iter().map(ToString::to_string).collect();
        assert_eq!(foreign, ["10.88.0.255", "10.96.0.10", "192.0.2.255", "198.51.100.255"]);
        assert!(facts.binds_services);
    }

    #[test]
    fn a_bridge_leads_out_by_what_is_no_pod_s() {
        let links = [
            link(2, "eth0", None, Some(3)),
            link(3, "azure0", Some("bridge"), None),
            link(4, "azv1", Some("veth"), Some(3)),
            link(5, "cni0", Some("bridge"), None),
            link(6, "tap0", Some("tun"), Some(5)),
            link(7, "veth1", Some("veth"), Some(5)),
            link(8, "keep-up", Some("dummy"), Some(5)),
            link(9, "br-lan", Some("bridge"), None),
            link(10, "eth1", None, Some(9)),
        ];
        let facts = NodeFacts::new(&links, &[], &[]);
        assert!(!facts.uplinks.contains("cni0"), "{:?}", facts.uplinks);
        assert!(facts.uplinks.contains("azure0") && facts.uplinks.contains("br-lan"));
        let of_pods: Vec<&str> = links
            .iter()
            .filter(|link| is_bridge_of_pods(link, &links))
            .map(|link| link.name.as_str())
            .collect();
        assert_eq!(of_pods, ["azure0", "cni0"]);
    }

    #[test]
    fn the_uplink_of_a_nested_node_is_a_veth_with_the_default_route() {
        let links = [link(2, "eth0", Some("veth"), None), link(3, "veth7", Some("veth"), None)];
        let facts = NodeFacts::new(
            &links,
            &[address(3, "10.244.0.1/32")],
            &[DefaultRoute { family: Family::V6, index: 2 }],
        );
        assert_eq!(facts.uplinks, BTreeSet::from(["eth0".to_owned()]));
        assert!(!facts.binds_services);
    }
}
