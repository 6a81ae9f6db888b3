//! nftables, in constant time: a table of our own with maps, written by one `nft -j -f -` and read
//! back element by element over netlink. Nothing is ever listed.

pub mod objects;
pub mod scaffold;
pub mod script;

use std::collections::BTreeSet;

use objects::{Atom, Data, Names, Objects, Place};
use scaffold::TABLE;
use serde_json::{Value, json};

use super::{Apply, Change, Desired, Observe, Outcome, Unrecorded, Unusable};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::record::{Part, Record};
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::namespace::in_scratch_netns;
use crate::sys::netlink::nftables::{NftFamily, NftReader};
use crate::sys::netlink::nftkey::Key;
use crate::sys::nft;

/// The backend.
pub struct Nftables;

impl Observe for Nftables {
    fn probe(&self, host: &Host) -> Result<(), Unusable> {
        let sample = super::probe_record(crate::model::BackendKind::Nftables);
        let facts = NodeFacts {
            uplinks: BTreeSet::from(["eth0".to_owned()]),
            addresses: sample.addresses.iter().map(ipnetwork::IpNetwork::ip).collect(),
            ..NodeFacts::default()
        };
        let text = script::restore(&[&sample], &facts);
        let tried = in_scratch_netns(|| {
            nft::apply(host, &text).map_err(|error| error.to_string())?;
            // Without an error old versions may have taken no notice of what they do not know.
            match scaffold_problem(&sample.parts()) {
                Ok(None) => Ok(()),
                Ok(Some(problem)) => Err(format!("nft reported success, but {problem}")),
                Err(error) => Err(format!("the rules cannot be read over netlink: {error}")),
            }
        });
        tried.and_then(|result| result).map_err(Unusable::Broken)
    }

    fn problems(
        &self,
        _host: &Host,
        record: &Record,
        related: &[Record],
        parts: &BTreeSet<Part>,
        facts: &NodeFacts,
        _recorded: bool,
    ) -> Result<Vec<String>> {
        let read = |error| Error::io("read the nftables rules (netlink)", error);
        if let Some(problem) = scaffold_problem(parts).map_err(read)? {
            return Ok(vec![problem]);
        }
        let names = objects::names_of(record);
        let expected = objects_of(related, [Some(record)], &names);
        let mut reader = NftReader::open().map_err(read)?;
        let mut problems = Vec::new();
        for place in script::fact_places(facts, parts) {
            if reader
                .element(NftFamily::Inet, TABLE, &place.set, &key(&place))
                .map_err(read)?
                .is_none()
            {
                problems.push(format!("{} expected, found nothing", describe(&place)));
            }
        }
        for (place, element) in &expected.elements {
            let found =
                reader.element(NftFamily::Inet, TABLE, &place.set, &key(place)).map_err(read)?;
            let wanted = describe_data(&element.data);
            match found {
                None => {
                    problems.push(format!("{} expected{wanted}, found nothing", describe(place)))
                }
                Some(found) if !holds(&found, &element.data) => {
                    let instead = found
                        .goto
                        .unwrap_or_else(|| format!("{:02x?}", found.data.unwrap_or_default()));
                    problems.push(format!("{} expected{wanted}, found {instead}", describe(place)));
                }
                Some(_) => {}
            }
        }
        for (chain, rules) in &expected.chains {
            let comments: Vec<Option<String>> =
                rules.iter().map(|(_, owner)| Some(owner.clone())).collect();
            if reader.rule_comments(NftFamily::Inet, TABLE, chain).map_err(read)? != comments {
                problems.push(format!(
                    "chain {chain} of table inet {TABLE} does not have its {} rules",
                    rules.len()
                ));
            }
        }
        Ok(problems)
    }
}

impl Apply for Nftables {
    fn change(&self, host: &Host, change: &Change) -> Result<Outcome> {
        if change.parts_after.is_empty() {
            nft::apply(host, &script::restore(&[], change.facts)).map_err(failed)?;
            return Ok(Outcome::Done);
        }
        if change.parts_before != change.parts_after {
            return Ok(Outcome::NeedsRestore("the shared rules change".into()));
        }
        match scaffold_problem(change.parts_before) {
            Ok(None) => {}
            Ok(Some(problem)) => return Ok(Outcome::NeedsRestore(problem)),
            Err(error) => return Err(Error::io("read the nftables rules (netlink)", error)),
        }
        let mut names = Names::default();
        for record in change.added.iter().chain(&change.removed) {
            let own = objects::names_of(record);
            names.places.extend(own.places);
            names.chains.extend(own.chains);
        }
        let before = objects_of(change.related, [change.removed], &names);
        let after = objects_of(change.related, [change.added], &names);
        let facts =
            (change.facts_before != change.facts).then_some((change.facts_before, change.facts));
        match nft::apply(host, &script::change(&before, &after, facts, change.parts_after)) {
            Ok(()) => Ok(Outcome::Done),
            Err(ToolError::Failed { stderr, .. }) => Ok(Outcome::NeedsRestore(stderr)),
            Err(error) => Err(failed(error)),
        }
    }

    fn restore(&self, host: &Host, desired: &Desired, _kept: &mut BTreeSet<Part>) -> Result<()> {
        let records: Vec<&Record> = desired.records.iter().collect();
        nft::apply(host, &script::restore(&records, desired.facts)).map_err(failed)
    }

