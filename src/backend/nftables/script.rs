//! What is sent to `nft -j -f -`. Pure, golden-tested. One input is one transaction.

use std::borrow::Cow;
use std::collections::BTreeSet;

use nftables::expr::{Elem, Expression, NamedExpression, Verdict};
use nftables::schema::{Element as NftElement, NfCmd, NfListObject};
use nftables::stmt::JumpTarget;
use nftables::types::NfFamily;
use serde_json::{Value, json};

use super::objects::{Atom, ChainRules, Data, Element, Objects, Place, digit};
use super::scaffold::{self, TABLE, add_rule, command, table};
use crate::facts::NodeFacts;
use crate::model::{Family, Protocol};
use crate::record::{Part, Record};

/// The elements of the sets `uplinks`, `listed_only`, `nodes4` and `nodes6` in a table with these parts.
#[must_use]
pub fn fact_places(facts: &NodeFacts, parts: &BTreeSet<Part>) -> Vec<Place> {
    let uplinks = facts
        .uplinks
        .iter()
        .filter(|name| device_text(name).is_some())
        .map(|name| Place { set: "uplinks".into(), key: vec![Atom::Device(name.clone())] });
    let nodes =
        facts.addresses.iter().filter(|ip| parts.contains(&Part::Base(Family::of(ip)))).map(|ip| {
            Place { set: format!("nodes{}", digit(Family::of(ip))), key: vec![Atom::Ip(*ip)] }
        });
    let listed_only = Protocol::ALL
        .into_iter()
        .filter(|_| facts.binds_services)
        .map(|protocol| Place { set: "listed_only".into(), key: vec![Atom::Protocol(protocol)] });
    uplinks.chain(listed_only).chain(nodes).collect()
}

/// How a device's name is written for nft (1.0.6), in whose JSON a string that begins with `@` names a
/// set, and one that ends in `*` is a prefix unless a backslash stands before it, when all backslashes
/// are dropped. `None` if it cannot be written. Strings have at most 15 bytes.
fn device_text(name: &str) -> Option<Cow<'_, str>> {
    let Some(stem) = name.strip_suffix('*') else {
        return (!name.starts_with('@')).then_some(Cow::Borrowed(name));
    };
    let escaped = !stem.starts_with('@') && !stem.contains('\\') && name.len() < 15;
    escaped.then(|| Cow::Owned(format!("{stem}\\*")))
}

/// Uplinks whose names nft does not take.
pub fn unwritable(facts: &NodeFacts) -> impl Iterator<Item = &String> {
    facts.uplinks.iter().filter(|name| device_text(name).is_none())
}

/// Makes the whole table anew with these parts, from records, oldest first; without parts it is removed.
#[must_use]
pub fn restore(records: &[&Record], parts: &BTreeSet<Part>, facts: &NodeFacts) -> String {
    let mut commands = vec![command(NfCmd::Add(table())), command(NfCmd::Delete(table()))];
    if !parts.is_empty() {
        commands.push(command(NfCmd::Add(table())));
        commands.extend(scaffold::commands(parts));
        commands.extend(elements(&fact_elements(fact_places(facts, parts)), Change::Add));
        commands.extend(difference(&Objects::default(), &Objects::of(records)));
    }
    document(commands)
}

/// From one state of some objects to another, in a table whose scaffold stays as it is; `facts` are
/// those that the table has and those that it should have.
#[must_use]
pub fn change(
    before: &Objects,
    after: &Objects,
    facts: Option<(&NodeFacts, &NodeFacts)>,
    parts: &BTreeSet<Part>,
) -> String {
    let mut commands = Vec::new();
    if let Some((old, new)) = facts {
        let (old, new) = (fact_places(old, parts), fact_places(new, parts));
        let only = |these: &[Place], those: &[Place]| {
            fact_elements(these.iter().filter(|place| !those.contains(place)).cloned().collect())
        };
        commands.extend(elements(&only(&old, &new), Change::Delete));
        commands.extend(elements(&only(&new, &old), Change::Add));
    }
    commands.extend(difference(before, after));
    document(commands)
}

fn fact_elements(places: Vec<Place>) -> Vec<(Place, Element)> {
    places
        .into_iter()
        .map(|place| (place, Element { data: Data::None, owner: String::new() }))
        .collect()
}

/// Takes rules away by their chains and handles, and goes from one state of some objects to another. Empty if
/// there is nothing to be done.
#[must_use]
pub fn removal(rules: &[(String, u64)], before: &Objects, after: &Objects) -> String {
    let rule = |(chain, handle): &(String, u64)| json!({"delete": {"rule": {"family": "inet", "table": TABLE, "chain": chain, "handle": handle}}});
    let mut commands: Vec<Value> = rules.iter().map(rule).collect();
    commands.extend(difference(before, after));
    match commands.is_empty() {
        true => String::new(),
        false => document(commands),
    }
}

