//! nftables, in constant time: a table of our own with maps, written by one `nft -j -f -` and read
//! back element by element over netlink. Nothing is listed for an attachment that has a record.

mod elements;
pub mod lost;
pub mod objects;
pub mod present;
pub mod scaffold;
pub mod script;
mod table;
pub mod upstream;

use std::collections::BTreeSet;

use elements::{holds, key};
use lost::Removal;
use objects::{Data, Names, Objects, Place};
use present::Present;
use scaffold::TABLE;
use upstream::Rule;
use upstream::table::{forwards_of_upstream, remove_of_upstream, rules_of_upstream};
pub use upstream::table::{take_from_upstream, taken_by_upstream};

use super::{
    Apply, Change, Desired, Leftover, Observe, Outcome, Recorded, Step, Unrecorded, Unusable,
};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::model::{BackendKind, Claim, Family, Forward};
use crate::record::{Part, Record};
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::namespace::in_scratch_netns;
use crate::sys::netlink::nftables::{NftFamily, NftReader};
use crate::sys::nft;

/// The backend.
pub struct Nftables;

impl Observe for Nftables {
    fn probe(&self, host: &Host) -> Result<(), Unusable> {
        let sample = super::probe_record(BackendKind::Nftables, Family::V4);
        let facts = NodeFacts {
            uplinks: BTreeSet::from(["eth0".to_owned()]),
            addresses: sample.addresses.iter().map(ipnetwork::IpNetwork::ip).collect(),
            ..NodeFacts::default()
        };
        let text = script::restore(&[&sample], &sample.parts(), &facts);
        let tried = in_scratch_netns(|| {
            nft::apply(host, &text).map_err(|error| error.to_string())?;
            // Without an error old versions may have taken no notice of what they do not know.
            match table::problem(&sample.parts()) {
                Ok(None) => Ok(()),
                Ok(Some(problem)) => Err(format!("nft reported success, but {problem}")),
                Err(error) => Err(format!("the rules cannot be read over netlink: {error}")),
            }
        });
        tried.and_then(|result| result).map_err(Unusable::Broken)
    }

