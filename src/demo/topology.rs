//! A node, its pods and a client outside of it, wired the way common networks wire them.
//!
//! The client and the node share an uplink subnet; the client routes the pods and the node's second
//! address through the node's first. See [`Shape`] for what lies between node and pods.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use super::LabError;
use super::addresses::{self, Ends, PodNet};
use super::links::{Link, Links, Subnet};
use super::netns::Netns;
use super::server::Servers;
use crate::model::Family;

/// The node's link to the outside, and the client's link to the node.
pub const UPLINK: &str = "eth0";
/// A pod's own link.
pub const POD_LINK: &str = "eth0";
/// The bridge of [`Shape::Bridge`].
pub const BRIDGE: &str = "cni0";

/// Both ends of every pod's link have it where packets bypass the node: a redirected frame keeps its
/// destination MAC, and the receiver must take it for its own. Cilium rewrites it.
const BYPASS_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// How pods are attached to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A veth per pod, pod addresses with a /32 and /128 mask, a gateway address that no link of
    /// the pod's subnet holds, host routes to the pods: Cilium in legacy routing with endpoint routes.
    Cilium,
    /// A veth per pod, pod addresses with the subnet's mask, the gateway's address on each host
    /// link: CNI's `ptp` plugin.
    Ptp,
    /// A bridge with the gateway's address, pods as its ports, hairpin off: CNI's `bridge` plugin.
    Bridge,
    /// Pods with even numbers, from 0, as in [`Shape::Ptp`] and the others as in [`Shape::Bridge`].
    Mixed,
}

/// What to build.
#[derive(Debug, Clone)]
pub struct Options {
    pub shape: Shape,
    pub families: Vec<Family>,
    /// How many pods, 1 to 200. They are called `pod-a`, `pod-b` and so on.
    pub pods: usize,
    /// Packets between pods of the node are delivered past the node's IP layer and netfilter, as
    /// Cilium's eBPF does it. Not for [`Shape::Bridge`].
    pub bypass: bool,
}

impl Options {
    /// Two pods, both families if the kernel has both, no bypass.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let mut families = vec![Family::V4];
        if kernel_has_ipv6() {
            families.push(Family::V6);
        }
        Self { shape, families, pods: 2, bypass: false }
    }

    /// How one pod is attached; never [`Shape::Mixed`].
    fn shape_of(&self, number: usize) -> Shape {
        match self.shape {
            Shape::Mixed if number.is_multiple_of(2) => Shape::Ptp,
            Shape::Mixed => Shape::Bridge,
            shape => shape,
        }
    }
}

/// Whether this kernel was built and started with IPv6.
#[must_use]
pub fn kernel_has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").is_dir()
}

/// One pod.
#[derive(Debug)]
pub struct Pod {
    /// `pod-a`, also the name that its servers answer with.
    pub name: String,
    pub netns: Netns,
    /// The node's end of the pod's link.
    pub host_link: String,
    /// The pod's addresses with the mask that its network plugin would report.
    pub addresses: Vec<IpNetwork>,
    /// How it is attached; never [`Shape::Mixed`].
    pub shape: Shape,
    host: Link,
    own: Link,
}

impl Pod {
    /// The pod's address of one family.
    #[must_use]
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        let mut all = self.addresses.iter().map(IpNetwork::ip);
        all.find(|ip| Family::of(ip) == family)
    }

    /// Starts servers in the pod that answer with its name.
    pub fn serve(&self, tcp: &[u16], udp: &[u16]) -> Result<Servers, LabError> {
        Servers::start(&self.netns, &self.name, tcp, udp)
    }
}

/// A laboratory; dropping it takes everything away.
#[derive(Debug)]
pub struct Lab {
    pub options: Options,
    pub client: Netns,
    pub node: Netns,
    pub pods: Vec<Pod>,
}

impl Lab {
    /// Builds it. Traffic passes when this returns.
    pub fn build(options: Options) -> Result<Self, LabError> {
        let client = Netns::new("client")?;
        // eBPF backends pin their state below /sys/fs/bpf: the real node's must not be touched.
        let node = Netns::with_private_bpffs("node")?;
        let mut lab = Self { options, client, node, pods: Vec::new() };
        prepare(&lab.client)?;
        prepare(&lab.node)?;
        for family in &lab.options.families {
            let key = match family {
                Family::V4 => "ipv4/ip_forward",
                Family::V6 => "ipv6/conf/all/forwarding",
            };
            lab.node.set_sysctl(key, "1")?;
        }
        let mut node = Links::open(&lab.node)?;
        node.set_up("lo")?;
        lab.wire_uplink(&mut node)?;
        lab.wire_gateway(&mut node)?;
        for number in 0..lab.options.pods {
            let pod = lab.add_pod(&mut node, number)?;
            lab.pods.push(pod);
        }
        if lab.options.bypass {
            lab.wire_bypass(&mut node)?;
        }
        lab.wait_for_addresses()?;
        Ok(lab)
    }