/// Element by element. An element that leads to a chain has an owner only for people: the chain's rules have
/// their own. Any other that another record goes on needing gets its name, which a lost record is found by.
fn difference(before: &Objects, after: &Objects) -> Vec<Value> {
    let missing_in = |these: &Objects, those: &Objects| -> Vec<(Place, Element)> {
        these
            .elements
            .iter()
            .filter(|(place, element)| {
                those.elements.get(*place).is_none_or(|other| {
                    let is_jump = matches!(element.data, Data::Jump(_));
                    other.data != element.data || !is_jump && other.owner != element.owner
                })
            })
            .map(|(place, element)| (place.clone(), element.clone()))
            .collect()
    };
    let mut commands = elements(&missing_in(before, after), Change::Delete);
    for (name, rules) in &after.chains {
        let known = before.chains.get(name);
        if known != Some(rules) {
            commands.extend(chain(name, rules, known.is_some()));
        }
    }
    commands.extend(elements(&missing_in(after, before), Change::Add));
    for name in before.chains.keys().filter(|name| !after.chains.contains_key(*name)) {
        commands.push(chain_command("delete", name));
    }
    commands
}

fn chain(name: &str, rules: &ChainRules, exists: bool) -> Vec<Value> {
    let mut commands = vec![chain_command(if exists { "flush" } else { "add" }, name)];
    commands
        .extend(rules.iter().map(|(statements, owner)| add_rule(name, json!(statements), owner)));
    commands
}

fn chain_command(verb: &str, name: &str) -> Value {
    json!({verb: {"chain": {"family": "inet", "table": TABLE, "name": name}}})
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Add,
    Delete,
}

/// One command for each set, in the order of the elements (which are sorted by set).
fn elements(list: &[(Place, Element)], change: Change) -> Vec<Value> {
    list.chunk_by(|(a, _), (b, _)| a.set == b.set)
        .filter_map(|chunk| {
            let (Place { set, .. }, _) = chunk.first()?;
            let object = NfListObject::Element(NftElement {
                family: NfFamily::INet,
                table: TABLE.into(),
                name: set.as_str().into(),
                elem: chunk
                    .iter()
                    .map(|(place, element)| expression(place, element, change))
                    .collect::<Vec<_>>()
                    .into(),
            });
            Some(command(match change {
                Change::Add => NfCmd::Add(object),
                Change::Delete => NfCmd::Delete(object),
            }))
        })
        .collect()
}

fn expression<'a>(place: &'a Place, element: &'a Element, change: Change) -> Expression<'a> {
    let mut atoms: Vec<Expression> = place
        .key
        .iter()
        .map(|atom| match atom {
            Atom::Ip(ip) => Expression::String(ip.to_string().into()),
            Atom::Protocol(protocol) => Expression::String(protocol.name().into()),
            Atom::Port(port) => Expression::Number(u32::from(*port)),
            Atom::Device(name) => Expression::String(device_text(name).unwrap_or_default()),
        })
        .collect();
    let key = if atoms.len() == 1 {
        atoms.swap_remove(0)
    } else {
        Expression::Named(NamedExpression::Concat(atoms))
    };
    if change == Change::Delete {
        return key;
    }
    let key = if element.owner.is_empty() {
        key
    } else {
        Expression::Named(NamedExpression::Elem(Elem {
            val: Box::new(key),
            comment: Some(element.owner.as_str().into()),
            ..Elem::default()
        }))
    };
    let data = match &element.data {
        Data::None => return key,
        Data::Ip(ip) => Expression::String(ip.to_string().into()),
        Data::Port(port) => Expression::Number(u32::from(*port)),
        Data::Jump(chain) => {
            Expression::Verdict(Verdict::Jump(JumpTarget { target: chain.as_str().into() }))
        }
    };
    Expression::List(vec![key, data])
}

fn document(commands: Vec<Value>) -> String {
    json!({ "nftables": commands }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_that_mean_something_else_to_nft() {
        for (name, written) in [
            ("eth0", Some("eth0")),
            ("a\\b", Some("a\\b")),
            ("a@b", Some("a@b")),
            ("*", Some("\\*")),
            ("a*b*", Some("a*b\\*")),
            ("abcdefghijklm*", Some("abcdefghijklm\\*")),
            ("abcdefghijklmn*", None),
            ("a\\*", None),
            ("@eth", None),
            ("@*", None),
        ] {
            assert_eq!(device_text(name).as_deref(), written, "{name}");
        }
    }
}
