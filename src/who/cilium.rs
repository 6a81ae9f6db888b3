//! What Cilium's kube-proxy replacement has in its maps. Pure.
//!
//! Keys and values are as in Cilium's `bpf/lib/common.h`: `struct lb4_key` (address, port, slot, protocol,
//! scope) and `lb4_service` (flags behind backend, count and index), the same for IPv6 with a longer
//! address. They have kept this form since `_v2` (Cilium 1.6).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::{Claim, Family};

/// Where Cilium pins the map of a family's services.
#[must_use]
pub fn map_path(family: Family) -> &'static str {
    match family {
        Family::V4 => "/sys/fs/bpf/tc/globals/cilium_lb4_services_v2",
        Family::V6 => "/sys/fs/bpf/tc/globals/cilium_lb6_services_v2",
    }
}

/// `SVC_FLAG_NODEPORT`, `SVC_FLAG_HOSTPORT`.
const NODEPORT: u8 = 1 << 1;
const HOSTPORT: u8 = 1 << 3;

/// Keys and values of a map.
pub type Entries = Vec<(Vec<u8>, Vec<u8>)>;

/// A frontend of Cilium's that calls may be meant for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frontend {
    /// Unspecified: any address of the node.
    pub address: IpAddr,
    /// Cilium's own word for it.
    pub kind: &'static str,
}

/// The frontends that take a call; entries that are not of the known form are left out.
#[must_use]
pub fn frontends(call: &Claim, entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<Frontend> {
    let mut found: Vec<Frontend> =
        entries.iter().filter_map(|(key, value)| frontend(call, key, value)).collect();
    found.sort_by_key(|frontend| frontend.address);
    found
}

fn frontend(call: &Claim, key: &[u8], value: &[u8]) -> Option<Frontend> {
    let (address, rest): (IpAddr, &[u8]) = match call.family {
        Family::V4 => {
            let (ip, rest) = key.split_first_chunk::<4>()?;
            (Ipv4Addr::from(*ip).into(), rest)
        }
        Family::V6 => {
            let (ip, rest) = key.split_first_chunk::<16>()?;
            (Ipv6Addr::from(*ip).into(), rest)
        }
    };
    let port = u16::from_be_bytes(*rest.first_chunk()?);
    let slot = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
    let protocol = rest.get(4)?;
    let flags = *value.get(8)?;
    // 0 is any, before Cilium told protocols apart.
    let same_protocol = *protocol == 0 || *protocol == call.protocol.number();
    let same_address =
        address.is_unspecified() || call.address.is_none_or(|called| called == address);
    let kind = match flags {
        flags if flags & HOSTPORT != 0 => "hostPort",
        flags if flags & NODEPORT != 0 => "NodePort",
        _ => return None,
    };
    // Other slots are the frontend's backends.
    (slot == 0 && port == call.port && same_protocol && same_address)
        .then_some(Frontend { address, kind })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::model::Protocol;

    fn entry(address: &str, port: u16, slot: u16, protocol: u8, flags: u8) -> (Vec<u8>, Vec<u8>) {
        let mut key = match address.parse().unwrap() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        key.extend(port.to_be_bytes());
        key.extend(slot.to_ne_bytes());
        key.extend([protocol, 0, 0, 0]);
        (key, vec![0, 0, 0, 0, 1, 0, 1, 0, flags, 0, 0, 0])
    }

    #[test]
    fn frontends_are_those_of_the_port() {
        let call = |family, address: Option<&str>| Claim {
            family,
            protocol: Protocol::Tcp,
            address: address.map(|ip| ip.parse().unwrap()),
            port: 8080,
        };
        let entries = [
            entry("0.0.0.0", 8080, 0, 6, HOSTPORT),
            entry("192.0.2.1", 8080, 0, 0, NODEPORT),
            entry("192.0.2.1", 8080, 1, 6, NODEPORT),
            entry("192.0.2.1", 8081, 0, 6, NODEPORT),
            entry("192.0.2.1", 8080, 0, 17, NODEPORT),
            entry("10.96.0.1", 8080, 0, 6, 0),
            (vec![1, 2, 3], vec![]),
        ];
        let found = |address| -> Vec<String> {
            frontends(&call(Family::V4, address), &entries)
                .iter()
                .map(|one| format!("{} {}", one.kind, one.address))
                .collect()
        };
        assert_eq!(found(None), ["hostPort 0.0.0.0", "NodePort 192.0.2.1"]);
        assert_eq!(found(Some("192.0.2.1")), ["hostPort 0.0.0.0", "NodePort 192.0.2.1"]);
        assert_eq!(found(Some("192.0.2.2")), ["hostPort 0.0.0.0"]);
        let six = [entry("::", 8080, 0, 6, HOSTPORT)];
        assert_eq!(frontends(&call(Family::V6, None), &six).len(), 1);
    }
}
