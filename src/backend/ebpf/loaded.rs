//! What is loaded on the node: maps by layout, programs by the object that they are from.
//!
//! A call that finds everything in place opens pins and looks at numbers. Only if something is missing
//! is the object taken apart, and only programs that are needed are verified, which is most of the
//! cost of a first call.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddrV4;

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{Config, LAYOUT, REVISION, config_flags};
use crate::error::{Error, Result};
use crate::sys::bpf::map::Map;
use crate::sys::bpf::object::{self, Aligned, Object};
use crate::sys::bpf::pins::Pins;
use crate::sys::bpf::program::Program;

/// All programs, as `src/bpf/build.sh` made them.
pub static OBJECT: &[u8] = &ALIGNED.0;
static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!("../../bpf/portmap.bpf.o"));
/// Beginning of the object's SHA-256, which names its programs' directory. A test compares them.
pub static OBJECT_REVISION: &str = include_str!("../../bpf/portmap.bpf.o.revision").trim_ascii();

/// Maps that every call works on.
const MAPS: [&str; 6] =
    ["pm_claims", "pm_ports", "pm_port_uses", "pm_traffic", "pm_addresses", "pm_config"];
/// Maps whose entries an upgrade takes along: connections, and what was counted.
const CARRIED: [&str; 4] = ["pm_flows", "pm_remaps", "pm_sockets", "pm_traffic"];

/// See `src/bpf/maps.h`.
pub struct Maps {
    pub claims: Map,
    pub ports: Map,
    pub port_uses: Map,
    pub traffic: Map,
    pub addresses: Map,
    pub config: Map,
}

/// What programs remember.
pub struct Flows {
    pub flows: Map,
    pub sockets: Map,
}

/// Maps and programs, open.
pub struct Loaded {
    pub maps: Maps,
    pins: Pins,
    /// Of the programs that are used: a newer plugin's are left in place.
    revision: String,
    batches: bool,
    programs: RefCell<BTreeMap<String, Program>>,
}

impl Loaded {
    /// What is there, if it is complete; `None` if this plugin's layout has no maps.
    ///
    /// # Errors
    ///
    /// `Error::Newer` where a newer plugin has changed the layout: nothing can be said of its maps.
    pub fn open(batches: bool) -> Result<Option<Self>> {
        let pins = pins()?;
        refuse_newer(&pins)?;
        let maps = pins.maps(LAYOUT, MAPS).map_err(failed("open the eBPF maps"))?;
        maps.map(|maps| Self::with(pins, maps, batches)).transpose()
    }

    /// What is there, made complete.
    pub fn ensure(batches: bool) -> Result<Self> {
        if let Some(loaded) = Self::open(batches)? {
            return Ok(loaded);
        }
        let pins = pins()?;
        let object = Object::parse(OBJECT).map_err(failed("read the eBPF object"))?;
        let definitions = object.maps();
        let older = pins.list().map_err(failed("list the pinned eBPF maps"))?.layouts;
        let maps = pins
            .create_maps(LAYOUT, definitions.values(), |maps| {
                older.iter().try_for_each(|layout| carry(&pins, *layout, maps))
            })
            .map_err(failed("make the eBPF maps"))?;
        Self::with(pins, maps, batches)
    }

    fn with(pins: Pins, mut maps: BTreeMap<String, Map>, batches: bool) -> Result<Self> {
        let mut take = |name: &str| {
            let map = maps.remove(name).ok_or_else(|| missing(name))?;
            Ok::<_, Error>(if batches { map } else { map.without_batches() })
        };
        let maps = Maps {
            claims: take("pm_claims")?,
            ports: take("pm_ports")?,
            port_uses: take("pm_port_uses")?,
            traffic: take("pm_traffic")?,
            addresses: take("pm_addresses")?,
            config: take("pm_config")?,
        };
        let mut revision = OBJECT_REVISION.to_owned();
        if config(&maps)?.revision > REVISION {
            let revisions = pins.list().map_err(failed("list the pinned eBPF programs"))?.revisions;
            revision = revisions.into_iter().next().unwrap_or(revision);
        }
        Ok(Loaded { maps, pins, revision, batches, programs: RefCell::default() })
    }

