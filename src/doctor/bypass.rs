//! Rules of others that keep callers from hostPorts before rules would translate the packets: eBPF has
//! given these the pod's address and port by then.

use super::rules::{Base, Packet, passed_by, told_apart};
use super::{Area, Finding, some_of};
use crate::model::Family;

/// The first packet to a hostPort, as it comes in and as eBPF makes it.
#[derive(Debug, Clone)]
pub struct Sample {
    pub family: Family,
    pub before: Packet,
    pub after: Packet,
}

#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Base chains that packets meet before they are translated by rules.
    pub chains: Vec<Base>,
    /// Where such chains could not be looked for, and why.
    pub unread: Vec<(String, String)>,
    /// Devices that callers come in by.
    pub devices: Vec<String>,
    /// Of every hostPort that eBPF forwards.
    pub samples: Vec<Sample>,
}

const AREA: Area = Area::Firewall;
const CHECK: &str = "bypass";

/// None where eBPF forwards nothing.
#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        facts.chains.iter().filter_map(|chain| passed(facts, chain)).collect();
    findings.extend(facts.unread.iter().map(|(what, reason)| AREA.unread(CHECK, what, reason)));
    if findings.is_empty() && !facts.samples.is_empty() {
        findings.push(AREA.fine(CHECK, "eBPF passes no rule by that drops what is for hostPorts"));
    }
    findings
}

