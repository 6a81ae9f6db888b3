//! Any sequence of ADD, DEL and GC over a few containers that compete for a few ports, on tables that
//! behave as the kernel's do: the way there never matters, only the attachments that are left.
//!
//! Pure: what the backends would send is applied to tables in memory, which refuse what the kernel
//! refuses. Maps of the kernel itself are written to in one privileged test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "lifecycle/ebpf.rs"]
mod ebpf;
#[path = "lifecycle/iptables.rs"]
mod iptables;
#[path = "lifecycle/nftables.rs"]
mod nftables;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use portmap::conf::Options;
use portmap::model::{Attachment, BackendKind, Family, Mapping, Protocol};
use portmap::record::{FORMAT, IndexKey, KnownId, Part, PodIdentity, Record, chain_name};
use proptest::prelude::*;
use serde_json::json;

const CONTAINERS: usize = 4;
/// What `hostIP` can be: absent, of the node, any of one family.
const HOST_IPS: [&str; 6] = ["", "192.0.2.1", "192.0.2.2", "fd00:51::1", "0.0.0.0", "::"];
const PORTS: [u16; 3] = [80, 81, 82];

/// What an ADD asks for; small, so that containers get in each other's way.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Protocol, port, hostIP: indices.
    mappings: Vec<(bool, usize, usize)>,
    families: u8,
    host_prefix: bool,
    snat: bool,
    masq_all: bool,
    mark: Option<u8>,
    conditions: bool,
    /// Container ports of all containers that wish so are the same.
    alike: bool,
}

/// One call.
#[derive(Debug, Clone)]
pub enum Step {
    Add(usize, Wish),
    Del(usize),
    /// The containers to keep, by bit.
    Gc(u8),
}

fn wish() -> impl Strategy<Value = Wish> {
    (
        prop::collection::vec((any::<bool>(), 0..PORTS.len(), 0..HOST_IPS.len()), 1..4),
        prop_oneof![3 => Just(3_u8), 1 => Just(1), 1 => Just(2)],
        any::<bool>(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.2),
        prop::option::weighted(0.3, 13_u8..15),
        prop::bool::weighted(0.2),
        any::<bool>(),
    )
        .prop_map(
            |(mappings, families, host_prefix, snat, masq_all, mark, conditions, alike)| Wish {
                mappings,
                families,
                host_prefix,
                snat,
                masq_all,
                mark,
                conditions,
                alike,
            },
        )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (0..CONTAINERS, wish()).prop_map(|(container, wish)| Step::Add(container, wish)),
        3 => (0..CONTAINERS).prop_map(Step::Del),
        1 => any::<u8>().prop_map(Step::Gc),
    ];
    prop::collection::vec(step, 1..12)
}

fn record(container: usize, wish: &Wish, backend: BackendKind, order: u64) -> Record {
    let id = format!("container{container}");
    let (short, long) = if wish.host_prefix { (32, 128) } else { (24, 64) };
    let addresses =
        [format!("10.0.0.{}/{short}", container + 2), format!("fd00::{}/{long}", container + 2)];
    let conditions = match (wish.conditions, backend) {
        (false, _) => Vec::new(),
        (true, BackendKind::Iptables) => vec!["-s".to_owned(), iptables::CONDITION.to_owned()],
        (true, BackendKind::Nftables) => vec!["condition".to_owned()],
        (true, BackendKind::Ebpf) => Vec::new(),
    };
    let statements = match (wish.conditions, backend) {
        (true, BackendKind::Nftables) => vec![json!(nftables::CONDITION)],
        _ => Vec::new(),
    };
    let mut record = Record {
        format: FORMAT,
        chain: chain_name("n", &id),
        attachment: Attachment { network: "n".into(), container_id: id, ifname: "eth0".into() },
        netns: String::new(),
        view: None,
        pod: PodIdentity::default(),
        mappings: Vec::new(),
        addresses: addresses
            .iter()
            .enumerate()
            .filter(|(bit, _)| wish.families >> bit & 1 == 1)
            .map(|(_, text)| text.parse().unwrap())
            .collect(),
        options: Options {
            no_snat: !wish.snat,
            masq_all: wish.masq_all,
            mark_masq_bit: wish.mark,
            conditions_v4: conditions.clone(),
            conditions_v6: conditions,
            ..Options::default()
        },
        backend,
        localnet_device: None,
        statements_v4: statements.clone(),
        statements_v6: statements,
        masquerade_as: match backend {
            BackendKind::Ebpf if wish.masq_all && wish.snat => {
                vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]
            }
            _ => Vec::new(),
        },
        mac: None,
        order,
        time: 0,
        known_id: KnownId::default(),
    };
    for (number, (udp, port, host_ip)) in wish.mappings.iter().enumerate() {
        let mapping = Mapping {
            protocol: if *udp { Protocol::Udp } else { Protocol::Tcp },
            host_port: PORTS[*port],
            container_port: 1000
                * u16::try_from(if wish.alike { 1 } else { container + 2 }).unwrap()
                + u16::try_from(number).unwrap(),
            host_ip: HOST_IPS[*host_ip].parse().ok(),
        };
        // One claim with two targets is refused before it gets here.
        let claims: BTreeSet<_> =
            Family::ALL.into_iter().filter_map(|of| mapping.claim(of)).collect();
        let known = |other: &Mapping| {
            Family::ALL
                .iter()
                .any(|of| other.claim(*of).is_some_and(|claim| claims.contains(&claim)))
        };
        if !record.mappings.iter().any(known) {
            record.mappings.push(mapping);
        }
    }
    if record.routes_loopback() {
        record.localnet_device = Some(format!("lxc{container}"));
    }
    record
}