    /// Numbers of programs by name, as far as they are loaded.
    pub fn loaded(&self, names: &BTreeSet<&str>) -> Result<BTreeMap<String, u32>> {
        let mut programs = self.programs.borrow_mut();
        for name in names {
            if programs.contains_key(*name) {
                continue;
            }
            let opened = self
                .pins
                .program(&self.revision, name)
                .map_err(|error| Error::io(format!("open the eBPF program {name}"), error))?;
            if let Some(program) = opened {
                programs.insert((*name).to_owned(), program);
            }
        }
        Ok(programs.iter().map(|(name, program)| (name.clone(), program.id())).collect())
    }

    /// Loads those of the programs that are not there.
    pub fn load(&self, names: &BTreeSet<&str>) -> Result<BTreeMap<String, u32>> {
        let present = self.loaded(names)?;
        let todo: Vec<&str> =
            names.iter().copied().filter(|name| !present.contains_key(*name)).collect();
        if todo.is_empty() {
            return Ok(present);
        }
        let load = || -> io::Result<Vec<Program>> {
            let object = Object::parse(OBJECT)?;
            let wanted = object.maps();
            let maps = self
                .pins
                .maps(LAYOUT, wanted.keys().map(String::as_str))?
                .ok_or_else(|| io::Error::other("its maps are not all pinned"))?;
            let programs = object::load(&object.link(&maps, &todo)?)?;
            self.pins.add_programs(&self.revision, todo.iter().copied().zip(&programs))?;
            Ok(programs)
        };
        let programs = load().map_err(failed("load the eBPF programs"))?;
        self.programs.borrow_mut().extend(todo.iter().map(|name| (*name).to_owned()).zip(programs));
        self.loaded(names)
    }

    /// Does something with a program that has been loaded or opened.
    pub fn with_program<T>(
        &self,
        name: &str,
        action: impl FnOnce(&Program) -> Result<T>,
    ) -> Result<T> {
        match self.programs.borrow().get(name) {
            Some(program) => action(program),
            None => Err(missing(name)),
        }
    }

    /// The maps of connections.
    pub fn flows(&self) -> Result<Flows> {
        let open = |name: &str| {
            let map = self
                .pins
                .map(LAYOUT, name)
                .map_err(failed("open the eBPF maps"))?
                .ok_or_else(|| missing(name))?;
            Ok::<_, Error>(if self.batches { map } else { map.without_batches() })
        };
        Ok(Flows { flows: open("pm_flows")?, sockets: open("pm_sockets")? })
    }

    /// The map of counters by reason, in the order of `layout::REASONS`.
    pub fn reasons(&self) -> Result<Map> {
        let map = self.pins.map(LAYOUT, "pm_reasons").map_err(failed("open the eBPF maps"))?;
        map.ok_or_else(|| missing("pm_reasons"))
    }

    /// Says which version's programs are attached from now on.
    pub fn claim_revision(&self) -> Result<()> {
        self.reconfigure(|config| config.revision = config.revision.max(REVISION))
    }

    /// Says in which network namespace the socket hooks act.
    pub fn set_cookie(&self, cookie: u64) -> Result<()> {
        self.reconfigure(|config| {
            config.netns_cookie = cookie;
            config.flags |= config_flags::COOKIE;
        })
    }

    /// Lets the program on connect4 keep the cookie of whoever connects to an address next.
    pub fn learn_from(&self, address: SocketAddrV4) -> io::Result<()> {
        self.reconfigure(|config| config.learn(address)).map_err(io::Error::other)
    }

