//! Rules of others that keep hostPorts from working: two variants of iptables at once, and chains
//! that drop what is forwarded.

use super::rules::{Base, Fate, Insert, Packet, fate, told_apart};
use super::{Area, Finding, Told, count, some_of};
use crate::model::Family;

/// A packet, and the family it is of.
pub type Sample = (Family, Packet);

#[derive(Debug, Clone)]
pub struct Facts {
    /// How many entries the tables nat and filter of iptables-legacy have beyond their base chains.
    pub legacy: Told<usize>,
    /// How many rules those of iptables-nft have.
    pub nft: Told<usize>,
    /// The variant behind `iptables` in PATH, if there is one.
    pub used: Option<&'static str>,
    /// Base chains at the forward hook.
    pub chains: Vec<Base>,
    /// Where such chains could not be looked for, and why.
    pub unread: Vec<(String, String)>,
    /// Devices that callers from outside come in by.
    pub uplinks: Vec<String>,
    /// First packets to every hostPort there is; without any, to pods that may come.
    pub samples: Vec<Sample>,
    /// Whether the samples are of pods that are there.
    pub real: bool,
}

const AREA: Area = Area::Firewall;

#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![variants(facts)];
    findings.extend(facts.chains.iter().filter_map(|chain| forward(facts, chain)));
    findings.extend(facts.unread.iter().map(|(what, reason)| AREA.unread("forward", what, reason)));
    if findings.len() == 1 {
        findings.push(AREA.fine("forward", "no chain drops what is forwarded to hostPorts"));
    }
    findings
}

fn variants(facts: &Facts) -> Finding {
    const CHECK: &str = "variants";
    match (&facts.legacy, &facts.nft) {
        (Err(reason), _) => AREA.unread(CHECK, "the tables of iptables-legacy", reason),
        (_, Err(reason)) => AREA.unread(CHECK, "the tables of iptables-nft", reason),
        (Ok(0), Ok(0)) => AREA.fine(CHECK, "there are no iptables rules"),
        (Ok(_), Ok(0)) => AREA.fine(CHECK, "all iptables rules are those of iptables-legacy"),
        (Ok(0), Ok(_)) => AREA.fine(CHECK, "all iptables rules are those of iptables-nft"),
        (Ok(legacy), Ok(nft)) => AREA.warning(
            CHECK,
            format!(
                "iptables-legacy has {} and iptables-nft {} in tables nat and filter",
                count(*legacy, "entry", "entries"),
                count(*nft, "rule", "rules")
            ),
            format!(
                "the kernel obeys both, and the tools of one do not show the other's: which Service or hostPort wins is \
                 chance{}",
                facts.used.map(|used| format!("; PATH leads to {used}")).unwrap_or_default()
            ),
            "iptables-legacy-save; iptables-nft-save; then have all of them use one, on Debian by \
             update-alternatives --config iptables, and reboot",
        ),
    }
}

/// `None` of a chain that lets through what its rules say nothing of, and has none against hostPorts.
fn forward(facts: &Facts, chain: &Base) -> Option<Finding> {
    const CHECK: &str = "forward";
    let place = &chain.place;
    let rules = match &chain.rules {
        Ok(rules) => rules,
        Err(reason) if !chain.drops => {
            return Some(AREA.unread(CHECK, &format!("the rules of {place}"), reason));
        }
        Err(reason) => {
            return Some(AREA.warning(
                CHECK,
                format!(
                    "the policy of {place} is to drop, and its rules could not be read: {reason}"
                ),
                "unless one of them accepts hostPort traffic, nobody outside reaches a pod",
                accept_translated(&chain.insert),
            ));
        }
    };
    let uplinks = told_apart(rules, &facts.uplinks);
    let fates: Vec<(&Packet, Fate)> = facts
        .samples
        .iter()
        .filter(|(family, _)| chain.families.contains(family))
        .map(|(_, packet)| (packet, fate(rules, &chain.entry, chain.drops, &uplinks, packet)))
        .collect();
    let dropped: Vec<(&Packet, Option<&str>)> = fates
        .iter()
        .filter_map(|(packet, fate)| match fate {
            Fate::Dropped(rule) => Some((*packet, rule.as_deref())),
            _ => None,
        })
        .collect();
    let all_dropped = dropped.len() == fates.len();
    // A pod to come need not be behind every device.
    if let Some((first, rule)) = dropped.first().filter(|_| facts.real || all_dropped) {
        let alike = dropped.iter().filter(|(_, other)| other == rule);
        let mut names: Vec<&str> = alike.map(|(packet, _)| packet.who.as_str()).collect();
        names.dedup();
        let whom = match facts.real {
            true => some_of(&names),
            false => "pods that come".to_owned(),
        };
        return Some(AREA.warning(
            CHECK,
            match rule {
                Some(rule) => format!("a rule of {place} drops packets to {whom}: {rule}"),
                None => format!("the policy of {place} is to drop, and no rule of it accepts packets to {whom}"),
            },
            "a hostPort is forwarded to its pod, so that nobody outside of the node reaches it; the node itself does",
            match (first.translated, &first.device) {
                (false, Some(device)) => accept_device(&chain.insert, device),
                _ => accept_translated(&chain.insert),
            },
        ));
    }
    if !chain.drops {
        return None;
    }
    let doubt = fates.iter().find_map(|(_, fate)| match fate {
        Fate::Unknown(rule) => Some(rule),
        _ => None,
    });
    let then = match doubt {
        _ if fates.is_empty() => "no hostPort leads to an address of its family".to_owned(),
        Some(rule) => format!(
            "whether hostPort traffic is accepted depends on a rule of a kind that is not followed here: {rule}"
        ),
        None => "a rule accepts hostPort traffic".to_owned(),
    };
    let and = if doubt.is_some() { ";" } else { ", and" };
    Some(AREA.fine(CHECK, format!("the policy of {place} is to drop{and} {then}")))
}