    fn wait_for_addresses(&self) -> Result<(), LabError> {
        let mut expected = Vec::new();
        for family in &self.options.families {
            let own = [self.node_address(*family), self.second_node_address(*family)];
            let gateways = self.pod_nets(*family).into_iter().map(|net| net.gateway);
            expected.push((&self.client, self.client_address(*family)));
            expected.extend(own.into_iter().chain(gateways).map(|ip| (&self.node, ip)));
            let pods = self.pods.iter();
            expected.extend(pods.filter_map(|pod| Some((&pod.netns, pod.address(*family)?))));
        }
        expected.into_iter().try_for_each(|(netns, ip)| netns.wait_for_address(ip))
    }

    /// The node's address on its uplink: where clients call.
    #[must_use]
    pub fn node_address(&self, family: Family) -> IpAddr {
        addresses::UPLINK[family as usize].near
    }

    /// Another address of the node, on the same link but outside of its subnet.
    #[must_use]
    pub fn second_node_address(&self, family: Family) -> IpAddr {
        addresses::SECOND[family as usize]
    }

    /// The outside client's address.
    #[must_use]
    pub fn client_address(&self, family: Family) -> IpAddr {
        addresses::UPLINK[family as usize].far
    }

    /// Where the pods' default route points, the first pod's in [`Shape::Mixed`]; an address of the
    /// node.
    #[must_use]
    pub fn gateway(&self, family: Family) -> IpAddr {
        addresses::pod_net(self.options.shape, family).gateway
    }

    /// Every address of the node but the loopback link's.
    #[must_use]
    pub fn is_node_address(&self, ip: IpAddr) -> bool {
        let family = Family::of(&ip);
        [self.node_address(family), self.second_node_address(family)].contains(&ip)
            || self.pod_nets(family).iter().any(|net| net.gateway == ip)
    }

