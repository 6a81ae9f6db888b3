//! Links, addresses, routes and neighbours of a laboratory namespace, through rtnetlink.

use std::io;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkHeader, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::LabError;
use super::netns::Netns;
use crate::sys::netlink::attributes::find;
use crate::sys::netlink::socket::{Message, NetlinkSocket};

/// A link as the kernel numbers and addresses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    /// Six bytes for Ethernet-like links.
    pub mac: Vec<u8>,
}

impl Link {
    /// The hardware address as `aa:bb:cc:dd:ee:ff`.
    #[must_use]
    pub fn mac_text(&self) -> String {
        let bytes: Vec<_> = self.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        bytes.join(":")
    }
}

/// How the kernel treats the subnet of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subnet {
    /// A route to the prefix is made, as by `ip address add`.
    OnLink,
    /// No route is made (`noprefixroute`): the caller gives all routes.
    NoRoute,
}

/// An rtnetlink socket of one namespace.
pub struct Links {
    place: String,
    pub(super) socket: NetlinkSocket,
}

impl Links {
    /// Opens the socket inside `netns`; it stays there whichever thread uses it.
    pub fn open(netns: &Netns) -> Result<Self, LabError> {
        let place = netns.name().to_owned();
        let socket =
            netns.run(|| NetlinkSocket::open(NETLINK_ROUTE)).and_then(|opened| opened).map_err(
                |source| LabError::Step { step: format!("{place}: opening rtnetlink"), source },
            )?;
        Ok(Self { place, socket })
    }

    /// Makes a pair of connected links: `name` here and `peer_name` in `peer`. Both are down.
    pub fn add_veth(&mut self, name: &str, peer_name: &str, peer: &Netns) -> Result<(), LabError> {
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer_name.to_owned()),
            LinkAttribute::NetNsFd(peer.raw_fd()),
        ];
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        self.create_link(&format!("adding veth {name}"), message)
    }

    /// Makes a bridge, down and without ports. Its default is what CNI's bridge plugin starts from:
    /// no spanning tree, hairpin off on every port.
    pub fn add_bridge(&mut self, name: &str) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.create_link(&format!("adding bridge {name}"), message)
    }

    fn create_link(&mut self, step: &str, message: LinkMessage) -> Result<(), LabError> {
        let message = RouteNetlinkMessage::NewLink(message);
        self.send(step, message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Looks a link up by name.
    pub fn link(&mut self, name: &str) -> Result<Link, LabError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        let step = format!("{}: looking up link {name}", self.place);
        self.socket
            .request(&Message::of(&RouteNetlinkMessage::GetLink(message)), 0, |kind, payload| {
                (kind == libc::RTM_NEWLINK).then(|| found(payload)).flatten()
            })
            .and_then(|found| {
                found.into_iter().next().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
            })
            .map_err(|source| LabError::Step { step, source })
    }

    /// Sets a link up.
    pub fn set_up(&mut self, name: &str) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.header.index = self.link(name)?.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        let message = RouteNetlinkMessage::SetLink(message);
        self.send(&format!("setting {name} up"), message, 0)
    }

    /// Sets a link's MAC address.
    pub fn set_mac(&mut self, name: &str, mac: [u8; 6]) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.header.index = self.link(name)?.index;
        message.attributes = vec![LinkAttribute::Address(mac.to_vec())];
        let message = RouteNetlinkMessage::SetLink(message);
        self.send(&format!("setting the MAC address of {name}"), message, 0)
    }

    /// Makes a link a port of a bridge.
    pub fn set_bridge(&mut self, name: &str, bridge: &str) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.header.index = self.link(name)?.index;
        message.attributes = vec![LinkAttribute::Controller(self.link(bridge)?.index)];
        let message = RouteNetlinkMessage::SetLink(message);
        self.send(&format!("adding {name} to {bridge}"), message, 0)
    }

    /// Deletes a link, and with it its peer.
    pub fn delete(&mut self, name: &str) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.header.index = self.link(name)?.index;
        let message = RouteNetlinkMessage::DelLink(message);
        self.send(&format!("deleting {name}"), message, 0)
    }

    /// Gives a link an address. IPv6 addresses are usable at once: duplicate address detection,
    /// which takes a second or two, is off for them.
    pub fn add_address(
        &mut self,
        name: &str,
        address: IpNetwork,
        subnet: Subnet,
    ) -> Result<(), LabError> {
        let mut flags = AddressFlags::empty();
        flags.set(AddressFlags::Nodad, address.is_ipv6());
        flags.set(AddressFlags::Noprefixroute, subnet == Subnet::NoRoute);
        let mut message = AddressMessage::default();
        message.header.family = family(&address.ip());
        message.header.prefix_len = address.prefix();
        message.header.index = self.link(name)?.index;
        // IPv4 takes the address from IFA_LOCAL, IPv6 from either.
        message.attributes = vec![
            AddressAttribute::Local(address.ip()),
            AddressAttribute::Address(address.ip()),
            AddressAttribute::Flags(flags),
        ];
        let message = RouteNetlinkMessage::NewAddress(message);
        let step = format!("adding {address} to {name}");
        self.send(&step, message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a route to the main table: through a gateway, or directly over the link (scope `link`
    /// for IPv4, which is what the kernel demands of a next hop's own route).
    pub fn add_route(
        &mut self,
        to: IpNetwork,
        via: Option<IpAddr>,
        name: &str,
    ) -> Result<(), LabError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(&to.ip());
        message.header.destination_prefix_length = to.prefix();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = RouteType::Unicast;
        message.header.scope = match via {
            Some(_) => RouteScope::Universe,
            None => RouteScope::Link,
        };
        message.attributes = vec![RouteAttribute::Oif(self.link(name)?.index)];
        if to.prefix() > 0 {
            let to = RouteAttribute::Destination(to.network().into());
            message.attributes.push(to);
        }
        if let Some(via) = via {
            message.attributes.push(RouteAttribute::Gateway(via.into()));
        }
        let message = RouteNetlinkMessage::NewRoute(message);
        let step = format!("adding a route to {to} over {name}");
        self.send(&step, message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// States for good which hardware address a neighbour has, so that nothing is asked for it.
    pub fn add_neighbour(&mut self, ip: IpAddr, mac: &[u8], name: &str) -> Result<(), LabError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(&ip);
        message.header.ifindex = self.link(name)?.index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            NeighbourAttribute::Destination(match ip {
                IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
                IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
            }),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        let message = RouteNetlinkMessage::NewNeighbour(message);
        let step = format!("adding neighbour {ip} to {name}");
        self.send(&step, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    pub(super) fn send(
        &mut self,
        step: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), LabError> {
        self.socket
            .request(&Message::of(&message), flags, |_, _| None::<()>)
            .map(drop)
            .map_err(|source| LabError::Step { step: format!("{}: {step}", self.place), source })
    }
}

/// `payload`: `struct ifinfomsg` and attributes. Not by the crate's own parser: those of all kinds of
/// messages, devices and filters would come with it, a twelfth of the binary.
fn found(payload: &[u8]) -> Option<Link> {
    let header = LinkHeader::parse(payload).ok()?;
    let mac = find(payload.get(header.buffer_len()..)?, libc::IFLA_ADDRESS);
    Some(Link { index: header.index, mac: mac.map(<[u8]>::to_vec).unwrap_or_default() })
}

fn family(ip: &IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
