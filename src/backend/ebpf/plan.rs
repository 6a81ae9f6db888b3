//! The writes that lead from the entries which are there to those which should be. Pure.
//!
//! Each is atomic by itself, and all of them together are not: packets pass in between, and a call may be
//! killed. So their order matters. Programs skip packets whose port has no bit: it is set before the
//! claims that need it, and cleared after the last. The entry of a pod is there before the claims that lead
//! to it, and as long as they are, because a connection that begins must find both. How many claims have a
//! port is written with its bit: it says whether anything is there at all.

use std::collections::{BTreeMap, BTreeSet};

use super::layout::{ClaimKey, ClaimValue, claim_flags};
use super::objects::{self, Claims};

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// So many claims have the port; programs look at its packets unless it is 0.
    Uses(u16, u32),
    /// What was counted of a claim goes. Programs begin to count with its first connection.
    Forget(ClaimKey),
    Put(ClaimKey, ClaimValue),
    Remove(ClaimKey),
}

/// What the maps have, as far as it concerns the keys in question.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Present {
    pub claims: Claims,
    /// How many claims have a port.
    pub uses: BTreeMap<u16, u32>,
    /// Ports that programs look at.
    pub watched: BTreeSet<u16>,
    /// Claims of which something was counted.
    pub counted: BTreeSet<ClaimKey>,
}

/// Who had a claim before: some of its connections may not be its own any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Former {
    pub key: ClaimKey,
    pub value: ClaimValue,
}

