//! Rules as `nft -j list table` has them.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::{Chains, Condition, End, Of, Rule};

/// Reads the objects of `nft -j list table`.
#[must_use]
pub fn of_nft(objects: &[Value]) -> Chains {
    let mut chains = Chains::new();
    for object in objects {
        if let Some(name) = object.pointer("/chain/name").and_then(Value::as_str) {
            chains.entry(name.to_owned()).or_default();
        }
        let Some(rule) = object.get("rule") else { continue };
        let chain = rule.get("chain").and_then(Value::as_str).unwrap_or_default();
        let statements = rule.get("expr").and_then(Value::as_array).cloned().unwrap_or_default();
        chains.entry(chain.to_owned()).or_default().push(of_statements(&statements));
    }
    chains
}

fn of_statements(statements: &[Value]) -> Rule {
    let text = Value::from(statements.to_vec()).to_string();
    let mut rule = Rule { conditions: Vec::new(), end: End::Next, text };
    for statement in statements {
        let Some((key, value)) = statement.as_object().and_then(|object| object.iter().next())
        else {
            rule.conditions.push(Condition { negated: false, of: Of::Unknown });
            continue;
        };
        let target = || value.get("target").and_then(Value::as_str).unwrap_or_default().to_owned();
        match key.as_str() {
            "accept" => rule.end = End::Accept,
            "drop" | "reject" => rule.end = End::Drop,
            "return" => rule.end = End::Return,
            "jump" => rule.end = End::Jump(target()),
            "goto" => rule.end = End::Goto(target()),
            "match" => rule.conditions.extend(of_match(value)),
            "queue" => {
                // A program decides.
                rule.conditions.push(Condition { negated: false, of: Of::Unknown });
                rule.end = End::Accept;
            }
            "vmap" => rule.end = of_verdicts(value, &mut rule.conditions),
            "counter" | "log" | "mangle" | "notrack" | "comment" => {}
            _ => rule.conditions.push(Condition { negated: false, of: Of::Unknown }),
        }
    }
    rule
}

fn of_match(value: &Value) -> Vec<Condition> {
    let operator = value.get("op").and_then(Value::as_str).unwrap_or("==");
    let key = |kind: &str, field: &str| {
        value.pointer(&format!("/left/{kind}/{field}")).and_then(Value::as_str)
    };
    let mut conditions = Vec::new();
    // A port's match implies one on its protocol, which nft does not list and `!=` does not negate. `th` has none.
    if let (Some("dport"), Some(protocol)) = (key("payload", "field"), key("payload", "protocol"))
        && protocol != "th"
    {
        let of = Of::Protocol(vec![protocol.to_owned()]);
        conditions.push(Condition { negated: false, of });
    }
    let right = value.get("right").unwrap_or(&Value::Null);
    let of = match (key("meta", "key"), key("payload", "field"), key("ct", "key")) {
        _ if !["==", "!=", "in"].contains(&operator) => None,
        (Some("iifname" | "iif"), ..) => strings(right).map(Of::In),
        (Some("oifname" | "oif"), ..) => strings(right).map(Of::Out),
        (Some("l4proto"), ..) | (_, Some("protocol" | "nexthdr"), _) => {
            strings(right).map(Of::Protocol)
        }
        (_, Some("saddr"), _) => addresses(right).map(Of::Source),
        (_, Some("daddr"), _) => addresses(right).map(Of::Destination),
        (_, Some("dport"), _) => ports(right).map(Of::Port),
        (_, _, Some("state" | "status")) => strings(right).map(Of::State),
        _ if is_type_of_destination(value) => (right == "local").then_some(Of::Local),
        _ => None,
    };
    conditions.push(Condition { negated: operator == "!=", of: of.unwrap_or(Of::Unknown) });
    conditions
}

/// `fib daddr type`.
fn is_type_of_destination(value: &Value) -> bool {
    let part = |name: &str| value.pointer(&format!("/left/fib/{name}"));
    let flags = part("flags").map(items);
    part("result").is_some_and(|result| result == "type")
        && flags.is_some_and(|flags| flags.iter().eq(["daddr"]))
}

/// A map from a key to verdicts: of the state of a connection that of new ones counts.
fn of_verdicts(value: &Value, conditions: &mut Vec<Condition>) -> End {
    let entries = value.pointer("/data/set").and_then(Value::as_array).cloned().unwrap_or_default();
    if value.pointer("/key/ct/key").and_then(Value::as_str) == Some("state") {
        let new = entries.iter().find_map(|entry| {
            let pair = entry.as_array()?;
            (pair.first()?.as_str() == Some("new")).then(|| pair.get(1).cloned())?
        });
        return new.map_or(End::Next, |verdict| of_statements(&[verdict]).end);
    }
    conditions.push(Condition { negated: false, of: Of::Unknown });
    End::Accept
}

