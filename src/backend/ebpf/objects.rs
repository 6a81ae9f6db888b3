//! Which map entries follow from records. Pure.
//!
//! A claim is one entry, keyed by what packets to the hostPort have. A second entry stands for the
//! pod's own address and containerPort: flows to it are remembered without being translated, so that
//! an answer to a direct connection is never taken for one to a hostPort.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::layout::{Addr, ClaimKey, ClaimValue, claim_flags};
use crate::facts::NodeFacts;
use crate::model::{Attachment, Family, Forward, Protocol};
use crate::record::{Record, record_id};

/// The entries of the map of claims.
pub type Claims = BTreeMap<ClaimKey, ClaimValue>;

/// Whether an address is never taken from the wire, whatever is claimed: what `is_reserved` in
/// `src/bpf/local.h` says.
#[must_use]
pub fn is_reserved(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let first = ip.octets()[0];
            first == 0 || first == 127 || first >= 224 || ip.is_link_local()
        }
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_multicast(),
    }
}

/// The claims of all records together. `records` are oldest first: the newest claim is active.
#[must_use]
pub fn claims(records: &[&Record]) -> Claims {
    let mut pods = Claims::new();
    let mut claims = Claims::new();
    for record in records {
        for (key, value) in entries(record) {
            let map = if value.flags & claim_flags::SELF == 0 { &mut claims } else { &mut pods };
            map.insert(key, value);
        }
    }
    // A hostIP that is a pod's own address: the claim has been asked for.
    pods.extend(claims);
    pods
}

/// Those at `keys`, of an attachment and of all records that share a port or a pod's address with it.
#[must_use]
pub fn claims_at(keys: &BTreeSet<ClaimKey>, related: &[Record], own: Option<&Record>) -> Claims {
    let mut records: Vec<&Record> = related.iter().chain(own).collect();
    records.sort_by_key(|record| record.order);
    let mut claims = claims(&records);
    claims.retain(|key, _| keys.contains(key));
    claims
}

/// The keys that a record has entries at, its own or another record's.
#[must_use]
pub fn keys(record: &Record) -> BTreeSet<ClaimKey> {
    let forwards = Family::ALL.into_iter().flat_map(|family| record.forwards(family));
    forwards.flat_map(|forward| keys_of(&forward)).collect()
}

/// That of the pod, and that of the claim.
fn keys_of(forward: &Forward) -> [ClaimKey; 2] {
    let Forward { claim, target } = forward;
    [ClaimKey::new(target.ip().into(), claim.protocol, target.port()), ClaimKey::of(claim)]
}

/// Who claims and flows belong to: the beginning of the record's id.
#[must_use]
pub fn owner(record: &Record) -> u32 {
    owner_by_id(record.id())
}

/// [`owner`] of the attachment's record, which may be lost.
#[must_use]
pub fn owner_of(attachment: &Attachment) -> u32 {
    owner_by_id(&record_id(attachment))
}

fn owner_by_id(id: &str) -> u32 {
    id.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or_default()
}

fn entries(record: &Record) -> Vec<(ClaimKey, ClaimValue)> {
    let owner = owner(record);
    let mac = record.mac.as_deref().and_then(parse_mac);
    let mut entries = Vec::new();
    for family in Family::ALL {
        let source = record
            .masquerade_as
            .iter()
            .find(|ip| record.masquerades_all() && Family::of(ip) == family)
            .map(|ip| Addr::from(*ip));
        let value = |target: SocketAddr, flags: u16| {
            let mut value = ClaimValue::new(target, owner);
            value.flags = flags;
            if let Some(source) = source {
                value.flags |= claim_flags::MASQUERADE;
                value.source = source;
            }
            if let Some(mac) = mac {
                value.flags |= claim_flags::MAC;
                value.mac = mac;
            }
            value
        };
        for forward in record.forwards(family) {
            let [own, claim] = keys_of(&forward);
            entries.push((own, value(forward.target, claim_flags::SELF)));
            entries.push((claim, value(forward.target, 0)));
        }
    }
    entries
}

/// Six bytes from `02:00:00:00:00:01`.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

/// How many claims have each port (host byte order). Programs look at no other packets.
#[must_use]
pub fn port_uses(claims: &Claims) -> BTreeMap<u16, u32> {
    let mut uses = BTreeMap::new();
    for key in claims.keys() {
        *uses.entry(key.port()).or_insert(0) += 1;
    }
    uses
}

