//! What is loaded on the node: maps by layout, programs by the object that they are from.
//!
//! A call that finds everything in place opens the maps and looks at the programs' numbers, which an earlier
//! call has noted. Only if something is missing
//! is the object taken apart, and only programs that are needed are verified, which is most of the
//! cost of a first call.

mod config;
mod known;
mod upgrade;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use super::layout::{Config, LAYOUT, REVISION};
use crate::error::{Error, Result};
use crate::sys::bpf::map::Map;
use crate::sys::bpf::name::Name;
use crate::sys::bpf::numbers::{Numbers, Stamp};
use crate::sys::bpf::object::{self, Aligned, Object};
use crate::sys::bpf::pins::Pins;
use crate::sys::bpf::program::Program;
use config::config;
pub use known::is_as_seen;
use upgrade::make_maps;

/// An object, and what this and other versions of the plugin know it by.
#[derive(Debug, Clone, Copy)]
pub struct Build {
    pub object: &'static [u8],
    /// Beginning of the object's SHA-256, which names its programs' directory.
    pub digest: &'static str,
    /// As in `layout.h`.
    pub layout: u32,
    pub revision: u32,
}

/// All programs, as `src/bpf/build.sh` made them.
pub static OWN: Build = Build {
    object: &ALIGNED.0,
    digest: include_str!("../../bpf/portmap.bpf.o.revision").trim_ascii(),
    layout: LAYOUT,
    revision: REVISION,
};
static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!("../../bpf/portmap.bpf.o"));

/// Maps that every call works on.
const WORKED_ON: [&str; 6] =
    ["pm_claims", "pm_ports", "pm_port_uses", "pm_traffic", "pm_addresses", "pm_config"];
/// Maps that are the programs' own business.
const OTHERS: [&str; 6] =
    ["pm_flows", "pm_remaps", "pm_fragments", "pm_sockets", "pm_streams", "pm_reasons"];
/// See `src/bpf/maps.h`.
pub struct Maps {
    pub claims: Map,
    pub ports: Map,
    pub port_uses: Map,
    pub traffic: Map,
    pub addresses: Map,
    pub config: Map,
}

impl Maps {
    fn open(batches: bool, mut open: impl FnMut(&str) -> Option<Map>) -> Result<Self> {
        let mut open = |name: &str| {
            let map = open(name).ok_or_else(|| missing(name))?;
            Ok::<_, Error>(if batches { map } else { map.without_batches() })
        };
        Ok(Maps {
            claims: open("pm_claims")?,
            ports: open("pm_ports")?,
            port_uses: open("pm_port_uses")?,
            traffic: open("pm_traffic")?,
            addresses: open("pm_addresses")?,
            config: open("pm_config")?,
        })
    }
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
    build: Build,
    /// Directories that programs are looked for in, a newer plugin's first: it is left in place.
    digests: Vec<String>,
    batches: bool,
    /// What programs were told, as this call knows it.
    config: Cell<Config>,
    programs: RefCell<BTreeMap<Name, Program>>,
    /// Numbers of programs by name, of those that are open or known from an earlier call.
    ids: RefCell<Arc<BTreeMap<Name, u32>>>,
    /// Those from an earlier call are of programs that still have their names.
    exact: Cell<bool>,
    /// The directories of pins: the one above all, that of the maps, and that of the programs.
    stamps: Cell<[Option<Stamp>; 3]>,
}

/// What a look at the pins came to.
pub enum Found {
    Loaded(Box<Loaded>),
    /// What is not there, and where it is expected.
    Missing(String),
}

impl Loaded {
    /// What is there, if no map is missing. Where the directory is as an earlier call has seen it, which
    /// [`is_as_seen`] has said of the one above, the maps are opened by their numbers: walking the path of
    /// one takes longer than anything else that is done with it.
    ///
    /// # Errors
    ///
    /// `Error::NewerMaps` where a newer plugin has changed the layout: nothing can be said of its maps.
    pub fn open(build: &Build, batches: bool, known: &Numbers) -> Result<Found> {
        let before = Pins::opened_before();
        let stamp = before.maps_stamp(build.layout);
        let seen = known::seen_by(build, known).filter(|seen| stamp == Some(seen.maps));
        let (pins, root, maps) =
            match seen.and_then(|seen| Some((seen, known::maps(known, batches)?))) {
                Some((seen, maps)) => (before, Some(seen.root), maps),
                None => {
                    let pins = pins()?;
                    if let Some(missing) = missing_map(&pins, build.layout)? {
                        return Ok(Found::Missing(missing));
                    }
                    let maps = pins.maps(build.layout, WORKED_ON);
                    let mut maps = maps.map_err(failed("open the eBPF maps"))?.unwrap_or_default();
                    let maps = Maps::open(batches, |name| maps.remove(name))?;
                    let root = pins.stamp();
                    (pins, root, maps)
                }
            };
        let loaded = Self::with(build, pins, maps, batches)?;
        loaded.stamps.set([root, stamp, None]);
        Ok(Found::Loaded(Box::new(loaded)))
    }

