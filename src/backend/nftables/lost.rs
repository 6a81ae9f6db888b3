//! Attachments whose records are lost: the table tells by comments whose its elements and rules are. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::elements::family_of;
use super::objects::{Atom, Data, Element, Objects, Place, names_of_claim};
use super::present::Present;
use super::scaffold::TABLE;
use super::script;
use crate::backend::{Leftover, Recorded, Unrecorded};
use crate::error::Result;
use crate::model::{Attachment, Claim, Forward};
use crate::record::{Record, owner_of};

/// What takes away all that attachments without a record have.
#[derive(Debug, PartialEq, Eq)]
pub struct Removal {
    /// For `nft -j -f -`.
    pub script: String,
    /// What was forwarded.
    pub forwards: BTreeSet<Forward>,
}

/// Where records have the same claims, these lead to them from then on. `None` if nothing is of those.
pub fn removal(
    present: &Present,
    unrecorded: &Unrecorded,
    records: Recorded,
) -> Result<Option<Removal>> {
    let is_theirs = |owner: &str| is_of(unrecorded, owner);
    let own = Own::of(present, is_theirs);
    if own.is_nothing() {
        return Ok(None);
    }
    let records = records()?;
    let wanted = Objects::of(&records.iter().collect::<Vec<_>>());
    let known: BTreeSet<String> = records.iter().map(Record::owner).collect();
    // Of more attachments than these the records may be lost, or of a format that only a newer version reads.
    let is_strangers = |owner: &str| !is_theirs(owner) && !known.contains(owner);
    let ways = ways_into(present);
    let mut change = Difference::default();
    for claim in own.claims(&ways) {
        let names = names_of_claim(&claim);
        let (own_ways, halves): (Vec<&Place>, Vec<&Place>) =
            names.places.iter().partition(|place| place.set.ends_with("_own"));
        let is_left = |place: &Place| {
            present.elements.get(place).is_some_and(|found| is_strangers(&found.owner))
        };
        if !halves.iter().any(|place| is_left(place)) {
            halves.iter().for_each(|place| change.exchange(place, present, &wanted));
        }
        for chain in &names.chains {
            let rules = present.chains.get(chain).map_or(&[][..], Vec::as_slice);
            let of_others = || rules.iter().map(|(_, owner)| owner).filter(|of| !is_theirs(of));
            let wanted_rules = wanted.chains.get(chain);
            let are_right =
                wanted_rules.is_some_and(|wanted| of_others().eq(wanted.iter().map(|(_, of)| of)));
            if are_right || of_others().any(|owner| is_strangers(owner)) {
                let handles = own.chains.get(chain.as_str()).into_iter().flatten();
                change.rules.extend(handles.map(|handle| (chain.clone(), *handle)));
                continue;
            }
            own_ways.iter().for_each(|place| change.exchange(place, present, &wanted));
            if present.chains.contains_key(chain) {
                change.before.chains.insert(chain.clone(), Vec::new());
            }
            change.after.chains.extend(wanted_rules.map(|rules| (chain.clone(), rules.clone())));
        }
    }
    for place in own.elements.keys().filter(|place| claim_of(place).is_none()) {
        change.exchange(place, present, &wanted);
    }
    let Difference { rules, before, after } = &change;
    let script = script::removal(rules, before, after);
    Ok(Some(Removal { script, forwards: own.forwards(&ways) }))
}

/// From what there is to what should be.
#[derive(Default)]
struct Difference {
    /// Chains and handles.
    rules: Vec<(String, u64)>,
    before: Objects,
    after: Objects,
}

impl Difference {
    fn exchange(&mut self, place: &Place, present: &Present, wanted: &Objects) {
        let at = |elements: &BTreeMap<Place, Element>| {
            elements.get(place).map(|element| (place.clone(), element.clone()))
        };
        self.before.elements.extend(at(&present.elements));
        self.after.elements.extend(at(&wanted.elements));
    }
}