fn passed(facts: &Facts, chain: &Base) -> Option<Finding> {
    let place = &chain.place;
    let rules = match &chain.rules {
        Ok(rules) => rules,
        Err(reason) => return Some(AREA.unread(CHECK, &format!("the rules of {place}"), reason)),
    };
    let devices = told_apart(rules, &facts.devices);
    let mut found: Vec<(&str, Option<String>)> = Vec::new();
    for Sample { family, before, after } in &facts.samples {
        if chain.families.contains(family) {
            let passed = passed_by(rules, &chain.entry, chain.drops, &devices, [before, after]);
            found.extend(passed.into_iter().map(|rule| (before.who.as_str(), rule)));
        }
    }
    let (_, rule) = found.first()?;
    let mut names: Vec<&str> =
        found.iter().filter(|(_, other)| other == rule).map(|(who, _)| *who).collect();
    names.dedup();
    let whom = some_of(&names);
    Some(AREA.warning(
        CHECK,
        match rule {
            Some(rule) => format!("a rule of {place} drops what is for {whom}, and eBPF passes it by: {rule}"),
            None => format!("the policy of {place} drops what is for {whom}, and eBPF passes it by"),
        },
        "eBPF gives packets the pod's address and port before netfilter has them: whom this should keep out gets in, \
         while iptables and nftables translate after it",
        "drop what is for the pod's address and port instead, in a chain at the forward hook; or set \"backend\" to \
         \"nftables\" or \"iptables\", and start the pods again",
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use serde_json::{Value, json};

    use super::super::Severity;
    use super::super::rules::{Insert, drops, of_iptables, of_nft};
    use super::*;
    use crate::model::Protocol;

    fn sample(container_port: u16) -> Sample {
        let packet = |target: String, is_local| Packet {
            who: "tcp 8080 of default/web".into(),
            device: None,
            protocol: Protocol::Tcp,
            target: Some(target.parse().unwrap()),
            is_local,
            translated: false,
        };
        Sample {
            family: Family::V4,
            before: packet("192.0.2.1:8080".into(), true),
            after: packet(format!("10.88.0.2:{container_port}"), false),
        }
    }

    fn base(rules: &str) -> Base {
        Base {
            place: "chain PREROUTING of table raw".into(),
            families: vec![Family::V4],
            entry: "PREROUTING".into(),
            drops: drops(rules, "PREROUTING"),
            rules: Ok(of_iptables(rules)),
            insert: Insert::Iptables("iptables -t raw -I PREROUTING".into()),
        }
    }

    fn of(base: Base, container_port: u16) -> Finding {
        let facts = Facts {
            chains: vec![base],
            devices: vec!["eth0".into(), "cni0".into()],
            samples: vec![sample(container_port)],
            ..Facts::default()
        };
        findings(&facts).remove(0)
    }

    fn is_passed_by(rules: &str) -> bool {
        let text: String =
            rules.split("; ").map(|rule| format!("-A PREROUTING {rule}\n")).collect();
        of(base(&text), 80).severity == Severity::Warning
    }

    #[test]
    fn rules_about_the_host_port_are_passed_by() {
        for rules in [
            "-p tcp -m tcp --dport 8080 -j DROP",
            "-p tcp -m multiport --dports 22,8000:8999 -j DROP",
            "-d 192.0.2.1/32 -j DROP",
            "-m addrtype --dst-type LOCAL -j DROP",
            "! -d 10.88.0.0/16 -j DROP",
            // Of some callers, or by one device.
            "-s 203.0.113.0/24 -p tcp -m tcp --dport 8080 -j DROP",
            "! -s 203.0.113.0/24 -p tcp -m tcp --dport 8080 -j DROP",
            "-s 203.0.113.0/24 -j ACCEPT; -p tcp -m tcp --dport 8080 -j DROP",
            "-i cni0 -p tcp -m tcp --dport 8080 -j DROP",
            "-m set --match-set bad src -p tcp -m tcp --dport 8080 -j DROP",
            // What no longer comes to a rule, since it is accepted as the pod's.
            "-d 10.88.0.0/16 -j ACCEPT; -s 203.0.113.0/24 -j DROP",
        ] {
            assert!(is_passed_by(rules), "{rules}");
        }
    }

    #[test]
    fn rules_that_packets_meet_all_the_same_are_not() {
        for rules in [
            "-j ACCEPT",
            "-s 203.0.113.0/24 -j DROP",
            "-m set --match-set bad src -j DROP",
            "-p tcp -j DROP",
            "-i eth0 -j DROP",
            "-m rpfilter --invert -j DROP",
            "-p udp -m udp --dport 8080 -j DROP",
            "-p tcp -m tcp --dport 80 -j DROP",
            "-d 127.0.0.0/8 ! -i lo -j DROP",
            "-m conntrack --ctstate INVALID -p tcp -m tcp --dport 8080 -j DROP",
            "-p tcp -m tcp --dport 8080 -j ACCEPT; -p tcp -m tcp --dport 8080 -j DROP",
            "-p tcp -m tcp --dport 8080 -j LOG",
        ] {
            assert!(!is_passed_by(rules), "{rules}");
        }
        // The port stays what it is; the address does not.
        let of_port = "-A PREROUTING -p tcp -m tcp --dport 8080 -j DROP\n";
        assert_eq!(of(base(of_port), 8080).severity, Severity::Fine);
        let of_node = of_port.replace("-p tcp", "-m addrtype --dst-type LOCAL -p tcp");
        assert_eq!(of(base(&of_node), 8080).severity, Severity::Warning);
        // One that lets in what the pod's address may not.
        let policy = "-P PREROUTING DROP\n-A PREROUTING -d 192.0.2.1/32 -j ACCEPT\n";
        assert_eq!(of(base(policy), 80).severity, Severity::Fine);
    }

    #[test]
    fn the_rule_is_named_with_those_that_lead_to_it() {
        let rules = "-N BLOCK\n-A PREROUTING -m set --match-set bad src -j BLOCK\n\
                     -A PREROUTING -p tcp -m tcp --dport 8080 -j BLOCK\n-A BLOCK -j DROP\n";
        let found = of(base(rules), 80).found;
        assert!(
            found.contains("drops what is for tcp 8080 of default/web, and")
                && found.ends_with(": -p tcp -m tcp --dport 8080 -j BLOCK, then -j DROP"),
            "{found}"
        );
        let rules = "-P PREROUTING DROP\n-A PREROUTING -d 10.88.0.0/16 -j ACCEPT\n";
        let found = of(base(rules), 80).found;
        assert!(found.starts_with("the policy of chain PREROUTING of table raw drops"), "{found}");
    }

    #[test]
    fn rules_of_nft_about_the_host_port_are_passed_by() {
        let matching = |left: Value, right: Value| json!({"match": {"op": "==", "left": left, "right": right}});
        let port = matching(json!({"payload": {"protocol": "tcp", "field": "dport"}}), json!(8080));
        let local = |of: &str| {
            let fib = json!({"fib": {"result": "type", "flags": [of]}});
            matching(fib, json!("local"))
        };
        let other = json!({"payload": {"protocol": "ip6", "field": "saddr"}});
        for (conditions, severity) in [
            (vec![port.clone()], Severity::Warning),
            (vec![local("daddr")], Severity::Warning),
            (vec![local("daddr"), port.clone()], Severity::Warning),
            (vec![local("saddr")], Severity::Fine),
            (vec![matching(other, json!("fd00::1")), port], Severity::Fine),
        ] {
            let mut rule = conditions;
            rule.push(json!({"drop": null}));
            let objects = [json!({"rule": {"chain": "PREROUTING", "expr": rule}})];
            let chain = Base { rules: Ok(of_nft(&objects)), ..base("") };
            assert_eq!(of(chain, 80).severity, severity, "{rule:?}");
        }
    }

    #[test]
    fn nothing_is_said_where_ebpf_forwards_nothing_and_what_cannot_be_read_is() {
        assert!(findings(&Facts::default()).is_empty());
        let unread = Base { rules: Err("nft is not installed".into()), ..base("") };
        assert!(of(unread, 80).found.contains("could not be read: nft is not installed"));
        let of_other_family = Base { families: vec![Family::V6], ..base("-P PREROUTING DROP\n") };
        assert_eq!(of(of_other_family, 80).severity, Severity::Fine);
    }
}
