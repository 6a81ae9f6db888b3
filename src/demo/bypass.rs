//! Delivery between pods of one node that never reaches netfilter, as Cilium's eBPF does it.
//!
//! A packet that arrives from a pod is redirected to the other pod's link at tc ingress, before the
//! node's IP layer sees it. So the node's connection tracking knows only one direction of a
//! connection that it translated, and cannot translate the answers back (cilium#9784).

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::LabError;
use super::links::Links;

/// Filters of one link and direction are ordered by priority; one each, since a priority holds
/// filters of one packet type only. They come late, so that filters under test run first.
const PRIORITY_V4: u32 = 0xC001;
const PRIORITY_V6: u32 = 0xC002;

impl Links {
    /// Gives a link the hook that [`Links::redirect`] needs.
    pub fn add_clsact(&mut self, name: &str) -> Result<(), LabError> {
        let mut message = tc_message(self.link(name)?.index);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
        message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        let step = format!("adding clsact to {name}");
        self.send(&step, message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// What arrives on link `from` for `destination` leaves at once over link `to`, unchanged.
    pub fn redirect(&mut self, from: &str, destination: IpAddr, to: &str) -> Result<(), LabError> {
        let mut message = tc_message(self.link(from)?.index);
        message.header.parent =
            TcHandle { major: TcHandle::CLSACT.major, minor: TcHandle::MIN_INGRESS };
        // Priority in the upper half, packet type (network byte order) in the lower.
        let (priority, ethertype) = match destination {
            IpAddr::V4(_) => (PRIORITY_V4, libc::ETH_P_IP as u16),
            IpAddr::V6(_) => (PRIORITY_V6, libc::ETH_P_IPV6 as u16),
        };
        message.header.info = priority << 16 | u32::from(ethertype.to_be());

        let mut mirror = TcMirror::default();
        mirror.generic = TcActionGeneric::default();
        mirror.generic.action = TcActionType::Stolen;
        mirror.eaction = TcMirrorActionType::EgressRedir;
        mirror.ifindex = self.link(to)?.index;
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind("mirred".to_owned()),
            TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
                mirror,
            ))]),
        ];
        // u32 rather than flower or matchall: it has been in every kernel that has tc at all.
        message.attributes = vec![
            TcAttribute::Kind("u32".to_owned()),
            TcAttribute::Options(vec![
                TcOption::U32(TcFilterU32Option::Selector(selector(destination))),
                TcOption::U32(TcFilterU32Option::Action(vec![action])),
            ]),
        ];
        let message = RouteNetlinkMessage::NewTrafficFilter(message);
        let step = format!("redirecting {destination} from {from} to {to}");
        self.send(&step, message, NLM_F_CREATE | NLM_F_EXCL)
    }
}

fn tc_message(index: u32) -> TcMessage {
    TcMessage::with_index(index.cast_signed())
}

/// Matches the destination address in the IP header, 32 bits at a time.
fn selector(destination: IpAddr) -> TcU32Selector {
    let (offset, bytes) = match destination {
        IpAddr::V4(ip) => (16, ip.octets().to_vec()),
        IpAddr::V6(ip) => (24, ip.octets().to_vec()),
    };
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.keys = bytes
        .chunks_exact(4)
        .zip((offset..).step_by(4))
        .map(|(word, offset)| {
            let mut key = TcU32Key::default();
            key.mask = u32::MAX;
            key.val = word.iter().fold(0, |value, byte| value << 8 | u32::from(*byte));
            key.off = offset;
            key
        })
        .collect();
    selector.nkeys = if destination.is_ipv4() { 1 } else { 4 };
    selector
}
