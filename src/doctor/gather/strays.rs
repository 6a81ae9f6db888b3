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
use crate::backend::nftables::objects::Objects;
use crate::backend::nftables::present::Present;
use crate::backend::nftables::scaffold::TABLE;
use crate::backend::nftables::upstream::TABLE as UPSTREAM_TABLE;
use crate::error::Result;
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
    let mut is_there = |family, table| reader.table_exists(family, table).unwrap_or(false);
    if is_there(NftFamily::Inet, TABLE) {
        match own_elements(records) {
            Ok(orphan) => facts.orphans.extend(orphan),
            Err(error) => {
                facts.unread.push((format!("table inet {TABLE}"), error.details()));
            }
        }
    }
    let mut list = |family: NftFamily, name: &str| {
        if !is_there(family, UPSTREAM_TABLE) {
            return Vec::new();
        }
        nft::list_table(host, name, UPSTREAM_TABLE).unwrap_or_else(|error| {
            facts.unread.push((format!("table {name} {UPSTREAM_TABLE}"), error.to_string()));
            Vec::new()
        })
    };
    let upstreams = [(NftFamily::Ip, "ip"), (NftFamily::Ip6, "ip6")]
        .map(|(family, name)| (name, list(family, name)));
    for (name, objects) in upstreams {
        facts.orphans.extend(of_upstream(name, &objects));
    }
}

/// Elements of the plugin's table at places where no record asks for any.
fn own_elements(records: &[&Record]) -> Result<Option<Orphan>> {
    let expected = Objects::of(records).elements;
    let mut strays = Vec::new();
    for place in Present::read()?.elements.into_keys() {
        if !expected.contains_key(&place) {
            strays.push(format!("{} in {}", place.key_text(), place.set));
        }
    }
    let removal = format!("nft delete table inet {TABLE} && portmap restore");
    Ok(match (strays.is_empty(), records.is_empty()) {
        (false, _) => Some(Orphan {
            what: format!(
                "table inet {TABLE} has {} of no attachment that is recorded (the DEL of a container takes its own away): {}",
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
    })
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
