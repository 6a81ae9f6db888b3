//! Map entries, one by one on the fast path and all together on the slow one.
//!
//! Programs look only at packets whose port has its bit in the map of ports. A bit is set before the
//! claims that need it and cleared after the last; how many there are is counted in a map of its own,
//! from what the map of claims really gains and loses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{Addr, ClaimKey, ClaimValue, Traffic, claim_flags, port_bit};
use super::loaded::Maps;
use super::objects::{self, Claims};
use crate::sys::bpf::map::Map;

/// Who had a claim before: its flows are not those of the claim's new owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Former {
    pub key: ClaimKey,
    pub value: ClaimValue,
}

/// The claim's entry.
pub fn get(maps: &Maps, key: &ClaimKey) -> io::Result<Option<ClaimValue>> {
    Ok(maps.claims.get(key.as_bytes())?.and_then(|value| ClaimValue::read_from_bytes(&value).ok()))
}

/// Brings the entries at `keys` to what `after` has for them, in an order in which no packet sees a
/// claim half-made. Returns who lost claims that had connections.
pub fn change(maps: &Maps, keys: &BTreeSet<ClaimKey>, after: &Claims) -> io::Result<Vec<Former>> {
    let mut former = Vec::new();
    for key in keys {
        former.extend(loser(maps, key, keys, after)?);
    }
    let mut todo: Vec<&ClaimKey> = keys.iter().collect();
    // The pods behind claims first: a flow that begins must find both.
    todo.sort_by_key(|key| after.get(key).is_none_or(|value| value.pod != key.addr));
    for key in todo {
        let before = get(maps, key)?;
        let wanted = after.get(key);
        let same_owner = same_owner(before, wanted.copied());
        match wanted {
            Some(wanted) => {
                if before.is_none() {
                    count(maps, key.port(), 1)?;
                }
                if !same_owner {
                    reset_traffic(maps, key)?;
                }
                if before != Some(*wanted) {
                    maps.claims.put(key.as_bytes(), wanted.as_bytes())?;
                }
            }
            None => {
                if maps.claims.remove(key.as_bytes())? {
                    count(maps, key.port(), -1)?;
                }
                maps.traffic.remove(key.as_bytes())?;
            }
        }
    }
    Ok(former)
}

/// Who had the claim at a key and will not have it, if there were connections. The claim of an address
/// takes the place of one of any address, and leaves its place to it.
fn loser(
    maps: &Maps,
    key: &ClaimKey,
    keys: &BTreeSet<ClaimKey>,
    after: &Claims,
) -> io::Result<Option<Former>> {
    let at = |key: &ClaimKey| match keys.contains(key) {
        true => Ok(after.get(key).copied()),
        false => get(maps, key),
    };
    let any = key.of_any();
    let (found, before) = match get(maps, key)? {
        None => (any, get(maps, &any)?),
        own => (*key, own),
    };
    let now = match at(key)? {
        None => at(&any)?,
        own => own,
    };
    let Some(value) = before.filter(|_| !same_owner(before, now)) else {
        return Ok(None);
    };
    // A pod's own entry takes no claim's place.
    if found != *key && now.is_some_and(|now| now.flags & claim_flags::SELF != 0) {
        return Ok(None);
    }
    Ok((connections(maps, &found)? > 0).then_some(Former { key: *key, value }))
}

fn same_owner(one: Option<ClaimValue>, other: Option<ClaimValue>) -> bool {
    one.zip(other).is_some_and(|(one, other)| {
        (one.owner, one.target(), one.flags & claim_flags::SELF)
            == (other.owner, other.target(), other.flags & claim_flags::SELF)
    })
}

