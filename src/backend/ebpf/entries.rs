//! The entries of the maps: read, and written as planned.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::discriminant;

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    Addr, ClaimKey, ClaimValue, REASONS, Traffic, claim_flags, port_bit, ports_of,
};
use super::loaded::Maps;
use super::objects::{self, Claims};
use super::plan::{self, Former, Present, Write};
use crate::sys::bpf::map::Map;

/// The claim's entry.
pub fn get(maps: &Maps, key: &ClaimKey) -> io::Result<Option<ClaimValue>> {
    Ok(maps.claims.get(key.as_bytes())?.and_then(|value| ClaimValue::read_from_bytes(&value).ok()))
}

/// Where packets to an address and port of the node go: the claim of the address goes before that of any.
pub fn in_effect(maps: &Maps, called: &ClaimKey) -> io::Result<Option<(ClaimKey, ClaimValue)>> {
    let own = get(maps, called)?.map(|claim| (*called, claim));
    let any = called.of_any();
    Ok(match own {
        None => get(maps, &any)?.map(|claim| (any, claim)),
        own => own,
    })
}

/// Brings the entries at `keys` to what `after` has for them. Returns who lost claims that had
/// connections. Where there [`are_none`], none is looked for.
pub fn change(
    maps: &Maps,
    keys: &BTreeSet<ClaimKey>,
    after: &Claims,
    are_none: bool,
) -> io::Result<Vec<Former>> {
    let present = match are_none {
        true => Present::default(),
        false => present_at(maps, keys, after)?,
    };
    let former = plan::losers(&present, keys, after);
    apply(maps, &plan::change(&present, keys, after))?;
    Ok(former)
}

/// A port that programs skip has no claims, whatever its number says (see [`plan`]): most that come need one
/// look for 64 of them.
fn present_at(maps: &Maps, keys: &BTreeSet<ClaimKey>, after: &Claims) -> io::Result<Present> {
    let words = words(maps, after.keys().filter(|key| keys.contains(key)).map(ClaimKey::port))?;
    let is_skipped = |port: u16| {
        let (index, bit) = port_bit(port);
        words.get(&index).is_some_and(|word| word & bit == 0)
    };
    let mut present = Present::default();
    for key in keys.iter().filter(|key| !is_skipped(key.port())) {
        present.claims.extend(get(maps, key)?.map(|value| (*key, value)));
    }
    let mut asked = plan::also_asked(&present.claims, keys, after);
    asked.retain(|key| !is_skipped(key.port()));
    for key in asked {
        present.claims.extend(get(maps, &key)?.map(|value| (key, value)));
    }
    let mut counted = plan::counted_anew(&present.claims, keys, after);
    counted.retain(|port| !is_skipped(*port));
    for port in counted {
        present.uses.insert(port, read_uses(maps, port)?);
    }
    Ok(present)
}

/// Brings all entries to what is wanted, and counts ports anew.
pub fn restore(maps: &Maps, wanted: &Claims) -> io::Result<()> {
    apply(maps, &plan::restore(&present(maps)?, wanted))
}

/// Counts connections that a claim has and that nobody has counted, because it came anew while they were
/// open: the claim's end will ask whether there were any.
pub fn count_open(maps: &Maps, open: &BTreeMap<ClaimKey, u64>) -> io::Result<()> {
    let mut uncounted = Vec::new();
    for (key, number) in open {
        let Some(claim) = get(maps, key)?.filter(|claim| !claim.is_used()) else {
            continue;
        };
        maps.claims.put(key.as_bytes(), claim.with_used(true).as_bytes())?;
        if claim.flags & claim_flags::SELF == 0 {
            uncounted.push((key, number));
        }
    }
    // There may be no room for what is counted, which is for people.
    for (key, number) in uncounted {
        let mut values = vec![0; maps.traffic.value_bytes()?];
        // One of the CPUs stands for all.
        if let Some((first, _)) = values.split_first_chunk_mut::<{ size_of::<u64>() }>() {
            *first = number.to_ne_bytes();
        }
        maps.traffic.put_new(key.as_bytes(), &values)?;
    }
    Ok(())
}

fn apply(maps: &Maps, writes: &[Write]) -> io::Result<()> {
    let of_one_kind = |one: &Write, other: &Write| match (one, other) {
        // The bits of ports go before the first claim, or after the last.
        (Write::Uses(_, one), Write::Uses(_, other)) => (*one == 0) == (*other == 0),
        _ => discriminant(one) == discriminant(other),
    };
    writes.chunk_by(of_one_kind).try_for_each(|writes| apply_together(maps, writes))
}

/// Writes of one kind.
fn apply_together(maps: &Maps, writes: &[Write]) -> io::Result<()> {
    let (mut uses, mut forgotten, mut puts, mut removals) = (vec![], vec![], vec![], vec![]);
    for write in writes {
        match write {
            Write::Uses(port, number) => uses.push((*port, *number)),
            Write::Forget(key) => forgotten.push(key.as_bytes()),
            Write::Put(key, value) => puts.push((key.as_bytes(), value.as_bytes())),
            Write::Remove(key) => removals.push(key.as_bytes()),
        }
    }
    write_uses(maps, &uses)?;
    maps.traffic.remove_all(&forgotten)?;
    maps.claims.put_all(&puts).map_err(full(&maps.claims))?;
    maps.claims.remove_all(&removals).map(drop)
}

