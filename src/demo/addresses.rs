//! The addresses and names of the laboratory. All prefixes are for documentation or private use.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use super::LabError;
use super::topology::Shape;
use crate::model::Family;

/// The two ends of a subnet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub near: IpAddr,
    pub far: IpAddr,
    pub prefix: u8,
}

/// Node and client, indexed by family.
pub(super) const UPLINK: [Ends; 2] = [
    Ends {
        near: IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
        far: IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2)),
        prefix: 24,
    },
    Ends {
        near: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x51, 0, 0, 0, 0, 0, 1)),
        far: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x51, 0, 0, 0, 0, 0, 2)),
        prefix: 64,
    },
];

/// The node's second addresses, indexed by family.
pub(super) const SECOND: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x192, 0, 0, 0, 0, 0, 1)),
];

/// Pod number 0 has this last part of the address.
const FIRST_POD: u8 = 7;

/// The pods' addresses of one family.
#[derive(Debug, Clone, Copy)]
pub(super) struct PodNet {
    pub gateway: IpAddr,
    pub prefix: u8,
}

impl PodNet {
    /// The address of pod `number`: the gateway's with another last part.
    pub fn pod(self, number: usize) -> IpAddr {
        let last = FIRST_POD.saturating_add(u8::try_from(number).unwrap_or(u8::MAX));
        match self.gateway {
            IpAddr::V4(gateway) => {
                let [a, b, c, _] = gateway.octets();
                Ipv4Addr::new(a, b, c, last).into()
            }
            IpAddr::V6(gateway) => {
                let [a, b, c, d, e, f, g, _] = gateway.segments();
                Ipv6Addr::new(a, b, c, d, e, f, g, last.into()).into()
            }
        }
    }

    /// The subnet that holds all of them.
    pub fn subnet(self) -> Result<IpNetwork, LabError> {
        let address = network(self.gateway, self.prefix)?;
        network(address.network(), self.prefix)
    }
}

pub(super) fn pod_net(shape: Shape, family: Family) -> PodNet {
    let v6 = |subnet, gateway| Ipv6Addr::new(0xfd00, subnet, 0, 0, 0, 0, gateway, 0xfe);
    let (gateway, prefix) = match (shape, family) {
        (Shape::Cilium, Family::V4) => (Ipv4Addr::new(10, 0, 1, 254).into(), 24),
        (Shape::Cilium, Family::V6) => (v6(0x10, 1).into(), 64),
        // Of the pods that have a link of their own.
        (Shape::Ptp | Shape::Mixed, Family::V4) => (Ipv4Addr::new(10, 0, 2, 254).into(), 24),
        (Shape::Ptp | Shape::Mixed, Family::V6) => (v6(0x20, 0).into(), 64),
        (Shape::Bridge, Family::V4) => (Ipv4Addr::new(10, 0, 3, 254).into(), 24),
        (Shape::Bridge, Family::V6) => (v6(0x30, 0).into(), 64),
    };
    PodNet { gateway, prefix }
}

/// `0.0.0.0/0` or `::/0`.
pub(super) fn default_of(family: Family) -> Result<IpNetwork, LabError> {
    let unspecified = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    network(unspecified, 0)
}

/// `pod-a` for 0, `pod-b` for 1; from 26 on with the number.
pub(super) fn pod_name(number: usize) -> String {
    match u8::try_from(number) {
        Ok(number) if number < 26 => format!("pod-{}", char::from(b'a' + number)),
        _ => format!("pod-{number}"),
    }
}

/// The node's end of a pod's link, named as the shape's real plugin names it; at most 15 bytes.
pub(super) fn host_link(shape: Shape, number: usize) -> String {
    match shape {
        Shape::Cilium => format!("lxc{:012x}", 0x2d3a_4b5c_0000 + number),
        Shape::Ptp | Shape::Bridge | Shape::Mixed => format!("veth{:08x}", 0x2823_0000 + number),
    }
}

pub(super) fn network(ip: IpAddr, prefix: u8) -> Result<IpNetwork, LabError> {
    IpNetwork::new(ip, prefix).map_err(|error| LabError::Step {
        step: format!("address {ip}/{prefix}"),
        source: io::Error::other(error),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test says by a panic that it failed")]
mod tests {
    use super::*;

    #[test]
    fn pods_have_names_links_and_addresses_of_their_own() {
        assert_eq!(pod_name(0), "pod-a");
        assert_eq!(pod_name(26), "pod-26");
        for shape in [Shape::Cilium, Shape::Ptp, Shape::Bridge] {
            assert_ne!(host_link(shape, 0), host_link(shape, 1));
            // IFNAMSIZ is 16, with the final zero.
            assert!(host_link(shape, 199).len() <= 15);
            for family in Family::ALL {
                let net = pod_net(shape, family);
                let subnet = net.subnet().unwrap();
                assert_eq!(subnet.ip(), subnet.network());
                assert!(subnet.contains(net.pod(0)) && subnet.contains(net.pod(199)));
                assert_ne!(net.pod(0), net.pod(1));
            }
        }
    }

    #[test]
    fn default_routes_cover_everything() {
        assert_eq!(default_of(Family::V4).unwrap().to_string(), "0.0.0.0/0");
        assert_eq!(default_of(Family::V6).unwrap().to_string(), "::/0");
    }
}