    /// The node's address and a port, to call.
    #[must_use]
    pub fn node_socket(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.node_address(family), port)
    }

    /// What the main network plugin reports after its ADD, in the given `cniVersion`'s form (0.3.0
    /// and later): host link, then the pod's own, IPv6 addresses first as Cilium has them.
    #[must_use]
    pub fn prev_result(&self, pod: &Pod, cni_version: &str) -> Value {
        let typed_ips = cni_version.starts_with("0.");
        let (mut ips, mut routes) = (Vec::new(), Vec::new());
        for network in pod.addresses.iter().rev() {
            let family = Family::of(&network.ip());
            let gateway = addresses::pod_net(pod.shape, family).gateway;
            let host = IpNetwork::from(gateway);
            let mut ip =
                json!({"address": network.to_string(), "gateway": gateway, "interface": 1});
            if typed_ips {
                ip["version"] = json!(if family == Family::V4 { "4" } else { "6" });
            }
            ips.push(ip);
            if pod.shape == Shape::Cilium {
                routes.push(json!({"dst": host.to_string()}));
            }
            let default = match family {
                Family::V4 => "0.0.0.0/0",
                Family::V6 => "::/0",
            };
            routes.push(json!({"dst": default, "gw": gateway}));
        }
        json!({
            "cniVersion": cni_version,
            "interfaces": [
                {"name": pod.host_link, "mac": pod.host.mac_text()},
                {"name": POD_LINK, "mac": pod.own.mac_text(), "sandbox": pod.netns.path()},
            ],
            "ips": ips,
            "routes": routes,
            "dns": {},
        })
    }

    /// The pods' addresses, by shape.
    fn pod_nets(&self, family: Family) -> Vec<PodNet> {
        let shapes = match self.options.shape {
            Shape::Mixed => vec![Shape::Ptp, Shape::Bridge],
            shape => vec![shape],
        };
        shapes.into_iter().map(|shape| addresses::pod_net(shape, family)).collect()
    }

    fn wire_uplink(&self, node: &mut Links) -> Result<(), LabError> {
        let mut client = Links::open(&self.client)?;
        client.set_up("lo")?;
        node.add_veth(UPLINK, UPLINK, &self.client)?;
        // Both ends before any address: without carrier, IPv6 leaves its routes out.
        node.set_up(UPLINK)?;
        client.set_up(UPLINK)?;
        for family in &self.options.families {
            let Ends { near, far, prefix } = addresses::UPLINK[*family as usize];
            let second = self.second_node_address(*family);
            node.add_address(UPLINK, addresses::network(near, prefix)?, Subnet::OnLink)?;
            node.add_address(UPLINK, second.into(), Subnet::OnLink)?;
            client.add_address(UPLINK, addresses::network(far, prefix)?, Subnet::OnLink)?;
            client.add_route(second.into(), Some(near), UPLINK)?;
            for pods in self.pod_nets(*family) {
                client.add_route(pods.subnet()?, Some(near), UPLINK)?;
            }
            // A node has a default route; programs look for it to find the uplink.
            node.add_route(addresses::default_of(*family)?, Some(far), UPLINK)?;
        }
        Ok(())
    }

    /// The link that holds the pods' gateway address, where one link does so for all pods.
    fn wire_gateway(&self, node: &mut Links) -> Result<(), LabError> {
        let (link, shape, subnet) = match self.options.shape {
            Shape::Cilium => {
                node.add_veth("cilium_host", "cilium_net", &self.node)?;
                node.set_up("cilium_net")?;
                ("cilium_host", Shape::Cilium, Subnet::NoRoute)
            }
            Shape::Bridge | Shape::Mixed => {
                node.add_bridge(BRIDGE)?;
                (BRIDGE, Shape::Bridge, Subnet::OnLink)
            }
            Shape::Ptp => return Ok(()),
        };
        node.set_up(link)?;
        for family in &self.options.families {
            let pod_net = addresses::pod_net(shape, *family);
            let prefix = match subnet {
                Subnet::OnLink => pod_net.prefix,
                Subnet::NoRoute => family.max_prefix(),
            };
            node.add_address(link, addresses::network(pod_net.gateway, prefix)?, subnet)?;
        }
        Ok(())
    }

    fn add_pod(&self, node: &mut Links, number: usize) -> Result<Pod, LabError> {
        let shape = self.options.shape_of(number);
        let name = addresses::pod_name(number);
        let netns = Netns::new(&name)?;
        prepare(&netns)?;
        let host_link = addresses::host_link(shape, number);
        node.add_veth(&host_link, POD_LINK, &netns)?;
        let mut inside = Links::open(&netns)?;
        inside.set_up("lo")?;
        if self.options.bypass {
            node.set_mac(&host_link, BYPASS_MAC)?;
            inside.set_mac(POD_LINK, BYPASS_MAC)?;
        }
        node.set_up(&host_link)?;
        inside.set_up(POD_LINK)?;
        let mut pod = Pod {
            host: node.link(&host_link)?,
            own: inside.link(POD_LINK)?,
            name,
            netns,
            host_link,
            addresses: Vec::new(),
            shape,
        };
        if shape == Shape::Bridge {
            node.set_bridge(&pod.host_link, BRIDGE)?;
        }
        for family in &self.options.families {
            let pod_net = addresses::pod_net(shape, *family);
            let ip = pod_net.pod(number);
            let prefix = match shape {
                Shape::Cilium => family.max_prefix(),
                Shape::Ptp | Shape::Bridge | Shape::Mixed => pod_net.prefix,
            };
            let address = addresses::network(ip, prefix)?;
            pod.addresses.push(address);
            let gateway = pod_net.gateway;
            if shape == Shape::Bridge {
                inside.add_address(POD_LINK, address, Subnet::OnLink)?;
            } else {
                inside.add_address(POD_LINK, address, Subnet::NoRoute)?;
                inside.add_route(gateway.into(), None, POD_LINK)?;
                node.add_route(ip.into(), None, &pod.host_link)?;
            }
            inside.add_route(addresses::default_of(*family)?, Some(gateway), POD_LINK)?;
            match shape {
                // Cilium's eBPF answers for the gateway; without it, IPv6 would not (the kernel
                // only speaks for addresses of the link that it is asked on).
                Shape::Cilium => {
                    inside.add_neighbour(gateway, &pod.host.mac, POD_LINK)?;
                    node.add_neighbour(ip, &pod.own.mac, &pod.host_link)?;
                }
                Shape::Ptp => {
                    inside.add_route(pod_net.subnet()?, Some(gateway), POD_LINK)?;
                    node.add_address(&pod.host_link, gateway.into(), Subnet::NoRoute)?;
                }
                Shape::Bridge | Shape::Mixed => {}
            }
        }
        Ok(pod)
    }

    fn wire_bypass(&self, node: &mut Links) -> Result<(), LabError> {
        for from in &self.pods {
            node.add_clsact(&from.host_link)?;
            for to in self.pods.iter().filter(|to| to.name != from.name) {
                for network in &to.addresses {
                    node.redirect(&from.host_link, network.ip(), &to.host_link)?;
                }
            }
        }
        Ok(())
    }
}

/// Settings that a new namespace would otherwise take over from the machine, or that cost time.
fn prepare(netns: &Netns) -> Result<(), LabError> {
    // "Port unreachable" is how a caller learns that a UDP port is closed; by default the kernel
    // sends a peer only a few of them a second, and none right after a redirect.
    netns.set_sysctl("ipv4/icmp_ratemask", "0")?;
    if kernel_has_ipv6() {
        netns.set_sysctl("ipv6/icmp/ratelimit", "0")?;
    }
    for key in ["all", "default"] {
        for (setting, value) in [("forwarding", "0"), ("rp_filter", "0"), ("route_localnet", "0")] {
            netns.set_sysctl(&format!("ipv4/conf/{key}/{setting}"), value)?;
        }
        if kernel_has_ipv6() {
            // Link-local addresses too are to work at once.
            netns.set_sysctl(&format!("ipv6/conf/{key}/accept_dad"), "0")?;
            netns.set_sysctl(&format!("ipv6/conf/{key}/disable_ipv6"), "0")?;
        }
    }
    Ok(())
}
