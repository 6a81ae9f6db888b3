//! eBPF, without any tool on the node: programs at the node's devices and at the sockets of its own
//! processes, which look hostPorts up in maps.
//!
//! ```text
//! client ─► uplink ──ingress: destination = pod──► routing ─► pod's link ─► pod
//!        ◄── egress: source = hostPort ◄────────── routing ◄───────────────┘
//! process of the node ─► connect, sendmsg: destination = pod ─► pod
//! ```
//!
//! The way to the pod needs no state: one lookup per packet, so that a takeover acts on the very next
//! one. Only answers need it: a flow says what was called. Packets are changed and passed on, never
//! redirected, so that routing, conntrack and other programs see a connection to the pod; but for a
//! pod that calls itself.
//!
//! Nothing is loaded or attached twice: what is found in place is left there, and stays until
//! [`Apply::unload`], since loading is the dear part of a first call.

pub mod devices;
pub mod entries;
pub mod filters;
pub mod flows;
pub mod hooks;
pub mod layout;
pub mod loaded;
mod lost;
pub mod objects;
mod path;
mod places;
pub mod plan;
mod problems;
pub mod sockets;
mod strangers;
mod teacher;
pub mod trial;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use devices::{Mode, Scope};
use entries::Addresses;
use flows::Suspects;
use layout::{ClaimKey, Config};
use loaded::{Found, Loaded, OWN};
use plan::Former;

use super::{
    Apply, Change, Counters, Desired, Leftover, Observe, Outcome, Recorded, Step, Unrecorded,
    Unusable,
};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::model::{Claim, Forward, Protocol};
use crate::record::{Part, Record};
use crate::sys::bpf::numbers::Numbers;
use crate::sys::netlink::socket_diag;
use crate::sys::{Host, monotonic};

/// The backend.
pub struct Ebpf;

impl Observe for Ebpf {
    fn probe(&self, host: &Host) -> Result<(), Unusable> {
        trial::probe(host)
    }

    fn objection(&self, host: &Host) -> Option<String> {
        trial::objection(host)
    }

    fn problems(
        &self,
        host: &Host,
        record: &Record,
        related: &[Record],
        _parts: &BTreeSet<Part>,
        _facts: &NodeFacts,
        _recorded: bool,
    ) -> Result<Vec<String>> {
        let loaded = match open(host)? {
            Found::Loaded(loaded) => loaded,
            Found::Missing(what) => return Ok(vec![what]),
        };
        let mut problems = problems::of_entries(&loaded, record, related)?;
        problems.extend(problems::of_node(host, &loaded, Some(record))?);
        Ok(problems)
    }

    /// What is the node's is looked at once.
    fn survey(
        &self,
        host: &Host,
        records: &[Record],
        _parts: &BTreeSet<Part>,
        _facts: &NodeFacts,
    ) -> Result<Vec<Vec<String>>> {
        let loaded = match open(host)? {
            Found::Loaded(loaded) => loaded,
            Found::Missing(what) => return Ok(vec![vec![what]; records.len()]),
        };
        let of_node = problems::of_node(host, &loaded, None)?;
        records
            .iter()
            .zip(super::related(records))
            .map(|(record, related)| {
                let mut problems = problems::of_entries(&loaded, record, &related)?;
                problems.extend(of_node.iter().cloned());
                Ok(problems)
            })
            .collect()
    }

    fn counters(&self, host: &Host, claims: &BTreeSet<Claim>) -> Result<BTreeMap<Claim, Counters>> {
        let Found::Loaded(loaded) = open(host)? else {
            return Ok(BTreeMap::new());
        };
        let mut counters = BTreeMap::new();
        for claim in claims {
            let counted = entries::traffic(&loaded.maps, &ClaimKey::of(claim))
                .map_err(failed("read the eBPF maps"))?;
            counters.extend(counted.map(|counted| (*claim, counted)));
        }
        Ok(counters)
    }

