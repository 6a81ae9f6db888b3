//! The cookie of the node's network namespace where neither the kernel tells it (before 5.14) nor a pinned
//! map: a program is attached for one connection.

use super::layout::Config;
use super::places;
use super::trial::load_apart;
use crate::sys::Host;
use crate::sys::bpf::cookie;
use crate::sys::bpf::map::Map;
use crate::sys::bpf::program::SocketHook;
use zerocopy::{FromBytes, IntoBytes};

const HOOK: SocketHook = SocketHook::Connect4;
const CONFIG: &str = "pm_config";
const ONLY: [u8; 4] = [0; 4];

/// Learns the cookie by a program of its own, which is gone afterwards.
///
/// # Errors
///
/// Why it cannot be learnt, in words.
pub fn ask(host: &Host) -> Result<u64, String> {
    let places = places::find(host)?;
    let (maps, programs) = load_apart(places::program(HOOK, true))?;
    let (Some(config), Some(program)) = (maps.get(CONFIG), programs.first()) else {
        return Err("the eBPF object is incomplete".into());
    };
    let mut attached = Vec::new();
    let mut learnt = Err("no cgroup of this process takes a program".to_owned());
    for place in &places.cgroups {
        // Somebody's, which allows no others: one of the others may hold this process.
        match place.attach(HOOK, program) {
            Ok(()) => attached.push(place),
            Err(error) => learnt = Err(format!("cgroup {}: {error}", place.name())),
        }
    }
    if !attached.is_empty() {
        learnt = learn(config);
    }
    for place in attached {
        if let Err(error) = place.detach(HOOK, program) {
            host.warn(format!("an eBPF program stays at the cgroup {}: {error}", place.name()));
        }
    }
    learnt
}

fn learn(config: &Map) -> Result<u64, String> {
    let expect = |address| {
        let mut told = Config::default();
        told.learn(address);
        config.put(&ONLY, told.as_bytes())
    };
    cookie::teach(expect).map_err(|error| error.to_string())?;
    let value = config.get(&ONLY).map_err(|error| error.to_string())?.unwrap_or_default();
    let told = Config::read_from_bytes(&value).unwrap_or_default();
    told.has_learnt().then_some(told.netns_cookie).ok_or_else(|| "no program saw the call".into())
}
