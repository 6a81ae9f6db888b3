//! Which rules of a table nat take packets to a port of the node. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::backend::iptables::listing::{Listing, canonical, option, target_of};
use crate::backend::iptables::rules::{DNAT, GUARD, LOOPBACK, MASQ, NEIGHBOURS, SETMARK};
use crate::model::{Claim, Family};

/// A rule that takes packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taker {
    /// The chains on the way, the base chain first.
    pub chains: Vec<String>,
    /// As listed, after `-A CHAIN `.
    pub rule: String,
    /// Before the jump to our `CNI-HOSTPORT-DNAT`.
    pub before: bool,
    /// It leaves the destination as it is, and only keeps the packet from the rest of its own table.
    pub spares: bool,
    /// Matches that nothing is known of here have to hold as well.
    pub some: bool,
}

impl Taker {
    /// Whose it is, by the names that tools give their chains.
    #[must_use]
    pub fn describe(&self) -> String {
        let named = |prefix: &str| self.chains.iter().any(|chain| chain.starts_with(prefix));
        let comment = option(&self.rule, "--comment");
        let comment = comment.map(|comment| format!(" ({comment})")).unwrap_or_default();
        if named("KUBE-NODEPORTS") {
            format!("the NodePort of a Service{comment}")
        } else if named("KUBE-") {
            format!("a Service{comment}")
        } else if named("DOCKER") {
            let target = option(&self.rule, "--to-destination");
            format!("a published port of Docker, {}", target.unwrap_or_default())
        } else if named("CILIUM_") {
            format!("Cilium{comment}")
        } else {
            format!("a rule of table nat{comment}")
        }
    }
}

/// What takes packets that enter by a base chain (`PREROUTING`, `OUTPUT`), in the order in which they
/// meet it. `call` is what is called; `local` are the node's addresses.
#[must_use]
pub fn takers(listing: &Listing, base: &str, call: &Claim, local: &BTreeSet<IpAddr>) -> Vec<Taker> {
    let mut walk = Walk { listing, call, local, before: true, found: Vec::new() };
    walk.chain(base, &mut Vec::new(), false);
    walk.found
}

struct Walk<'a> {
    listing: &'a Listing,
    call: &'a Claim,
    local: &'a BTreeSet<IpAddr>,
    before: bool,
    found: Vec<Taker>,
}

/// What a rule says of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Match {
    /// It is about this port, and not about all.
    port: bool,
    some: bool,
}

impl Walk<'_> {
    fn chain(&mut self, name: &str, way: &mut Vec<String>, some: bool) {
        // The kernel refuses loops; a listing may be anything.
        if way.iter().any(|chain| chain == name) {
            return;
        }
        way.push(name.to_owned());
        for rule in self.listing.rules(name) {
            let Some(target) = target_of(rule) else {
                continue;
            };
            if [SETMARK, MASQ, NEIGHBOURS, GUARD, LOOPBACK].contains(&target.as_str()) {
                continue;
            }
            if target == DNAT {
                self.before = false;
                continue;
            }
            let Some(found) = matches(rule, self.call, self.local) else {
                continue;
            };
            let some = some || found.some;
            let takes = match self.listing.has_chain(&target) {
                true if found.port => self.translates(&target, &mut Vec::new()),
                true => {
                    self.chain(&target, way, some);
                    false
                }
                false if target == "RETURN" && !some => break,
                // The rest of the table is not for this packet.
                false => matches!(target.as_str(), "DNAT" | "REDIRECT" | "NETMAP" | "ACCEPT"),
            };
            if takes {
                let (chains, rule) = (way.clone(), rule.clone());
                let spares = target == "ACCEPT";
                self.found.push(Taker { chains, rule, before: self.before, spares, some });
            }
        }
        way.pop();
    }

    /// Whether a chain, or one that it leads to, changes destinations: those that only mark leave the
    /// packet to the next rule.
    fn translates(&self, name: &str, way: &mut Vec<String>) -> bool {
        if way.iter().any(|chain| chain == name) {
            return false;
        }
        way.push(name.to_owned());
        let found = self.listing.rules(name).iter().any(|rule| {
            target_of(rule).is_some_and(|target| {
                matches!(target.as_str(), "DNAT" | "REDIRECT" | "NETMAP")
                    || self.listing.has_chain(&target) && self.translates(&target, way)
            })
        });
        way.pop();
        found
    }
}

/// `None` if the rule is not about such packets.
fn matches(rule: &str, call: &Claim, local: &BTreeSet<IpAddr>) -> Option<Match> {
    let mut found = Match { port: false, some: false };
    for option in canonical(rule) {
        let (name, value) = option.split_once(' ').unwrap_or((&option, ""));
        let (negated, name, value) = match name {
            "!" => {
                let (name, value) = value.split_once(' ').unwrap_or((value, ""));
                (true, name, value)
            }
            _ => (false, name, value),
        };
        match (name, negated) {
            ("-p", false) if value == call.protocol.name() || value == "all" => {}
            ("-p", _) => return None,
            ("--dport" | "--dports", false)
                if ports(value).any(|port| port.contains(&call.port)) =>
            {
                found.port = true;
            }
            ("--dport" | "--dports", false) => return None,
            ("-d", _) => match (reaches(value, call, local), negated) {
                (Reach::None, false) | (Reach::All, true) => return None,
                (Reach::Some, _) => found.some = true,
                _ => {}
            },
            ("--dst-type", false) if value == "LOCAL" => {}
            ("--dst-type", true) if value == "LOCAL" => return None,
            // Everything but one bridge or network: callers are elsewhere.
            ("-i" | "-s" | "-o", true) => {}
            (
                "-j" | "-g" | "--comment" | "--to-destination" | "--to-ports" | "--random"
                | "--persistent",
                _,
            ) => {}
            _ => found.some = true,
        }
    }
    Some(found)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    None,
    Some,
    All,
}

