//! Policy routing rules of this network namespace (`ip rule`).

use std::io;

use netlink_packet_core::{DefaultNla, parse_u32};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::rule::RuleHeader;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::attributes::attributes;
use super::socket::{Message, NetlinkSocket};

/// `struct fib_rule_hdr`.
const HEADER: usize = 12;
/// linux/fib_rules.h.
const FRA_FWMARK: u16 = 10;
const FRA_FWMASK: u16 = 16;

/// The packet marks that IPv4 rules look at, each with its mask.
///
/// # Errors
///
/// As [`NetlinkSocket::dump`].
pub fn marks() -> io::Result<Vec<(u32, u32)>> {
    let header = RuleHeader { family: AddressFamily::Inet, ..RuleHeader::default() };
    let request = Message::new::<DefaultNla>(libc::RTM_GETRULE, &header, &[]);
    NetlinkSocket::open(NETLINK_ROUTE)?.dump(&request, |kind, payload| {
        (kind == libc::RTM_NEWRULE).then(|| mark(payload)).flatten()
    })
}

fn mark(payload: &[u8]) -> Option<(u32, u32)> {
    // The kernel sends the mask with every mark, and neither for a rule without one.
    let (mut mark, mut mask) = (None, u32::MAX);
    for (kind, value) in attributes(payload.get(HEADER..)?) {
        match kind {
            FRA_FWMARK => mark = parse_u32(value).ok(),
            FRA_FWMASK => mask = parse_u32(value).unwrap_or(mask),
            _ => {}
        }
    }
    mark.map(|mark| (mark, mask))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_with_a_mark_and_one_without() {
        let header = RuleHeader { family: AddressFamily::Inet, ..RuleHeader::default() };
        let nla = |kind, value: u32| DefaultNla::new(kind, value.to_ne_bytes().to_vec());
        let with = [nla(6, 1024), nla(FRA_FWMARK, 0x80), nla(FRA_FWMASK, 0x80)];
        let message = Message::new(libc::RTM_NEWRULE, &header, &with);
        assert_eq!(mark(message.payload()), Some((0x80, 0x80)));
        let message = Message::new(libc::RTM_NEWRULE, &header, &with[..1]);
        assert_eq!(mark(message.payload()), None);
        assert_eq!(mark(b"short"), None);
    }
}
