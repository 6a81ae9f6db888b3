//! Rules and entries of attachments of which there is no record: this plugin's, whose record was lost,
//! and those that upstream's plugin has left.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::super::attachments::{Facts, Orphan};
use super::super::{count, some_of};
use super::tables::{Tables, named};
use crate::backend;
use crate::backend::iptables::listing::Listing;
use crate::backend::iptables::rules::DNAT;
use crate::backend::nftables::objects::{Atom, Objects, Place};
use crate::backend::nftables::scaffold::TABLE;
use crate::backend::nftables::upstream::TABLE as UPSTREAM_TABLE;
use crate::model::{BackendKind, Family, Forward};
use crate::record::Record;
use crate::sys::netlink::nftables::{NftFamily, NftReader};
use crate::sys::{Host, nft};

/// Adds what was found, and what could not be looked at.
pub fn add(host: &Host, tables: &Tables, records: &[Record], mut facts: Facts) -> Facts {
    if facts.doubt().is_some() {
        return facts;
    }
    let of = |kind: BackendKind| -> Vec<&Record> {
        records.iter().filter(|record| record.backend == kind).collect()
    };
    in_iptables(host, tables, &of(BackendKind::Iptables), &mut facts);
    in_nftables(host, &of(BackendKind::Nftables), &mut facts);
    in_ebpf(host, records, &mut facts);
    facts
}

fn in_ebpf(host: &Host, records: &[Record], facts: &mut Facts) {
    let mut own = records.to_vec();
    own.retain(|record| record.backend == BackendKind::Ebpf);
    let forwards: Vec<Forward> = match backend::of(BackendKind::Ebpf).leftovers(host, &own) {
        Ok(leftovers) => leftovers.into_iter().flat_map(|leftover| leftover.forwards).collect(),
        Err(error) => {
            let reason = format!("{error}: {}", error.details());
            return facts.unread.push(("the eBPF maps".into(), reason));
        }
    };
    if forwards.is_empty() {
        return;
    }
    facts.orphans.push(Orphan {
        what: format!("the eBPF maps forward {}", some_of(&forwards)),
        // Flushing takes away what outlives the last attachment of a backend, and an empty state
        // directory has none of any: rules of other backends stay.
        removal: match own.is_empty() {
            true => "portmap flush --all --state-dir \"$(mktemp -d)\"".into(),
            false => "rm -r /sys/fs/bpf/portmap && portmap restore".into(),
        },
    });
}

fn in_iptables(host: &Host, tables: &Tables, records: &[&Record], facts: &mut Facts) {
    let recorded: BTreeSet<&str> = records.iter().map(|record| record.chain.as_str()).collect();
    for (variant, family, present) in tables.with("nat") {
        let tool = named(variant.name(), family);
        let text = present.and_then(|()| tables.list(host, variant, family, "nat"));
        let listing = match text {
            Ok(text) => Listing::parse(&text),
            Err(reason) => {
                facts.unread.push((format!("table nat of {tool}"), reason));
                continue;
            }
        };
        let command = tables.tool(variant, family).unwrap_or_default();
        let chains = listing.chains.keys().filter(|chain| chain.starts_with("CNI-DN-"));
        for chain in chains.filter(|chain| !recorded.contains(chain.as_str())) {
            facts.orphans.push(Orphan {
                what: format!("{}, in table nat of {tool}", described(&listing, chain, family)),
                removal: removal(&listing, chain, command),
            });
        }
    }
}

fn described(listing: &Listing, chain: &str, family: Family) -> String {
    let owner = listing.attachments().into_iter().find(|found| found.chain == chain);
    let owner = owner.map_or_else(
        || "to which nothing leads".to_owned(),
        |found| format!("of container {} on network {}", found.container_id, found.network),
    );
    let forwards: Vec<String> =
        listing.forwards(chain, family).iter().map(ToString::to_string).collect();
    match forwards.is_empty() {
        true => format!("chain {chain} {owner} forwards nothing"),
        false => format!("chain {chain} {owner} forwards {}", some_of(&forwards)),
    }
}

/// As listed, rules are quoted as a shell needs them.
fn removal(listing: &Listing, chain: &str, tool: &str) -> String {
    let mut commands: Vec<String> =
        listing.jumps(DNAT, chain).map(|rule| format!("{tool} -t nat -D {DNAT} {rule}")).collect();
    commands.push(format!("{tool} -t nat -F {chain}"));
    commands.push(format!("{tool} -t nat -X {chain}"));
    commands.join(" && ")
}