    fn packets(&self, host: &Host) -> Result<BTreeMap<&'static str, u64>> {
        if !loaded::is_pinned() {
            return Ok(BTreeMap::new());
        }
        match open(host)? {
            Found::Loaded(loaded) => {
                entries::reasons(&loaded.reasons()?).map_err(failed("read the eBPF maps"))
            }
            Found::Missing(_) => Ok(BTreeMap::new()),
        }
    }

    fn leftovers(&self, host: &Host, records: &[Record]) -> Result<Vec<Leftover>> {
        // Where nothing is pinned, nobody has to find out what the kernel can do.
        if !loaded::is_pinned() {
            return Ok(Vec::new());
        }
        match open(host)? {
            Found::Loaded(loaded) => path::leftovers(&loaded, records),
            Found::Missing(_) => Ok(Vec::new()),
        }
    }

    fn path(
        &self,
        host: &Host,
        record: &Record,
        claim: &Claim,
        _related: &[Record],
        _parts: &BTreeSet<Part>,
    ) -> Result<Vec<Step>> {
        match open(host)? {
            Found::Loaded(loaded) => path::steps(host, &loaded, record, claim),
            Found::Missing(what) => {
                Ok(vec![Step { place: "eBPF maps".into(), what, found: false }])
            }
        }
    }
}

impl Apply for Ebpf {
    fn admit(&self, host: &Host) -> Result<()> {
        has_maps(host).map(drop)
    }

    fn prepare(&self, host: &Host) -> Result<()> {
        trial::prepare(host)
    }

    fn change(&self, host: &Host, change: &Change) -> Result<Outcome> {
        let loaded = match open_admitted(host)? {
            Found::Loaded(loaded) => loaded,
            Found::Missing(what) => return Ok(Outcome::NeedsRestore(what)),
        };
        let mut are_none = false;
        if change.added.is_some() && change.is_first {
            // Nobody has looked since the last one went: for claims of another state directory, or for
            // filters where no program is needed any more (a device that has become a bridge's port).
            // Programs by tcx are looked at by every ADD.
            are_none = entries::are_none(&loaded.maps).map_err(failed("read the eBPF maps"))?;
            if !are_none || !host.kernel()?.tcx {
                return Ok(Outcome::NeedsRestore("this is the first attachment".into()));
            }
        }
        if change.added.is_some() {
            loaded.trust(&host.programs())?;
            let links = host.links()?;
            let hooked =
                devices::sync(host, &loaded, &links, change.facts, Scope::All, Mode::Extend)
                    .and_then(|done| Ok(done && sockets::sync(host, &loaded, Mode::Extend)?));
            match hooked {
                Ok(true) => host.remember_programs(loaded.numbers()),
                Ok(false) => {
                    return Ok(Outcome::NeedsRestore("other eBPF programs are attached".into()));
                }
                Err(error) => {
                    return Ok(Outcome::NeedsRestore(format!("{error}: {}", error.details())));
                }
            }
        }
        let keys: BTreeSet<ClaimKey> = change
            .added
            .iter()
            .chain(&change.removed)
            .flat_map(|record| objects::keys(record))
            .collect();
        let after = objects::claims_at(&keys, change.related, change.added);
        // A DEL is told what was noted before. An address that has left the node must not stay taken.
        let now = if change.added.is_none() { host.node_addresses().ok() } else { None };
        let facts = now.as_ref().unwrap_or(change.facts);
        let write = || -> io::Result<(Vec<Former>, Addresses)> {
            let described = loaded.describe(host.ephemeral_ports(), facts, &after);
            described.map_err(io::Error::other)?;
            seed(host, &loaded, change.added);
            let former = entries::change(&loaded.maps, &keys, &after, are_none)?;
            Ok((former, entries::addresses(&loaded.maps, &objects::addresses(facts))?))
        };
        match write() {
            Ok((former, addresses)) => {
                if !former.is_empty() {
                    forget(host, &loaded, Suspects::Former(&former))?;
                }
                leave(host, &loaded, &addresses);
                let gone: Vec<&Record> = change.removed.into_iter().collect();
                if !Config::usual().expects(&objects::claims(&gone)) {
                    rule_out(host, &loaded);
                }
                Ok(Outcome::Done)
            }
            Err(error) => {
                Ok(Outcome::NeedsRestore(format!("the eBPF maps cannot be written: {error}")))
            }
        }
    }

