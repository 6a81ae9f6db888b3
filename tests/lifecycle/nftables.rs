//! An nftables table in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use portmap::backend::Unrecorded;
use portmap::backend::nftables::lost::removal;
use portmap::backend::nftables::objects::{Atom, Data, Element, Names, Objects, Place, names_of};
use portmap::backend::nftables::present::Present;
use portmap::backend::nftables::{scaffold, script};
use portmap::facts::NodeFacts;
use portmap::model::{BackendKind, Family, Protocol};
use portmap::record::{Part, Record};
use serde_json::{Value, json};

use super::{Change, Packet, Table, parts};

/// Stands for any match in a rule.
pub const CONDITION: &str = "condition";

/// The table `inet portmap`, if there is one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fake(Option<Content>);

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Content {
    /// Data and comment of each element.
    sets: BTreeMap<String, BTreeMap<String, (Value, Value)>>,
    /// Statements and comment of each rule, whose handle is its place.
    chains: BTreeMap<String, Vec<Value>>,
}

impl Fake {
    /// One transaction: all of it or an error.
    fn apply(&mut self, text: &str) -> Result<(), String> {
        let document: Value = serde_json::from_str(text).unwrap();
        let mut next = self.clone();
        for command in document["nftables"].as_array().unwrap() {
            next.command(command).map_err(|error| format!("{error}: {command}"))?;
        }
        for rules in next.0.iter_mut().flat_map(|table| table.chains.values_mut()) {
            rules.retain(|rule| !rule.is_null());
        }
        next.complete()?;
        *self = next;
        Ok(())
    }

