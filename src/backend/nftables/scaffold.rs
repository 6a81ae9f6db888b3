//! The table's fixed part: sets, chains and rules, as a function of which parts records need. Pure.
//!
//! ```text
//! prerouting, output (-99) ─ local destination ─► hostports: verdict maps, then maps, specific hostIP first
//! postrouting (99)         ─ translated by us  ─► masq4, masq6: sets keyed by the pod
//! guard (-300)               127.0.0.0/8 from outside is dropped while route_localnet is on
//! ```
//!
//! -99 is just after dstnat: at equal priority the chain that was registered last runs first (Linux
//! 6.18, `nf_hook_entries_grow`), so kube-proxy's Services would win or lose by chance. 99 is just
//! before srcnat, where main plugins masquerade their pods. nft 1.0.6 refuses the names of
//! priorities in the output hook, hence numbers.
//!
//! Every rule has a numbered comment. The comments of a chain, in order, say whether the scaffold is
//! whole; reading them costs microseconds, listing the table tens of milliseconds.

use std::borrow::Cow;
use std::collections::BTreeSet;

use nftables::schema::{Chain, NfCmd, NfListObject, NfObject, Set, SetType, SetTypeValue, Table};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::objects::{digit, from_pods, ip_name};
use crate::model::{Family, Protocol};
use crate::record::{Part, hex};

/// Our table, of family inet.
pub const TABLE: &str = "portmap";

/// A base chain: name, kind, hook, priority.
pub struct BaseChain {
    pub name: &'static str,
    pub kind: NfChainType,
    pub hook: NfHook,
    pub priority: i32,
}

/// The base chains of a table with these parts.
#[must_use]
pub fn base_chains(parts: &BTreeSet<Part>) -> Vec<BaseChain> {
    let nat = |name, hook, priority| BaseChain { name, kind: NfChainType::NAT, hook, priority };
    let mut chains = vec![
        nat("prerouting", NfHook::Prerouting, -99),
        nat("output", NfHook::Output, -99),
        nat("postrouting", NfHook::Postrouting, 99),
    ];
    if parts.contains(&Part::Guard) {
        let kind = NfChainType::Filter;
        chains.push(BaseChain { name: "guard", kind, hook: NfHook::Prerouting, priority: -300 });
    }
    chains
}

