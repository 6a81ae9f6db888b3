//! Which map elements, set elements and chains follow from records. Pure.
//!
//! A claim without conditions is two map elements, address and port of its target (nft before 1.1
//! cannot read maps with concatenated data from JSON). A claim with conditions or a packet mark is an
//! element of a verdict map that leads to a chain; the chain has the rules of the claim's owners,
//! newest first, up to the first one without conditions, and falls back to the plain maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use crate::model::{Claim, Family, Forward, Protocol};
use crate::record::Record;

/// One component of a key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Atom {
    Ip(IpAddr),
    Protocol(Protocol),
    Port(u16),
    Device(String),
}

/// A place in a set or map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub set: String,
    pub key: Vec<Atom>,
}

impl Place {
    /// The key as nft writes it.
    #[must_use]
    pub fn key_text(&self) -> String {
        let text = |atom: &Atom| match atom {
            Atom::Ip(ip) => ip.to_string(),
            Atom::Protocol(protocol) => protocol.to_string(),
            Atom::Port(port) => port.to_string(),
            Atom::Device(name) => name.clone(),
        };
        self.key.iter().map(text).collect::<Vec<_>>().join(" . ")
    }
}

/// What a map has at a place; sets have nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Data {
    None,
    Ip(IpAddr),
    Port(u16),
    Jump(String),
}

/// An element, and whom it belongs to (its comment).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    pub data: Data,
    pub owner: String,
}

/// Rules of a chain: the statements of each, and whom it belongs to.
pub type ChainRules = Vec<(Vec<Value>, String)>;

/// Everything in the table that is not its scaffold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Objects {
    pub elements: BTreeMap<Place, Element>,
    pub chains: BTreeMap<String, ChainRules>,
}

/// A record with a claim, and where it leads.
struct Owner<'a> {
    record: &'a Record,
    target: SocketAddr,
}

/// Names of places and chains.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    pub places: BTreeSet<Place>,
    pub chains: BTreeSet<String>,
}

/// `4` or `6`, the last letter of set names.
#[must_use]
pub fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

impl Objects {
    /// The objects of all records together. `records` are oldest first.
    #[must_use]
    pub fn of(records: &[&Record]) -> Self {
        let mut objects = Objects::default();
        let mut claims: BTreeMap<Claim, Vec<Owner>> = BTreeMap::new();
        for (record, family) in
            records.iter().rev().flat_map(|record| Family::ALL.map(|family| (record, family)))
        {
            for Forward { claim, target } in record.forwards(family) {
                let owners = claims.entry(claim).or_default();
                // Of two mappings of one attachment to the same the first one counts.
                if owners.last().is_none_or(|last| !std::ptr::eq(last.record, *record)) {
                    owners.push(Owner { record, target });
                }
            }
        }
        for (claim, owners) in claims {
            objects.add_claim(&claim, &owners);
        }
        // Newest last: it becomes the owner of elements that several records need.
        for record in records {
            for family in Family::ALL {
                objects.add_masquerade(record, family);
            }
        }
        objects
    }

    /// The part of the objects that has these names.
    #[must_use]
    pub fn restricted_to(mut self, names: &Names) -> Self {
        self.elements.retain(|place, _| names.places.contains(place));
        self.chains.retain(|chain, _| names.chains.contains(chain));
        self
    }

    /// `owners` are newest first.
    fn add_claim(&mut self, claim: &Claim, owners: &[Owner]) {
        let places = ClaimPlaces::of(claim);
        let plain = owners.iter().position(|owner| !owner.record.needs_own_chains(claim.family));
        let own = owners.get(..plain.unwrap_or(owners.len())).unwrap_or_default();
        if let Some(newest) = own.first() {
            let rules = own.iter().flat_map(|owner| own_rules(owner, claim)).collect();
            self.chains.insert(places.chain.clone(), rules);
            let element = Element { data: Data::Jump(places.chain), owner: newest.record.owner() };
            self.elements.insert(places.own, element);
        }
        let Some(owner) = plain.and_then(|index| owners.get(index)) else {
            return;
        };
        let data = [
            (places.address, Data::Ip(owner.target.ip())),
            (places.port, Data::Port(owner.target.port())),
        ];
        for (place, data) in data {
            self.elements.insert(place, Element { data, owner: owner.record.owner() });
        }
    }

    fn add_masquerade(&mut self, record: &Record, family: Family) {
        let Some(network) = record.network(family).filter(|_| !record.options.no_snat) else {
            return;
        };
        let mut add = |set: String, key: Vec<Atom>| {
            self.elements
                .insert(Place { set, key }, Element { data: Data::None, owner: record.owner() });
        };
        let pod = Atom::Ip(network.ip());
        let digit = digit(family);
        for forward in record.forwards(family) {
            let key = vec![
                pod.clone(),
                Atom::Protocol(forward.claim.protocol),
                Atom::Port(forward.target.port()),
                Atom::Port(forward.claim.port),
            ];
            add(format!("flows{digit}"), key);
        }
        if record.options.mark_masq_bit.is_some() {
            return;
        }
        if record.options.masq_all {
            add(format!("all{digit}"), vec![pod]);
            return;
        }
        let prefix = network.prefix();
        add(format!("near{digit}_{prefix}"), vec![Atom::Ip(network.network()), pod.clone()]);
        if record.masquerades_neighbours(family) {
            add(format!("neighbours{digit}"), vec![pod]);
        }
    }
}

