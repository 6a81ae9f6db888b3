//! The rules of one attachment and of the shared chains, as text. Pure.
//!
//! Table nat holds what upstream's portmap writes, rule for rule: other tools read these chains, and
//! nodes are upgraded and rolled back under running pods. A rule is the text after `-A CHAIN `, in the
//! spelling in which iptables 1.8 lists it, so that a listing can be compared with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::conf::Options;
use crate::model::{Claim, Family, Forward, Protocol};
use crate::record::Record;

/// Upstream's names. Never change them: they outlive every release.
pub const DNAT: &str = "CNI-HOSTPORT-DNAT";
pub const SETMARK: &str = "CNI-HOSTPORT-SETMARK";
pub const MASQ: &str = "CNI-HOSTPORT-MASQ";

/// Our additions live in chains of their own.
pub const NEIGHBOURS: &str = "PORTMAP-NEIGHBOURS";
pub const GUARD: &str = "PORTMAP-GUARD";
pub const LOOPBACK: &str = "PORTMAP-LOOPBACK";

/// Jump from PREROUTING and OUTPUT. Appended, so that Services win (CVE-2019-9946).
pub const DNAT_JUMP: &str = "-m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT";
/// Jump from POSTROUTING. Put first: the main plugin's own masquerading would take the packet.
pub const MASQ_JUMP: &str =
    r#"-m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ"#;
/// Jump from PREROUTING, before `DNAT_JUMP`.
pub const NEIGHBOURS_JUMP: &str = "-m addrtype --dst-type LOCAL -j PORTMAP-NEIGHBOURS";
/// Jump from OUTPUT (IPv6), before `DNAT_JUMP`: the kernel has no route_localnet for IPv6, so a
/// translated connection to ::1 would be lost, together with any local service on that port.
pub const LOOPBACK_JUMP: &str = "-d ::1/128 -j PORTMAP-LOOPBACK";
pub const LOOPBACK_RULE: &str = "-j ACCEPT";
/// Jump from table raw, PREROUTING. Before conntrack, so that replies, whose destination is
/// translated back later, are not met.
pub const GUARD_JUMP: &str = "-d 127.0.0.0/8 ! -i lo -j PORTMAP-GUARD";
pub const GUARD_RULE: &str = "-j DROP";

/// xt_multiport takes 15 ports (XT_MULTI_PORTS).
const PORTS_PER_RULE: usize = 15;
/// xt_comment takes 255 bytes (XT_MAX_COMMENT_LEN less the terminator).
const MAX_COMMENT: usize = 255;

/// The rule of SETMARK that sets an attachment's bit.
#[must_use]
pub fn setmark_rule(bit: u32) -> String {
    let mark = 1_u32 << bit;
    format!(
        r#"-m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark {mark:#x}/{mark:#x}"#
    )
}

/// The rule of MASQ that acts on a bit.
#[must_use]
pub fn masq_rule(bit: u32) -> String {
    let mark = 1_u32 << bit;
    format!("-m mark --mark {mark:#x}/{mark:#x} -j MASQUERADE")
}

/// Where an attachment's packets get their mark.
#[must_use]
pub fn mark_chain(options: &Options) -> &str {
    options.external_set_mark_chain.as_deref().unwrap_or(SETMARK)
}

/// The rules of the attachment's own chain, in order.
#[must_use]
pub fn chain_rules(record: &Record, family: Family) -> Vec<String> {
    let Some(network) = record.network(family) else {
        return Vec::new();
    };
    let mark = mark_chain(&record.options);
    let mut rules = Vec::new();
    for Forward { claim, target } in specific_first(record.forwards(family)) {
        let destination =
            claim.address.map(|ip| format!("-d {ip}/{} ", family.max_prefix())).unwrap_or_default();
        let (protocol, port) = (claim.protocol, claim.port);
        let matches = format!("{destination}-p {protocol} -m {protocol} --dport {port}");
        if !record.options.no_snat {
            if record.options.masq_all {
                rules.push(format!("{matches} -j {mark}"));
            } else {
                let source = format!("{}/{}", network.network(), network.prefix());
                rules.push(format!("-s {source} {matches} -j {mark}"));
            }
            if family == Family::V4 {
                rules.push(format!("-s 127.0.0.1/32 {matches} -j {mark}"));
            }
        }
        rules.push(format!("{matches} -j DNAT --to-destination {target}"));
    }
    rules
}

/// Upstream keeps the order of the request. Only where one attachment maps a port both for a
/// specific and for any address, the specific one has to come first to be of use.
fn specific_first(forwards: Vec<Forward>) -> Vec<Forward> {
    let anywhere: BTreeSet<(Protocol, u16)> = forwards
        .iter()
        .filter(|forward| forward.claim.address.is_none())
        .map(|forward| (forward.claim.protocol, forward.claim.port))
        .collect();
    let shadowed = |forward: &Forward| {
        forward.claim.address.is_some()
            && anywhere.contains(&(forward.claim.protocol, forward.claim.port))
    };
    let (first, rest): (Vec<Forward>, Vec<Forward>) = forwards.into_iter().partition(shadowed);
    first.into_iter().chain(rest).collect()
}

/// The rules of `CNI-HOSTPORT-DNAT` that lead to the attachment's chain. As upstream's, they name
/// the ports of all mappings, also of those that belong to the other family.
#[must_use]
pub fn entry_rules(record: &Record, family: Family) -> Vec<String> {
    let mut ports: BTreeMap<Protocol, Vec<u16>> = BTreeMap::new();
    for mapping in &record.mappings {
        ports.entry(mapping.protocol).or_default().push(mapping.host_port);
    }
    ports
        .into_iter()
        .flat_map(|(protocol, ports)| entries(record, family, "", protocol, &ports))
        .collect()
}