    fn remove_unrecorded(&self, host: &Host, unrecorded: &Unrecorded) -> Result<()> {
        // A kernel without nf_tables has no table to look at.
        let Ok(mut reader) = NftReader::open() else {
            return Ok(());
        };
        for (family, name) in [(NftFamily::Ip, "ip"), (NftFamily::Ip6, "ip6")] {
            // An error means that the kernel has no nf_tables, and so no table.
            if !reader.table_exists(family, UPSTREAM_TABLE).unwrap_or(false) {
                continue;
            }
            let objects = nft::list_table(host, name, UPSTREAM_TABLE).map_err(failed)?;
            let commands: Vec<Value> =
                objects.iter().filter_map(|object| upstream_rule(object, unrecorded)).map(|(chain, handle)| {
                    json!({"delete": {"rule": {"family": name, "table": UPSTREAM_TABLE, "chain": chain, "handle": handle}}})
                }).collect();
            if !commands.is_empty() {
                nft::apply(host, &json!({ "nftables": commands }).to_string()).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// The table of upstream's nftables backend (1.6.0 and later).
const UPSTREAM_TABLE: &str = "cni_hostport";

/// Chain and handle of a rule that upstream made for the attachment. Its comment is the container
/// ID alone, which does not tell networks apart, so rules of a whole network cannot be found.
fn upstream_rule(object: &Value, unrecorded: &Unrecorded) -> Option<(String, u64)> {
    let Unrecorded::One { attachment, .. } = unrecorded else {
        return None;
    };
    let rule = object.get("rule")?;
    let owner = rule.get("comment")?.as_str()?;
    (owner == attachment.container_id)
        .then(|| Some((rule.get("chain")?.as_str()?.to_owned(), rule.get("handle")?.as_u64()?)))?
}

fn objects_of<const N: usize>(
    related: &[Record],
    own: [Option<&Record>; N],
    names: &Names,
) -> Objects {
    let mut records: Vec<&Record> = related.iter().chain(own.into_iter().flatten()).collect();
    records.sort_by_key(|record| record.order);
    Objects::of(&records).restricted_to(names)
}

/// What of the scaffold is missing or not as made.
fn scaffold_problem(parts: &BTreeSet<Part>) -> std::io::Result<Option<String>> {
    let mut reader = NftReader::open()?;
    for base in scaffold::base_chains(parts) {
        let hooked = reader
            .chain(NftFamily::Inet, TABLE, base.name)?
            .and_then(|chain| chain.base)
            .is_some_and(|found| {
                found.priority == base.priority && found.hook == hook_number(base.hook)
            });
        if !hooked {
            return Ok(Some(format!(
                "table inet {TABLE} has no base chain {} at priority {}",
                base.name, base.priority
            )));
        }
    }
    for (chain, rules) in scaffold::chains(parts) {
        let expected: Vec<Option<String>> = rules
            .iter()
            .enumerate()
            .map(|(index, rule)| Some(scaffold::comment(chain, index, rule)))
            .collect();
        let found = reader.rule_comments(NftFamily::Inet, TABLE, chain)?;
        if found != expected {
            let named = |comments: Vec<Option<String>>| {
                let names = comments.into_iter().map(|one| one.unwrap_or("a foreign one".into()));
                match names.collect::<Vec<_>>().join(", ") {
                    none if none.is_empty() => "none".to_owned(),
                    names => names,
                }
            };
            return Ok(Some(format!(
                "chain {chain} of table inet {TABLE}: rules expected: {}, found: {}",
                named(expected),
                named(found)
            )));
        }
    }
    Ok(None)
}

/// `NF_INET_*` (linux/netfilter.h).
fn hook_number(hook: nftables::types::NfHook) -> u32 {
    use nftables::types::NfHook;
    match hook {
        NfHook::Prerouting => 0,
        NfHook::Input => 1,
        NfHook::Forward => 2,
        NfHook::Output => 3,
        _ => 4,
    }
}

fn key(place: &Place) -> Vec<u8> {
    place
        .key
        .iter()
        .fold(Key::new(), |key, atom| match atom {
            Atom::Ip(ip) => key.ip(*ip),
            Atom::Protocol(protocol) => key.proto(protocol.number()),
            Atom::Port(port) => key.port(*port),
            Atom::Device(name) => key.device(name),
        })
        .bytes()
}

fn holds(found: &crate::sys::netlink::nftables::Element, data: &Data) -> bool {
    match data {
        Data::None => true,
        Data::Ip(ip) => found.data.as_deref() == Some(&Key::new().ip(*ip).bytes()),
        Data::Port(port) => found.data.as_deref() == Some(&Key::new().port(*port).bytes()),
        Data::Jump(chain) => found.goto.as_ref() == Some(chain),
    }
}

fn describe(place: &Place) -> String {
    let key: Vec<String> = place
        .key
        .iter()
        .map(|atom| match atom {
            Atom::Ip(ip) => ip.to_string(),
            Atom::Protocol(protocol) => protocol.to_string(),
            Atom::Port(port) => port.to_string(),
            Atom::Device(name) => name.clone(),
        })
        .collect();
    format!("{} in {} of table inet {TABLE}:", key.join(" . "), place.set)
}

fn describe_data(data: &Data) -> String {
    match data {
        Data::None => String::new(),
        Data::Ip(ip) => format!(" {ip}"),
        Data::Port(port) => format!(" port {port}"),
        Data::Jump(chain) => format!(" a jump to {chain}"),
    }
}

fn failed(error: ToolError) -> Error {
    error.into_error("cannot change the nftables rules".into())
}