/// Every name that a record could have a part in, whoever else competes for it.
#[must_use]
pub fn names_of(record: &Record) -> Names {
    let alone = Objects::of(&[record]);
    let mut names = Names { places: alone.elements.into_keys().collect(), chains: BTreeSet::new() };
    for claim in record.claims() {
        let own = names_of_claim(&claim);
        names.chains.extend(own.chains);
        names.places.extend(own.places);
    }
    names
}

/// Everything by which packets to a claim find their way.
#[must_use]
pub fn names_of_claim(claim: &Claim) -> Names {
    let ClaimPlaces { address, port, own, chain } = ClaimPlaces::of(claim);
    Names { places: [address, port, own].into(), chains: [chain].into() }
}

/// Where a claim is written.
struct ClaimPlaces {
    address: Place,
    port: Place,
    own: Place,
    chain: String,
}

impl ClaimPlaces {
    fn of(claim: &Claim) -> Self {
        let digit = digit(claim.family);
        let (set, mut key, name) = match claim.address {
            Some(ip) => {
                (format!("ip{digit}"), vec![Atom::Ip(ip)], format!("ip{digit}_{}", identifier(ip)))
            }
            None => (format!("any{digit}"), Vec::new(), format!("any{digit}")),
        };
        key.extend([Atom::Protocol(claim.protocol), Atom::Port(claim.port)]);
        let place = |suffix: &str| Place { set: format!("{set}_{suffix}"), key: key.clone() };
        ClaimPlaces {
            address: place("addr"),
            port: place("port"),
            own: place("own"),
            chain: format!("{name}_{}_{}", claim.protocol, claim.port),
        }
    }
}

/// An address in the letters that nft allows in names.
fn identifier(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string().replace('.', "_"),
        IpAddr::V6(ip) => ip.octets().iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// The rules of one owner in a claim's chain: marking where the source must be masqueraded, then
/// the translation. Its conditions stand in front of each.
fn own_rules(owner: &Owner, claim: &Claim) -> ChainRules {
    let Owner { record, target } = owner;
    let Some(network) = record.network(claim.family) else {
        return Vec::new();
    };
    let conditions = match claim.family {
        Family::V4 => &record.statements_v4,
        Family::V6 => &record.statements_v6,
    };
    let rule = |statements: Vec<Value>| {
        (conditions.iter().cloned().chain(statements).collect(), record.owner())
    };
    let mut rules: ChainRules = Vec::new();
    if record.options.mark_masq_bit.is_some() && !record.options.no_snat {
        let mark = mark_statement(record.options.mark());
        for source in marked_sources(record, network) {
            rules.push(rule(source.into_iter().chain([mark.clone()]).collect()));
        }
    }
    let (family, ip) = (ip_name(claim.family), target.ip().to_string());
    rules.push(rule(vec![
        json!({"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": claim.protocol.name()}}),
        json!({"dnat": {"family": family, "addr": ip, "port": target.port()}}),
    ]));
    rules
}

/// Matches of the sources to be masqueraded; an empty one matches all.
fn marked_sources(record: &Record, network: IpNetwork) -> Vec<Vec<Value>> {
    if record.options.masq_all {
        return vec![Vec::new()];
    }
    let family = Family::of(&network.ip());
    let saddr = |addr: String, len: u8| {
        json!({"match": {
            "op": "==",
            "left": {"payload": {"protocol": ip_name(family), "field": "saddr"}},
            "right": {"prefix": {"addr": addr, "len": len}},
        }})
    };
    let mut sources = vec![vec![saddr(network.network().to_string(), network.prefix())]];
    if family == Family::V4 {
        sources.push(vec![saddr("127.0.0.0".into(), 8)]);
    }
    if record.masquerades_neighbours(family) {
        sources.push(from_pods().into());
    }
    sources
}

/// Matches packets that arrived over a device that does not lead out of the node. Packets of the
/// node itself arrived over none: the kernel reads its index as 0 and its name as an empty one,
/// which is no uplink's (old kernels end the rule instead).
#[must_use]
pub fn from_pods() -> [Value; 2] {
    [
        json!({"match": {"op": "!=", "left": {"meta": {"key": "iif"}}, "right": 0}}),
        json!({"match": {"op": "!=", "left": {"meta": {"key": "iifname"}}, "right": "@uplinks"}}),
    ]
}

fn mark_statement(mark: u32) -> Value {
    json!({"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"|": [{"meta": {"key": "mark"}}, mark]}}})
}

/// nft's name of a family's header.
#[must_use]
pub fn ip_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}
