//! What a packet to a claim meets.

use super::hooks::{Hook, Mechanism};
use super::layout::{ClaimKey, ClaimValue, claim_flags};
use super::loaded::Loaded;
use super::{devices, entries, failed, objects, sockets};
use crate::backend::{Leftover, Step};
use crate::error::Result;
use crate::model::{Claim, Family, Forward, Protocol};
use crate::record::Record;
use crate::sys::Host;
use crate::sys::bpf::Direction;
use crate::sys::bpf::program::SocketHook;

/// The hooks that packets of the claim pass, and its entry. Pods' links are hooked alike; uplinks stand
/// for all of them.
pub fn steps(host: &Host, loaded: &Loaded, record: &Record, claim: &Claim) -> Result<Vec<Step>> {
    let facts = host.node_facts()?;
    let hooks = devices::hooked(host, loaded, &host.links()?, &facts)?;
    let mut steps = Vec::new();
    let at_device = |hook: &Hook, found: bool| {
        let way = match hook.mechanism {
            Mechanism::Tcx => "tcx",
            Mechanism::Clsact => "clsact",
        };
        Step {
            place: format!("{} {}", hook.device, devices::direction(hook.direction)),
            what: format!("{way}: program {}", hook.program),
            found,
        }
    };
    let is_uplink = |hook: &Hook| facts.uplinks.contains(&hook.device);
    let inward =
        hooks.iter().filter(|(hook, _)| is_uplink(hook) && hook.direction == Direction::Ingress);
    steps.extend(inward.map(|(hook, found)| at_device(hook, *found)));
    for (cgroup, hook, name, found) in sockets::hooked(host, loaded)? {
        if is_met(hook, claim) {
            let (place, what) = (format!("cgroup {cgroup}"), format!("{hook:?}: program {name}"));
            steps.push(Step { place, what: what.to_lowercase(), found });
        }
    }
    let key = ClaimKey::of(claim);
    let present = entries::get(&loaded.maps, &key).map_err(failed("read the eBPF maps"))?;
    let wanted = record.forwards(claim.family).into_iter().find(|forward| forward.claim == *claim);
    let is_own = |value: &ClaimValue| {
        value.owner == objects::owner(record)
            && wanted.is_some_and(|wanted| value.target() == wanted.target)
    };
    let shown = present.map(|value| value.target()).or(wanted.map(|forward| forward.target));
    steps.push(Step {
        place: "map pm_claims".into(),
        what: format!(
            "{} : {}",
            objects::describe(&key),
            shown.map(|target| target.to_string()).unwrap_or_default()
        ),
        found: present.as_ref().is_some_and(is_own),
    });
    Ok(steps)
}

/// Whether sockets that call the claim pass the hook on their way out.
fn is_met(hook: SocketHook, claim: &Claim) -> bool {
    let (connect, sendmsg) = match claim.family {
        Family::V4 => (SocketHook::Connect4, SocketHook::Sendmsg4),
        Family::V6 => (SocketHook::Connect6, SocketHook::Sendmsg6),
    };
    match claim.protocol {
        Protocol::Tcp => hook == connect,
        Protocol::Udp => hook == connect || hook == sendmsg,
        // There are no programs for it.
        Protocol::Sctp => false,
    }
}

/// Claims in the map that none of the records has.
pub fn leftovers(loaded: &Loaded, records: &[Record]) -> Result<Vec<Leftover>> {
    let records: Vec<&Record> = records.iter().collect();
    let wanted = objects::claims(&records);
    let present = entries::present(&loaded.maps).map_err(failed("read the eBPF maps"))?;
    let strange = present
        .claims
        .iter()
        .filter(|(key, value)| value.flags & claim_flags::SELF == 0 && !wanted.contains_key(key));
    Ok(strange
        .filter_map(|(key, value)| {
            let forward = Forward { claim: claim_of(key)?, target: value.target() };
            Some(Leftover {
                place: "ebpf".into(),
                object: "map pm_claims".into(),
                network: String::new(),
                container_id: String::new(),
                forwards: [forward].into(),
            })
        })
        .collect())
}

fn claim_of(key: &ClaimKey) -> Option<Claim> {
    let protocol = Protocol::ALL.into_iter().find(|one| one.number() == key.protocol)?;
    let ip = key.addr.ip();
    let address = (!ip.is_unspecified()).then_some(ip);
    Some(Claim { family: Family::of(&ip), protocol, address, port: key.port() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_claims_are_each_other_s() {
        for (family, address) in [
            (Family::V4, None),
            (Family::V6, None),
            (Family::V4, "192.0.2.1".parse().ok()),
            (Family::V6, "2001:db8::1".parse().ok()),
        ] {
            for protocol in Protocol::ALL {
                let claim = Claim { family, protocol, address, port: 8080 };
                assert_eq!(claim_of(&ClaimKey::of(&claim)), Some(claim));
            }
        }
    }
}