/// A backend's table in memory, and its own way from one set of records to another.
pub trait Table {
    const BACKEND: BackendKind;
    /// Does what the backend's `change` does.
    fn change(&mut self, change: &Change);
    /// Holds after each step.
    fn verify(&self, live: &[Record]);
    /// Where a packet goes; `matching` says whether it meets everybody's conditions.
    fn resolve(&self, packet: &Packet, matching: bool) -> Option<SocketAddr>;
}

/// A step, as the engine puts it to a backend.
pub struct Change<'a> {
    pub added: Option<&'a Record>,
    pub removed: Option<&'a Record>,
    pub related: Vec<Record>,
    pub before: BTreeSet<Part>,
    pub after: BTreeSet<Part>,
    /// All records that are left, oldest first.
    pub live: &'a [Record],
}

/// A packet for a local address.
#[derive(Debug)]
pub struct Packet {
    pub family: Family,
    pub protocol: Protocol,
    pub address: IpAddr,
    pub port: u16,
}

fn parts(records: &[Record]) -> BTreeSet<Part> {
    records.iter().flat_map(Record::parts).collect()
}

fn related(live: &[Record], pair: [Option<&Record>; 2]) -> Vec<Record> {
    let keys = |record: &Record| -> BTreeSet<IndexKey> { record.rival_keys().collect() };
    let wanted: BTreeSet<IndexKey> = pair.into_iter().flatten().flat_map(keys).collect();
    let own: Vec<&str> = pair.into_iter().flatten().map(Record::id).collect();
    live.iter()
        .filter(|record| !own.contains(&record.id()) && !keys(record).is_disjoint(&wanted))
        .cloned()
        .collect()
}

/// One container's record takes another's place, or comes, or goes.
fn replace<T: Table>(table: &mut T, live: &mut Vec<Record>, id: usize, added: Option<Record>) {
    let name = format!("container{id}");
    let old = live.clone();
    let removed = old.iter().find(|record| record.attachment.container_id == name);
    live.retain(|record| record.attachment.container_id != name);
    live.extend(added.clone());
    if added.is_none() && removed.is_none() {
        return;
    }
    let change = Change {
        added: added.as_ref(),
        removed,
        related: related(&old, [added.as_ref(), removed]),
        before: parts(&old),
        after: parts(live),
        live,
    };
    table.change(&change);
}

/// Newest first; a specific address goes before any.
fn expected(live: &[Record], packet: &Packet, matching: bool) -> Option<SocketAddr> {
    [Some(packet.address), None].into_iter().find_map(|address| {
        live.iter()
            .rev()
            .filter(|record| matching || record.options.conditions(packet.family).is_empty())
            .flat_map(|record| record.forwards(packet.family))
            .find(|forward| {
                let claim = forward.claim;
                (claim.address, claim.protocol, claim.port)
                    == (address, packet.protocol, packet.port)
            })
            .map(|forward| forward.target)
    })
}