/// From what is there to what `after` has, at `keys` alone. `present` need not know what programs look at.
#[must_use]
pub fn change(present: &Present, keys: &BTreeSet<ClaimKey>, after: &Claims) -> Vec<Write> {
    let is_pod = |value: Option<&ClaimValue>| {
        value.is_some_and(|value| value.flags & claim_flags::SELF != 0)
    };
    let has_counts = |key: &ClaimKey, before: Option<&ClaimValue>| {
        (before.is_some() && !is_pod(before)) || present.counted.contains(key)
    };
    let target = |value: &ClaimValue| (value.owner, value.target(), is_pod(Some(value)));
    // Also of a claim that takes the place of another one of its owner, of any address or of one.
    let used: BTreeSet<_> =
        present.claims.values().filter(|value| value.is_used()).map(target).collect();
    let mut todo: Vec<&ClaimKey> = keys.iter().collect();
    todo.sort_by_cached_key(|key| match after.get(key) {
        None => (true, is_pod(present.claims.get(key))),
        wanted => (false, !is_pod(wanted)),
    });
    // A pod's own entry comes first: if there is no room for it, nothing has been taken from a former owner.
    let (mut pods, mut forget, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    let (mut removals, mut gone) = (Vec::new(), Vec::new());
    let (mut more, mut fewer) = (BTreeMap::new(), BTreeMap::new());
    for key in todo {
        let before = present.claims.get(key);
        match after.get(key) {
            Some(wanted) => {
                if before.is_none() {
                    *more.entry(key.port()).or_default() += 1;
                }
                let same = same_owner(before, Some(wanted));
                if !same && has_counts(key, before) {
                    forget.push(Write::Forget(*key));
                }
                if before.is_none_or(|before| !before.says(wanted)) {
                    let puts = if is_pod(Some(wanted)) { &mut pods } else { &mut calls };
                    // Of the same owner there may be connections, also such that begin at this moment.
                    let used = same || used.contains(&target(wanted));
                    puts.push(Write::Put(*key, wanted.with_used(used)));
                }
            }
            None => {
                removals.push(Write::Remove(*key));
                if has_counts(key, before) {
                    gone.push(Write::Forget(*key));
                }
                if before.is_some() {
                    *fewer.entry(key.port()).or_default() += 1;
                }
            }
        }
    }
    let mut uses = present.uses.clone();
    let mut count = |ports: BTreeMap<u16, u32>, change: fn(u32, u32) -> u32| -> Vec<Write> {
        let count = |(port, number)| {
            let uses = uses.entry(port).or_default();
            *uses = change(*uses, number);
            Write::Uses(port, *uses)
        };
        ports.into_iter().map(count).collect()
    };
    // Those of a kind stand together: the kernel takes them in one call.
    let (more, fewer) = (count(more, u32::saturating_add), count(fewer, u32::saturating_sub));
    [more, pods, forget, calls, removals, gone, fewer].concat()
}

/// From all that is there, whatever it is, to what is wanted and nothing else.
#[must_use]
pub fn restore(present: &Present, wanted: &Claims) -> Vec<Write> {
    let needed = objects::port_uses(wanted);
    let mut now = present.clone();
    let mut writes = Vec::new();
    for (port, uses) in &needed {
        // Too many do no harm.
        let uses = present.uses.get(port).copied().unwrap_or_default().max(*uses);
        now.uses.insert(*port, uses);
        writes.push(Write::Uses(*port, uses));
    }
    let known = present.claims.keys().chain(&present.counted);
    let keys = known.chain(wanted.keys()).copied().collect();
    writes.extend(change(&now, &keys, wanted));
    for port in present.uses.keys().chain(&present.watched).chain(needed.keys()) {
        writes.push(Write::Uses(*port, needed.get(port).copied().unwrap_or_default()));
    }
    writes
}

/// Further keys that [`losers`] has to know the claims of, with what is present at `keys`: a claim of an
/// address that comes or goes takes the place of that of any, or leaves it its own.
#[must_use]
pub fn also_asked(
    present: &Claims,
    keys: &BTreeSet<ClaimKey>,
    after: &Claims,
) -> BTreeSet<ClaimKey> {
    let comes_or_goes = |key: &&ClaimKey| match (present.get(key), after.get(key)) {
        (Some(only), None) | (None, Some(only)) => only.flags & claim_flags::SELF == 0,
        _ => false,
    };
    let any = keys.iter().filter(comes_or_goes).map(ClaimKey::of_any);
    any.filter(|any| !keys.contains(any)).collect()
}

/// The ports that more or fewer claims will have than now.
#[must_use]
pub fn counted_anew(present: &Claims, keys: &BTreeSet<ClaimKey>, after: &Claims) -> BTreeSet<u16> {
    let comes_or_goes = |key: &&ClaimKey| present.contains_key(key) != after.contains_key(key);
    keys.iter().filter(comes_or_goes).map(ClaimKey::port).collect()
}

/// Who is reached at one of `keys` and will not be, and has had connections. The claim of an address takes the place of one
/// of any address, and leaves its place to it. `present` has what is at those of [`also_asked`], too.
#[must_use]
pub fn losers(present: &Present, keys: &BTreeSet<ClaimKey>, after: &Claims) -> Vec<Former> {
    let will_be = |key: &ClaimKey| match keys.contains(key) {
        true => after.get(key),
        false => present.claims.get(key),
    };
    let loser = |key: &ClaimKey| {
        let any = key.of_any();
        let own = present.claims.get(key).map(|value| (*key, value));
        let (found, value) = own.or_else(|| Some((any, present.claims.get(&any)?)))?;
        let next = will_be(key).or_else(|| will_be(&any));
        // A pod's own entry takes no claim's place.
        let takes = found == *key || next.is_none_or(|next| next.flags & claim_flags::SELF == 0);
        let loses = takes && !same_owner(Some(value), next);
        (loses && value.is_used()).then_some(Former { key: found, value: *value })
    };
    keys.iter().filter_map(loser).collect()
}

fn same_owner(one: Option<&ClaimValue>, other: Option<&ClaimValue>) -> bool {
    one.zip(other).is_some_and(|(one, other)| {
        (one.owner, one.target(), one.flags & claim_flags::SELF)
            == (other.owner, other.target(), other.flags & claim_flags::SELF)
    })
}