/// What is of none of the records, which are all of the backend's, by whom it is of.
#[must_use]
pub fn leftovers(present: &Present, records: &[Record]) -> Vec<Leftover> {
    let wanted = Objects::of(&records.iter().collect::<Vec<_>>());
    let mut strange = Present::default();
    for (place, element) in &present.elements {
        if wanted.elements.get(place).is_none_or(|wanted| wanted.data != element.data) {
            strange.elements.insert(place.clone(), element.clone());
        }
    }
    for (chain, rules) in &present.chains {
        let is_wanted = |owner: &str| {
            wanted.chains.get(chain).is_some_and(|rules| rules.iter().any(|(_, of)| of == owner))
        };
        let rules = rules.iter().filter(|(_, owner)| !is_wanted(owner)).cloned().collect();
        strange.chains.insert(chain.clone(), rules);
    }
    let of_elements = strange.elements.values().filter(|element| !is_jump(element));
    let of_rules = strange.chains.values().flatten();
    let owners: BTreeSet<&str> = (of_elements.map(|element| element.owner.as_str()))
        .chain(of_rules.map(|(_, owner)| owner.as_str()))
        .collect();
    let ways = ways_into(present);
    let leftover = |owner: &str| {
        let (container_id, _, network) = parts_of(owner).unwrap_or_default();
        Leftover {
            place: "nftables".into(),
            object: format!("table inet {TABLE}"),
            network: network.to_owned(),
            container_id: container_id.to_owned(),
            forwards: Own::of(&strange, |of| of == owner).forwards(&ways),
        }
    };
    owners.into_iter().map(leftover).collect()
}

/// What of the table is of some owners.
struct Own<'a> {
    /// Without those that lead to chains, which may be several owners'.
    elements: BTreeMap<Place, Element>,
    /// Handles of their rules.
    chains: BTreeMap<&'a str, Vec<u64>>,
}

impl<'a> Own<'a> {
    fn of(present: &'a Present, is_theirs: impl Fn(&str) -> bool) -> Self {
        let elements = present
            .elements
            .iter()
            .filter(|(_, element)| !is_jump(element) && is_theirs(&element.owner))
            .map(|(place, element)| (place.clone(), element.clone()));
        let mut chains: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for (chain, rules) in &present.chains {
            for (handle, _) in rules.iter().filter(|(_, owner)| is_theirs(owner)) {
                chains.entry(chain).or_default().push(*handle);
            }
        }
        Own { elements: elements.collect(), chains }
    }

    fn is_nothing(&self) -> bool {
        self.elements.is_empty() && self.chains.is_empty()
    }

    fn claims(&self, ways: &Ways) -> BTreeSet<Claim> {
        let by_rules = self.chains.keys().filter_map(|chain| ways.get(chain)).copied();
        self.elements.keys().filter_map(claim_of).chain(by_rules).collect()
    }

    /// A rule's target is not read: the pod's port is in the key of what is masqueraded.
    fn forwards(&self, ways: &Ways) -> BTreeSet<Forward> {
        let half = |claim: &Claim, suffix: &str| {
            let places = names_of_claim(claim).places;
            let place = places.into_iter().find(|place| place.set.ends_with(suffix))?;
            self.elements.get(&place).map(|element| element.data.clone())
        };
        let mut forwards = BTreeSet::new();
        for claim in self.claims(ways) {
            if let (Some(Data::Ip(ip)), Some(Data::Port(port))) =
                (half(&claim, "_addr"), half(&claim, "_port"))
            {
                forwards.insert(Forward { claim, target: (ip, port).into() });
                continue;
            }
            for place in self.elements.keys().filter(|place| place.set.starts_with("flows")) {
                if let [
                    Atom::Ip(ip),
                    Atom::Protocol(protocol),
                    Atom::Port(port),
                    Atom::Port(called),
                ] = place.key[..]
                    && family_of(&place.set) == Some(claim.family)
                    && (protocol, called) == (claim.protocol, claim.port)
                {
                    forwards.insert(Forward { claim, target: (ip, port).into() });
                }
            }
        }
        forwards
    }
}

fn is_jump(element: &Element) -> bool {
    matches!(element.data, Data::Jump(_))
}

/// The claims whose packets come into chains, by the names of these.
type Ways<'a> = BTreeMap<&'a str, Claim>;

fn ways_into(present: &Present) -> Ways<'_> {
    let mut ways = Ways::new();
    for (place, element) in &present.elements {
        if let (Data::Jump(chain), Some(claim)) = (&element.data, claim_of(place)) {
            ways.insert(chain, claim);
        }
    }
    ways
}