/// One value, or those of an anonymous set.
fn items(right: &Value) -> Vec<Value> {
    match right.get("set").unwrap_or(right) {
        Value::Array(items) => items.clone(),
        one => vec![one.clone()],
    }
}

fn strings(right: &Value) -> Option<Vec<String>> {
    items(right)
        .iter()
        .map(|item| match item {
            Value::String(text) if !text.starts_with('@') => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        })
        .collect()
}

fn addresses(right: &Value) -> Option<Vec<IpNetwork>> {
    items(right)
        .iter()
        .map(|item| match item.get("prefix") {
            Some(prefix) => {
                let ip: IpAddr = prefix.get("addr")?.as_str()?.parse().ok()?;
                IpNetwork::new(ip, prefix.get("len")?.as_u64()?.try_into().ok()?).ok()
            }
            None => item.as_str()?.parse().ok(),
        })
        .collect()
}

fn ports(right: &Value) -> Option<Vec<(u16, u16)>> {
    let port = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    items(right)
        .iter()
        .map(|item| match item.get("range").and_then(Value::as_array) {
            Some(range) => Some((port(range.first()?)?, port(range.get(1)?)?)),
            None => port(item).map(|port| (port, port)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::samples::{ETH0, packet};
    use super::super::{Fate, fate};
    use super::*;

    fn nft(rules: &[Value]) -> Fate {
        let mut objects = vec![json!({"chain": {"name": "forward"}})];
        let rule = |expr: &Value| json!({"rule": {"chain": "forward", "expr": expr}});
        objects.extend(rules.iter().map(rule));
        objects.push(json!({"rule": {"chain": "sub", "expr": [{"accept": null}]}}));
        fate(&of_nft(&objects), "forward", true, &ETH0, &packet())
    }

    #[test]
    fn rules_of_nft_as_they_act_on_a_new_connection() {
        let matching = |left: Value, right: Value| json!({"match": {"op": "==", "left": left, "right": right}});
        let accept = json!({"accept": null});
        let meta = |key: &str| json!({"meta": {"key": key}});
        let ct = |key: &str| json!({"ct": {"key": key}});
        let field = |field: &str| json!({"payload": {"protocol": "ip", "field": field}});
        let port = |protocol: &str| json!({"payload": {"protocol": protocol, "field": "dport"}});
        for condition in [
            matching(meta("oifname"), json!({"set": ["docker0", "cni0"]})),
            matching(ct("status"), json!("dnat")),
            matching(ct("state"), json!(["established", "new"])),
            matching(field("daddr"), json!({"prefix": {"addr": "10.88.0.0", "len": 16}})),
            matching(port("tcp"), json!({"range": [70, 90]})),
            matching(port("th"), json!(80)),
            json!({"match": {"op": "!=", "left": port("tcp"), "right": 53}}),
        ] {
            assert_eq!(
                nft(&[json!([condition, {"counter": null}, accept])]),
                Fate::Accepted,
                "{condition}"
            );
        }
        for condition in [
            matching(meta("oifname"), json!("docker0")),
            matching(ct("state"), json!(["established", "related"])),
            matching(field("saddr"), json!("10.88.0.2")),
            matching(port("tcp"), json!(8080)),
            matching(port("udp"), json!(80)),
            json!({"match": {"op": "!=", "left": port("udp"), "right": 53}}),
        ] {
            assert_eq!(nft(&[json!([condition, accept])]), Fate::Dropped(None), "{condition}");
        }
        let set = matching(field("daddr"), json!("@pods"));
        assert!(matches!(nft(&[json!([set, accept])]), Fate::Unknown(_)));
        assert_eq!(nft(&[json!([{"jump": {"target": "sub"}}])]), Fate::Accepted);
        let states = |new: Value| {
            json!([{"vmap": {"key": {"ct": {"key": "state"}},
            "data": {"set": [["established", {"accept": null}], ["new", new]]}}}])
        };
        assert_eq!(nft(&[states(json!({"accept": null}))]), Fate::Accepted);
        assert!(matches!(nft(&[states(json!({"drop": null}))]), Fate::Dropped(Some(_))));
        let above = json!({"match": {"op": ">=", "left": port("tcp"), "right": 80}});
        assert!(matches!(nft(&[json!([above, accept])]), Fate::Unknown(_)));
        let other =
            matching(json!({"payload": {"protocol": "ip6", "field": "daddr"}}), json!("fd00::1"));
        let but_other =
            json!({"match": {"op": "!=", "left": other["match"]["left"], "right": "fd00::1"}});
        assert_eq!(nft(&[json!([but_other, {"drop": null}])]), Fate::Dropped(None));
        assert!(matches!(nft(&[json!([{"queue": {"num": 0}}])]), Fate::Unknown(_)));
    }
}
