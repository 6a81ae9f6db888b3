//! Network configurations that were once valid.

use std::path::Path;

use proptest::prelude::*;
use proptest::sample::Index;

/// JSON that may have a key twice, and text that is no JSON in place of a value.
#[derive(Debug, Clone)]
enum Json {
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    fn write(&self) -> String {
        let joined = |items: Vec<String>| items.join(",");
        match self {
            Json::Text(text) => text.clone(),
            Json::Array(items) => format!("[{}]", joined(items.iter().map(Json::write).collect())),
            Json::Object(members) => {
                let member = |(key, value): &(String, Json)| {
                    format!("{}:{}", serde_json::Value::from(key.as_str()), value.write())
                };
                format!("{{{}}}", joined(members.iter().map(member).collect()))
            }
        }
    }

    /// How many members and items there are, at every depth.
    fn slots(&self) -> usize {
        match self {
            Json::Text(_) => 0,
            Json::Array(items) => items.iter().map(|item| 1 + item.slots()).sum(),
            Json::Object(members) => members.iter().map(|(_, value)| 1 + value.slots()).sum(),
        }
    }

    /// Does something to the slot with this number.
    fn apply(&mut self, mut number: usize, change: &Change) -> bool {
        let count = match self {
            Json::Text(_) => 0,
            Json::Array(items) => items.len(),
            Json::Object(members) => members.len(),
        };
        for index in 0..count {
            if number == 0 {
                self.change(index, change);
                return true;
            }
            number -= 1;
            let child = match self {
                Json::Array(items) => &mut items[index],
                Json::Object(members) => &mut members[index].1,
                Json::Text(_) => return false,
            };
            let below = child.slots();
            if number < below {
                return child.apply(number, change);
            }
            number -= below;
        }
        false
    }

    fn change(&mut self, index: usize, change: &Change) {
        match (self, change) {
            (Json::Array(items), Change::Remove) => drop(items.remove(index)),
            (Json::Object(members), Change::Remove) => drop(members.remove(index)),
            (Json::Array(items), Change::Repeat) => items.push(items[index].clone()),
            (Json::Object(members), Change::Repeat) => members.push(members[index].clone()),
            (Json::Array(items), Change::Put(text)) => items[index] = Json::Text(text.clone()),
            (Json::Object(members), Change::Put(text)) => {
                members[index].1 = Json::Text(text.clone());
            }
            (Json::Array(items), Change::Wrap) => {
                items[index] = Json::Array(vec![items[index].clone()]);
            }
            (Json::Object(members), Change::Wrap) => {
                members[index].1 = Json::Object(vec![members[index].clone()]);
            }
            (Json::Object(members), Change::Case(bits)) => {
                let flipped = members[index]
                    .0
                    .chars()
                    .enumerate()
                    .map(|(at, c)| if bits >> (at % 64) & 1 == 1 { swap_case(c) } else { c });
                members[index].0 = flipped.collect();
            }
            (Json::Object(members), Change::Rename(name)) => members[index].0.clone_from(name),
            (_, Change::Case(_) | Change::Rename(_)) | (Json::Text(_), _) => {}
        }
    }
}

fn swap_case(c: char) -> char {
    if c.is_ascii_uppercase() { c.to_ascii_lowercase() } else { c.to_ascii_uppercase() }
}

#[derive(Debug, Clone)]
enum Change {
    Remove,
    Repeat,
    /// In place of the value, JSON or not.
    Put(String),
    Wrap,
    /// Upper and lower case of the key's letters, by bit.
    Case(u64),
    Rename(String),
}

/// A configuration, and what is done to its text.
#[derive(Debug, Clone)]
pub struct Mangled {
    members: Json,
    cut: Option<Index>,
    inserted: Option<(Index, String)>,
}

impl Mangled {
    /// The text with `stateDir` as its last member, which is the one that counts: no mangled one
    /// may lead to the machine's own records. For the same reason that part stays intact.
    pub fn text(&self, state_dir: &Path) -> Vec<u8> {
        let mut text = self.members.write().into_bytes();
        text.pop();
        if let Some((at, bytes)) = &self.inserted {
            let at = at.index(text.len().max(1)).min(text.len());
            text.splice(at..at, bytes.bytes());
        }
        let comma = if text.len() > 1 { "," } else { "" };
        let end = format!("{comma}\"stateDir\":\"{}\"}}", state_dir.display());
        text.extend_from_slice(end.as_bytes());
        if let Some(cut) = &self.cut {
            text.truncate(cut.index(text.len()));
        }
        text
    }
}