    fn command(&mut self, command: &Value) -> Result<(), &'static str> {
        let (verb, object) = command.as_object().unwrap().iter().next().unwrap();
        let (kind, object) = object.as_object().unwrap().iter().next().unwrap();
        assert_eq!(object["family"], "inet");
        let name = object["name"].as_str().unwrap_or_default().to_owned();
        if kind == "table" {
            assert_eq!(name, scaffold::TABLE);
            match verb.as_str() {
                "add" => drop(self.0.get_or_insert_default()),
                "delete" => drop(self.0.take().ok_or("ENOENT: the table")?),
                _ => return Err("an unknown verb"),
            }
            return Ok(());
        }
        assert_eq!(object["table"], scaffold::TABLE);
        let table = self.0.as_mut().ok_or("ENOENT: the table")?;
        match (verb.as_str(), kind.as_str()) {
            ("add", "set" | "map") => drop(table.sets.entry(name).or_default()),
            ("add", "chain") => drop(table.chains.entry(name).or_default()),
            ("flush", "chain") => table.chains.get_mut(&name).ok_or("ENOENT: the chain")?.clear(),
            ("delete", "chain") => drop(table.chains.remove(&name).ok_or("ENOENT: the chain")?),
            ("add", "rule") => {
                let chain = object["chain"].as_str().unwrap();
                let rules = table.chains.get_mut(chain).ok_or("ENOENT: the rule's chain")?;
                rules.push(json!([object["expr"], object["comment"]]));
            }
            ("delete", "rule") => {
                let rules = table.chains.get_mut(object["chain"].as_str().unwrap());
                let handle = usize::try_from(object["handle"].as_u64().unwrap()).unwrap();
                let rule =
                    rules.and_then(|rules| rules.get_mut(handle)).ok_or("ENOENT: the rule")?;
                // Handles of the others stay what they are until the transaction's end.
                *rule = Value::Null;
            }
            (_, "element") => {
                let set = table.sets.get_mut(&name).ok_or("ENOENT: the set")?;
                for element in object["elem"].as_array().unwrap() {
                    let (key, data, comment) = element_of(element);
                    match verb.as_str() {
                        "delete" => drop(set.remove(&key).ok_or("ENOENT: the element")?),
                        "add" => match set.get(&key) {
                            Some((known, _)) if *known != data => {
                                return Err("EEXIST: an element with other data");
                            }
                            // As it is, with the comment that it has.
                            Some(_) => {}
                            None => drop(set.insert(key, (data, comment))),
                        },
                        _ => return Err("an unknown verb"),
                    }
                }
            }
            _ => return Err("an unknown command"),
        }
        Ok(())
    }

    /// No jump to a chain and no lookup in a set that is not there (ENOENT, or EBUSY on removal).
    fn complete(&self) -> Result<(), String> {
        let Some(table) = &self.0 else {
            return Ok(());
        };
        let (mut jumps, mut lookups) = (BTreeSet::new(), BTreeSet::new());
        let all = table.sets.values().flat_map(BTreeMap::values).map(|(data, _)| data);
        for value in all.chain(table.chains.values().flatten()) {
            references(value, &mut jumps, &mut lookups);
        }
        let chain = jumps.into_iter().find(|chain| !table.chains.contains_key(chain));
        let set = lookups.into_iter().find(|set| !table.sets.contains_key(set));
        match (chain, set) {
            (None, None) => Ok(()),
            missing => Err(format!("referred to and missing: {missing:?}")),
        }
    }

    fn fresh(records: &[Record]) -> Self {
        let mut fake = Fake::default();
        let all: Vec<&Record> = records.iter().collect();
        fake.apply(&script::restore(&all, &parts(records), &facts())).unwrap();
        fake
    }

    fn element(&self, set: &str, key: &Value) -> Option<&Value> {
        self.0.as_ref()?.sets.get(set)?.get(&key.to_string()).map(|(data, _)| data)
    }

    /// What attachments have, as it is read over netlink.
    fn present(&self) -> Present {
        let mut present = Present::default();
        let table = self.0.clone().unwrap_or_default();
        for (set, elements) in table.sets {
            if ["uplinks", "listed_only", "nodes4", "nodes6"].contains(&set.as_str()) {
                continue;
            }
            for (key, (data, comment)) in elements {
                let key: Value = serde_json::from_str(&key).unwrap();
                let atoms = key.get("concat").and_then(Value::as_array).cloned();
                let atoms = atoms.unwrap_or_else(|| vec![key]).iter().map(atom).collect();
                let data = match (&data, data.pointer("/jump/target").and_then(Value::as_str)) {
                    (_, Some(chain)) => Data::Jump(chain.to_owned()),
                    (Value::Null, _) => Data::None,
                    (data, _) => match atom(data) {
                        Atom::Ip(ip) => Data::Ip(ip),
                        Atom::Port(port) => Data::Port(port),
                        other => panic!("{other:?}"),
                    },
                };
                if let Data::Jump(chain) = &data {
                    let rules = table.chains[chain].iter().enumerate();
                    let owner = |rule: &Value| rule[1].as_str().unwrap().to_owned();
                    let rules = rules.map(|(at, rule)| (at as u64, owner(rule))).collect();
                    present.chains.insert(chain.clone(), rules);
                }
                let owner = comment.as_str().unwrap_or_default().to_owned();
                present
                    .elements
                    .insert(Place { set: set.clone(), key: atoms }, Element { data, owner });
            }
        }
        present
    }

    /// DEL of an attachment without a record.
    fn remove_lost(&mut self, lost: &Record, records: &[Record]) {
        let unrecorded = Unrecorded::One { attachment: &lost.attachment, chain: None };
        let records = || Ok(records.to_vec());
        if let Some(removal) = removal(&self.present(), &unrecorded, &records).unwrap() {
            self.apply(&removal.script).unwrap();
        }
    }

    /// The first rule of a claim's chain that translates.
    fn translated(&self, chain: &str, matching: bool) -> Option<SocketAddr> {
        self.0.as_ref()?.chains.get(chain)?.iter().find_map(|rule| {
            let statements = rule[0].as_array()?;
            if !matching && statements.contains(&json!(CONDITION)) {
                return None;
            }
            let dnat = &statements.last()?["dnat"];
            let port = u16::try_from(dnat["port"].as_u64()?).ok()?;
            Some(SocketAddr::new(dnat["addr"].as_str()?.parse().ok()?, port))
        })
    }
}