/// Whether a comment names an attachment that is to go.
fn is_of(unrecorded: &Unrecorded, owner: &str) -> bool {
    match unrecorded {
        Unrecorded::One { attachment, .. } => owner == owner_of(attachment),
        Unrecorded::AllBut { network, owners, is_recorded, .. } => {
            let Some((container_id, ifname, _)) = parts_of(owner) else {
                return false;
            };
            let attachment = Attachment {
                network: (*network).to_owned(),
                container_id: container_id.to_owned(),
                ifname: ifname.to_owned(),
            };
            owner == owner_of(&attachment) && !owners.contains(owner) && !is_recorded(&attachment)
        }
    }
}

/// Container ID, interface and network of [`owner_of`], as far as there was room for them.
fn parts_of(owner: &str) -> Option<(&str, &str, &str)> {
    let mut words = owner.splitn(3, ' ');
    Some((words.next()?, words.next()?, words.next()?))
}

/// The claim that a map's element is for.
fn claim_of(place: &Place) -> Option<Claim> {
    let family = family_of(&place.set)?;
    if !["_addr", "_port", "_own"].iter().any(|suffix| place.set.ends_with(suffix)) {
        return None;
    }
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
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::model::BackendKind;
    use crate::record::samples;

    /// Mappings are `protocol hostPort containerPort [hostIP]`.
    fn pod(id: &str, address: &str, mapping: &str, order: u64) -> Record {
        samples::record(id, &[address], &[mapping], BackendKind::Nftables, order)
    }

    fn conditional(mut record: Record) -> Record {
        record.options.conditions_v4 = vec!["ip saddr 192.0.2.0/24".into()];
        record
    }

    /// The table after ADDs of the records one after the other, of which the last ones may have gone again.
    fn table(steps: &[&[&Record]]) -> Present {
        let mut present = Present::default();
        let mut before = Objects::default();
        for records in steps {
            let after = Objects::of(records);
            // What `script::change` leaves: no command names a place where nothing differs.
            for place in before.elements.keys() {
                if !after.elements.contains_key(place) {
                    present.elements.remove(place);
                }
            }
            for (place, element) in &after.elements {
                if before.elements.get(place) != Some(element) {
                    present.elements.insert(place.clone(), element.clone());
                }
            }
            present.chains.clear();
            for (chain, rules) in &after.chains {
                let owners = rules.iter().enumerate().map(|(at, (_, of))| (at as u64, of.clone()));
                present.chains.insert(chain.clone(), owners.collect());
            }
            before = after;
        }
        present
    }

    fn del(record: &Record, present: &Present, others: &[&Record]) -> Option<Removal> {
        let attachment = &record.attachment;
        let unrecorded = Unrecorded::One { attachment, chain: None };
        let others = || Ok(others.iter().map(|record| (*record).clone()).collect());
        removal(present, &unrecorded, &others).unwrap()
    }

    /// Commands as `verb set key`, or `verb chain`.
    fn commands(removal: Option<&Removal>) -> Vec<String> {
        let script = removal.map_or("{\"nftables\": []}", |removal| removal.script.as_str());
        let script: serde_json::Value = serde_json::from_str(script).unwrap();
        let mut lines = Vec::new();
        for command in script["nftables"].as_array().unwrap() {
            let (verb, object) = command.as_object().unwrap().iter().next().unwrap();
            let (kind, object) = object.as_object().unwrap().iter().next().unwrap();
            let name = object.get("name").or_else(|| object.get("chain")).unwrap().as_str();
            let handle = object.get("handle").map(|handle| format!(" {handle}"));
            lines.push(format!("{verb} {kind} {}{}", name.unwrap(), handle.unwrap_or_default()));
        }
        lines
    }

    fn texts(removal: &Removal) -> Vec<String> {
        removal.forwards.iter().map(ToString::to_string).collect()
    }

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
            assert!(is_of(&Unrecorded::One { attachment: &one, chain: None }, &owner));
            let other = attachment(network, "c2");
            assert!(!is_of(&Unrecorded::One { attachment: &other, chain: None }, &owner));
            let sibling = Attachment { ifname: "net1".into(), ..one.clone() };
            assert!(!is_of(&Unrecorded::One { attachment: &sibling, chain: None }, &owner));

            let gc = |network, valid: &[&Attachment], is_recorded: bool, owner: &str| {
                let unrecorded = Unrecorded::AllBut {
                    network,
                    keep: &BTreeSet::new(),
                    recorded: &BTreeSet::new(),
                    owners: &valid.iter().map(|one| owner_of(one)).collect(),
                    is_recorded: &|_| is_recorded,
                };
                is_of(&unrecorded, owner)
            };
            assert!(gc(network, &[], false, &owner));
            assert!(gc(network, &[&other, &sibling], false, &owner));
            assert!(!gc(network, &[&one], false, &owner));
            assert!(!gc(network, &[], true, &owner));
            assert!(!gc("another", &[], false, &owner));
            for strange in ["", "hostports 1 0123abcd", "a b"] {
                assert!(!is_of(&Unrecorded::One { attachment: &one, chain: None }, strange));
                assert!(!gc(network, &[], false, strange));
            }
        }
    }

    #[test]
    fn everything_of_a_lost_record_goes_and_nothing_else() {
        let a = samples::record(
            "a",
            &["10.0.0.2/24", "fd00::2/64"],
            &["tcp 80 8080", "udp 53 54 192.0.2.1"],
            BackendKind::Nftables,
            1,
        );
        let b = pod("b", "10.0.0.3/24", "tcp 81 8080", 2);
        let present = table(&[&[&a], &[&a, &b]]);
        let mut whole = del(&a, &present, &[]).unwrap();
        let forwards = ["tcp 0.0.0.0:80 -> 10.0.0.2:8080", "udp 192.0.2.1:53 -> 10.0.0.2:54"];
        assert_eq!(texts(&whole)[..2], forwards);
        assert_eq!(commands(Some(&whole)).iter().filter(|one| one.starts_with("add")).count(), 0);
        assert_eq!(del(&a, &table(&[&[&b]]), &[]), None);
        // Whether others' records are there or not.
        let with = del(&a, &present, &[&b]).unwrap();
        assert_eq!(commands(Some(&with)), commands(Some(&whole)));
        whole.forwards.retain(|forward| forward.claim.port == 80);
        assert_eq!(texts(&whole)[1], "tcp [::]:80 -> [fd00::2]:8080");
    }

    /// One container port: of a takeover's target only the address differs.
    #[test]
    fn a_takeover_leaves_nothing_in_the_former_owner_s_name() {
        let b = pod("b", "10.0.0.3/24", "udp 80 8080", 1);
        let a = pod("a", "10.0.0.2/24", "udp 80 8080", 2);
        let present = table(&[&[&b], &[&b, &a], &[&a]]);
        assert_eq!(del(&b, &present, &[]), None);
        let gone = del(&a, &present, &[]).unwrap();
        assert_eq!(texts(&gone), ["udp 0.0.0.0:80 -> 10.0.0.2:8080"]);
    }

    #[test]
    fn an_address_that_is_used_again_has_its_new_owner_s_name() {
        let dead = pod("dead", "10.0.0.2/24", "tcp 80 8080", 1);
        let live = pod("live", "10.0.0.2/24", "tcp 80 8080", 2);
        let present = table(&[&[&dead], &[&dead, &live], &[&live]]);
        assert_eq!(del(&dead, &present, &[]), None);
        assert_eq!(del(&live, &present, &[]).unwrap().forwards.len(), 1);
    }

    #[test]
    fn of_a_chain_the_rules_of_others_stay() {
        let b = conditional(pod("b", "10.0.0.3/24", "udp 80 8080", 1));
        let a = conditional(pod("a", "10.0.0.2/24", "udp 80 8080", 2));
        let present = table(&[&[&b], &[&b, &a]]);
        let of_sets = ["delete element flows4", "delete element near4_24"];
        for (lost, handle) in [(&a, 0), (&b, 1)] {
            // All records are lost: rule by rule.
            let gone = del(lost, &present, &[]).unwrap();
            let rule = format!("delete rule any4_udp_80 {handle}");
            assert_eq!(commands(Some(&gone)), [&[rule.as_str()][..], &of_sets].concat());
            assert_eq!(gone.forwards.len(), 1, "flows4 tells the pod's port");
        }
        // The other's record says the same.
        assert_eq!(del(&a, &present, &[&b]).unwrap(), del(&a, &present, &[]).unwrap());
        // It says more than is there.
        let mut damaged = present.clone();
        damaged.chains.values_mut().for_each(|rules| rules.truncate(1));
        let gone = del(&a, &damaged, &[&b]).unwrap();
        let again = ["flush chain any4_udp_80", "add rule any4_udp_80"];
        assert_eq!(commands(Some(&gone)), [&of_sets[..], &again].concat());
        // The last one takes the chain along.
        let gone = del(&b, &table(&[&[&b]]), &[]).unwrap();
        let all = ["delete element any4_own", of_sets[0], of_sets[1], "delete chain any4_udp_80"];
        assert_eq!(commands(Some(&gone)), all);
    }

    #[test]
    fn an_older_claim_has_its_port_back_whatever_it_is_made_of() {
        let plain = |id, address, order| pod(id, address, "tcp 80 8080", order);
        let older = conditional(plain("b", "10.0.0.3/24", 1));
        let lost = plain("a", "10.0.0.2/24", 2);
        let gone = del(&lost, &table(&[&[&older], &[&older, &lost]]), &[&older]).unwrap();
        let lines = commands(Some(&gone));
        for line in ["delete element any4_addr", "add chain any4_tcp_80", "add element any4_own"] {
            assert!(lines.iter().any(|one| one == line), "{line}: {lines:?}");
        }
        let (older, lost) = (plain("b", "10.0.0.3/24", 1), conditional(lost));
        let gone = del(&lost, &table(&[&[&older], &[&older, &lost]]), &[&older]).unwrap();
        let lines = commands(Some(&gone));
        for line in ["delete element any4_own", "delete chain any4_tcp_80"] {
            assert!(lines.iter().any(|one| one == line), "{line}: {lines:?}");
        }
        assert!(!lines.iter().any(|one| one.contains("_addr")), "{lines:?}");
    }

    /// Its record is lost, too: no older record has its port.
    #[test]
    fn a_living_stranger_keeps_what_it_has() {
        let mapping = "tcp 80 8080";
        let older = pod("older", "10.0.0.2/24", mapping, 1);
        let stranger = pod("stranger", "10.0.0.3/24", mapping, 2);
        let lost = conditional(pod("lost", "10.0.0.4/24", mapping, 3));
        let all = [&older, &stranger, &lost];
        for older in [older.clone(), conditional(older.clone())] {
            let gone = del(&lost, &table(&[&all]), &[&older]).unwrap();
            let lines = commands(Some(&gone));
            assert!(!lines.iter().any(|line| line.contains("_addr") || line.contains("_port")));
        }
        let stranger = conditional(stranger);
        let gone = del(&lost, &table(&[&[&older, &stranger, &lost]]), &[&older]).unwrap();
        let lines = commands(Some(&gone));
        assert!(lines.contains(&"delete rule any4_tcp_80 0".to_owned()), "{lines:?}");
        assert!(!lines.iter().any(|line| line.contains("chain")), "{lines:?}");
    }

    #[test]
    fn whom_what_is_left_was_of() {
        let a = pod("a", "10.0.0.2/24", "tcp 80 8080", 1);
        let b = conditional(pod("b", "10.0.0.3/24", "udp 53 54", 2));
        let present = table(&[&[&a], &[&a, &b]]);
        let shown = |records: &[&Record]| -> Vec<String> {
            let records: Vec<Record> = records.iter().map(|record| (*record).clone()).collect();
            leftovers(&present, &records)
                .iter()
                .map(|one| {
                    let forwards: Vec<String> =
                        one.forwards.iter().map(ToString::to_string).collect();
                    format!("{} {}: {}", one.network, one.container_id, forwards.join(", "))
                })
                .collect()
        };
        let (of_a, of_b) = (
            "portmap a: tcp 0.0.0.0:80 -> 10.0.0.2:8080",
            "portmap b: udp 0.0.0.0:53 -> 10.0.0.3:54",
        );
        assert_eq!(shown(&[]), [of_a, of_b]);
        assert_eq!(shown(&[&a]), [of_b]);
        assert_eq!(shown(&[&b]), [of_a]);
        assert_eq!(shown(&[&a, &b]), [""; 0]);
    }
}