/// The map of addresses: 1 for the node's own, 0 for others that the kernel's route lookup does not tell
/// from them (`bpf_fib_lookup` returns NOT_FWDED for both).
#[must_use]
pub fn addresses(facts: &NodeFacts) -> BTreeMap<Addr, u32> {
    let own = facts.addresses.iter().filter(|ip| !ip.is_loopback()).map(|ip| (Addr::from(*ip), 1));
    // An address that is both (a subnet's last one, given to a link) is the node's.
    facts.foreign.iter().map(|ip| (Addr::from(*ip), 0)).chain(own).collect()
}

/// `tcp 192.0.2.1:80`, for messages.
#[must_use]
pub fn describe(key: &ClaimKey) -> String {
    let protocol = Protocol::ALL
        .into_iter()
        .find(|protocol| protocol.number() == key.protocol)
        .map_or("?", Protocol::name);
    format!("{protocol} {}", SocketAddr::new(key.addr.ip(), key.port()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::model::BackendKind;
    use crate::record::samples::record;

    fn texts(claims: &Claims) -> Vec<String> {
        claims
            .iter()
            .map(|(key, value)| format!("{} -> {} {}", describe(key), value.target(), value.flags))
            .collect()
    }

    #[test]
    fn a_mapping_is_a_claim_and_the_pod_behind_it() {
        let one =
            record("a", &["10.0.0.2/32", "fd00::2/128"], &["tcp 80 8080"], BackendKind::Ebpf, 1);
        assert_eq!(
            texts(&claims(&[&one])),
            [
                "tcp [::]:80 -> [fd00::2]:8080 0",
                "tcp 0.0.0.0:80 -> 10.0.0.2:8080 0",
                "tcp 10.0.0.2:8080 -> 10.0.0.2:8080 1",
                "tcp [fd00::2]:8080 -> [fd00::2]:8080 1",
            ]
        );
        assert_eq!(port_uses(&claims(&[&one])), BTreeMap::from([(80, 2), (8080, 2)]));
    }

    #[test]
    fn the_newest_claim_is_active_and_older_pods_stay_known() {
        let old = record("a", &["10.0.0.2/32"], &["udp 53 53"], BackendKind::Ebpf, 1);
        let new = record("b", &["10.0.0.3/32"], &["udp 53 53"], BackendKind::Ebpf, 2);
        assert_eq!(
            texts(&claims(&[&old, &new])),
            [
                "udp 0.0.0.0:53 -> 10.0.0.3:53 0",
                "udp 10.0.0.2:53 -> 10.0.0.2:53 1",
                "udp 10.0.0.3:53 -> 10.0.0.3:53 1",
            ]
        );
        assert_ne!(owner(&old), owner(&new));
        assert_eq!(owner(&old), owner_of(&old.attachment));
    }

    #[test]
    fn masquerading_and_frames_are_said_at_both_entries() {
        let mut one = record("a", &["10.0.0.2/24"], &["tcp 80 80 192.0.2.1"], BackendKind::Ebpf, 1);
        one.options.masq_all = true;
        one.masquerade_as = vec!["10.0.0.1".parse().unwrap()];
        one.mac = Some("02:00:00:00:00:0a".into());
        let claims = claims(&[&one]);
        assert_eq!(
            texts(&claims),
            ["tcp 10.0.0.2:80 -> 10.0.0.2:80 7", "tcp 192.0.2.1:80 -> 10.0.0.2:80 6"]
        );
        for value in claims.values() {
            assert_eq!(value.source.ip().to_string(), "10.0.0.1");
            assert_eq!(value.mac, [2, 0, 0, 0, 0, 10]);
        }
    }

    #[test]
    fn a_hostip_that_is_a_pod_s_address_is_a_claim() {
        let pod = record("a", &["10.0.0.2/24"], &["tcp 80 80"], BackendKind::Ebpf, 2);
        let other = record("b", &["10.0.0.3/24"], &["tcp 80 81 10.0.0.2"], BackendKind::Ebpf, 1);
        assert!(
            texts(&claims(&[&other, &pod])).contains(&"tcp 10.0.0.2:80 -> 10.0.0.3:81 0".into())
        );
    }
}