    fn restore(&self, host: &Host, desired: &Desired, _kept: &mut BTreeSet<Part>) -> Result<()> {
        let records: Vec<&Record> = desired.records.iter().collect();
        let wanted = objects::claims(&records);
        let loaded = match open(host)? {
            Found::Loaded(loaded) => *loaded,
            // Programs may be attached all the same, with maps that cannot be reached.
            Found::Missing(_) if records.is_empty() => return self.unload(host),
            Found::Missing(_) => Loaded::ensure(&OWN, host.kernel()?.batches)?,
        };
        loaded.describe(host.ephemeral_ports(), desired.facts, &wanted)?;
        // Also for claims of long ago: maps that were lost knew the connections.
        seed(host, &loaded, records.iter().copied());
        let addresses = entries::restore(&loaded.maps, &wanted)
            .and_then(|()| entries::addresses(&loaded.maps, &objects::addresses(desired.facts)))
            .map_err(failed("write the eBPF maps"))?;
        if !records.is_empty() {
            let links = host.links()?;
            devices::sync(host, &loaded, &links, desired.facts, Scope::All, Mode::Restore)?;
            sockets::sync(host, &loaded, Mode::Restore)?;
            loaded.claim_revision()?;
            loaded.finish_upgrade()?;
            host.remember_programs(loaded.numbers());
        }
        forget(host, &loaded, Suspects::All)?;
        leave(host, &loaded, &addresses);
        rule_out(host, &loaded);
        Ok(())
    }

    fn remove_unrecorded(
        &self,
        host: &Host,
        unrecorded: &Unrecorded,
        records: Recorded,
        _removed: &mut BTreeSet<Forward>,
    ) -> Result<()> {
        lost::remove(host, unrecorded, records)
    }

    fn welcome(&self, host: &Host, names: &[String]) -> Result<()> {
        let Found::Loaded(loaded) = open(host)? else {
            return Ok(());
        };
        let facts = host.node_facts()?;
        let links = host.links()?;
        // The first pod's link moves a bridge's programs to its ports.
        let is_special = |name: &String| {
            let link = links.iter().find(|link| link.name == *name);
            let master =
                link.and_then(|link| links.iter().find(|one| link.master == Some(one.index)));
            master.is_some_and(|master| facts.uplinks.contains(&master.name))
        };
        let all = names.is_empty() || names.iter().any(is_special);
        let scope = if all { Scope::All } else { Scope::Only(names) };
        devices::sync(host, &loaded, &links, &facts, scope, Mode::Extend).map(drop)
    }

    fn unload(&self, host: &Host) -> Result<()> {
        self.admit(host)?;
        // Where eBPF does not work nothing can be attached, unless it was by somebody who may more.
        if host.kernel().is_err() && !loaded::is_pinned() {
            return Ok(());
        }
        let loaded = match open(host)? {
            Found::Loaded(loaded) => Some(loaded),
            Found::Missing(_) => None,
        };
        let errors: Vec<Error> = [
            devices::detach(host, &host.links()?),
            sockets::detach(host, loaded.as_deref()),
            loaded::unpin(),
        ]
        .into_iter()
        .filter_map(Result::err)
        .collect();
        match errors.is_empty() {
            true => Ok(()),
            false => Err(Error::Several { what: "removing the eBPF programs".into(), errors }),
        }
    }
}

/// Where programs at the node's sockets are attached, or would be: cgroups by their names.
///
/// # Errors
///
/// Why nowhere, in words.
pub fn socket_places(host: &Host) -> Result<Vec<String>, String> {
    let places = places::find(host)?;
    match places.reserved {
        Some(reason) => Err(reason),
        None => Ok(places.cgroups.iter().map(|place| place.name().to_owned()).collect()),
    }
}

fn open(host: &Host) -> Result<Found> {
    has_maps(host)?;
    open_admitted(host)
}