/// Everything that could meet a claim.
fn packets() -> Vec<Packet> {
    let mut packets = Vec::new();
    for address in ["192.0.2.1", "192.0.2.2", "10.0.0.1", "fd00:51::1", "fd00:51::2"] {
        let address: IpAddr = address.parse().unwrap();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for port in PORTS {
                packets.push(Packet { family: Family::of(&address), protocol, address, port });
            }
        }
    }
    packets
}

fn verify<T: Table>(table: &T, live: &[Record]) {
    table.verify(live);
    for packet in packets() {
        for matching in [true, false] {
            assert_eq!(
                table.resolve(&packet, matching),
                expected(live, &packet, matching),
                "{packet:?}, conditions met: {matching}"
            );
        }
    }
}

fn run<T: Table>(mut table: T, steps: &[Step], marks: bool) {
    let mut live: Vec<Record> = Vec::new();
    for (order, step) in (1..).zip(steps) {
        match step {
            Step::Add(id, wish) => {
                let mut wish = wish.clone();
                wish.mark = wish.mark.filter(|_| marks);
                let added = record(*id, &wish, T::BACKEND, order);
                // Without an address in a claim's family, nothing is asked for.
                let added = Some(added).filter(|added| !added.claims().is_empty());
                replace(&mut table, &mut live, *id, added);
            }
            Step::Del(id) => replace(&mut table, &mut live, *id, None),
            Step::Gc(keep) => {
                for id in (0..CONTAINERS).filter(|id| keep >> id & 1 == 0) {
                    replace(&mut table, &mut live, id, None);
                }
            }
        }
        verify(&table, &live);
    }
    // Twice: a second DEL has nothing to do.
    for id in (0..CONTAINERS).chain(0..CONTAINERS) {
        replace(&mut table, &mut live, id, None);
        verify(&table, &live);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nftables_keeps_to_the_records(steps in steps()) {
        run(nftables::Fake::default(), &steps, true);
    }

    #[test]
    fn nftables_tells_whose_everything_is(wishes in prop::collection::vec(wish(), 0..CONTAINERS)) {
        let numbered = wishes.iter().enumerate().zip(1..);
        let records: Vec<Record> = numbered
            .map(|((id, wish), order)| record(id, wish, BackendKind::Nftables, order))
            .collect();
        nftables::assert_lost(&records);
    }

    #[test]
    fn iptables_keeps_to_the_records(steps in steps()) {
        run(iptables::Fake::new(false), &steps, true);
    }

    /// Upstream's attachments keep their masquerade bit, and bits are never taken from it: only its
    /// own is used here, so that the end is what was there before.
    #[test]
    fn iptables_keeps_to_the_records_beside_upstream_s(steps in steps()) {
        run(iptables::Fake::new(true), &steps, false);
    }

    #[test]
    fn ebpf_keeps_to_the_records(steps in steps()) {
        run(ebpf::Fake::default(), &steps, true);
    }

    #[test]
    fn ebpf_gets_from_any_state_to_any_other(
        from in prop::collection::vec(wish(), 0..CONTAINERS),
        to in prop::collection::vec(wish(), 0..CONTAINERS),
        damage in any::<u64>(),
    ) {
        let records = |wishes: &[Wish], order: u64| -> Vec<Record> {
            let numbered = wishes.iter().enumerate().zip(order..);
            numbered.map(|((id, wish), order)| record(id, wish, BackendKind::Ebpf, order)).collect()
        };
        ebpf::assert_restored(&records(&from, 1), &records(&to, 100), damage);
    }

    #[test]
    fn nftables_gets_from_any_state_to_any_other(
        from in prop::collection::vec(wish(), 0..CONTAINERS),
        to in prop::collection::vec(wish(), 0..CONTAINERS),
    ) {
        let records = |wishes: &[Wish], order: u64| -> Vec<Record> {
            let numbered = wishes.iter().enumerate().zip(order..);
            numbered.map(|((id, wish), order)| record(id, wish, BackendKind::Nftables, order)).collect()
        };
        // The second set has its containers in another order of age.
        let (from, mut to) = (records(&from, 1), records(&to, 100));
        to.reverse();
        nftables::assert_change(&from, &to);
        nftables::assert_change(&to, &from);
    }
}

proptest! {
    // Listing the kernel's maps takes milliseconds.
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "privileged: makes maps"]
    fn ebpf_keeps_to_the_records_in_the_kernel(steps in steps()) {
        run(ebpf::Kernel::default(), &steps, true);
    }
}