    /// After that connection: what was learnt holds from now on, if anything was.
    pub fn trust_learnt_cookie(&self) -> Result<()> {
        self.reconfigure(|config| {
            if config.has_learnt() {
                config.flags |= config_flags::COOKIE;
            }
        })
    }

    /// The network namespace that the socket hooks act in, if it is known.
    pub fn cookie(&self) -> Result<Option<u64>> {
        let config = config(&self.maps)?;
        Ok((config.flags & config_flags::COOKIE != 0).then_some(config.netns_cookie))
    }

    fn reconfigure(&self, change: impl FnOnce(&mut Config)) -> Result<()> {
        let before = config(&self.maps)?;
        let mut after = before;
        change(&mut after);
        if before == after {
            return Ok(());
        }
        self.maps
            .config
            .put(0_u32.as_bytes(), after.as_bytes())
            .map_err(failed("write the configuration of the eBPF programs"))
    }

    /// After an upgrade: takes along what came about while both were at work, and lets the old maps
    /// and programs go.
    pub fn finish_upgrade(&self) -> Result<()> {
        let tidy = || -> io::Result<()> {
            let contents = self.pins.list()?;
            for layout in contents.layouts.into_iter().filter(|layout| *layout < LAYOUT) {
                if let Some(maps) = self.pins.maps(LAYOUT, CARRIED)? {
                    carry(&self.pins, layout, &maps)?;
                }
                self.pins.remove_maps(layout)?;
            }
            for revision in contents.revisions.iter().filter(|name| **name != self.revision) {
                self.pins.remove_programs(revision)?;
            }
            Ok(())
        };
        tidy().map_err(failed("remove the former eBPF maps and programs"))
    }
}

/// Takes every name away: what is attached nowhere is gone then.
pub fn unpin() -> Result<()> {
    let pins = pins()?;
    refuse_newer(&pins)?;
    pins.remove_all().map_err(failed("remove the pinned eBPF maps and programs"))
}

/// Numbers of the pinned maps of this name, of all layouts.
pub fn ids(name: &str) -> Result<BTreeSet<u32>> {
    let read = || -> io::Result<BTreeSet<u32>> {
        let pins = Pins::open()?;
        let layouts = pins.list()?.layouts;
        let maps = layouts.into_iter().filter_map(|layout| pins.map(layout, name).transpose());
        maps.map(|map| Ok(map?.id())).collect()
    };
    read().map_err(failed("list the pinned eBPF maps"))
}

fn pins() -> Result<Pins> {
    Pins::open().map_err(failed("use the directory for eBPF maps"))
}

fn refuse_newer(pins: &Pins) -> Result<()> {
    let newest = pins.list().map_err(failed("list the pinned eBPF maps"))?.layouts.pop();
    match newest.filter(|newest| *newest > LAYOUT) {
        Some(newest) => Err(Error::NewerMaps { newest, own: LAYOUT }),
        None => Ok(()),
    }
}

/// Entries of an older layout, as far as the new maps do not have them.
fn carry(pins: &Pins, layout: u32, maps: &BTreeMap<String, Map>) -> io::Result<()> {
    for name in CARRIED {
        if let (Some(old), Some(new)) = (pins.map(layout, name)?, maps.get(name)) {
            new.take_over(&old)?;
        }
    }
    Ok(())
}

fn config(maps: &Maps) -> Result<Config> {
    let value = maps
        .config
        .get(0_u32.as_bytes())
        .map_err(failed("read the configuration of the eBPF programs"))?;
    Ok(value.and_then(|value| Config::read_from_bytes(&value).ok()).unwrap_or_default())
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::io(action, error)
}

fn missing(name: &str) -> Error {
    Error::io(
        format!("use {name}"),
        io::Error::new(
            io::ErrorKind::NotFound,
            "the eBPF backend's maps or programs are incomplete",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_is_the_object_s() {
        assert_eq!(OBJECT_REVISION, object::revision(OBJECT));
    }
}