/// Further entry rules for an attachment that maps a port for a specific address while another one
/// has it for that or any: they match that address alone and go before all entry rules for any
/// address.
#[must_use]
pub fn promoted_rules(
    record: &Record,
    family: Family,
    contested: &dyn Fn(&Claim) -> bool,
) -> Vec<String> {
    let mut ports: BTreeMap<(IpAddr, Protocol), Vec<u16>> = BTreeMap::new();
    for Forward { claim, .. } in record.forwards(family) {
        if let Some(ip) = claim.address.filter(|_| contested(&claim)) {
            ports.entry((ip, claim.protocol)).or_default().push(claim.port);
        }
    }
    ports
        .into_iter()
        .flat_map(|((ip, protocol), ports)| {
            // A rule takes `-d` once, and conditions come as they are. No packet that meets the rule has
            // been translated yet.
            let destination = match record.options.conditions(family).iter().any(|w| is_dash_d(w)) {
                true => format!("-m conntrack --ctorigdst {ip} "),
                false => format!("-d {ip}/{} ", family.max_prefix()),
            };
            entries(record, family, &destination, protocol, &ports)
        })
        .collect()
}

/// Whether a word of a rule is the option for the destination address, in any of the ways in which
/// getopt_long(3) takes it: with its value behind it, and long names cut short.
fn is_dash_d(word: &str) -> bool {
    let name = word.split('=').next().unwrap_or_default();
    name == "--dst"
        || (name.len() >= "--de".len() && "--destination".starts_with(name))
        || (word.starts_with("-d") && !word.starts_with("--"))
}

fn entries(
    record: &Record,
    family: Family,
    destination: &str,
    protocol: Protocol,
    ports: &[u16],
) -> Vec<String> {
    let attachment = &record.attachment;
    let comment = trim_comment(format!(
        r#"dnat name: "{}" id: "{}""#,
        attachment.network, attachment.container_id
    ));
    let conditions: String = record
        .options
        .conditions(family)
        .iter()
        .map(|word| format!("{} ", quote_if_needed(word)))
        .collect();
    ports
        .chunks(PORTS_PER_RULE)
        .map(|ports| {
            format!(
                "{destination}-p {protocol} -m comment --comment {} -m multiport --dports {} {conditions}-j {}",
                quote(&comment),
                comma_separated(ports),
                record.chain
            )
        })
        .collect()
}

/// The rules of `PORTMAP-NEIGHBOURS`: packets from uplinks keep their source; of all others the
/// claims of attachments with a host prefix are marked.
#[must_use]
pub fn neighbour_rules(records: &[&Record], family: Family, uplinks: &[String]) -> Vec<String> {
    let returns = uplinks.iter().map(|device| uplink_rule(device));
    let marks = records.iter().flat_map(|record| neighbour_rules_of(record, family));
    returns.chain(marks).collect()
}

/// The rule of `PORTMAP-NEIGHBOURS` that spares packets from an uplink.
#[must_use]
pub fn uplink_rule(device: &str) -> String {
    format!("-i {} -j RETURN", quote_if_needed(device))
}

/// An attachment's part of `PORTMAP-NEIGHBOURS`.
#[must_use]
pub fn neighbour_rules_of(record: &Record, family: Family) -> Vec<String> {
    if !record.masquerades_neighbours(family) {
        return Vec::new();
    }
    let mut ports: BTreeMap<(Option<IpAddr>, Protocol), Vec<u16>> = BTreeMap::new();
    for Forward { claim, .. } in record.forwards(family) {
        ports.entry((claim.address, claim.protocol)).or_default().push(claim.port);
    }
    let mut rules = Vec::new();
    for ((address, protocol), ports) in ports {
        let destination =
            address.map(|ip| format!("-d {ip}/{} ", family.max_prefix())).unwrap_or_default();
        for ports in ports.chunks(PORTS_PER_RULE) {
            rules.push(format!(
                "{destination}-p {protocol} -m comment --comment {} -m multiport --dports {} -j {}",
                quote(&record.chain),
                comma_separated(ports),
                mark_chain(&record.options)
            ));
        }
    }
    rules
}

fn comma_separated(ports: &[u16]) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Upstream cuts what is too long to 253 bytes and adds three dots; of these 256 bytes iptables
/// keeps 255.
fn trim_comment(comment: String) -> String {
    match comment.get(..MAX_COMMENT - 2) {
        Some(start) if comment.len() > MAX_COMMENT => format!("{start}.."),
        _ => comment,
    }
}

fn quote(word: &str) -> String {
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The parser of iptables-restore splits at white space and knows quotes and backslashes.
fn quote_if_needed(word: &str) -> String {
    if word.contains([' ', '"', '\'', '\\', '#']) { quote(word) } else { word.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_known_in_all_its_spellings() {
        for word in ["-d", "-d10.0.0.0/8", "--dst", "--dst=10.0.0.0/8", "--destination", "--dest"] {
            assert!(is_dash_d(word), "{word}");
        }
        for word in ["-s", "--dport", "--dports", "--dst-type", "--dst-range", "--d", "!", "dst"] {
            assert!(!is_dash_d(word), "{word}");
        }
    }
}