/// Which of the addresses that may be called are in a network. Who calls any means none of loopback.
fn reaches(network: &str, call: &Claim, local: &BTreeSet<IpAddr>) -> Reach {
    let Ok(network) = network.parse::<IpNetwork>() else {
        return Reach::Some;
    };
    let called: Vec<IpAddr> = match call.address {
        Some(ip) => vec![ip],
        None => {
            let of_family = |ip: &&IpAddr| Family::of(ip) == call.family;
            local.iter().filter(of_family).filter(|ip| !ip.is_loopback()).copied().collect()
        }
    };
    let inside = called.iter().filter(|ip| network.contains(**ip)).count();
    match inside {
        0 => Reach::None,
        all if all == called.len() => Reach::All,
        _ => Reach::Some,
    }
}

/// `80`, `80,443`, `8000:8010`.
fn ports(text: &str) -> impl Iterator<Item = std::ops::RangeInclusive<u16>> + '_ {
    text.split(',').filter_map(|part| {
        let (first, last) = part.split_once(':').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::model::Protocol;

    const NODE: &str = r#"-N KUBE-SERVICES
-N KUBE-NODEPORTS
-N KUBE-MARK-MASQ
-N KUBE-SVC-1
-N KUBE-SEP-1
-N DOCKER
-N CNI-HOSTPORT-DNAT
-N CNI-DN-1
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/svc-1 cluster IP" -m tcp --dport 9000 -j KUBE-SVC-1
-A KUBE-SERVICES -d 192.0.2.2/32 -p tcp -m comment --comment "default/ext external IP" -m tcp --dport 9100 -j KUBE-SVC-1
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30001 -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/svc-1" -m tcp --dport 30001 -j KUBE-SVC-1
-A KUBE-NODEPORTS -s 10.0.0.0/8 -p tcp -m tcp --dport 30002 -j KUBE-SVC-1
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SVC-1 -j KUBE-SEP-1
-A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination 10.244.1.1:8080
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 9000 -j DNAT --to-destination 172.17.0.2:80
-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 9000 -j CNI-DN-1
-A CNI-DN-1 -p tcp -m tcp --dport 9000 -j DNAT --to-destination 10.0.0.2:80
"#;

    fn found(base: &str, port: u16, address: Option<&str>) -> Vec<String> {
        let local = ["192.0.2.1", "192.0.2.2", "127.0.0.1"].map(|ip| ip.parse().unwrap()).into();
        let address = address.map(|ip| ip.parse().unwrap());
        let call = Claim { family: Family::V4, protocol: Protocol::Tcp, address, port };
        takers(&Listing::parse(NODE), base, &call, &local)
            .iter()
            .map(|taker| {
                let flags = [(taker.before, "before"), (taker.some, "some")];
                let flags: Vec<&str> =
                    flags.iter().filter(|(on, _)| *on).map(|(_, word)| *word).collect();
                format!("{} [{}]", taker.describe(), flags.join(" "))
            })
            .collect()
    }

    #[test]
    fn a_node_port_takes_its_own_port_first_and_no_other() {
        assert_eq!(
            found("PREROUTING", 30001, None),
            ["the NodePort of a Service (default/svc-1) [before]"]
        );
        assert_eq!(found("PREROUTING", 30002, None), ["the NodePort of a Service [before some]"]);
        assert_eq!(found("PREROUTING", 30003, None), [""; 0]);
    }

    #[test]
    fn docker_is_met_before_or_behind() {
        let docker = "a published port of Docker, 172.17.0.2:80";
        assert_eq!(found("PREROUTING", 9000, None), [format!("{docker} []")]);
        assert_eq!(found("OUTPUT", 9000, None), [format!("{docker} [before]")]);
        assert_eq!(found("OUTPUT", 9000, Some("127.0.0.1")), [""; 0]);
    }

    #[test]
    fn addresses_of_a_service_count_where_they_are_the_node_s() {
        let service = "a Service (default/ext external IP)";
        assert_eq!(found("PREROUTING", 9100, Some("192.0.2.2")), [format!("{service} [before]")]);
        assert_eq!(found("PREROUTING", 9100, None), [format!("{service} [before some]")]);
        assert_eq!(found("PREROUTING", 9100, Some("192.0.2.1")), [""; 0]);
    }

    #[test]
    fn ports_are_lists_and_ranges() {
        let has = |text: &str, port: u16| ports(text).any(|range| range.contains(&port));
        assert!(has("80,443", 443) && has("8000:8010", 8005) && has("1", 1));
        assert!(!has("80,443", 81) && !has("8000:8010", 8011) && !has("http", 80));
    }
}