/// Whether maps have been made here. Fails where a newer plugin has made its own.
fn has_maps(host: &Host) -> Result<bool> {
    let known = host.programs();
    if loaded::is_as_seen(&known)? {
        return Ok(true);
    }
    host.remember_programs(Numbers { seen: None, ..Numbers::clone(&known) });
    loaded::refuse_newer()
}

/// [`open`], after [`Apply::admit`] or [`Apply::prepare`].
fn open_admitted(host: &Host) -> Result<Found> {
    Loaded::open(&OWN, host.kernel()?.batches, &host.programs())
}

/// What was remembered of claims that changed hands goes, and sockets of the node that are connected
/// to a former pod are told. The claims are right by now, so that a failure is only worth a note.
fn forget(host: &Host, loaded: &Loaded, suspects: Suspects) -> Result<()> {
    let now = |called: &ClaimKey| entries::in_effect(&loaded.maps, called);
    let flows = loaded.flows()?;
    let told = flows::forget(&flows, suspects, now).and_then(|seen| {
        let counted = match suspects {
            Suspects::All => entries::count_open(&loaded.maps, &seen.open),
            Suspects::Former(_) => Ok(()),
        };
        for (pod, cookies) in &seen.callers {
            let mut connected = socket_diag::connected_to(Protocol::Udp, *pod)?;
            connected.retain(|connection| cookies.contains(&connection.cookie));
            socket_diag::destroy(&connected)?;
        }
        flows::forget_callers(&flows, &seen)?;
        counted
    });
    if let Err(error) = told {
        host.warn(format!("connections of former pods are not ended: {error}"));
    }
    Ok(())
}

/// What was remembered of calls to addresses goes with these. Those that the map has no room for are
/// reached from outside all the same.
fn leave(host: &Host, loaded: &Loaded, addresses: &Addresses) {
    if !addresses.gone.is_empty()
        && let Err(error) = loaded.flows().and_then(|flows| {
            flows::forget_hosts(&flows, &addresses.gone).map_err(failed("read the eBPF maps"))
        })
    {
        host.warn(format!("connections to former addresses of the node are not ended: {error}"));
    }
    if addresses.left_out > 0 {
        host.warn(format!(
            "map pm_addresses is full: it has room for {} addresses of the node, and {} more are not called by pods and the node's own processes; remove addresses, or set \"backend\" to \"nftables\" or \"iptables\"",
            addresses.room, addresses.left_out
        ));
    }
}

/// Lets programs ask no more than the claims make necessary that are there by now. They would be slower
/// otherwise, and as right.
fn rule_out(host: &Host, loaded: &Loaded) {
    let all = entries::claims(&loaded.maps).map_err(failed("read the eBPF maps"));
    if let Err(error) = all.and_then(|all| loaded.rule_out_but(&all)) {
        host.warn(format!("packets to hostPorts go a longer way than they have to: {error}"));
    }
}

/// Connections that the node has open from the records' hostPorts go on. Before the claims are there: a
/// packet in between would begin a flow to the pod, whose RST ends the connection. Only ports that sockets
/// get by themselves are looked for: a listing costs milliseconds on a node with many connections.
fn seed<'a>(host: &Host, loaded: &Loaded, records: impl IntoIterator<Item = &'a Record>) {
    let mut ports: BTreeMap<Protocol, BTreeSet<u16>> = BTreeMap::new();
    for mapping in records.into_iter().flat_map(|record| &record.mappings) {
        if mapping.protocol != Protocol::Sctp && host.ephemeral_ports().contains(&mapping.host_port)
        {
            ports.entry(mapping.protocol).or_default().insert(mapping.host_port);
        }
    }
    if ports.is_empty() {
        return;
    }
    let now = u32::try_from(monotonic() >> 30).unwrap_or_default();
    let seeded = loaded.flows().and_then(|flows| {
        flows::seed(&flows, &ports, now, socket_diag::connected_from)
            .map_err(failed("list the node's connections (netlink)"))
    });
    if let Err(error) = seeded {
        host.warn(format!("connections of the node from a hostPort may break: {error}"));
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::io(action, error)
}
