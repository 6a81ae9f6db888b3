//! Who has which claim, and who stands before whom. Pure.

use std::cmp::Reverse;

use crate::model::{BackendKind, Claim, Family, Forward};
use crate::record::Record;

/// A claim of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding<'a> {
    pub record: &'a Record,
    pub forward: Forward,
    /// Whoever gets all of its packets instead.
    pub shadowed_by: Option<&'a Record>,
}

/// When a packet meets a backend: programs run before netfilter, and iptables' chains of table nat
/// (priority -100) before the table `portmap` (-99).
#[must_use]
pub fn turn(kind: BackendKind) -> u8 {
    match kind {
        BackendKind::Ebpf => 0,
        BackendKind::Iptables => 1,
        BackendKind::Nftables => 2,
    }
}

/// The claims of all records, by protocol, port, family and address, and those to the same in the
/// order in which packets meet them.
#[must_use]
pub fn holdings(records: &[Record]) -> Vec<Holding<'_>> {
    let mut all: Vec<Holding> = records
        .iter()
        .flat_map(|record| {
            Family::ALL
                .into_iter()
                .flat_map(|family| record.forwards(family))
                .map(|forward| Holding { record, forward, shadowed_by: None })
        })
        .collect();
    all.sort_by_key(|holding| {
        let Claim { family, protocol, address, port } = holding.forward.claim;
        (protocol, port, family, address, precedence(holding.record))
    });
    // Only claims to one port can be in each other's way, and they stand together by now.
    let same_port = |a: &Holding, b: &Holding| {
        let [a, b] = [a, b].map(|holding| holding.forward.claim);
        (a.protocol, a.port, a.family) == (b.protocol, b.port, b.family)
    };
    for group in all.chunk_by_mut(same_port) {
        let before: Vec<Holding> = group.to_vec();
        for holding in group {
            holding.shadowed_by = before
                .iter()
                .filter(|other| takes_all(other, holding))
                .min_by_key(|other| precedence(other.record))
                .map(|other| other.record);
        }
    }
    all
}

/// Where a packet that is sent to an address of the node goes, as indices of `holdings`, first choice
/// first; a call without an address is one to an address that nobody claims by itself. A choice with
/// conditions leaves packets to the next.
#[must_use]
pub fn choices(holdings: &[Holding], call: &Claim) -> Vec<usize> {
    let mut found: Vec<(usize, &Holding)> = holdings
        .iter()
        .enumerate()
        .filter(|(_, holding)| {
            let claim = holding.forward.claim;
            (claim.family, claim.protocol, claim.port) == (call.family, call.protocol, call.port)
                && claim.address.is_none_or(|own| call.address == Some(own))
        })
        .collect();
    found.sort_by_key(|(_, holding)| {
        let (turn, age) = precedence(holding.record);
        (turn, holding.forward.claim.address.is_none(), age)
    });
    found.into_iter().map(|(index, _)| index).collect()
}

/// Whether only some packets get to the record's claims of a family.
#[must_use]
pub fn is_conditional(record: &Record, family: Family) -> bool {
    !record.options.conditions(family).is_empty()
}

fn precedence(record: &Record) -> (u8, Reverse<u64>) {
    (turn(record.backend), Reverse(record.order))
}

/// Whether nothing is left for `own` by another one to the same port.
fn takes_all(other: &Holding, own: &Holding) -> bool {
    let [theirs, ours] = [other, own].map(|holding| holding.forward.claim.address);
    let first = precedence(other.record) < precedence(own.record);
    let covers = match turn(other.record.backend).cmp(&turn(own.record.backend)) {
        std::cmp::Ordering::Less => theirs.is_none() || theirs == ours,
        // Inside one backend a specific address goes before any.
        _ => theirs == ours,
    };
    first && covers && !is_conditional(other.record, other.forward.claim.family)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;
    use crate::record::samples::record;

    fn shadows(records: &[Record]) -> Vec<String> {
        holdings(records)
            .iter()
            .map(|holding| {
                let by = holding.shadowed_by.map_or("-", |by| &by.attachment.container_id);
                format!("{} {} {by}", holding.forward.claim, holding.record.attachment.container_id)
            })
            .collect()
    }

    #[test]
    fn the_newest_of_equal_claims_is_active_and_a_specific_one_shadows_nobody() {
        let kind = BackendKind::Nftables;
        let records = [
            record("a", &["10.0.0.2/24"], &["tcp 80 80"], kind, 1),
            record("b", &["10.0.0.3/24"], &["tcp 80 80", "udp 80 80"], kind, 2),
            record("c", &["10.0.0.4/24"], &["tcp 80 80 192.0.2.1"], kind, 3),
            record("d", &["10.0.0.5/24"], &["tcp 80 80 192.0.2.1"], kind, 0),
        ];
        assert_eq!(
            shadows(&records),
            [
                "tcp 0.0.0.0:80 b -",
                "tcp 0.0.0.0:80 a b",
                "tcp 192.0.2.1:80 c -",
                "tcp 192.0.2.1:80 d c",
                "udp 0.0.0.0:80 b -",
            ]
        );
    }

    #[test]
    fn conditions_leave_packets_to_the_next() {
        let mut newest = record("b", &["10.0.0.3/24"], &["tcp 80 80"], BackendKind::Iptables, 2);
        newest.options.conditions_v4 = vec!["-s".into(), "10.0.0.0/8".into()];
        let older = record("a", &["10.0.0.2/24"], &["tcp 80 80"], BackendKind::Iptables, 1);
        assert_eq!(shadows(&[older, newest]), ["tcp 0.0.0.0:80 b -", "tcp 0.0.0.0:80 a -"]);
    }

    #[test]
    fn an_earlier_backend_takes_also_what_is_more_specific() {
        let records = [
            record("a", &["10.0.0.2/24"], &["tcp 80 80"], BackendKind::Iptables, 1),
            record("b", &["10.0.0.3/24"], &["tcp 80 80 192.0.2.1"], BackendKind::Nftables, 2),
        ];
        assert_eq!(shadows(&records), ["tcp 0.0.0.0:80 a -", "tcp 192.0.2.1:80 b a"]);
    }

    #[test]
    fn choices_are_met_in_order() {
        let kind = BackendKind::Ebpf;
        let records = [
            record("a", &["10.0.0.2/24"], &["tcp 80 80"], kind, 1),
            record("b", &["10.0.0.3/24"], &["tcp 80 80 192.0.2.1"], kind, 0),
            record("c", &["10.0.0.4/24"], &["tcp 80 80"], BackendKind::Nftables, 9),
        ];
        let holdings = holdings(&records);
        let met = |address: Option<&str>| -> Vec<&str> {
            let address = address.and_then(|text| text.parse().ok());
            let call = Claim { family: Family::V4, protocol: Protocol::Tcp, address, port: 80 };
            choices(&holdings, &call)
                .into_iter()
                .map(|index| holdings[index].record.attachment.container_id.as_str())
                .collect()
        };
        assert_eq!(met(None), ["a", "c"]);
        assert_eq!(met(Some("192.0.2.1")), ["b", "a", "c"]);
        assert_eq!(met(Some("192.0.2.2")), ["a", "c"]);
    }
}
