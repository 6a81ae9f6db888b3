//! Links, addresses and routes of this network namespace (`NETLINK_ROUTE`).

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, parse_ip, parse_u32};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressHeader, AddressScope};
use netlink_packet_route::link::{LinkFlags, LinkHeader};
use netlink_packet_route::route::{RouteHeader, RouteType};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::attributes::{attributes, find, text};
use super::socket::{Message, NetlinkSocket};
use crate::model::Family;
use crate::sys::bpf::cookie;

const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// What `ip -d link` calls the type: "veth", "bridge", "vlan". Physical devices have none.
    pub kind: Option<String>,
    /// Index of the bridge, bond or VRF that the device belongs to.
    pub master: Option<u32>,
    /// Index of the device underneath (vlan, macvlan) or at the other end (veth). It may lie in
    /// another network namespace, and so be the number of an unrelated device here.
    pub peer: Option<u32>,
    /// Administratively up (`IFF_UP`); says nothing about the carrier.
    pub up: bool,
    pub loopback: bool,
    /// `ARPHRD_*` of linux/if_arp.h: what its packets begin with.
    pub hardware: u16,
    /// The device's own address; `None` if it is not of 6 bytes.
    pub mac: Option<[u8; 6]>,
}

impl Link {
    /// Whether packets of the device begin with an Ethernet header.
    #[must_use]
    pub fn has_frames(&self) -> bool {
        matches!(self.hardware, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK)
    }
}

/// An address of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Index of the device that carries it.
    pub index: u32,
    /// The node's own address, also on point-to-point devices.
    pub ip: IpAddr,
    /// Prefix length in bits. On point-to-point devices it belongs to the other end's address.
    pub prefix: u8,
    /// Of scope universe: neither link-local nor of the host only.
    pub global: bool,
}

/// A next hop of a default route in the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    pub family: Family,
    /// Index of the output device.
    pub index: u32,
}

/// Where the node sends packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Index of the output device.
    pub device: u32,
    /// The address that the node's own sockets have as their source then.
    pub source: Option<IpAddr>,
    /// They end at the node itself.
    pub local: bool,
}

/// Reads devices, addresses and routes of the network namespace of the thread that opened it.
pub struct RouteReader {
    socket: NetlinkSocket,
}