    /// What is there, made complete.
    pub fn ensure(build: &Build, batches: bool) -> Result<Self> {
        let pins = pins()?;
        admitted(&pins, build.layout)?;
        let object = Object::parse(build.object).map_err(failed("read the eBPF object"))?;
        let made = make_maps(&pins, build.layout, &object.maps());
        let mut made = made.map_err(failed("make the eBPF maps"))?;
        let maps = Maps::open(batches, |name| made.remove(name))?;
        Self::with(build, pins, maps, batches)
    }

    fn with(build: &Build, pins: Pins, maps: Maps, batches: bool) -> Result<Self> {
        let config = config(&maps)?;
        let mut digests = vec![build.digest.to_owned()];
        if config.revision > build.revision {
            let present = pins.list().map_err(failed("list the pinned eBPF programs"))?.revisions;
            let newer = present.into_iter().filter(|digest| digest != build.digest);
            digests.splice(0..0, newer);
        }
        Ok(Loaded {
            maps,
            pins,
            build: *build,
            digests,
            batches,
            config: Cell::new(config),
            programs: RefCell::default(),
            ids: RefCell::default(),
            exact: Cell::default(),
            stamps: Cell::default(),
        })
    }

    /// The revision whose programs go before others'.
    fn digest(&self) -> &str {
        self.digests.first().map_or(self.build.digest, String::as_str)
    }

    /// Numbers of programs by name, as far as they are loaded.
    pub fn loaded(&self, names: &BTreeSet<&str>) -> Result<Arc<BTreeMap<Name, u32>>> {
        for name in names {
            if !self.ids.borrow().contains_key(&Name::of(name))
                && let Some(program) = self.open_program(name)?
            {
                self.adopt(name, program);
            }
        }
        Ok(Arc::clone(&self.ids.borrow()))
    }

    fn open_program(&self, name: &str) -> Result<Option<Program>> {
        for digest in &self.digests {
            let opened = self
                .pins
                .program(digest, name)
                .map_err(|error| Error::io(format!("open the eBPF program {name}"), error))?;
            if opened.is_some() {
                return Ok(opened);
            }
        }
        Ok(None)
    }

    fn adopt(&self, name: &str, program: Program) {
        let (name, id) = (Name::of(name), program.id());
        let mut ids = self.ids.borrow_mut();
        if ids.get(&name) != Some(&id) {
            Arc::make_mut(&mut ids).insert(name, id);
        }
        self.programs.borrow_mut().insert(name, program);
    }

    /// Loads those of the programs that are not there.
    pub fn load(&self, names: &BTreeSet<&str>) -> Result<Arc<BTreeMap<Name, u32>>> {
        let present = self.loaded(names)?;
        let todo: Vec<&str> =
            names.iter().copied().filter(|name| !present.contains_key(&Name::of(name))).collect();
        if todo.is_empty() {
            return Ok(present);
        }
        let Build { object, digest, layout, .. } = self.build;
        let load = || -> io::Result<Vec<Program>> {
            let object = Object::parse(object)?;
            let wanted = object.maps();
            let maps = self
                .pins
                .maps(layout, wanted.keys().map(String::as_str))?
                .ok_or_else(|| io::Error::other("its maps are not all pinned"))?;
            let programs = object::load(&object.link(&maps, &todo)?)?;
            self.pins.add_programs(digest, todo.iter().copied().zip(&programs))?;
            Ok(programs)
        };
        let programs = load().map_err(failed("load the eBPF programs"))?;
        todo.iter().zip(programs).for_each(|(name, program)| self.adopt(name, program));
        self.loaded(names)
    }