/// Brings all entries to what is wanted, and counts ports anew.
pub fn restore(maps: &Maps, wanted: &Claims) -> io::Result<Vec<Former>> {
    let present = keys_of(&maps.claims)?;
    for (port, uses) in objects::port_uses(wanted) {
        // Bits come first: too many do no harm.
        let uses = uses.max(read_uses(maps, port)?);
        write_uses(maps, port, uses)?;
    }
    let keys = present.into_iter().chain(wanted.keys().copied()).collect();
    let former = change(maps, &keys, wanted)?;
    for key in keys_of(&maps.traffic)?.difference(&wanted.keys().copied().collect()) {
        maps.traffic.remove(key.as_bytes())?;
    }
    let uses = objects::port_uses(wanted);
    let counted: BTreeSet<u16> = maps
        .port_uses
        .entries()?
        .iter()
        .filter_map(|(key, _)| u16::read_from_bytes(key).ok())
        .collect();
    for port in counted.into_iter().chain(uses.keys().copied()) {
        write_uses(maps, port, uses.get(&port).copied().unwrap_or_default())?;
    }
    clear_other_bits(maps, &uses)?;
    Ok(former)
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
            Some(found) if found == *wanted => {
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

/// Brings the map of addresses to what is wanted.
pub fn addresses(maps: &Maps, wanted: &BTreeMap<Addr, u32>) -> io::Result<()> {
    for (addr, value) in wanted {
        if maps.addresses.get(addr.as_bytes())?.as_deref() != Some(value.as_bytes()) {
            maps.addresses.put(addr.as_bytes(), value.as_bytes())?;
        }
    }
    let present: BTreeSet<Addr> = keys_of(&maps.addresses)?;
    for addr in present.iter().filter(|addr| !wanted.contains_key(addr)) {
        maps.addresses.remove(addr.as_bytes())?;
    }
    Ok(())
}

/// What the map of addresses does not have as it should.
pub fn missing_addresses(maps: &Maps, expected: &BTreeMap<Addr, u32>) -> io::Result<Vec<Addr>> {
    let mut missing = Vec::new();
    for (addr, value) in expected {
        if maps.addresses.get(addr.as_bytes())?.as_deref() != Some(value.as_bytes()) {
            missing.push(*addr);
        }
    }
    Ok(missing)
}

/// Packets of a claim so far, of all CPUs together.
pub fn traffic(maps: &Maps, key: &ClaimKey) -> io::Result<Option<Traffic>> {
    let Some(values) = maps.traffic.get(key.as_bytes())? else {
        return Ok(None);
    };
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

fn connections(maps: &Maps, key: &ClaimKey) -> io::Result<u64> {
    // Without an entry nothing was counted, and there may have been any number.
    Ok(traffic(maps, key)?.map_or(1, |traffic| traffic.connections))
}

fn reset_traffic(maps: &Maps, key: &ClaimKey) -> io::Result<()> {
    maps.traffic.put(key.as_bytes(), &vec![0; maps.traffic.value_bytes()])
}

fn count(maps: &Maps, port: u16, change: i32) -> io::Result<()> {
    let uses = read_uses(maps, port)?.saturating_add_signed(change);
    write_uses(maps, port, uses)
}

fn read_uses(maps: &Maps, port: u16) -> io::Result<u32> {
    let value = maps.port_uses.get(port.as_bytes())?;
    Ok(value.and_then(|value| u32::read_from_bytes(&value).ok()).unwrap_or_default())
}

fn write_uses(maps: &Maps, port: u16, uses: u32) -> io::Result<()> {
    if uses == 0 {
        set_bit(maps, port, false)?;
        maps.port_uses.remove(port.as_bytes()).map(drop)
    } else {
        maps.port_uses.put(port.as_bytes(), uses.as_bytes())?;
        set_bit(maps, port, true)
    }
}

fn word(maps: &Maps, index: u32) -> io::Result<u64> {
    let value = maps.ports.get(index.as_bytes())?;
    Ok(value.and_then(|value| u64::read_from_bytes(&value).ok()).unwrap_or_default())
}

fn is_watched(maps: &Maps, port: u16) -> io::Result<bool> {
    let (index, bit) = port_bit(port);
    Ok(word(maps, index)? & bit != 0)
}

fn set_bit(maps: &Maps, port: u16, on: bool) -> io::Result<()> {
    let (index, bit) = port_bit(port);
    let before = word(maps, index)?;
    let after = if on { before | bit } else { before & !bit };
    if before == after {
        return Ok(());
    }
    maps.ports.put(index.as_bytes(), after.as_bytes())
}

fn clear_other_bits(maps: &Maps, uses: &BTreeMap<u16, u32>) -> io::Result<()> {
    let mut wanted: BTreeMap<u32, u64> = BTreeMap::new();
    for port in uses.keys() {
        let (index, bit) = port_bit(*port);
        *wanted.entry(index).or_default() |= bit;
    }
    for (key, value) in maps.ports.entries()? {
        let (Ok(index), Ok(found)) = (u32::read_from_bytes(&key), u64::read_from_bytes(&value))
        else {
            continue;
        };
        let right = wanted.get(&index).copied().unwrap_or_default();
        if found != right {
            maps.ports.put(index.as_bytes(), right.as_bytes())?;
        }
    }
    Ok(())
}

fn keys_of<K: FromBytes + Ord>(map: &Map) -> io::Result<BTreeSet<K>> {
    Ok(map.entries()?.iter().filter_map(|(key, _)| K::read_from_bytes(key).ok()).collect())
}
