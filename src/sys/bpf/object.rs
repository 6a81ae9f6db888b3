//! The object file with all programs and the definitions of their maps.
//!
//! Taking it apart costs half a millisecond and verifying its programs many times that, so nothing
//! of it is looked at unless something is missing in the kernel.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;

use aya_obj::ProgramSection;
use aya_obj::generated::{bpf_attach_type, bpf_insn};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use sha2::{Digest, Sha256};

use super::in_parallel;
use super::map::{Definition, Map};
use super::program::{Hook, Program, SocketHook};

/// The first 16 hexadecimal digits of an object's SHA-256, which name the directory of its programs.
#[must_use]
pub fn revision(object: &[u8]) -> String {
    Sha256::digest(object)[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes at an address that is a multiple of 8: sections of an object are read in place.
#[repr(C, align(8))]
pub struct Aligned<T: ?Sized>(pub T);

/// An object, taken apart.
#[derive(Debug, Clone)]
pub struct Object {
    parsed: aya_obj::Object,
}

/// A program, complete but for the kernel's consent.
#[derive(Debug, Clone)]
pub struct Loadable {
    pub name: String,
    pub hook: Hook,
    license: CString,
    instructions: Vec<bpf_insn>,
}

impl Object {
    /// Takes an ELF object apart, which has to be [`Aligned`].
    ///
    /// # Errors
    ///
    /// `InvalidData` for what is no such object, has sections of an unknown kind, or global data,
    /// which kernels before 5.2 do not know.
    pub fn parse(bytes: &[u8]) -> io::Result<Self> {
        let parsed = aya_obj::Object::parse(bytes).map_err(invalid)?;
        match parsed.maps.iter().find(|(_, map)| !map.data().is_empty()) {
            Some((section, _)) => Err(invalid(format!("the object has global data in {section}"))),
            None => Ok(Self { parsed }),
        }
    }

    /// Definitions of all maps, by name.
    #[must_use]
    pub fn maps(&self) -> BTreeMap<String, Definition> {
        let definition = |(name, map): (&String, &aya_obj::Map)| {
            let definition = Definition {
                name: name.clone(),
                kind: map.map_type(),
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: map.max_entries(),
                flags: map.map_flags(),
            };
            (name.clone(), definition)
        };
        self.parsed.maps.iter().map(definition).collect()
    }

    /// Names of all programs, and where they can be attached.
    ///
    /// # Errors
    ///
    /// `InvalidData` for a program of a kind that is not used here.
    pub fn programs(&self) -> io::Result<BTreeMap<String, Hook>> {
        let hook = |(name, program): (&String, &aya_obj::Program)| {
            Ok((name.clone(), hook(name, &program.section)?))
        };
        self.parsed.programs.iter().map(hook).collect()
    }

    /// Puts maps into the programs, and together with each one the functions that it calls.
    ///
    /// # Errors
    ///
    /// `InvalidData` if a program has a map that is not in `maps`, or calls what is not there;
    /// `NotFound` if `names` has what the object has not.
    pub fn link(
        mut self,
        maps: &BTreeMap<String, Map>,
        names: &[&str],
    ) -> io::Result<Vec<Loadable>> {
        let definitions: HashMap<String, aya_obj::Map> = self.parsed.maps.clone();
        if let Some(missing) = definitions.keys().find(|name| !maps.contains_key(*name)) {
            return Err(invalid(format!("no map for {missing}")));
        }
        // What is not asked for is not linked.
        self.parsed.programs.retain(|name, _| names.contains(&name.as_str()));
        let sections: HashSet<usize> =
            self.parsed.functions.keys().map(|(section, _)| *section).collect();
        let opened = definitions.iter().filter_map(|(name, definition)| {
            Some((name.as_str(), maps.get(name)?.fd().as_raw_fd(), definition))
        });
        self.parsed.relocate_maps(opened, &sections).map_err(invalid)?;
        self.parsed.relocate_calls(&sections).map_err(invalid)?;
        names.iter().map(|name| self.loadable(name)).collect()
    }

    fn loadable(&self, name: &str) -> io::Result<Loadable> {
        let missing =
            || io::Error::new(io::ErrorKind::NotFound, format!("the object has no program {name}"));
        let program = self.parsed.programs.get(name).ok_or_else(missing)?;
        let function = self.parsed.functions.get(&program.function_key()).ok_or_else(missing)?;
        Ok(Loadable {
            name: name.to_owned(),
            hook: hook(name, &program.section)?,
            license: program.license.clone(),
            instructions: function.instructions.clone(),
        })
    }
}

/// Loads programs, as many at a time as there are processors: nearly all of the time goes into the
/// verifier, which runs in the calling thread, and in parallel for callers with `CAP_BPF` or, before
/// Linux 5.8, `CAP_SYS_ADMIN`. The results have the order of `programs`.
///
/// # Errors
///
/// As [`Program::load`], of the first program that fails.
pub fn load(programs: &[Loadable]) -> io::Result<Vec<Program>> {
    lift_memory_limit();
    // The long ones first, lest the last one is begun when all others are done.
    let mut order: Vec<(usize, &Loadable)> = programs.iter().enumerate().collect();
    order.sort_by_key(|(_, program)| Reverse(program.instructions.len()));
    let mut loaded = in_parallel(&order, |(index, program)| {
        let Loadable { name, hook, license, instructions } = program;
        (*index, Program::load(*hook, name, instructions, license))
    })?;
    loaded.sort_by_key(|(index, _)| *index);
    loaded.into_iter().map(|(_, program)| program).collect()
}

/// Before Linux 5.11, maps and programs count against the memory that a process may lock, and 64 KiB
/// are usual. Later kernels do not look at it. Without `CAP_SYS_RESOURCE` it stays as it is, and
/// what then does not fit is refused with `EPERM`.
pub(super) fn lift_memory_limit() {
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).ok();
}

fn hook(name: &str, section: &ProgramSection) -> io::Result<Hook> {
    let unknown = || invalid(format!("program {name} is of a kind that is not used"));
    match section {
        ProgramSection::SchedClassifier => Ok(Hook::Classifier),
        ProgramSection::CgroupSockAddr { attach_type } => {
            let number = bpf_attach_type::from(*attach_type) as u32;
            let found = SocketHook::ALL.into_iter().find(|hook| hook.attach_type() == number);
            found.map(Hook::Socket).ok_or_else(unknown)
        }
        _ => Err(unknown()),
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
