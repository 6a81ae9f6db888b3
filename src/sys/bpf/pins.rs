//! Names for maps and programs in a bpffs:
//!
//! ```text
//! /sys/fs/bpf/portmap/m<layout>/<map>          maps by the layout of their values
//!                     p-<revision>/<program>   programs by the object that they are from
//!                     tmp-…                    what is not finished
//! ```
//!
//! A directory gets its name when it is complete: until then it has a temporary one, which whoever
//! comes next removes if its maker was killed. A single pin is atomic by itself. Callers hold the
//! node's lock; names have no dots, which bpffs refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::unistd::{AccessFlags, access};

use super::in_parallel;
use super::map::{Definition, Map};
use super::numbers::Stamp;
use super::object::lift_memory_limit;
use super::program::Program;
use super::refusal::explained;
use crate::sys::directory;
use crate::sys::namespace::in_scratch_mounts;

/// Where the kernel makes a directory for a bpffs, if it has bpf(2) at all.
const BPFFS: &str = "/sys/fs/bpf";
const DIRECTORY: &str = "portmap";
const TEMPORARY: &str = "tmp-";

/// The plugin's directory in the bpffs of this mount namespace.
#[derive(Debug, Clone)]
pub struct Pins {
    root: PathBuf,
    stamp: Option<Stamp>,
}

/// What has names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Layouts of which there are maps, in ascending order. A plugin that finds a newer one than its
    /// own must leave everything as it is.
    pub layouts: Vec<u32>,
    /// Revisions of the object of which there are programs.
    pub revisions: Vec<String>,
}

