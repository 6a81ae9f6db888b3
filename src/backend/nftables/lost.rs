//! What the table has of attachments whose records are lost. Comments tell whose it is.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::elements;
use super::objects::{Atom, Data, Element, Names, Objects, Place, digit};
use super::scaffold::TABLE;
use super::{failed, script};
use crate::backend::{Leftover, Recorded, Unrecorded};
use crate::error::{Error, Result};
use crate::model::{Attachment, Claim, Family, Forward};
use crate::record::{Record, owner_of};
use crate::sys::Host;
use crate::sys::netlink::nftables::{NftFamily, NftReader};
use crate::sys::{command::ToolError, nft};

/// Takes away what attachments have of which there is no record. What that was for other attachments' claims
/// as well leads to them now. Returns what it forwarded.
pub fn remove(
    host: &Host,
    unrecorded: &Unrecorded,
    records: Recorded,
) -> Result<BTreeSet<Forward>> {
    let mut before = of_owners(present()?, |owner| is_of(unrecorded, owner));
    if before.elements.is_empty() {
        return Ok(BTreeSet::new());
    }
    let records = records()?;
    let names = Names {
        places: before.elements.keys().cloned().collect(),
        chains: before.chains.keys().cloned().collect(),
    };
    let after = Objects::of(&records.iter().collect::<Vec<_>>()).restricted_to(&names);
    // Of several attachments that need an element the first one is named in its comment, even when it has gone.
    before.elements.retain(|place, element| !is_in(&after, place, element));
    if before.elements.is_empty() && before.chains.is_empty() {
        return Ok(BTreeSet::new());
    }
    match nft::apply(host, &script::change(&before, &after, None, &BTreeSet::new())) {
        // Nobody could do it then, and runtimes would repeat the DEL of every such pod for ever.
        Err(error @ ToolError::Missing { .. }) => {
            host.warn(format!(
                "elements of table inet {TABLE} whose record is lost are left as they are: {error}"
            ));
            Ok(BTreeSet::new())
        }
        Err(error) => Err(failed(error)),
        Ok(()) => Ok(forwards(&before).into_iter().map(|(forward, _)| forward).collect()),
    }
}

/// What forwards and is of none of the records, which are all of the backend's, by whom it is of.
pub fn leftovers(records: &[Record]) -> Result<Vec<Leftover>> {
    let mut strange = present()?;
    let wanted = Objects::of(&records.iter().collect::<Vec<_>>());
    strange.elements.retain(|place, element| !is_in(&wanted, place, element));
    let mut found: BTreeMap<String, BTreeSet<Forward>> = BTreeMap::new();
    for element in strange.elements.values() {
        found.entry(element.owner.clone()).or_default();
    }
    for (forward, owner) in forwards(&strange) {
        found.entry(owner).or_default().insert(forward);
    }
    let leftover = |(owner, forwards): (String, BTreeSet<Forward>)| {
        let (container_id, _, network) = parts_of(&owner).unwrap_or_default();
        Leftover {
            place: "nftables".into(),
            object: format!("table inet {TABLE}"),
            network: network.to_owned(),
            container_id: container_id.to_owned(),
            forwards,
        }
    };
    Ok(found.into_iter().map(leftover).collect())
}

fn is_in(objects: &Objects, place: &Place, element: &Element) -> bool {
    objects.elements.get(place).is_some_and(|wanted| wanted.data == element.data)
}

/// All elements that attachments have, and the chains that they lead to, of which nothing but the name is known.
pub fn present() -> Result<Objects> {
    read().map_err(|error| Error::io("read the nftables rules (netlink)", error))
}

fn read() -> io::Result<Objects> {
    let mut objects = Objects::default();
    // A kernel without nf_tables has no table to look at.
    let Ok(mut reader) = NftReader::open() else {
        return Ok(objects);
    };
    if !reader.table_exists(NftFamily::Inet, TABLE).unwrap_or(false) {
        return Ok(objects);
    }
    for set in reader.sets(NftFamily::Inet, TABLE)? {
        for (key, found) in reader.all_elements(NftFamily::Inet, TABLE, &set)? {
            if let Some((place, data)) = elements::read(&set, &key, &found) {
                if let Data::Jump(chain) = &data {
                    objects.chains.insert(chain.clone(), Vec::new());
                }
                let owner = found.comment.unwrap_or_default();
                objects.elements.insert(place, Element { data, owner });
            }
        }
    }
    Ok(objects)
}

/// The part of the objects whose elements are of these owners.
fn of_owners(mut objects: Objects, is_theirs: impl Fn(&str) -> bool) -> Objects {
    objects.elements.retain(|_, element| is_theirs(&element.owner));
    let led_to: BTreeSet<&Data> = objects.elements.values().map(|element| &element.data).collect();
    objects.chains.retain(|chain, _| led_to.contains(&Data::Jump(chain.clone())));
    objects
}