/// Each chain of the scaffold with its rules, in the order in which they can be made.
#[must_use]
pub fn chains(parts: &BTreeSet<Part>) -> Vec<(&'static str, Vec<Value>)> {
    let families: Vec<Family> =
        Family::ALL.into_iter().filter(|family| parts.contains(&Part::Base(*family))).collect();
    let mut hostports = Vec::new();
    if families.contains(&Family::V6) {
        // There is no route_localnet for IPv6: a translated connection to ::1 would be lost.
        hostports.push(json!([equal(payload("ip6", "daddr"), "::1"), {"return": null}]));
    }
    hostports.extend(families.iter().map(|family| leave_services(*family)));
    for specific in [true, false] {
        for family in &families {
            if parts.contains(&Part::OwnChains(*family)) {
                hostports.push(dispatch(*family, specific));
            }
            hostports.push(translate(*family, specific));
        }
    }
    let local = json!([
        {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": ["sctp", "tcp", "udp"]}}},
        {"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local"}},
        {"jump": {"target": "hostports"}},
    ]);
    let mut postrouting = Vec::new();
    let mut all: Vec<(&'static str, Vec<Value>)> = vec![("hostports", hostports)];
    for family in families {
        let name = match family {
            Family::V4 => "masq4",
            Family::V6 => "masq6",
        };
        postrouting.extend(masquerade_entry(family, name));
        all.push((name, masquerade(family, parts)));
    }
    all.extend([
        ("prerouting", vec![local.clone()]),
        ("output", vec![local]),
        ("postrouting", postrouting),
    ]);
    if parts.contains(&Part::Guard) {
        let drop = json!([
            {"match": {"op": "!=", "left": {"meta": {"key": "iifname"}}, "right": "lo"}},
            in_network(payload("ip", "daddr"), "127.0.0.0", 8),
            {"drop": null},
        ]);
        all.push(("guard", vec![drop]));
    }
    all
}

/// The comment of a chain's rule, counted from 0: its place, and a digest of its statements, so that
/// the scaffold of another version of this plugin is told from this one's.
#[must_use]
pub fn comment(chain: &str, index: usize, statements: &Value) -> String {
    let digest = hex(&Sha256::digest(statements.to_string()), 8);
    format!("{chain} {index} {digest}")
}

/// Whether a rule of the chain has a comment such as [`comment`] makes, of whatever version.
#[must_use]
pub fn is_comment(chain: &str, comment: &str) -> bool {
    let words: Vec<&str> = comment.split(' ').collect();
    matches!(words.as_slice(), [of, index, digest] if *of == chain
        && index.parse::<usize>().is_ok()
        && digest.len() == 8
        && digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Commands that make the scaffold in an empty table.
#[must_use]
pub fn commands(parts: &BTreeSet<Part>) -> Vec<Value> {
    let mut commands: Vec<Value> = sets(parts);
    let bases = base_chains(parts);
    let chains = chains(parts);
    for (name, _) in &chains {
        let base = bases.iter().find(|base| base.name == *name);
        commands.push(add(NfListObject::Chain(Chain {
            family: NfFamily::INet,
            table: TABLE.into(),
            name: (*name).into(),
            _type: base.map(|base| base.kind),
            hook: base.map(|base| base.hook),
            prio: base.map(|base| base.priority),
            policy: base.map(|_| NfChainPolicy::Accept),
            ..Chain::default()
        })));
    }
    for (name, rules) in chains {
        for (index, rule) in rules.into_iter().enumerate() {
            let comment = comment(name, index, &rule);
            commands.push(add_rule(name, rule, &comment));
        }
    }
    commands
}

/// A command that adds an object of the crate's schema.
#[must_use]
pub fn add(object: NfListObject) -> Value {
    command(NfCmd::Add(object))
}

/// A command as JSON. The schema's types hold nothing that cannot be written as JSON.
#[must_use]
pub fn command(command: NfCmd) -> Value {
    serde_json::to_value(NfObject::CmdObject(command)).unwrap_or_default()
}

/// The crate's statements are not used for rules: it lacks verdict maps and prints some operators
/// swapped.
#[must_use]
pub fn add_rule(chain: &str, statements: Value, comment: &str) -> Value {
    json!({"add": {"rule": {
        "family": "inet", "table": TABLE, "chain": chain, "comment": comment, "expr": statements,
    }}})
}

/// The table itself.
#[must_use]
pub fn table() -> NfListObject<'static> {
    NfListObject::Table(Table { family: NfFamily::INet, name: TABLE.into(), handle: None })
}

fn sets(parts: &BTreeSet<Part>) -> Vec<Value> {
    use SetType::{Ifname, InetProto, InetService, Ipv4Addr, Ipv6Addr};
    let mut commands = vec![set("uplinks", &[Ifname]), set("listed_only", &[InetProto])];
    for part in parts {
        let (Part::Base(family)
        | Part::OwnChains(family)
        | Part::Near(family, _)
        | Part::Neighbours(family)) = part
        else {
            continue;
        };
        let digit = digit(*family);
        let ip = match family {
            Family::V4 => Ipv4Addr,
            Family::V6 => Ipv6Addr,
        };
        match part {
            Part::Base(_) => {
                for (prefix, key) in [
                    ("any", vec![InetProto, InetService]),
                    ("ip", vec![ip, InetProto, InetService]),
                ] {
                    commands.push(map(&format!("{prefix}{digit}_addr"), &key, ip));
                    commands.push(map(&format!("{prefix}{digit}_port"), &key, InetService));
                }
                commands.push(set(
                    &format!("flows{digit}"),
                    &[ip, InetProto, InetService, InetService],
                ));
                commands.push(set(&format!("all{digit}"), &[ip]));
                commands.push(set(&format!("nodes{digit}"), &[ip]));
            }
            Part::OwnChains(_) => {
                for (prefix, key) in [
                    ("any", vec![InetProto, InetService]),
                    ("ip", vec![ip, InetProto, InetService]),
                ] {
                    commands.push(json!({"add": {"map": {
                        "family": "inet", "table": TABLE, "name": format!("{prefix}{digit}_own"),
                        "type": key, "map": "verdict",
                    }}}));
                }
            }
            Part::Near(_, prefix) => {
                commands.push(set(&format!("near{digit}_{prefix}"), &[ip, ip]))
            }
            Part::Neighbours(_) => commands.push(set(&format!("neighbours{digit}"), &[ip])),
            Part::Mark(..) | Part::Guard => {}
        }
    }
    commands
}

fn set(name: &str, key: &[SetType]) -> Value {
    add(NfListObject::Set(Box::new(Set {
        family: NfFamily::INet,
        table: TABLE.into(),
        name: name.to_owned().into(),
        set_type: set_type(key),
        ..Set::default()
    })))
}

fn map(name: &str, key: &[SetType], data: SetType) -> Value {
    add(NfListObject::Map(Box::new(nftables::schema::Map {
        family: NfFamily::INet,
        table: TABLE.into(),
        name: name.to_owned().into(),
        set_type: set_type(key),
        map: SetTypeValue::Single(data),
        ..nftables::schema::Map::default()
    })))
}

fn set_type(key: &[SetType]) -> SetTypeValue<'static> {
    match key {
        [single] => SetTypeValue::Single(*single),
        several => SetTypeValue::Concatenated(Cow::Owned(several.to_vec())),
    }
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn equal(left: Value, right: &str) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn in_network(left: Value, addr: &str, len: u8) -> Value {
    json!({"match": {"op": "==", "left": left, "right": {"prefix": {"addr": addr, "len": len}}}})
}

/// Key of a claim: `[daddr .] l4proto . dport`.
fn claim_key(family: Family, specific: bool) -> Value {
    let mut key = vec![json!({"meta": {"key": "l4proto"}}), payload("th", "dport")];
    if specific {
        key.insert(0, payload(ip_name(family), "daddr"));
    }
    json!({"concat": key})
}

fn set_prefix(family: Family, specific: bool) -> String {
    format!("{}{}", if specific { "ip" } else { "any" }, digit(family))
}

fn dispatch(family: Family, specific: bool) -> Value {
    let map = format!("@{}_own", set_prefix(family, specific));
    json!([of_family(family), {"vmap": {"key": claim_key(family, specific), "data": map}}])
}

fn translate(family: Family, specific: bool) -> Value {
    let prefix = set_prefix(family, specific);
    let lookup = |suffix: &str| json!({"map": {"key": claim_key(family, specific), "data": format!("@{prefix}_{suffix}")}});
    json!([of_family(family), {"dnat": {"family": ip_name(family), "addr": lookup("addr"), "port": lookup("port")}}])
}

fn of_family(family: Family) -> Value {
    let name = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    equal(json!({"meta": {"key": "nfproto"}}), name)
}

/// Services' addresses are local to the kernel where they are bound to a device of the node, and kube-proxy's
/// ACCEPT for them ends no chain but its own. Set `listed_only` has every protocol then, otherwise none.
fn leave_services(family: Family) -> Value {
    let daddr = || payload(ip_name(family), "daddr");
    let unlike = |right: Value| json!({"match": {"op": "!=", "left": daddr(), "right": right}});
    let mut statements = vec![
        of_family(family),
        equal(json!({"meta": {"key": "l4proto"}}), "@listed_only"),
        unlike(json!(format!("@nodes{}", digit(family)))),
    ];
    // What no list of the node's addresses has, and no Service.
    let (addr, len) = match family {
        Family::V4 => ("127.0.0.0", 8),
        Family::V6 => ("fe80::", 10),
    };
    statements.push(unlike(json!({"prefix": {"addr": addr, "len": len}})));
    statements.push(json!({"return": null}));
    Value::Array(statements)
}

/// From postrouting to the masquerade chain: connections that were translated from a node address to
/// a mapped port of a pod, on that mapping's hostPort. A Service's connection to the same port of the
/// pod had another address (its own) or another port (a NodePort).
fn masquerade_entry(family: Family, chain: &str) -> Vec<Value> {
    let (ip, digit) = (ip_name(family), digit(family));
    let translated =
        json!({"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}});
    let to_node = json!({"match": {
        "op": "==",
        "left": {"ct": {"key": format!("{ip} daddr"), "dir": "original"}},
        "right": format!("@nodes{digit}"),
    }});
    let from_loopback = in_network(payload(ip, "saddr"), "127.0.0.0", 8);
    let mut rules = Vec::new();
    // The original port has a type only where the protocol is known (nft 1.0.6): a rule for each.
    for protocol in [Protocol::Sctp, Protocol::Tcp, Protocol::Udp] {
        let protocol = equal(json!({"meta": {"key": "l4proto"}}), protocol.name());
        let flow = json!({"match": {
            "op": "==",
            "left": {"concat": [
                payload(ip, "daddr"), {"meta": {"key": "l4proto"}}, payload("th", "dport"),
                {"ct": {"key": "proto-dst", "dir": "original"}},
            ]},
            "right": format!("@flows{digit}"),
        }});
        if family == Family::V4 {
            let masquerade = json!({"masquerade": null});
            rules.push(json!([protocol, translated, from_loopback, flow, masquerade]));
        }
        rules.push(json!([protocol, translated, to_node, flow, {"jump": {"target": chain}}]));
    }
    rules
}

fn masquerade(family: Family, parts: &BTreeSet<Part>) -> Vec<Value> {
    let (ip, digit) = (ip_name(family), digit(family));
    let pod = payload(ip, "daddr");
    let mut rules =
        vec![json!([equal(pod.clone(), &format!("@all{digit}")), {"masquerade": null}])];
    for part in parts {
        match *part {
            Part::Near(of, prefix) if of == family => {
                let mut source = payload(ip, "saddr");
                if prefix < family.max_prefix() {
                    source = json!({"&": [source, mask(family, prefix)]});
                }
                rules.push(json!([
                    {"match": {"op": "==", "left": {"concat": [source, pod]}, "right": format!("@near{digit}_{prefix}")}},
                    {"masquerade": null},
                ]));
            }
            Part::Neighbours(of) if of == family => {
                let pods = equal(pod.clone(), &format!("@neighbours{digit}"));
                let [received, inside] = from_pods();
                rules.push(json!([received, inside, pods, {"masquerade": null}]));
            }
            Part::Mark(of, bit) if of == family => {
                let mark = 1_u32 << bit;
                rules.push(json!([
                    {"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, mark]}, "right": mark}},
                    {"masquerade": null},
                ]));
            }
            _ => {}
        }
    }
    rules
}

/// A prefix length as an address.
fn mask(family: Family, prefix: u8) -> String {
    match family {
        Family::V4 => {
            let bits = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            std::net::Ipv4Addr::from_bits(bits).to_string()
        }
        Family::V6 => {
            let bits = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            std::net::Ipv6Addr::from_bits(bits).to_string()
        }
    }
}
