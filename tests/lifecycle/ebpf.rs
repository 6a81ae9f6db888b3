//! The eBPF backend's maps, in memory and in the kernel.

use std::collections::BTreeSet;
use std::mem::discriminant;
use std::net::SocketAddr;

use portmap::backend::ebpf::entries;
use portmap::backend::ebpf::layout::{ClaimKey, ClaimValue, claim_flags};
use portmap::backend::ebpf::loaded::{Maps, OWN};
use portmap::backend::ebpf::objects::{self, Claims};
use portmap::backend::ebpf::plan::{self, Former, Present, Write};
use portmap::model::{BackendKind, Protocol};
use portmap::record::Record;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::object::Object;

use super::{Change, Packet, Table};

/// What all records together lead to, before there are connections.
fn wanted(live: &[Record]) -> Present {
    let claims = objects::claims(&live.iter().collect::<Vec<_>>());
    let uses = objects::port_uses(&claims);
    let watched = uses.keys().copied().collect();
    Present { watched, counted: BTreeSet::new(), uses, claims }
}

/// Fails unless both are the same but for connections.
fn assert_like(found: &Present, wanted: &Present) {
    let claims = |present| unused(present).claims;
    assert_eq!(claims(found), claims(wanted), "not what the records alone lead to");
    assert_eq!((&found.uses, &found.watched), (&wanted.uses, &wanted.watched));
    let is_counted = |key: &ClaimKey| found.claims.get(key).is_some_and(|value| !is_pod(value));
    assert!(found.counted.iter().all(is_counted), "{:?}", found.counted);
}

fn is_pod(value: &ClaimValue) -> bool {
    value.flags & claim_flags::SELF != 0
}

/// Keys of a step, and what they are to have.
fn target(change: &Change) -> (BTreeSet<ClaimKey>, Claims) {
    let pair = change.added.iter().chain(&change.removed);
    let keys = pair.flat_map(|record| objects::keys(record)).collect();
    let after = objects::claims_at(&keys, &change.related, change.added);
    (keys, after)
}

fn key(packet: &Packet) -> ClaimKey {
    ClaimKey::new(packet.address.into(), packet.protocol, packet.port)
}

fn find<'a>(claims: &'a Claims, packet: &Packet) -> Option<&'a ClaimValue> {
    let key = key(packet);
    claims.get(&key).or_else(|| claims.get(&key.of_any()))
}

/// The same without connections.
fn unused(present: &Present) -> Present {
    let claims = present.claims.iter().map(|(key, value)| (*key, value.with_used(false)));
    Present { claims: claims.collect(), ..present.clone() }
}

/// Maps in memory.
#[derive(Default)]
pub struct Fake(Present);

impl Fake {
    /// Packets come in between.
    fn apply(&mut self, writes: &[Write]) {
        for write in writes {
            self.write(*write);
            self.assert_sound();
        }
    }

    fn write(&mut self, write: Write) {
        let Present { claims, uses, watched, counted } = &mut self.0;
        match write {
            Write::Uses(port, 0) => {
                uses.remove(&port);
                watched.remove(&port);
            }
            Write::Uses(port, number) => {
                uses.insert(port, number);
                watched.insert(port);
            }
            Write::Forget(key) => drop(counted.remove(&key)),
            Write::Put(key, value) => drop(claims.insert(key, value)),
            Write::Remove(key) => drop(claims.remove(&key)),
        }
    }

    /// Every claim has a connection, as programs say and count it.
    fn connect(&mut self) {
        let Present { claims, counted, .. } = &mut self.0;
        for (key, value) in claims {
            *value = value.with_used(true);
            counted.extend((!is_pod(value)).then_some(key));
        }
    }

    /// No claim is there that packets would miss, or that leads to a pod without an entry of its own.
    fn assert_sound(&self) {
        for (key, value) in &self.0.claims {
            assert!(self.0.watched.contains(&key.port()), "{key:?} is skipped");
            assert!(self.0.uses.contains_key(&key.port()), "{key:?} is not seen to be there");
            let protocol = if key.protocol == 6 { Protocol::Tcp } else { Protocol::Udp };
            let pod = ClaimKey::new(value.pod, protocol, value.target().port());
            assert!(self.0.claims.contains_key(&pod), "{key:?} leads to no pod");
        }
        let has_uses = |key: &ClaimKey| self.0.uses.contains_key(&key.port());
        assert!(self.0.counted.iter().all(has_uses), "{:?}", self.0.counted);
    }
}

impl Table for Fake {
    const BACKEND: BackendKind = BackendKind::Ebpf;