    /// Which of these programs have no pin, in words. `ids` is what [`Loaded::loaded`] found.
    pub fn unpinned(&self, names: &BTreeSet<&str>, ids: &BTreeMap<Name, u32>) -> Vec<String> {
        let dir = self.pins.programs_dir(self.digest());
        let missing = names.iter().filter(|name| !ids.contains_key(&Name::of(name)));
        missing
            .map(|name| {
                format!("the eBPF program {name} is missing: expected in {}", dir.display())
            })
            .collect()
    }

    /// Does something with a program that has been loaded, or of which [`Loaded::loaded`] knew.
    pub fn with_program<T>(
        &self,
        name: &str,
        action: impl FnOnce(&Program) -> Result<T>,
    ) -> Result<T> {
        let key = Name::of(name);
        if !self.programs.borrow().contains_key(&key) {
            let known = self.ids.borrow().get(&key).copied().filter(|_| self.exact.get());
            let known = known.and_then(|id| Program::from_id(id).ok()?);
            if let Some(program) =
                known.map_or_else(|| self.open_program(name), |it| Ok(Some(it)))?
            {
                self.adopt(name, program);
            }
        }
        match self.programs.borrow().get(&key) {
            Some(program) => action(program),
            None => Err(missing(name)),
        }
    }

    /// The maps of connections.
    pub fn flows(&self) -> Result<Flows> {
        let open = |name: &str| {
            let map = self
                .pins
                .map(self.build.layout, name)
                .map_err(failed("open the eBPF maps"))?
                .ok_or_else(|| missing(name))?;
            Ok::<_, Error>(if self.batches { map } else { map.without_batches() })
        };
        Ok(Flows { flows: open("pm_flows")?, sockets: open("pm_sockets")? })
    }

    /// The map of counters by reason, whose keys are indices of `layout::REASONS`.
    pub fn reasons(&self) -> Result<Map> {
        let map =
            self.pins.map(self.build.layout, "pm_reasons").map_err(failed("open the eBPF maps"))?;
        map.ok_or_else(|| missing("pm_reasons"))
    }
}

/// Whether anything is pinned, by whichever version.
pub fn is_pinned() -> bool {
    pins().is_ok_and(|pins| pins.exists())
}

/// Takes every name away: what is attached nowhere is gone then.
pub fn unpin() -> Result<()> {
    pins()?.remove_all().map_err(failed("remove the pinned eBPF maps and programs"))
}

/// Fails where a newer plugin has changed the layout: its maps and programs are not for this one. Says
/// whether maps have been made here.
pub fn refuse_newer() -> Result<bool> {
    Ok(admitted(&pins()?, LAYOUT)?.contains(&LAYOUT))
}

/// Which map is not there, in words.
fn missing_map(pins: &Pins, layout: u32) -> Result<Option<String>> {
    admitted(pins, layout)?;
    let present = pins.map_names(layout).map_err(failed("look for the eBPF maps"))?;
    let dir = pins.maps_dir(layout);
    let mut expected = WORKED_ON.iter().chain(&OTHERS);
    let missing = expected.find(|name| !present.contains(**name));
    Ok(missing.map(|name| match present.is_empty() {
        true => format!("there are no eBPF maps: expected in {}", dir.display()),
        false => format!("the eBPF map {name} is missing: expected in {}", dir.display()),
    }))
}

/// The layouts that there are, none of which is newer.
fn admitted(pins: &Pins, own: u32) -> Result<Vec<u32>> {
    let layouts = pins.list().map_err(failed("list the pinned eBPF maps"))?.layouts;
    match layouts.last().copied().filter(|newest| *newest > own) {
        Some(newest) => Err(Error::NewerMaps { newest, own }),
        None => Ok(layouts),
    }
}

fn pins() -> Result<Pins> {
    Pins::open().map_err(failed("use the directory for eBPF maps"))
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
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_object_s() {
        assert_eq!(OWN.digest, object::revision(OWN.object));
    }

    #[test]
    fn the_maps_are_the_object_s() {
        let maps = Object::parse(OWN.object).unwrap().maps();
        let mut known: Vec<&str> = WORKED_ON.into_iter().chain(OTHERS).collect();
        known.sort_unstable();
        assert_eq!(maps.keys().map(String::as_str).collect::<Vec<_>>(), known);
    }
}
