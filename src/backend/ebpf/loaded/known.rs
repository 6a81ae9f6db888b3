//! What an earlier call has found, as far as it still is so: names are looked for once, as long as the
//! directories that have them do not change.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Build, Loaded, Maps, OWN, failed, pins};
use crate::error::Result;
use crate::sys::bpf::map::Map;
use crate::sys::bpf::name::Name;
use crate::sys::bpf::numbers::{Numbers, Seen};

/// Whether no name has come to the directory above all, nor gone, since an earlier call saw maps of this
/// layout there, and none of a newer one.
///
/// # Errors
///
/// As [`Pins::open`](crate::sys::bpf::pins::Pins::open).
pub fn is_as_seen(known: &Numbers) -> Result<bool> {
    let pins = pins()?;
    Ok(seen_by(&OWN, known).is_some_and(|seen| pins.stamp() == Some(seen.root)))
}

/// What a build like this one has seen: others have other maps.
pub(super) fn seen_by<'a>(build: &Build, known: &'a Numbers) -> Option<&'a Seen> {
    known.seen.as_ref().filter(|seen| seen.object == build.digest)
}

/// The maps by their numbers; `None` if that cannot be done, as without `CAP_SYS_ADMIN`.
pub(super) fn maps(known: &Numbers, batches: bool) -> Option<Maps> {
    let open = |name: &str| Map::from_id(*known.maps.get(&Name::of(name))?).ok()?;
    Maps::open(batches, open).ok()
}

impl Loaded {
    /// Takes the numbers of programs from what an earlier call knew, if these still have their pins:
    /// opening a dozen of them is a good part of what a call costs.
    pub fn trust(&self, known: &Numbers) -> Result<()> {
        let stamp = self.pins.programs_stamp(self.digest());
        let [root, maps, _] = self.stamps.get();
        self.stamps.set([root, maps, stamp]);
        if known.revision != self.digest() || known.claims != self.maps.claims.id() {
            return Ok(());
        }
        if stamp.is_some() {
            // Once something has changed, each is opened by its name, and its number noted anew.
            if known.seen.as_ref().is_some_and(|seen| stamp == Some(seen.programs)) {
                *self.ids.borrow_mut() = Arc::clone(&known.programs);
                self.exact.set(true);
            }
            return Ok(());
        }
        let present = self
            .pins
            .program_names(self.digest())
            .map_err(failed("list the pinned eBPF programs"))?;
        let present: BTreeSet<Name> = present.iter().map(|name| Name::of(name)).collect();
        let known = known.programs.iter().filter(|(name, _)| present.contains(*name));
        Arc::make_mut(&mut self.ids.borrow_mut()).extend(known.map(|(name, id)| (*name, *id)));
        Ok(())
    }

    /// For later calls' [`is_as_seen`], [`Loaded::open`] and [`Loaded::trust`].
    pub fn numbers(&self) -> Numbers {
        let seen = match self.stamps.get() {
            [Some(root), Some(maps), Some(programs)] => {
                Some(Seen { object: self.build.digest.to_owned(), root, maps, programs })
            }
            _ => None,
        };
        let Maps { claims, ports, port_uses, traffic, addresses, config } = &self.maps;
        let maps = [claims, ports, port_uses, traffic, addresses, config];
        let number = |map: &Map| (Name::of(&map.definition().name), map.id());
        Numbers {
            revision: self.digest().to_owned(),
            claims: claims.id(),
            programs: Arc::clone(&self.ids.borrow()),
            maps: maps.into_iter().map(number).collect(),
            seen,
        }
    }
}