impl Pins {
    /// The directory, whether it exists or not.
    ///
    /// # Errors
    ///
    /// `PermissionDenied` if it is one that others may write to: everybody may make directories in
    /// a bpffs that is mounted without a mode, and maps decide where packets go.
    pub fn open() -> io::Result<Self> {
        let root = Path::new(BPFFS).join(DIRECTORY);
        let mut stamp = None;
        match fs::symlink_metadata(&root) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(meta) if !meta.is_dir() || meta.mode() & 0o022 != 0 || !is_ours(&meta) => {
                return Err(io::Error::new(
                    ErrorKind::PermissionDenied,
                    format!(
                        "{} has owner {} and mode {:03o}: nobody but the owner, who must be user {}, may write to it",
                        root.display(),
                        meta.uid(),
                        meta.mode() & 0o777,
                        nix::unistd::geteuid()
                    ),
                ));
            }
            Ok(meta) => stamp = Stamp::of(&meta),
        }
        Ok(Self { root, stamp })
    }

    /// As [`Pins::open`], for who has asked that before.
    #[must_use]
    pub fn opened_before() -> Self {
        Self { root: Path::new(BPFFS).join(DIRECTORY), stamp: None }
    }

    /// The directory's own stamp when it was opened.
    #[must_use]
    pub fn stamp(&self) -> Option<Stamp> {
        self.stamp
    }

    /// The stamp of the directory with a layout's maps.
    #[must_use]
    pub fn maps_stamp(&self, layout: u32) -> Option<Stamp> {
        Stamp::of(&fs::symlink_metadata(self.maps_dir(layout)).ok()?)
    }

    /// The stamp of the directory with a revision's programs.
    #[must_use]
    pub fn programs_stamp(&self, revision: &str) -> Option<Stamp> {
        Stamp::of(&fs::symlink_metadata(self.programs_dir(revision)).ok()?)
    }

    /// Where a layout's maps are.
    #[must_use]
    pub fn maps_dir(&self, layout: u32) -> PathBuf {
        self.root.join(format!("m{layout}"))
    }

    /// Where a revision's programs are.
    #[must_use]
    pub fn programs_dir(&self, revision: &str) -> PathBuf {
        self.root.join(format!("p-{revision}"))
    }

    /// Finds out whether names can be given here, and leaves nothing behind.
    ///
    /// # Errors
    ///
    /// A message that says why not.
    pub fn try_out(&self) -> io::Result<()> {
        if is_bpffs()? {
            let dir = if self.exists() { &self.root } else { Path::new(BPFFS) };
            return access(dir, AccessFlags::W_OK).map_err(|error| {
                named(error.into(), &format!("cannot write to {}", dir.display()))
            });
        }
        in_scratch_mounts(Path::new(BPFFS), mount_bpffs).map_err(io::Error::other)?
    }

    /// One of a layout's maps; `None` if it, or the layout, is not there.
    ///
    /// # Errors
    ///
    /// What bpf(2) returns. This holds for all below, with what the file operations return.
    pub fn map(&self, layout: u32, name: &str) -> io::Result<Option<Map>> {
        Map::from_pin(&self.maps_dir(layout).join(name))
    }

    /// All of these maps of a layout, by name; `None` if one of them is not there.
    pub fn maps<'a>(
        &self,
        layout: u32,
        names: impl IntoIterator<Item = &'a str>,
    ) -> io::Result<Option<BTreeMap<String, Map>>> {
        let open = |name: &str| Ok(self.map(layout, name)?.map(|map| (name.to_owned(), map)));
        names.into_iter().map(open).map(io::Result::transpose).collect::<Option<_>>().transpose()
    }

    /// Names of a layout's maps; none if it is not there.
    pub fn map_names(&self, layout: u32) -> io::Result<BTreeSet<String>> {
        names_in(&self.maps_dir(layout))
    }

    /// Whether there is anything that this or another version has pinned.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.root.is_dir()
    }

    /// Names of a revision's programs; none if it is not there.
    pub fn program_names(&self, revision: &str) -> io::Result<BTreeSet<String>> {
        names_in(&self.programs_dir(revision))
    }

    /// One of a revision's programs; `None` if it is not there.
    pub fn program(&self, revision: &str, name: &str) -> io::Result<Option<Program>> {
        Program::from_pin(&self.programs_dir(revision).join(name))
    }

    /// Makes and names the maps of a layout. `fill` gets them before anybody else can; if it fails,
    /// nothing has happened. What there was of the layout loses its name, and so do all programs,
    /// which keep on using the maps that they were loaded with.
    pub fn create_maps<'a>(
        &self,
        layout: u32,
        definitions: impl IntoIterator<Item = &'a Definition>,
        fill: impl FnOnce(&BTreeMap<String, Map>) -> io::Result<()>,
    ) -> io::Result<BTreeMap<String, Map>> {
        self.prepare()?;
        lift_memory_limit();
        let dir = self.maps_dir(layout);
        let former = self.root.join(format!("{TEMPORARY}former"));
        let definitions: Vec<&Definition> = definitions.into_iter().collect();
        // Clearing the memory of a large LRU map takes longer than all others together.
        let make =
            |definition: &&Definition| Ok((definition.name.clone(), Map::create(definition)?));
        let maps: BTreeMap<String, Map> =
            in_parallel(&definitions, make)?.into_iter().collect::<io::Result<_>>()?;
        fill(&maps)?;
        self.publish(&dir, |temporary| {
            maps.iter().try_for_each(|(name, map)| map.pin(&temporary.join(name)))?;
            for revision in self.list()?.revisions {
                self.remove_programs(&revision)?;
            }
            // As a whole: where it is half gone, nobody would know that the new ones are complete.
            match fs::rename(&dir, &former) {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                other => other,
            }
        })?;
        remove(&former)?;
        Ok(maps)
    }

    /// Gives a layout's maps their name where [`Pins::create_maps`] was killed after it had taken the
    /// former ones' name away: what these held is nowhere else any more. They may be incomplete if there
    /// were none before.
    pub fn resume_maps(&self, layout: u32) -> io::Result<()> {
        let dir = self.maps_dir(layout);
        let made = self.temporary(&dir);
        if !made.is_dir() || dir.exists() {
            return Ok(());
        }
        fs::rename(made, dir)
    }

    /// Names programs of a revision, in addition to those that have names already.
    pub fn add_programs<'a>(
        &self,
        revision: &str,
        programs: impl IntoIterator<Item = (&'a str, &'a Program)>,
    ) -> io::Result<()> {
        self.prepare()?;
        let dir = self.programs_dir(revision);
        let pin_in = |dir: &Path| {
            programs.into_iter().try_for_each(|(name, program)| program.pin(&dir.join(name)))
        };
        if dir.is_dir() { pin_in(&dir) } else { self.publish(&dir, pin_in) }
    }

    /// Everything that has a name.
    pub fn list(&self) -> io::Result<Contents> {
        let mut contents = Contents::default();
        for name in names_in(&self.root)? {
            if let Some(revision) = name.strip_prefix("p-") {
                contents.revisions.push(revision.to_owned());
            } else if let Some(Ok(layout)) = name.strip_prefix('m').map(str::parse) {
                contents.layouts.push(layout);
            }
        }
        contents.layouts.sort_unstable();
        contents.revisions.sort_unstable();
        Ok(contents)
    }

    /// Takes the names of a revision's programs away. Those that are attached go on.
    pub fn remove_programs(&self, revision: &str) -> io::Result<()> {
        remove(&self.programs_dir(revision))
    }

    /// Takes the names of a layout's maps away. Those that programs use stay.
    pub fn remove_maps(&self, layout: u32) -> io::Result<()> {
        remove(&self.maps_dir(layout))
    }

    /// Takes all names away, and the directory.
    pub fn remove_all(&self) -> io::Result<()> {
        remove(&self.root)
    }

    /// Makes the directory, in a bpffs that is mounted if need be, and removes what is unfinished.
    fn prepare(&self) -> io::Result<()> {
        ensure_bpffs()?;
        match make_dir(&self.root) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            other => return other,
        }
        for name in names_in(&self.root)? {
            if name.starts_with(TEMPORARY) {
                remove(&self.root.join(name))?;
            }
        }
        Ok(())
    }

    fn temporary(&self, dir: &Path) -> PathBuf {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        self.root.join(format!("{TEMPORARY}{name}"))
    }

    /// Fills a directory under a temporary name and then gives it its own.
    fn publish(&self, dir: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
        let temporary = self.temporary(dir);
        make_dir(&temporary)?;
        let done = fill(&temporary).and_then(|()| fs::rename(&temporary, dir));
        if done.is_err() {
            // The first error is the one to report.
            drop(remove(&temporary));
        }
        done
    }
}