    fn change(&mut self, change: &Change) {
        let (keys, after) = target(change);
        // Nobody loses a connection where there was none.
        assert_eq!(plan::losers(&unused(&self.0), &keys, &after), []);
        self.connect();
        let before = self.0.claims.clone();
        let former = plan::losers(&self.0, &keys, &after);
        let mut present = self.0.clone();
        // The fast path looks at nothing else.
        present.claims.retain(|key, _| keys.contains(key));
        let asked = plan::also_asked(&present.claims, &keys, &after);
        let ports = plan::counted_anew(&present.claims, &keys, &after);
        let also = before.iter().filter(|(key, _)| asked.contains(key));
        present.claims.extend(also.map(|(key, value)| (*key, *value)));
        present.uses.retain(|port, _| ports.contains(port));
        present.watched.clear();
        present.counted.clear();
        assert_eq!(plan::losers(&present, &keys, &after), former);
        let writes = plan::change(&present, &keys, &after);
        assert_ordered(&writes, &after);
        self.apply(&writes);
        for packet in super::packets() {
            assert_noticed(&before, &self.0.claims, &packet, &former);
        }
        // What was said and counted of another's connections is gone.
        let target = |value: &ClaimValue| (value.owner, value.target(), is_pod(value));
        for (key, value) in &self.0.claims {
            let same = before.get(key).map(target) == Some(target(value));
            // Of any address now, or of one, where there were connections of the other kind.
            let moved = before.values().any(|before| target(before) == target(value));
            assert_eq!(value.is_used(), moved, "{key:?}");
            assert_eq!(self.0.counted.contains(key), same && !is_pod(value), "{key:?}");
        }
    }

    fn verify(&self, live: &[Record]) {
        assert_like(&self.0, &wanted(live));
    }

    fn resolve(&self, packet: &Packet, _matching: bool) -> Option<SocketAddr> {
        find(&self.0.claims, packet).map(ClaimValue::target)
    }
}

/// Writes of a kind stand together, for the kernel to take them at once; and nothing is taken from a former
/// owner while there may be no room for a pod's own entries.
fn assert_ordered(writes: &[Write], after: &Claims) {
    let groups = writes.chunk_by(|one, other| discriminant(one) == discriminant(other)).count();
    assert!(groups <= 7, "{writes:#?}");
    let pod =
        writes.iter().rposition(|write| matches!(write, Write::Put(_, value) if is_pod(value)));
    let call = writes.iter().position(|write| match write {
        Write::Put(_, value) => !is_pod(value),
        Write::Forget(key) => after.contains_key(key),
        _ => false,
    });
    assert!(pod.zip(call).is_none_or(|(pod, call)| pod < call), "{writes:#?}");
}

/// Who loses packets is looked at for connections.
fn assert_noticed(before: &Claims, after: &Claims, packet: &Packet, former: &[Former]) {
    let owner = |claims| find(claims, packet).map(|value| (value.owner, value.target()));
    let (Some((was, target)), next) = (owner(before), owner(after)) else {
        return;
    };
    let noticed = former.iter().any(|former| former.value.owner == was);
    assert!(noticed || next == Some((was, target)), "{packet:?}: {former:?}");
}

/// The slow path from the maps of some records, damaged, to those of others.
pub fn assert_restored(from: &[Record], to: &[Record], damage: u64) {
    let mut fake = Fake(wanted(from));
    fake.connect();
    let mut damage = (0..64).map(|bit| damage >> bit & 1 == 1).cycle();
    let mut survives = || damage.next() == Some(true);
    fake.0.claims.retain(|_, _| survives());
    fake.0.uses.retain(|_, uses| {
        *uses += u32::from(survives());
        survives()
    });
    fake.0.watched.retain(|_| survives());
    fake.0.watched.extend([7, 65535].into_iter().filter(|_| survives()));
    fake.0.counted.retain(|_| survives());
    let wanted = wanted(to);
    // What is damaged is not sound before the end.
    plan::restore(&fake.0, &wanted.claims).into_iter().for_each(|write| fake.write(write));
    assert_like(&fake.0, &wanted);
    let keys = wanted.claims.keys().copied().collect();
    assert_eq!(plan::losers(&fake.0, &keys, &wanted.claims), []);
}

/// Maps of the kernel, which nothing else knows of.
pub struct Kernel(Maps);

impl Default for Kernel {
    fn default() -> Self {
        let object = Object::parse(OWN.object).unwrap();
        let definitions = object.maps();
        let map = |name: &str| Map::create(&definitions[name]).unwrap();
        Kernel(Maps {
            claims: map("pm_claims"),
            ports: map("pm_ports"),
            port_uses: map("pm_port_uses"),
            traffic: map("pm_traffic"),
            addresses: map("pm_addresses"),
            config: map("pm_config"),
        })
    }
}

impl Table for Kernel {
    const BACKEND: BackendKind = BackendKind::Ebpf;

    fn change(&mut self, change: &Change) {
        let (keys, after) = target(change);
        let none = entries::are_none(&self.0).unwrap();
        entries::change(&self.0, &keys, &after, none).unwrap();
    }

    fn verify(&self, live: &[Record]) {
        assert_like(&entries::present(&self.0).unwrap(), &wanted(live));
        // The slow path finds nothing to do.
        let claims = objects::claims(&live.iter().collect::<Vec<_>>());
        entries::restore(&self.0, &claims).unwrap();
        assert_like(&entries::present(&self.0).unwrap(), &wanted(live));
    }

    fn resolve(&self, packet: &Packet, _matching: bool) -> Option<SocketAddr> {
        let value = entries::in_effect(&self.0, &key(packet)).unwrap();
        value.map(|(_, value)| value.target())
    }
}