impl RouteReader {
    /// # Errors
    ///
    /// What making the socket returned.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: NetlinkSocket::open(NETLINK_ROUTE)? })
    }

    /// All network devices.
    ///
    /// # Errors
    ///
    /// As [`NetlinkSocket::dump`].
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        // Leaves out the IPv6 counters, a good part of an entry; old kernels ignore the flag.
        let skip = libc::RTEXT_FILTER_SKIP_STATS.to_ne_bytes().to_vec();
        let request = Message::new(
            libc::RTM_GETLINK,
            &LinkHeader::default(),
            &[DefaultNla::new(libc::IFLA_EXT_MASK, skip)],
        );
        self.socket.dump(&request, |kind, payload| {
            (kind == libc::RTM_NEWLINK).then(|| link(payload)).flatten()
        })
    }

    /// The indices of the devices with these names, in their order; `None` for one that is not there.
    ///
    /// # Errors
    ///
    /// As [`NetlinkSocket::request`].
    pub fn indices<const N: usize>(&mut self, names: [&str; N]) -> io::Result<[Option<u32>; N]> {
        let requests = names.map(|name| {
            let name = DefaultNla::new(libc::IFLA_IFNAME, [name.as_bytes(), &[0]].concat());
            Message::new(libc::RTM_GETLINK, &LinkHeader::default(), &[name])
        });
        let answers = self.socket.ask_all(&requests, |kind, payload| {
            (kind == libc::RTM_NEWLINK).then(|| LinkHeader::parse(payload).ok())?
        })?;
        let mut indices = [None; N];
        for (index, answer) in indices.iter_mut().zip(answers) {
            *index = match answer {
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => None,
                other => other?.map(|header| header.index),
            };
        }
        Ok(indices)
    }

    /// The cookie of the network namespace that the questions are about; `None` from a kernel that does
    /// not tell processes (before 5.14).
    ///
    /// # Errors
    ///
    /// What getsockopt(2) returns.
    pub fn netns_cookie(&self) -> io::Result<Option<u64>> {
        cookie::of(&self.socket.descriptor())
    }

    /// All addresses of both families.
    ///
    /// # Errors
    ///
    /// As [`NetlinkSocket::dump`].
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let request = Message::new::<DefaultNla>(libc::RTM_GETADDR, &AddressHeader::default(), &[]);
        self.socket.dump(&request, |kind, payload| {
            (kind == libc::RTM_NEWADDR).then(|| address(payload)).flatten()
        })
    }

    /// The default routes of the main table, one entry for each next hop, in the kernel's order
    /// (IPv4 first). Routes that lead nowhere (`unreachable default`) are left out.
    ///
    /// Where `net.ipv4.nexthop_compat_mode` is 0, routes through a next hop object do not name their
    /// device, and are left out as well.
    ///
    /// # Errors
    ///
    /// As [`NetlinkSocket::dump`].
    pub fn default_routes(&mut self) -> io::Result<Vec<DefaultRoute>> {
        // A node that speaks BGP has many thousand routes, and every node has its local table.
        self.socket.filter_dumps();
        let mut found = Vec::new();
        for family in Family::ALL {
            let header = RouteHeader {
                address_family: address_family(family),
                table: RouteHeader::RT_TABLE_MAIN,
                ..RouteHeader::default()
            };
            let request = Message::new::<DefaultNla>(libc::RTM_GETROUTE, &header, &[]);
            let dump = self.socket.dump(&request, |kind, payload| {
                (kind == libc::RTM_NEWROUTE).then(|| default_route(payload))
            });
            match dump {
                Ok(routes) => found.extend(
                    routes.into_iter().flatten().map(|index| DefaultRoute { family, index }),
                ),
                // The main table comes into being with its first route; a filtered dump of a missing
                // one is refused. A kernel without IPv6 knows no such routes.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT)
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// How the node sends packets for `ip`: over `lo` to its own addresses. `None` without a route, or
    /// with one that refuses or drops packets.
    ///
    /// # Errors
    ///
    /// As [`NetlinkSocket::request`].
    pub fn route_to(&mut self, ip: IpAddr) -> io::Result<Option<Route>> {
        let request = route_request(ip);
        let answer = self
            .socket
            .ask(&request, |kind, payload| (kind == libc::RTM_NEWROUTE).then(|| route(payload))?);
        match answer {
            Ok(route) => Ok(route),
            // Routes of type prohibit, blackhole and throw answer with these three, in this order
            // (`fib_props`, `ip6_rt_type_to_error`); the first two errors mean no or an unreachable
            // route. EAFNOSUPPORT and EOPNOTSUPP: a kernel without IPv6.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(
                        libc::ENETUNREACH
                            | libc::EHOSTUNREACH
                            | libc::EACCES
                            | libc::EINVAL
                            | libc::EAGAIN
                            | libc::EAFNOSUPPORT
                            | libc::EOPNOTSUPP
                    )
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn route_request(ip: IpAddr) -> Message {
    let family = Family::of(&ip);
    let header = RouteHeader {
        address_family: address_family(family),
        destination_prefix_length: family.max_prefix(),
        ..RouteHeader::default()
    };
    let octets = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let destination = DefaultNla::new(libc::RTA_DST, octets);
    Message::new(libc::RTM_GETROUTE, &header, &[destination])
}

fn index(value: &[u8]) -> Option<u32> {
    parse_u32(value).ok().filter(|index| *index != 0)
}

/// `payload`: `struct ifinfomsg` and attributes.
fn link(payload: &[u8]) -> Option<Link> {
    let header = LinkHeader::parse(payload).ok()?;
    let mut link = Link {
        index: header.index,
        name: String::new(),
        kind: None,
        master: None,
        peer: None,
        up: header.flags.contains(LinkFlags::Up),
        loopback: header.flags.contains(LinkFlags::Loopback),
        hardware: header.link_layer_type.into(),
        mac: None,
    };
    for (kind, value) in attributes(payload.get(LINK_HEADER..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok(),
            libc::IFLA_MASTER => link.master = index(value),
            libc::IFLA_LINK => link.peer = index(value),
            libc::IFLA_LINKINFO => link.kind = find(value, libc::IFLA_INFO_KIND).map(text),
            _ => {}
        }
    }
    Some(link)
}

/// `payload`: `struct ifaddrmsg` and attributes.
fn address(payload: &[u8]) -> Option<Address> {
    let header = AddressHeader::parse(payload).ok()?;
    let rest = payload.get(ADDRESS_HEADER..)?;
    // IFA_ADDRESS is the other end's address on a point-to-point device. IPv6 sends IFA_LOCAL
    // there only, IPv4 always.
    let own = find(rest, libc::IFA_LOCAL).or_else(|| find(rest, libc::IFA_ADDRESS))?;
    Some(Address {
        index: header.index,
        ip: parse_ip(own).ok()?,
        prefix: header.prefix_len,
        global: header.scope == AddressScope::Universe,
    })
}

/// Indices of the output devices if `payload` (`struct rtmsg` and attributes) is a default route
/// of the main table, else nothing.
fn default_route(payload: &[u8]) -> Vec<u32> {
    let usable = RouteHeader::parse(payload).is_ok_and(|header| {
        header.destination_prefix_length == 0
            && header.source_prefix_length == 0
            && header.table == RouteHeader::RT_TABLE_MAIN
            && header.kind == RouteType::Unicast
    });
    let rest = payload.get(ROUTE_HEADER..).unwrap_or_default();
    if !usable {
        return Vec::new();
    }
    match find(rest, libc::RTA_MULTIPATH) {
        Some(hops) => next_hops(hops),
        None => find(rest, libc::RTA_OIF).and_then(index).into_iter().collect(),
    }
}

/// `hops`: several `struct rtnexthop` (length, flags, hops, device), each with attributes.
fn next_hops(mut hops: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    while let Some((head, _)) = hops.split_first_chunk::<8>() {
        found.extend(index(&head[4..]));
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]])).next_multiple_of(4);
        hops = hops.get(length.max(8)..).unwrap_or_default();
    }
    found
}