/// A valid configuration, with something to forward or without.
pub fn configuration(mappings: bool) -> Mangled {
    let list = match mappings {
        true => {
            r#"[{"hostPort":18080,"containerPort":80,"protocol":"tcp","hostIP":""},{"HostPort":18081,"ContainerPort":53,"Protocol":"UDP","HostIP":"127.0.0.1"}]"#
        }
        false => "[]",
    };
    let text = format!(
        r#"{{"cniVersion":"1.1.0","name":"n","type":"portmap","backend":"nftables","snat":true,"masqAll":false,"markMasqBit":13,"conditionsV4":[],"conflictPolicy":"takeover","capabilities":{{"portMappings":true}},"cni.dev/valid-attachments":[{{"containerID":"c1","ifname":"eth0"}}],"runtimeConfig":{{"portMappings":{list}}},"prevResult":{{"cniVersion":"1.0.0","interfaces":[{{"name":"lxc1","mac":"00:00:5e:00:53:01"}},{{"name":"eth0","sandbox":"/n"}}],"ips":[{{"address":"fd00:201::2/128","interface":1}},{{"address":"10.201.0.2/32","gateway":"10.201.0.1","interface":1}}],"routes":[{{"dst":"0.0.0.0/0"}}],"dns":{{}},"x":1.50}}}}"#
    );
    let members = read(&serde_json::from_str(&text).unwrap());
    Mangled { members, cut: None, inserted: None }
}

fn read(value: &serde_json::Value) -> Json {
    match value {
        serde_json::Value::Array(items) => Json::Array(items.iter().map(read).collect()),
        serde_json::Value::Object(members) => {
            Json::Object(members.iter().map(|(key, value)| (key.clone(), read(value))).collect())
        }
        other => Json::Text(other.to_string()),
    }
}

fn change() -> impl Strategy<Value = Change> {
    let values = [
        "null",
        "true",
        "0",
        "-1",
        "1.5",
        "1e400",
        "65535",
        "65536",
        "4294967296",
        "\"\"",
        "[]",
        "{}",
        "18446744073709551616",
        "-9223372036854775809",
        "123456789012345678901234567890",
        "\"80\"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"\u{1f980}\u{202e}\"",
        "\"::\"",
        "\"0.0.0.0\"",
        "\"::ffff:1.2.3.4\"",
        "\"10.0.0.2/33\"",
        "\"1.0.0\"",
        "\"0.2.0\"",
        "\"iptables\"",
        "\"auto\"",
        "\"sctp\"",
        "[[[[[[]]]]]]",
        "nul",
        "'x'",
        "",
        "[\"-s\",\"10.0.0.1\"]",
        "[\"ip\",\"saddr\"]",
        "{\"a\":1,\"a\":2}",
        "\t7\n",
        "\"deny\"",
        "false",
        "31",
    ];
    let names = [
        "cniVersion",
        "name",
        "prevResult",
        "runtimeConfig",
        "portMappings",
        "hostPort",
        "hostIP",
        "interface",
        "ips",
        "ip4",
        "ip6",
        "",
        "\u{1f980}",
        "\u{0}",
        "conditionsV6",
        "externalSetMarkChain",
        "cni.dev/attachments",
    ];
    prop_oneof![
        2 => Just(Change::Remove),
        1 => Just(Change::Repeat),
        4 => prop::sample::select(values.to_vec()).prop_map(|text| Change::Put(text.to_owned())),
        1 => any::<String>().prop_map(|text| Change::Put(serde_json::Value::from(text).to_string())),
        1 => any::<f64>().prop_map(|number| Change::Put(number.to_string())),
        1 => Just(Change::Wrap),
        2 => any::<u64>().prop_map(Change::Case),
        1 => prop::sample::select(names.to_vec()).prop_map(|name| Change::Rename(name.to_owned())),
    ]
}

/// A few changes to the structure, seldom to the text.
pub fn mangled() -> impl Strategy<Value = Mangled> {
    let piece = prop::sample::select(vec![
        "\"", "}", "{", "]", ",", "\\", "\u{0}", "\u{feff}", "/**/", " \r\n", "é",
    ]);
    (
        any::<bool>(),
        prop::collection::vec((any::<Index>(), change()), 0..5),
        prop::option::weighted(0.1, any::<Index>()),
        prop::option::weighted(0.1, (any::<Index>(), piece.prop_map(str::to_owned))),
    )
        .prop_map(|(mappings, changes, cut, inserted)| {
            let mut mangled = Mangled { cut, inserted, ..configuration(mappings) };
            for (slot, change) in changes {
                let slots = mangled.members.slots();
                if slots > 0 {
                    mangled.members.apply(slot.index(slots), &change);
                }
            }
            mangled
        })
}