/// Whether a comment names an attachment that is to go.
fn is_of(unrecorded: &Unrecorded, owner: &str) -> bool {
    match unrecorded {
        Unrecorded::One { attachment, .. } => owner == owner_of(attachment),
        Unrecorded::AllBut { network, keep, .. } => {
            parts_of(owner).is_some_and(|(container, ifname, _)| {
                let named = |container_id: &str| {
                    let attachment = Attachment {
                        network: (*network).to_owned(),
                        container_id: container_id.to_owned(),
                        ifname: ifname.to_owned(),
                    };
                    owner == owner_of(&attachment)
                };
                named(container) && !keep.iter().any(|container_id| named(container_id))
            })
        }
    }
}

/// Container ID, interface and network of [`owner_of`], as far as there was room for them.
fn parts_of(owner: &str) -> Option<(&str, &str, &str)> {
    let mut words = owner.splitn(3, ' ');
    Some((words.next()?, words.next()?, words.next()?))
}

/// What the plain maps forward, and whom it is of.
fn forwards(objects: &Objects) -> Vec<(Forward, String)> {
    let forward = |(place, element): (&Place, &Element)| {
        let Data::Ip(ip) = element.data else { return None };
        let set = place.set.strip_suffix("_addr")?;
        let port = Place { set: format!("{set}_port"), key: place.key.clone() };
        let Data::Port(port) = objects.elements.get(&port)?.data else { return None };
        let forward = Forward { claim: claim_of(place)?, target: (ip, port).into() };
        Some((forward, element.owner.clone()))
    };
    objects.elements.iter().filter_map(forward).collect()
}

/// The claim that a map's element is for.
fn claim_of(place: &Place) -> Option<Claim> {
    let family = Family::ALL.into_iter().find(|family| place.set.contains(digit(*family)))?;
    let (address, rest) = match place.key.as_slice() {
        [Atom::Ip(ip), rest @ ..] => (Some(*ip), rest),
        rest => (None, rest),
    };
    match rest {
        [Atom::Protocol(protocol), Atom::Port(port)] => {
            Some(Claim { family, protocol: *protocol, address, port: *port })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::BackendKind;
    use crate::record::samples::record;

    #[test]
    fn owners_are_told_by_their_comments() {
        let long = "c".repeat(70);
        let network = "n".repeat(90);
        let attachment = |network: &str, container_id: &str| Attachment {
            network: network.into(),
            container_id: container_id.into(),
            ifname: "eth0".into(),
        };
        for (network, id) in [("net", "c1"), ("a net", "c1"), (&network, &long), ("net", &long)] {
            let one = attachment(network, id);
            let owner = owner_of(&one);
            assert!(is_of(&Unrecorded::One { attachment: &one, chain: "" }, &owner));
            let other = attachment(network, "c2");
            assert!(!is_of(&Unrecorded::One { attachment: &other, chain: "" }, &owner));

            let recorded = BTreeSet::new();
            let of = |network, keep: &[&'static str]| {
                let keep = keep.iter().copied().collect();
                is_of(&Unrecorded::AllBut { network, keep: &keep, recorded: &recorded }, &owner)
            };
            assert!(of(network, &[]));
            assert!(of(network, &["c2", ""]));
            assert!(!of("another", &[]));
            let keep = BTreeSet::from([id]);
            assert!(!is_of(
                &Unrecorded::AllBut { network, keep: &keep, recorded: &recorded },
                &owner
            ));
            for strange in ["", "hostports 1 0123abcd", "a b"] {
                assert!(!is_of(&Unrecorded::One { attachment: &one, chain: "" }, strange));
                assert!(!is_of(
                    &Unrecorded::AllBut { network, keep: &BTreeSet::new(), recorded: &recorded },
                    strange
                ));
            }
        }
    }

    #[test]
    fn what_elements_forward_is_what_the_record_asks_for() {
        let mappings = ["tcp 80 8080", "udp 53 54 192.0.2.1", "sctp 9 10 2001:db8::1"];
        let one = record("a", &["10.0.0.2/24", "fd00::2/64"], &mappings, BackendKind::Nftables, 1);
        let found: BTreeSet<Forward> =
            forwards(&Objects::of(&[&one])).into_iter().map(|(forward, _)| forward).collect();
        let asked: BTreeSet<Forward> =
            Family::ALL.into_iter().flat_map(|family| one.forwards(family)).collect();
        assert_eq!(found, asked);
        assert_eq!(found.len(), 4);
    }
}