/// Key, data and comment. That of an element which leads to a chain says nothing: its rules have their own.
fn element_of(element: &Value) -> (String, Value, Value) {
    let (key, data) = match element.as_array().map(Vec::as_slice) {
        Some([key, data]) => (key, data.clone()),
        _ => (element, Value::Null),
    };
    let comment = match data.get("jump") {
        Some(_) => Value::Null,
        None => key.pointer("/elem/comment").cloned().unwrap_or_default(),
    };
    (key.pointer("/elem/val").unwrap_or(key).to_string(), data, comment)
}

/// A component of a key, or what a map has.
fn atom(value: &Value) -> Atom {
    match value {
        Value::Number(port) => Atom::Port(port.as_u64().unwrap().try_into().unwrap()),
        Value::String(text) => match (text.parse(), Protocol::parse(text)) {
            (Ok(ip), _) => Atom::Ip(ip),
            (_, Some(protocol)) => Atom::Protocol(protocol),
            _ => panic!("{text}"),
        },
        other => panic!("{other}"),
    }
}

fn references(value: &Value, jumps: &mut BTreeSet<String>, sets: &mut BTreeSet<String>) {
    match value {
        Value::String(text) => sets.extend(text.strip_prefix('@').map(str::to_owned)),
        Value::Array(items) => items.iter().for_each(|item| references(item, jumps, sets)),
        Value::Object(members) => {
            if let Some(target) = value.pointer("/jump/target").and_then(Value::as_str) {
                jumps.insert(target.to_owned());
            }
            members.values().for_each(|member| references(member, jumps, sets));
        }
        _ => {}
    }
}

fn facts() -> NodeFacts {
    NodeFacts {
        uplinks: BTreeSet::from(["eth0".to_owned()]),
        addresses: ["192.0.2.1", "fd00:51::1"].iter().map(|ip| ip.parse().unwrap()).collect(),
        ..NodeFacts::default()
    }
}

fn objects(related: &[Record], own: Option<&Record>, names: &Names) -> Objects {
    let mut records: Vec<&Record> = related.iter().chain(own).collect();
    records.sort_by_key(|record| record.order);
    Objects::of(&records).restricted_to(names)
}

impl Table for Fake {
    const BACKEND: BackendKind = BackendKind::Nftables;

    fn change(&mut self, change: &Change) {
        if change.after.is_empty() || change.before != change.after {
            let records: Vec<&Record> = change.live.iter().collect();
            self.apply(&script::restore(&records, &change.after, &facts())).unwrap();
            return;
        }
        let mut names = Names::default();
        for record in change.added.iter().chain(&change.removed) {
            let own = names_of(record);
            names.places.extend(own.places);
            names.chains.extend(own.chains);
        }
        let before = objects(&change.related, change.removed, &names);
        let after = objects(&change.related, change.added, &names);
        self.apply(&script::change(&before, &after, None, &change.after)).unwrap();
    }

    fn verify(&self, live: &[Record]) {
        assert_eq!(*self, Fake::fresh(live), "not what the records alone lead to");
    }

    fn resolve(&self, packet: &Packet, matching: bool) -> Option<SocketAddr> {
        let digit = match packet.family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        let claim = [json!(packet.protocol.name()), json!(packet.port)];
        let mut specific = claim.to_vec();
        specific.insert(0, json!(packet.address.to_string()));
        [("ip", specific), ("any", claim.to_vec())].into_iter().find_map(|(prefix, key)| {
            let key = json!({ "concat": key });
            let find = |suffix: &str| self.element(&format!("{prefix}{digit}_{suffix}"), &key);
            let own = find("own")
                .and_then(|verdict| verdict.pointer("/jump/target")?.as_str())
                .and_then(|chain| self.translated(chain, matching));
            own.or_else(|| {
                let port = u16::try_from(find("port")?.as_u64()?).ok()?;
                Some(SocketAddr::new(find("addr")?.as_str()?.parse().ok()?, port))
            })
        })
    }
}