    fn problems(
        &self,
        host: &Host,
        record: &Record,
        related: &[Record],
        parts: &BTreeSet<Part>,
        facts: &NodeFacts,
        recorded: bool,
    ) -> Result<Vec<String>> {
        if !recorded {
            let made = forwards_of_upstream(host, &record.attachment.container_id)?;
            if !made.is_empty() {
                let wanted: Vec<Forward> =
                    Family::ALL.into_iter().flat_map(|family| record.forwards(family)).collect();
                return Ok(upstream::problems(&wanted, &made));
            }
        }
        let read = |error| Error::io("read the nftables rules (netlink)", error);
        if let Some(problem) = table::problem(parts).map_err(read)? {
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

    fn leftovers(&self, host: &Host, records: &[Record]) -> Result<Vec<Leftover>> {
        let mut leftovers = lost::leftovers(&Present::read()?, records);
        for (family, rules) in rules_of_upstream(host, &upstream::HOST_PORTS) {
            match rules {
                Ok(rules) => leftovers.extend(upstream::leftovers(family, &rules)),
                Err(error) => host.warn(format!(
                    "table {} {} of upstream's plugin cannot be read: {error}",
                    objects::ip_name(family),
                    upstream::TABLE
                )),
            }
        }
        Ok(leftovers)
    }

    fn path(
        &self,
        _host: &Host,
        record: &Record,
        claim: &Claim,
        related: &[Record],
        parts: &BTreeSet<Part>,
    ) -> Result<Vec<Step>> {
        let read = |error| Error::io("read the nftables rules (netlink)", error);
        let mut reader = NftReader::open().map_err(read)?;
        let mut steps = Vec::new();
        let shown = ["prerouting", "output", "hostports"];
        for (chain, rules) in scaffold::chains(parts) {
            if shown.contains(&chain) {
                let found = reader.rule_comments(NftFamily::Inet, TABLE, chain).map_err(read)?;
                let base = scaffold::base_chains(parts).into_iter().find(|base| base.name == chain);
                let hooked = match &base {
                    Some(base) => table::is_hooked(&mut reader, base).map_err(read)?,
                    None => true,
                };
                steps.push(Step {
                    place: format!("inet {TABLE} {chain}"),
                    what: match base {
                        Some(base) => format!(
                            "nat hook {chain} priority {}: to addresses of the node, jump hostports",
                            base.priority
                        ),
                        None => format!("{} rules that look into the maps", rules.len()),
                    },
                    found: hooked && found == table::comments_of(chain, &rules),
                });
            }
        }
        // In the order of the packet: through the base chains first.
        steps.sort_by_key(|step| step.place.ends_with("hostports"));
        let expected = objects_of(related, [Some(record)], &objects::names_of_claim(claim));
        for (place, element) in &expected.elements {
            let found =
                reader.element(NftFamily::Inet, TABLE, &place.set, &key(place)).map_err(read)?;
            steps.push(Step {
                place: format!("inet {TABLE} @{}", place.set),
                what: format!("{} :{}", place.key_text(), describe_data(&element.data)),
                found: found.is_some_and(|found| holds(&found, &element.data)),
            });
        }
        for (chain, rules) in &expected.chains {
            let comments: Vec<Option<String>> =
                rules.iter().map(|(_, owner)| Some(owner.clone())).collect();
            let found = reader.rule_comments(NftFamily::Inet, TABLE, chain).map_err(read)?;
            steps.push(Step {
                place: format!("inet {TABLE} {chain}"),
                what: format!("{} rules with conditions or a mark", rules.len()),
                found: found == comments,
            });
        }
        Ok(steps)
    }
}

impl Apply for Nftables {
    fn prepare(&self, host: &Host) -> Result<()> {
        match host.tools.find("nft") {
            Some(_) => Ok(()),
            None => Err(failed(ToolError::Missing { tool: "nft".to_owned() })),
        }
    }

    fn change(&self, host: &Host, change: &Change) -> Result<Outcome> {
        if change.parts_after.is_empty() {
            table::remove(host, change.facts)?;
            return Ok(Outcome::Done);
        }
        if change.parts_before != change.parts_after {
            return Ok(Outcome::NeedsRestore("the shared rules change".into()));
        }
        match table::problem(change.parts_before) {
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
        if facts.is_some() {
            warn_of_devices(host, change.facts);
        }
        match nft::apply(host, &script::change(&before, &after, facts, change.parts_after)) {
            Ok(()) => Ok(Outcome::Done),
            Err(ToolError::Failed { stderr, .. }) => Ok(Outcome::NeedsRestore(stderr)),
            Err(error) => Err(failed(error)),
        }
    }

    fn restore(&self, host: &Host, desired: &Desired, _kept: &mut BTreeSet<Part>) -> Result<()> {
        if desired.parts.is_empty() {
            return table::remove(host, desired.facts);
        }
        if let Some(chains) = table::foreign_chains()? {
            let chains = chains.join(", ");
            return Err(Error::BackendUnusable {
                backend: BackendKind::Nftables.to_string(),
                reason: format!(
                    "there is a table inet {TABLE} that portmap has not made (its chains: {chains}): rename it, or delete it by `nft delete table inet {TABLE}`"
                ),
            });
        }
        warn_of_devices(host, desired.facts);
        let records: Vec<&Record> = desired.records.iter().collect();
        nft::apply(host, &script::restore(&records, desired.parts, desired.facts)).map_err(failed)
    }

    fn remove_unrecorded(
        &self,
        host: &Host,
        unrecorded: &Unrecorded,
        records: Recorded,
        removed: &mut BTreeSet<Forward>,
    ) -> Result<()> {
        if let Some(lost) = lost::removal(&Present::read()?, unrecorded, records)? {
            removed.extend(remove_lost(host, lost)?);
        }
        // Upstream's rules name their container, and not its network.
        let Unrecorded::One { attachment, chain: Some(_) } = unrecorded else {
            return Ok(());
        };
        let is_theirs = |rule: &Rule| rule.container_id == attachment.container_id;
        let gone = remove_of_upstream(host, &upstream::CHAINS, is_theirs)?;
        removed.extend(gone.into_iter().filter_map(|rule| rule.forward));
        Ok(())
    }
}

fn remove_lost(host: &Host, lost: Removal) -> Result<BTreeSet<Forward>> {
    if lost.script.is_empty() {
        return Ok(BTreeSet::new());
    }
    match nft::apply(host, &lost.script) {
        Ok(()) => Ok(lost.forwards),
        // Nobody could do it then, and runtimes would repeat the DEL of every such pod for ever.
        Err(error @ ToolError::Missing { .. }) => {
            host.warn(format!(
                "what table inet {TABLE} has of an attachment whose record is lost is left as it is: {error}"
            ));
            Ok(BTreeSet::new())
        }
        Err(error) => Err(failed(error)),
    }
}

fn warn_of_devices(host: &Host, facts: &NodeFacts) {
    for name in script::unwritable(facts) {
        host.warn(format!(
            "nft cannot be told the name of the device {name:?}, which leads out of the node: pods of /32 and /128 do not see the address of clients behind it"
        ));
    }
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

fn describe(place: &Place) -> String {
    format!("{} in {} of table inet {TABLE}:", place.key_text(), place.set)
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