fn in_nftables(host: &Host, records: &[&Record], facts: &mut Facts) {
    // A kernel without nf_tables has no table; who may not ask has been told already.
    let Ok(mut reader) = NftReader::open() else { return };
    let mut list = |family: NftFamily, name: &str, table: &str| {
        if !reader.table_exists(family, table).unwrap_or(false) {
            return Vec::new();
        }
        nft::list_table(host, name, table).unwrap_or_else(|error| {
            facts.unread.push((format!("table {name} {table}"), error.to_string()));
            Vec::new()
        })
    };
    let own = list(NftFamily::Inet, "inet", TABLE);
    let upstreams = [(NftFamily::Ip, "ip"), (NftFamily::Ip6, "ip6")]
        .map(|(family, name)| (name, list(family, name, UPSTREAM_TABLE)));
    if !own.is_empty() {
        facts.orphans.extend(own_elements(&own, records));
    }
    for (name, objects) in upstreams {
        facts.orphans.extend(of_upstream(name, &objects));
    }
}

/// Elements of the plugin's table that no record asks for.
fn own_elements(objects: &[Value], records: &[&Record]) -> Option<Orphan> {
    let expected: BTreeSet<(String, Vec<String>)> = Objects::of(records)
        .elements
        .keys()
        .map(|Place { set, key }| (set.clone(), key.iter().map(text_of).collect()))
        .collect();
    let mut strays = Vec::new();
    for object in objects {
        let Some(set) = object.get("map").or_else(|| object.get("set")) else { continue };
        let name = set.get("name").and_then(Value::as_str).unwrap_or_default();
        // What the node itself has is in these.
        if matches!(name, "uplinks" | "listed_only") || name.starts_with("nodes") {
            continue;
        }
        for element in set.get("elem").and_then(Value::as_array).into_iter().flatten() {
            let key = key_of(element);
            if !expected.contains(&(name.to_owned(), key.clone())) {
                strays.push(format!("{} in {name}", key.join(" . ")));
            }
        }
    }
    let removal = format!("nft delete table inet {TABLE} && portmap restore");
    match (strays.is_empty(), records.is_empty()) {
        (false, _) => Some(Orphan {
            what: format!(
                "table inet {TABLE} has {} of no attachment: {}",
                count(strays.len(), "element", "elements"),
                some_of(&strays)
            ),
            removal,
        }),
        (true, true) => Some(Orphan {
            what: format!("table inet {TABLE} is there, and no attachment needs it"),
            removal,
        }),
        (true, false) => None,
    }
}

fn text_of(atom: &Atom) -> String {
    match atom {
        Atom::Ip(ip) => ip.to_string(),
        Atom::Protocol(protocol) => protocol.name().to_owned(),
        Atom::Port(port) => port.to_string(),
        Atom::Device(name) => name.clone(),
    }
}

/// An element of a set is its key, or an object with that; one of a map a pair of such and a value.
fn key_of(element: &Value) -> Vec<String> {
    let element = element.as_array().and_then(|pair| pair.first()).unwrap_or(element);
    let value = element.pointer("/elem/val").unwrap_or(element);
    let atoms = value.get("concat").and_then(Value::as_array).cloned();
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    atoms.unwrap_or_else(|| vec![value.clone()]).iter().map(text).collect()
}

/// Rules of upstream's nftables backend, by the container that they name.
fn of_upstream(family: &str, objects: &[Value]) -> Vec<Orphan> {
    let mut rules: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for rule in objects.iter().filter_map(|object| object.get("rule")) {
        let text = |key: &str| rule.get(key).and_then(Value::as_str);
        let (Some(owner), Some(chain)) = (text("comment"), text("chain")) else { continue };
        let Some(handle) = rule.get("handle").and_then(Value::as_u64) else { continue };
        rules
            .entry(owner.to_owned())
            .or_default()
            .push(format!("nft delete rule {family} {UPSTREAM_TABLE} {chain} handle {handle}"));
    }
    rules
        .into_iter()
        .map(|(owner, commands)| Orphan {
            what: format!(
                "upstream's portmap has {} of container {owner} in table {family} {UPSTREAM_TABLE}",
                count(commands.len(), "rule", "rules")
            ),
            removal: commands.join(" && "),
        })
        .collect()
}