/// What a full map of claims means, which bpf(2) calls a list that is too long.
fn full(map: &Map) -> impl Fn(io::Error) -> io::Error {
    |error| match error.raw_os_error() {
        Some(libc::E2BIG) => io::Error::other(format!(
            "map {} is full: it has room for {} entries, and a mapping has up to two for each address family; take pods with many hostPorts to other nodes, or set \"backend\" to \"nftables\" or \"iptables\"",
            map.definition().name,
            map.definition().max_entries
        )),
        _ => error,
    }
}

/// Whether there are no claims, and nothing that is left of any. How many claims have a port is written before
/// them and removed after all else, so that nothing is without it at any time: an empty map of 65,536 buckets
/// takes 0.05 ms to walk.
pub fn are_none(maps: &Maps) -> io::Result<bool> {
    maps.port_uses.is_empty()
}

/// All claims.
pub fn claims(maps: &Maps) -> io::Result<Claims> {
    let claim = |(key, value): (Vec<u8>, Vec<u8>)| {
        ClaimKey::read_from_bytes(&key).ok().zip(ClaimValue::read_from_bytes(&value).ok())
    };
    Ok(maps.claims.entries()?.into_iter().filter_map(claim).collect())
}

/// All there is.
pub fn present(maps: &Maps) -> io::Result<Present> {
    let uses = |(key, value): (Vec<u8>, Vec<u8>)| {
        u16::read_from_bytes(&key).ok().zip(u32::read_from_bytes(&value).ok())
    };
    let watched = |(key, value): (Vec<u8>, Vec<u8>)| {
        let word = u32::read_from_bytes(&key).ok().zip(u64::read_from_bytes(&value).ok());
        let (index, word) = word.unwrap_or_default();
        ports_of(index).filter(move |port| word & port_bit(*port).1 != 0)
    };
    Ok(Present {
        claims: claims(maps)?,
        uses: maps.port_uses.entries()?.into_iter().filter_map(uses).collect(),
        watched: maps.ports.entries()?.into_iter().flat_map(watched).collect(),
        counted: keys_of(&maps.traffic)?,
    })
}

/// Where the entries at `keys` differ from what `expected` has for them, in words.
pub fn problems(
    maps: &Maps,
    keys: &BTreeSet<ClaimKey>,
    expected: &Claims,
) -> io::Result<Vec<String>> {
    let mut problems = Vec::new();
    for key in keys {
        let Some(wanted) = expected.get(key) else {
            continue;
        };
        let what = objects::describe(key);
        match get(maps, key)? {
            Some(found) if found.says(wanted) => {
                if !is_watched(maps, key.port())? {
                    problems.push(format!(
                        "{what} has its claim, but programs skip port {}",
                        key.port()
                    ));
                } else if read_uses(maps, key.port())? == 0 {
                    problems.push(format!(
                        "{what} has its claim, but port {} is not counted as used",
                        key.port()
                    ));
                }
            }
            Some(found) if found.target() == wanted.target() => {
                problems.push(format!("{what} has another owner or other options than recorded"))
            }
            Some(found) => problems.push(format!(
                "{what} expected to lead to {}, found {}",
                wanted.target(),
                found.target()
            )),
            None => problems
                .push(format!("{what} expected to lead to {}, found nothing", wanted.target())),
        }
    }
    Ok(problems)
}

/// What came of the addresses' change.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The node had them, and has them no more.
    pub gone: BTreeSet<Addr>,
    /// What the map has no room for, and how much room it has.
    pub left_out: usize,
    pub room: u32,
}

/// Brings the map of addresses to what is wanted, as far as it has room for them.
pub fn addresses(maps: &Maps, wanted: &BTreeMap<Addr, u32>) -> io::Result<Addresses> {
    let map = &maps.addresses;
    let present = listed(maps)?;
    let mut done = Addresses {
        gone: gone(&present, wanted),
        room: map.definition().max_entries,
        ..Addresses::default()
    };
    for addr in present.keys().filter(|addr| !wanted.contains_key(*addr)) {
        map.remove(addr.as_bytes())?;
    }
    for (addr, value) in wanted.iter().filter(|(addr, value)| present.get(addr) != Some(value)) {
        match map.put(addr.as_bytes(), value.as_bytes()) {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => done.left_out += 1,
            other => other?,
        }
    }
    Ok(done)
}

fn listed(maps: &Maps) -> io::Result<BTreeMap<Addr, u32>> {
    let entry = |(addr, value): (Vec<u8>, Vec<u8>)| {
        let addr = Addr::read_from_bytes(&addr).ok()?;
        Some((addr, u32::read_from_bytes(&value).unwrap_or_default()))
    };
    Ok(maps.addresses.entries()?.into_iter().filter_map(entry).collect())
}

