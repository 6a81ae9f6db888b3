//! The table of upstream's nftables backend (1.6.0 and later), as nft lists it. All but [`table`] is pure.

pub mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use crate::backend::Leftover;
use crate::model::{Claim, Family, Forward, Protocol};

/// Its name, in the families ip and ip6.
pub const TABLE: &str = "cni_hostport";

/// The chains whose rules forward to containers. Each rule of one has a comment.
pub const HOST_PORTS: [&str; 2] = ["hostports", "hostip_hostports"];
/// All chains that have rules of containers.
pub const CHAINS: [&str; 3] = ["hostports", "hostip_hostports", "masquerading"];

/// A rule that upstream made for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub family: Family,
    pub chain: String,
    pub handle: u64,
    /// The rule's comment, which is the container ID alone. It does not tell networks apart, so rules of a
    /// whole network cannot be found.
    pub container_id: String,
    /// `None` of one that masquerades.
    pub forward: Option<Forward>,
}

impl Rule {
    /// What takes it away.
    #[must_use]
    pub fn removal(&self) -> Value {
        let family = super::objects::ip_name(self.family);
        json!({"delete": {"rule": {"family": family, "table": TABLE, "chain": self.chain, "handle": self.handle}}})
    }
}

/// The rules of containers in the table of a family.
#[must_use]
pub fn rules(family: Family, objects: &[Value]) -> Vec<Rule> {
    let rule = |object: &Value| {
        let rule = object.get("rule")?;
        Some(Rule {
            family,
            chain: rule.get("chain")?.as_str()?.to_owned(),
            handle: rule.get("handle")?.as_u64()?,
            container_id: rule.get("comment")?.as_str()?.to_owned(),
            forward: forward(rule, family),
        })
    };
    objects.iter().filter_map(rule).collect()
}

/// The containers that a family's rules forward to.
#[must_use]
pub fn leftovers(family: Family, rules: &[Rule]) -> Vec<Leftover> {
    let mut found: BTreeMap<&str, BTreeSet<Forward>> = BTreeMap::new();
    for rule in rules {
        if let Some(forward) = rule.forward {
            found.entry(&rule.container_id).or_default().insert(forward);
        }
    }
    found
        .into_iter()
        .map(|(container_id, forwards)| Leftover {
            place: "nftables".into(),
            object: format!("table {} {TABLE}", super::objects::ip_name(family)),
            network: String::new(),
            container_id: container_id.to_owned(),
            forwards,
        })
        .collect()
}

/// Which of the forwards that an attachment asks for its container has not got, in the field's terms.
#[must_use]
pub fn problems(wanted: &[Forward], found: &BTreeSet<Forward>) -> Vec<String> {
    let missing = wanted.iter().filter(|forward| !found.contains(forward));
    let describe = |forward: &Forward| {
        let table = format!("table {} {TABLE}", super::objects::ip_name(forward.claim.family));
        let instead = found.iter().find(|other| other.claim == forward.claim);
        let instead = instead.map_or("nothing".to_owned(), |other| other.target.to_string());
        format!("{forward} expected in {table}, found {instead}")
    };
    missing.map(describe).collect()
}

/// `ip daddr A tcp dport P dnat to T`, the first match only where a host address is given.
fn forward(rule: &Value, family: Family) -> Option<Forward> {
    let (mut address, mut port, mut target) = (None, None, None);
    for statement in rule.get("expr")?.as_array()? {
        if let Some(found) = statement.get("match") {
            if found.get("op").and_then(Value::as_str) != Some("==") {
                return None;
            }
            let payload = found.get("left")?.get("payload")?;
            let field = payload.get("field")?.as_str()?;
            let protocol = payload.get("protocol")?.as_str()?;
            match field {
                "daddr" => address = Some(found.get("right")?.as_str()?.parse::<IpAddr>().ok()?),
                "dport" => {
                    let number = u16::try_from(found.get("right")?.as_u64()?).ok()?;
                    port = Some((Protocol::parse(protocol)?, number));
                }
                _ => {}
            }
        } else if let Some(dnat) = statement.get("dnat") {
            let ip: IpAddr = dnat.get("addr")?.as_str()?.parse().ok()?;
            target = Some(SocketAddr::new(ip, u16::try_from(dnat.get("port")?.as_u64()?).ok()?));
        }
    }
    let (protocol, port) = port?;
    Some(Forward { claim: Claim { family, protocol, address, port }, target: target? })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_by_their_container() {
        let payload = |protocol: &str, field: &str, right: Value| json!({"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}});
        let dnat = json!({"dnat": {"addr": "10.0.0.2", "port": 80}});
        let rule = |expr: Value| json!({"rule": {"family": "ip", "chain": "hostports", "comment": "c1", "handle": 4, "expr": expr}});
        let objects = [
            json!({"table": {"family": "ip", "name": TABLE}}),
            rule(json!([payload("tcp", "dport", json!(8080)), dnat])),
            rule(json!([
                payload("ip", "daddr", json!("192.0.2.1")),
                payload("udp", "dport", json!(53)),
                dnat
            ])),
            rule(json!([payload("ip", "saddr", json!("10.0.0.2")), {"masquerade": null}])),
        ];
        let rules = rules(Family::V4, &objects);
        let masquerades: Vec<bool> = rules.iter().map(|rule| rule.forward.is_none()).collect();
        assert_eq!(masquerades, [false, false, true]);
        let found = leftovers(Family::V4, &rules);
        let texts: Vec<String> = found
            .iter()
            .flat_map(|one| {
                one.forwards.iter().map(|forward| format!("{} {forward}", one.container_id))
            })
            .collect();
        assert_eq!(
            texts,
            ["c1 tcp 0.0.0.0:8080 -> 10.0.0.2:80", "c1 udp 192.0.2.1:53 -> 10.0.0.2:80"]
        );

        let found = &found.first().unwrap().forwards;
        let [mut tcp, mut udp] = <[Forward; 2]>::try_from(Vec::from_iter(found.clone())).unwrap();
        assert_eq!(problems(&[tcp, udp], found), [""; 0]);
        tcp.target.set_port(81);
        udp.claim.address = None;
        assert_eq!(
            problems(&[tcp, udp], found),
            [
                "tcp 0.0.0.0:8080 -> 10.0.0.2:81 expected in table ip cni_hostport, found 10.0.0.2:80",
                "udp 0.0.0.0:53 -> 10.0.0.2:80 expected in table ip cni_hostport, found nothing",
            ]
        );
    }
}
