//! Reading what a node shows of itself, for who has to find out what is wrong with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use nix::sys::statfs::{FsType, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, access};

use super::install::{self, Before};
use super::store;
use crate::cilium::Settings;
use crate::doctor::setup::Binary;
use crate::doctor::state::Directory;
use crate::usage::identity_in;

/// Largest program that is searched for what it is.
const LARGEST: u64 = 256 << 20;
/// RAMFS_MAGIC of linux/magic.h; TMPFS_MAGIC is nix's.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Devices with `route_localnet`, `all` among them where it is on for every device.
///
/// # Errors
///
/// What reading /proc returns.
pub fn routing_localnet() -> io::Result<BTreeSet<String>> {
    let mut devices = BTreeSet::new();
    for entry in fs::read_dir("/proc/sys/net/ipv4/conf")? {
        let entry = entry?;
        match fs::read_to_string(entry.path().join("route_localnet")) {
            Ok(value) if value.trim() == "1" => {
                devices.insert(entry.file_name().to_string_lossy().into_owned());
            }
            Ok(_) => {}
            // The device has gone.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    // What devices to come begin with, and the one that nothing from outside comes in by.
    for name in ["default", "lo"] {
        devices.remove(name);
    }
    Ok(devices)
}

/// The text of a file; `None` if there is none.
///
/// # Errors
///
/// What reading it returns.
pub fn text(path: &Path) -> io::Result<Option<String>> {
    absent(fs::read(path)).map(|text| text.map(|text| String::from_utf8_lossy(&text).into_owned()))
}

/// All names in a directory, in order; `None` if there is none.
///
/// # Errors
///
/// What reading it returns.
pub fn names(path: &Path) -> io::Result<Option<Vec<String>>> {
    let Some(entries) = absent(fs::read_dir(path))? else { return Ok(None) };
    let name = |entry: io::Result<fs::DirEntry>| {
        entry.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    let mut names = entries.map(name).collect::<io::Result<Vec<String>>>()?;
    names.sort_unstable();
    Ok(Some(names))
}

/// Whether this process is root's, as far as files and the network are concerned.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root() && super::bpf::require_capabilities().is_ok()
}

/// What the state directory is like; `None` if there is none.
///
/// # Errors
///
/// What looking at it returns.
pub fn state_directory(dir: &Path) -> io::Result<Option<Directory>> {
    let Some(meta) = absent(fs::metadata(dir))? else { return Ok(None) };
    let space = statvfs(dir)?;
    let kind = statfs(dir)?.filesystem_type();
    // File systems without a table of inodes say that they have none.
    let full = if space.blocks_available() == 0 && space.blocks() > 0 {
        Some("space")
    } else if space.files_available() == 0 && space.files() > 0 {
        Some("inodes")
    } else {
        None
    };
    Ok(Some(Directory {
        refused: store::refusal(dir, &meta),
        writable: access(dir, AccessFlags::W_OK).is_ok(),
        full,
        on_disk: kind != nix::sys::statfs::TMPFS_MAGIC && kind != RAMFS_MAGIC,
    }))
}

/// What runtimes find at the plugin's place. Nothing is run to find that out: this plugin's builds
/// have their version in them, and upstream's the path of its package.
///
/// # Errors
///
/// What reading it returns.
pub fn binary(path: &Path) -> io::Result<Binary> {
    let link = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Binary::Missing),
        other => other?.is_symlink(),
    };
    let meta = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && link => {
            return Ok(Binary::Dangling(fs::read_link(path)?));
        }
        other => other?,
    };
    if meta.is_dir() {
        return Ok(Binary::NotAFile("a directory"));
    }
    if !meta.is_file() {
        return Ok(Binary::NotAFile("neither a file nor a directory"));
    }
    if meta.permissions().mode() & 0o111 == 0 {
        let mode = meta.mode() & 0o7777;
        return Ok(Binary::NotExecutable(format!("its mode is {mode:o}")));
    }
    if statvfs(path)?.flags().contains(FsFlags::ST_NOEXEC) {
        return Ok(Binary::NotExecutable("its file system is mounted noexec".into()));
    }
    if install::look(path)? == Before::Same {
        return Ok(Binary::Same);
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(LARGEST).read_to_end(&mut bytes)?;
    Ok(match identity_in(&bytes) {
        Some(version) => Binary::Ours(version),
        None if contains(&bytes, b"containernetworking/plugins/plugins/meta/portmap") => {
            Binary::Upstreams
        }
        None => Binary::Unknown,
    })
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where Cilium's agent keeps its state.
pub const CILIUM_RUN: &str = "/run/cilium";

/// What the agent has written there of its settings.
#[must_use]
pub fn cilium_settings() -> Settings {
    let file = |name: &str| {
        let path = Path::new(CILIUM_RUN).join("state").join(name);
        let text = text(&path).map_err(|error| error.to_string());
        (path, text)
    };
    Settings {
        node_config: file("globals/node_config.h"),
        runtime_config: file("agent-runtime-config.json"),
    }
}