/// Names in a directory; none if there is no such directory.
fn names_in(dir: &Path) -> io::Result<BTreeSet<String>> {
    Ok(directory::names(dir)?.into_iter().collect())
}

fn ensure_bpffs() -> io::Result<()> {
    if is_bpffs()? { Ok(()) } else { mount_bpffs() }
}

fn is_bpffs() -> io::Result<bool> {
    match statfs(BPFFS) {
        Ok(found) => Ok(found.filesystem_type() == BPF_FS_MAGIC),
        Err(nix::errno::Errno::ENOENT) => Err(io::Error::new(
            ErrorKind::Unsupported,
            format!(
                "there is no {BPFFS}: this kernel has no bpf(2) (CONFIG_BPF_SYSCALL), or sysfs is not mounted"
            ),
        )),
        Err(error) => Err(named(error.into(), &format!("cannot look at {BPFFS}"))),
    }
}

fn mount_bpffs() -> io::Result<()> {
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700")).map_err(|error| {
        named(error.into(), &format!("no bpffs is mounted, and none can be mounted at {BPFFS}"))
    })
}

/// The error with its cause behind it, and what has failed in front.
fn named(error: io::Error, what: &str) -> io::Error {
    let error = explained(error);
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn is_ours(meta: &fs::Metadata) -> bool {
    meta.uid() == nix::unistd::geteuid().as_raw()
}

fn make_dir(path: &Path) -> io::Result<()> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.map_err(|error| named(error, &format!("cannot make {}", path.display())))
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotADirectory => fs::remove_file(path),
        other => other,
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