/// The command that lets through what rules have translated.
fn accept_translated(insert: &Insert) -> String {
    match insert {
        Insert::Iptables(insert) => format!("{insert} -m conntrack --ctstate DNAT -j ACCEPT"),
        Insert::Nft(insert) => format!("{insert} ct status dnat accept"),
    }
}

/// The command that lets through what goes to a device, and its answers.
fn accept_device(insert: &Insert, device: &str) -> String {
    match insert {
        Insert::Iptables(insert) => {
            format!("{insert} -o {device} -j ACCEPT; {insert} -i {device} -j ACCEPT")
        }
        Insert::Nft(insert) => {
            format!("{insert} oifname {device} accept; {insert} iifname {device} accept")
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::super::Severity;
    use super::super::rules::of_iptables;
    use super::*;
    use crate::model::Protocol;

    const ACCEPT: &str = "iptables -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT";

    fn facts(rules: &str, real: bool, translated: bool) -> Facts {
        let chain = Base {
            place: "chain FORWARD".into(),
            families: vec![Family::V4],
            entry: "FORWARD".into(),
            drops: true,
            rules: Ok(of_iptables(rules)),
            insert: Insert::Iptables("iptables -I FORWARD".into()),
        };
        let packet = |device: &str| Packet {
            who: "tcp 8080 of default/web".into(),
            device: Some(device.into()),
            protocol: Protocol::Tcp,
            target: real.then(|| "10.0.0.2:80".parse().unwrap()),
            is_local: false,
            translated,
        };
        Facts {
            legacy: Ok(0),
            nft: Ok(3),
            used: None,
            chains: vec![chain],
            unread: Vec::new(),
            uplinks: vec!["eth0".into()],
            samples: ["cni0", "veth1"].map(|device| (Family::V4, packet(device))).into(),
            real,
        }
    }

    fn forward(facts: &Facts) -> Finding {
        findings(facts).remove(1)
    }

    #[test]
    fn both_variants_at_once_are_a_warning() {
        let mut facts = facts("", true, true);
        assert_eq!(findings(&facts)[0].severity, Severity::Fine);
        facts.legacy = Ok(1);
        facts.used = Some("iptables-nft");
        let found = &findings(&facts)[0];
        assert_eq!((found.check, found.severity), ("variants", Severity::Warning));
        assert!(found.found.contains("1 entry and iptables-nft 3 rules"), "{found:?}");
        facts.legacy = Err("no rights".into());
        assert_eq!(findings(&facts)[0].severity, Severity::Warning);
    }

    #[test]
    fn a_chain_that_drops_every_or_some_hostport() {
        let none = forward(&facts("", true, true));
        assert_eq!((none.severity, none.fix.as_str()), (Severity::Warning, ACCEPT));
        assert!(none.found.ends_with("accepts packets to tcp 8080 of default/web"), "{none:?}");
        let one = "-A FORWARD -o cni0 -j ACCEPT\n";
        assert_eq!(forward(&facts(one, true, true)).severity, Severity::Warning);
        // A pod to come may well be behind that device.
        assert_eq!(forward(&facts(one, false, true)).severity, Severity::Fine);
        assert_eq!(forward(&facts("", false, true)).severity, Severity::Warning);
        assert_eq!(
            forward(&facts("", true, false)).fix,
            "iptables -I FORWARD -o cni0 -j ACCEPT; iptables -I FORWARD -i cni0 -j ACCEPT"
        );
        let translated = "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n";
        assert_eq!(forward(&facts(translated, true, true)).severity, Severity::Fine);
        let unknown = "-A FORWARD -m set --match-set a dst -j ACCEPT\n";
        assert!(forward(&facts(unknown, true, true)).found.contains("--match-set a dst"));
    }

    #[test]
    fn a_rule_that_drops_is_named_and_another_family_is_no_pod_s() {
        let mut facts = facts("-A FORWARD -j REJECT\n", true, true);
        facts.chains[0].drops = false;
        let found = forward(&facts);
        assert_eq!((found.severity, found.fix.as_str()), (Severity::Warning, ACCEPT));
        let end = "drops packets to tcp 8080 of default/web: -j REJECT";
        assert!(found.found.ends_with(end), "{found:?}");
        facts.chains[0].rules = Ok(of_iptables("-A FORWARD -i eth1 -j REJECT\n"));
        assert_eq!(forward(&facts).found, "no chain drops what is forwarded to hostPorts");
        facts.chains[0].rules = Err("nft is not installed".into());
        assert_eq!(forward(&facts).severity, Severity::Warning);

        facts.chains[0] = Base {
            families: vec![Family::V6],
            drops: true,
            rules: Ok(of_iptables("")),
            ..facts.chains[0].clone()
        };
        let found = forward(&facts);
        assert_eq!(found.severity, Severity::Fine);
        assert!(
            found.found.ends_with("and no hostPort leads to an address of its family"),
            "{found:?}"
        );
    }

    #[test]
    fn no_such_chain_and_what_cannot_be_read() {
        let mut facts = facts("", true, true);
        facts.chains[0].rules = Err("nft is not installed".into());
        assert_eq!(forward(&facts).severity, Severity::Warning);
        facts.chains.clear();
        assert_eq!(forward(&facts).severity, Severity::Fine);
        facts.unread.push(("native chains".into(), "no rights".into()));
        assert_eq!(forward(&facts).severity, Severity::Warning);
    }
}