/// Addresses that are listed as the node's and should not be.
fn gone(present: &BTreeMap<Addr, u32>, wanted: &BTreeMap<Addr, u32>) -> BTreeSet<Addr> {
    let is_gone = |addr: &Addr| wanted.get(addr).is_none_or(|wanted| *wanted == 0);
    let listed = present.iter().filter(|(_, value)| **value != 0).map(|(addr, _)| *addr);
    listed.filter(is_gone).collect()
}

/// Where the map of addresses differs from what it should have, in words.
pub fn address_problems(maps: &Maps, expected: &BTreeMap<Addr, u32>) -> io::Result<Vec<String>> {
    let present = listed(maps)?;
    let gone = gone(&present, expected);
    let is_unknown = |addr: &&Addr| present.get(addr) != expected.get(addr) && !gone.contains(addr);
    let unknown = expected.keys().filter(is_unknown);
    let unknown =
        unknown.map(|addr| format!("{} is not known as an address of the node", addr.ip()));
    let gone = gone
        .iter()
        .map(|addr| format!("{} is known as an address of the node, and is none", addr.ip()));
    Ok(unknown.chain(gone).collect())
}

/// Packets of a claim so far, of all CPUs together; `None` if there is no such claim.
pub fn traffic(maps: &Maps, key: &ClaimKey) -> io::Result<Option<Traffic>> {
    if get(maps, key)?.is_none() {
        return Ok(None);
    }
    let values = maps.traffic.get(key.as_bytes())?.unwrap_or_default();
    let mut sum = Traffic::default();
    for value in values.chunks_exact(size_of::<Traffic>()) {
        if let Ok(value) = Traffic::read_from_bytes(value) {
            sum.connections += value.connections;
            sum.packets_in += value.packets_in;
            sum.bytes_in += value.bytes_in;
            sum.packets_out += value.packets_out;
            sum.bytes_out += value.bytes_out;
        }
    }
    Ok(Some(sum))
}

/// What programs have done with packets, of all CPUs together, by the names of [`REASONS`].
pub fn reasons(map: &Map) -> io::Result<BTreeMap<&'static str, u64>> {
    let count = |(index, name): (u32, &'static str)| {
        let values = map.get(index.as_bytes())?.unwrap_or_default();
        let of_cpus = values.chunks_exact(8).filter_map(|value| u64::read_from_bytes(value).ok());
        Ok((name, of_cpus.sum()))
    };
    (0..).zip(REASONS).map(count).collect()
}

fn read_uses(maps: &Maps, port: u16) -> io::Result<u32> {
    let value = maps.port_uses.get(port.as_bytes())?;
    Ok(value.and_then(|value| u32::read_from_bytes(&value).ok()).unwrap_or_default())
}

/// All of them 0, or none. A port has its bit while its number is there.
fn write_uses(maps: &Maps, uses: &[(u16, u32)]) -> io::Result<()> {
    let unused = uses.iter().all(|(_, number)| *number == 0);
    let keys: Vec<&[u8]> = uses.iter().map(|(port, _)| port.as_bytes()).collect();
    if !unused {
        let entries = keys.iter().copied().zip(uses.iter().map(|(_, number)| number.as_bytes()));
        maps.port_uses.put_all(&entries.collect::<Vec<_>>())?;
    }
    set_bits(maps, uses.iter().map(|(port, _)| *port), !unused)?;
    if unused {
        maps.port_uses.remove_all(&keys)?;
    }
    Ok(())
}

/// The words in which the ports have their bits.
fn words(maps: &Maps, ports: impl Iterator<Item = u16>) -> io::Result<BTreeMap<u32, u64>> {
    let indices: BTreeSet<u32> = ports.map(|port| port_bit(port).0).collect();
    let word = |index: u32| {
        let value = maps.ports.get(index.as_bytes())?;
        let word = value.and_then(|value| u64::read_from_bytes(&value).ok());
        Ok((index, word.unwrap_or_default()))
    };
    indices.into_iter().map(word).collect()
}

fn is_watched(maps: &Maps, port: u16) -> io::Result<bool> {
    let (index, bit) = port_bit(port);
    Ok(words(maps, [port].into_iter())?.get(&index).is_some_and(|word| word & bit != 0))
}

fn set_bits(maps: &Maps, ports: impl Iterator<Item = u16>, on: bool) -> io::Result<()> {
    let ports: Vec<u16> = ports.collect();
    for (index, before) in words(maps, ports.iter().copied())? {
        let of_word = ports.iter().map(|port| port_bit(*port)).filter(|(of, _)| *of == index);
        let bits = of_word.fold(0, |bits, (_, bit)| bits | bit);
        let after = if on { before | bits } else { before & !bits };
        if before != after {
            maps.ports.put(index.as_bytes(), after.as_bytes())?;
        }
    }
    Ok(())
}

fn keys_of<K: FromBytes + Ord>(map: &Map) -> io::Result<BTreeSet<K>> {
    Ok(map.entries()?.iter().filter_map(|(key, _)| K::read_from_bytes(key).ok()).collect())
}