fn route(payload: &[u8]) -> Option<Route> {
    let header = RouteHeader::parse(payload).ok()?;
    // IPv6 answers for an unreachable route with the route itself on some kernels.
    if matches!(
        header.kind,
        RouteType::Unreachable | RouteType::BlackHole | RouteType::Prohibit | RouteType::Throw
    ) {
        return None;
    }
    let rest = payload.get(ROUTE_HEADER..)?;
    Some(Route {
        device: find(rest, libc::RTA_OIF).and_then(index)?,
        source: find(rest, libc::RTA_PREFSRC).and_then(|source| parse_ip(source).ok()),
        local: header.kind == RouteType::Local,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use netlink_packet_core::Emitable;

    use super::*;

    /// A device as rtnetlink tells it, of the kinds that the plugin tells apart.
    pub(crate) fn a_link(index: u32, name: &str, kind: Option<&str>, master: Option<u32>) -> Link {
        Link {
            index,
            name: name.into(),
            kind: kind.map(Into::into),
            master,
            peer: None,
            up: true,
            loopback: name == "lo",
            hardware: match kind {
                Some("wireguard") => libc::ARPHRD_NONE,
                _ => libc::ARPHRD_ETHER,
            },
            mac: None,
        }
    }

    fn nla(kind: u16, value: &[u8]) -> DefaultNla {
        DefaultNla::new(kind, value.to_vec())
    }

    fn payload(header: &impl Emitable, attributes: &[DefaultNla]) -> Vec<u8> {
        Message::new(0, header, attributes).payload().to_vec()
    }

    #[test]
    fn a_veth_in_a_bridge() {
        let header = LinkHeader {
            index: 7,
            flags: LinkFlags::Up,
            link_layer_type: libc::ARPHRD_ETHER.into(),
            ..LinkHeader::default()
        };
        // IFLA_INFO_KIND = "veth", and IFLA_INFO_DATA, which is not looked at.
        let info = [9, 0, 1, 0, b'v', b'e', b't', b'h', 0, 0, 0, 0, 5, 0, 2, 0, 9, 0, 0, 0];
        let mut attributes = vec![
            nla(libc::IFLA_IFNAME, b"veth1.2\0"),
            nla(libc::IFLA_LINK, &2_u32.to_ne_bytes()),
            nla(libc::IFLA_MASTER, &3_u32.to_ne_bytes()),
            nla(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 9]),
            nla(libc::IFLA_LINKINFO, &info),
            nla(60_000, b"of a later kernel"),
        ];
        let expected = Link {
            index: 7,
            name: "veth1.2".into(),
            kind: Some("veth".into()),
            master: Some(3),
            peer: Some(2),
            up: true,
            loopback: false,
            hardware: 1,
            mac: Some([2, 0, 0, 0, 0, 9]),
        };
        assert!(expected.has_frames());
        assert_eq!(link(&payload(&header, &attributes)).unwrap(), expected);
        // The kernel sends 0 for a veth whose other end is being removed, or for a tunnel.
        attributes[1] = nla(libc::IFLA_LINK, &[0; 4]);
        assert_eq!(link(&payload(&header, &attributes)).unwrap().peer, None);
    }

    #[test]
    fn a_tunnel_has_no_frames_and_an_ip_address_as_its_own() {
        let link_layer_type = libc::ARPHRD_TUNNEL.into();
        let header = LinkHeader { link_layer_type, ..LinkHeader::default() };
        let own = nla(libc::IFLA_ADDRESS, &[192, 0, 2, 1]);
        let tunnel = link(&payload(&header, &[own])).unwrap();
        assert!(!tunnel.has_frames());
        assert_eq!((tunnel.hardware, tunnel.mac), (768, None));
    }

    #[test]
    fn the_local_address_wins_over_the_peers() {
        let header = AddressHeader { prefix_len: 32, index: 4, ..AddressHeader::default() };
        let peer = nla(libc::IFA_ADDRESS, &[192, 0, 2, 2]);
        let own = nla(libc::IFA_LOCAL, &[192, 0, 2, 1]);
        let both = address(&payload(&header, &[peer.clone(), own])).unwrap();
        assert_eq!(both.ip.to_string(), "192.0.2.1");
        assert!(both.global);
        let one = address(&payload(&header, &[peer])).unwrap();
        assert_eq!((one.ip.to_string().as_str(), one.prefix), ("192.0.2.2", 32));
        assert!(address(&payload(&header, &[])).is_none());
    }

    fn main_route(kind: RouteType, length: u8, table: u8) -> RouteHeader {
        RouteHeader { kind, destination_prefix_length: length, table, ..RouteHeader::default() }
    }

    #[test]
    fn only_usable_default_routes_count() {
        let device = [nla(libc::RTA_OIF, &5_u32.to_ne_bytes())];
        let of = |kind, length, table| {
            default_route(&payload(&main_route(kind, length, table), &device))
        };
        assert_eq!(of(RouteType::Unicast, 0, 254), [5]);
        assert!(of(RouteType::Unicast, 24, 254).is_empty());
        assert!(of(RouteType::Unicast, 0, 255).is_empty());
        assert!(of(RouteType::Unreachable, 0, 254).is_empty());
        assert!(default_route(b"short").is_empty());
    }

    #[test]
    fn every_next_hop_counts() {
        let mut hops = Vec::new();
        for device in [5_u32, 6] {
            hops.extend([16, 0, 0, 0]); // length, flags, weight
            hops.extend(device.to_ne_bytes());
            hops.extend([8, 0, 5, 0, 192, 0, 2, 1]); // RTA_GATEWAY
        }
        let header = main_route(RouteType::Unicast, 0, 254);
        let route = payload(&header, &[nla(libc::RTA_MULTIPATH, &hops)]);
        assert_eq!(default_route(&route), [5, 6]);
        // A length of 0 must not loop for ever.
        assert_eq!(next_hops(&[0, 0, 0, 0, 1, 0, 0, 0]), [1]);
    }

    #[test]
    fn a_route_request_names_a_host() {
        let request = route_request("192.0.2.1".parse().unwrap());
        assert_eq!(request.payload()[..4], [2, 32, 0, 0]);
        assert_eq!(request.payload()[12..], [8, 0, 1, 0, 192, 0, 2, 1]);
        let request = route_request("2001:db8::1".parse().unwrap());
        assert_eq!(request.payload()[..4], [10, 128, 0, 0]);
        assert_eq!(request.payload().len(), 12 + 20);
    }
}
