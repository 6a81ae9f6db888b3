//! From another version's maps and programs to this one's, while connections go on.

use std::collections::BTreeMap;
use std::io;

use zerocopy::IntoBytes;

use super::super::layout::FlowValue;
use super::{Loaded, failed};
use crate::error::Result;
use crate::sys::bpf::map::{Definition, Map};
use crate::sys::bpf::pins::Pins;
use crate::sys::monotonic;

/// Maps whose entries an upgrade takes along: connections, and what was counted, which begins anew for a
/// claim whose former owner is not known.
const CARRIED: [&str; 6] =
    ["pm_flows", "pm_remaps", "pm_sockets", "pm_streams", "pm_traffic", "pm_claims"];
/// Those that programs make entries in. Of claims that are gone there would be counters again.
const CONNECTIONS: [&str; 4] = ["pm_flows", "pm_remaps", "pm_sockets", "pm_streams"];

impl Loaded {
    /// Before another version's programs are replaced: takes along the connections that came about
    /// since the maps were made. What a pod sends by one that comes about from now on is dropped by the
    /// new programs, to be sent again, until [`Loaded::release`], and for 3 seconds at the most.
    pub fn hold(&self) -> Result<()> {
        if !self.carry_older()? {
            return Ok(());
        }
        let now = u32::try_from(monotonic() >> 30).unwrap_or_default();
        self.reconfigure(|config| config.hold_until = now + 3)
    }

    /// No program of another version makes connections any more.
    pub fn release(&self) -> Result<()> {
        self.carry_older()?;
        self.reconfigure(|config| config.hold_until = 0)
    }

    /// Says whether there are any older maps.
    fn carry_older(&self) -> Result<bool> {
        let layout = self.build.layout;
        let carry_all = || -> io::Result<bool> {
            let mut older = self.pins.list()?.layouts;
            older.retain(|old| *old < layout);
            for old in &older {
                if let Some(maps) = self.pins.maps(layout, CONNECTIONS)? {
                    carry(&self.pins, *old, &maps)?;
                }
            }
            Ok(!older.is_empty())
        };
        carry_all().map_err(failed("take connections along from former eBPF maps"))
    }

    /// After an upgrade: takes along what came about while both were at work, and lets the old maps
    /// and programs go. A newer plugin's stay.
    pub fn finish_upgrade(&self) -> Result<()> {
        self.carry_older()?;
        let layout = self.build.layout;
        let tidy = || -> io::Result<()> {
            let contents = self.pins.list()?;
            for old in contents.layouts.into_iter().filter(|old| *old < layout) {
                self.pins.remove_maps(old)?;
            }
            for digest in contents.revisions.iter().filter(|name| !self.digests.contains(name)) {
                self.pins.remove_programs(digest)?;
            }
            Ok(())
        };
        tidy().map_err(failed("remove the former eBPF maps and programs"))
    }
}

/// All maps of a layout: those that are there, and new ones for those that are missing or, by
/// whatever accident, of another kind.
pub(super) fn make_maps(
    pins: &Pins,
    layout: u32,
    definitions: &BTreeMap<String, Definition>,
) -> io::Result<BTreeMap<String, Map>> {
    pins.resume_maps(layout)?;
    let mut present = BTreeMap::new();
    for (name, definition) in definitions {
        let map = pins.map(layout, name)?.filter(|map| definition.fits(map.definition()));
        present.extend(map.map(|map| (name.clone(), map)));
    }
    if present.len() == definitions.len() {
        return Ok(present);
    }
    let older: Vec<u32> = pins.list()?.layouts.into_iter().filter(|old| *old < layout).collect();
    pins.create_maps(layout, definitions.values(), |maps| {
        for name in CARRIED {
            if let (Some(old), Some(new)) = (present.get(name), maps.get(name)) {
                take_over(name, old, new)?;
            }
        }
        older.iter().try_for_each(|old| carry(pins, *old, maps))
    })
}

/// Entries of an older layout, as far as the new maps do not have them.
fn carry(pins: &Pins, layout: u32, maps: &BTreeMap<String, Map>) -> io::Result<()> {
    for name in CARRIED {
        if let (Some(old), Some(new)) = (pins.map(layout, name)?, maps.get(name)) {
            take_over(name, &old, new)?;
        }
    }
    Ok(())
}

fn take_over(name: &str, old: &Map, new: &Map) -> io::Result<()> {
    // A flow whose last packet nobody has noted would pass for one that is long forgotten.
    let now = u32::try_from(monotonic() >> 30).unwrap_or_default();
    let flow = FlowValue::of_node(now);
    let rest = if name == "pm_flows" { flow.as_bytes() } else { &[] };
    new.take_over(old, rest).map(drop)
}