/// A table with all sets that any of the records needs, after transactions from some objects to others.
fn built(records: &[Record], steps: &[(&Objects, &Objects)]) -> Fake {
    let parts: BTreeSet<Part> = records.iter().flat_map(Record::parts).collect();
    let mut commands = vec![json!({"add": {"table": {"family": "inet", "name": scaffold::TABLE}}})];
    commands.extend(scaffold::commands(&parts));
    let mut fake = Fake::default();
    fake.apply(&json!({ "nftables": commands }).to_string()).unwrap();
    for (before, after) in steps {
        fake.apply(&script::change(before, after, None, &parts)).unwrap();
    }
    fake
}

fn of(records: &[Record]) -> Objects {
    Objects::of(&records.iter().collect::<Vec<_>>())
}

/// Elements at their places, and owners of rules with their chains.
type Parts = (Vec<(Place, Element)>, Vec<(String, String)>);

/// Elements and rules of owners, by their places and chains. Elements that lead to chains are nobody's.
fn parts_of(present: &Present, is_theirs: impl Fn(&str) -> bool) -> Parts {
    let elements = present
        .elements
        .iter()
        .filter(|(_, element)| !matches!(element.data, Data::Jump(_)) && is_theirs(&element.owner));
    let rules = present.chains.iter().flat_map(|(chain, rules)| {
        rules.iter().map(move |(_, owner)| (chain.clone(), owner.clone()))
    });
    (
        elements.map(|(place, element)| (place.clone(), element.clone())).collect(),
        rules.filter(|(_, owner)| is_theirs(owner)).collect(),
    )
}

/// Of one of the records, or of all: the kernel tells whose everything is.
pub fn assert_lost(records: &[Record]) {
    let none = Objects::default();
    let whole = built(records, &[(&none, &of(records))]);
    for (at, lost) in records.iter().enumerate() {
        let mut others = records.to_vec();
        others.remove(at);
        let mut table = whole.clone();
        table.remove_lost(lost, &others);
        assert_eq!(table, built(records, &[(&none, &of(&others))]), "{:?}", lost.attachment);
        let after = table.clone();
        table.remove_lost(lost, &others);
        assert_eq!(table, after, "twice");
        // More are lost than this one: they keep what they have.
        let strangers: Vec<String> =
            others.iter().filter(|other| other.order % 2 != 0).map(Record::owner).collect();
        others.retain(|other| other.order % 2 == 0);
        let is_strangers = |owner: &str| strangers.iter().any(|stranger| stranger == owner);
        let before = parts_of(&whole.present(), is_strangers);
        let mut table = whole.clone();
        table.remove_lost(lost, &others);
        assert_eq!(parts_of(&table.present(), is_strangers), before, "{:?}", lost.attachment);
        let own = parts_of(&table.present(), |owner| owner == lost.owner());
        assert_eq!(own, Default::default(), "{:?}", lost.attachment);
    }
    let mut table = whole;
    for lost in records {
        let is_others = |owner: &str| owner != lost.owner();
        let before = parts_of(&table.present(), is_others);
        table.remove_lost(lost, &[]);
        assert_eq!(parts_of(&table.present(), is_others), before, "{:?}", lost.attachment);
        let own = parts_of(&table.present(), |owner| owner == lost.owner());
        assert_eq!(own, Default::default(), "{:?}", lost.attachment);
    }
    assert_eq!(table, built(records, &[]), "something is left");
}

/// One transaction from the objects of these records to those of others, in a table that has all
/// sets that either needs.
pub fn assert_change(from: &[Record], to: &[Record]) {
    let all = [from, to].concat();
    let (none, from, to) = (Objects::default(), of(from), of(to));
    let built = |steps: &[(&Objects, &Objects)]| built(&all, steps);
    assert_eq!(built(&[(&none, &from), (&from, &to)]), built(&[(&none, &to)]));
    assert_eq!(built(&[(&none, &from), (&from, &none)]), built(&[]), "ADD and DEL leave nothing");
    assert_eq!(built(&[(&none, &to), (&to, &to)]), built(&[(&none, &to)]));
}
