//! The rules that a packet meets on its way to a pod, and what is reached without a record. Pure.

use std::collections::BTreeSet;

use super::check::entry_position;
use super::listing::{Listing, option};
use super::rules::{
    DNAT, DNAT_JUMP, MASQ, MASQ_JUMP, chain_rules, entry_rules, masq_rule, promoted_rules,
};
use crate::backend::{Leftover, Step};
use crate::model::Claim;
use crate::record::Record;

/// The way of a packet through table nat: as the listing has it, and where it has not, as it should
/// be.
#[must_use]
pub fn steps(record: &Record, claim: &Claim, listing: &Listing) -> Vec<Step> {
    let family = claim.family;
    let mut steps = Vec::new();
    let mut step = |chain: &str, rule: &str, position: Option<usize>| {
        let present = position.and_then(|index| listing.rules(chain).get(index));
        steps.push(Step {
            place: format!("nat {chain}"),
            what: present.map_or(rule, String::as_str).to_owned(),
            found: present.is_some(),
        });
    };
    for chain in ["PREROUTING", "OUTPUT"] {
        step(chain, DNAT_JUMP, listing.position(chain, DNAT_JUMP));
    }
    // Only where somebody competes for the port.
    for rule in promoted_rules(record, family, &|other| other == claim) {
        let position = listing.position(DNAT, &rule);
        if position.is_some() {
            step(DNAT, &rule, position);
        }
    }
    for rule in entry_rules(record, family).iter().filter(|rule| names(rule, claim)) {
        step(DNAT, rule, entry_position(record, family, rule, listing));
    }
    let address = claim.address.map(|ip| format!("{ip}/{}", family.max_prefix()));
    for rule in chain_rules(record, family) {
        if names(&rule, claim) && option(&rule, "-d") == address {
            step(&record.chain, &rule, listing.position(&record.chain, &rule));
        }
    }
    if !record.options.no_snat && record.options.external_set_mark_chain.is_none() {
        step("POSTROUTING", MASQ_JUMP, listing.position("POSTROUTING", MASQ_JUMP));
        let rule = masq_rule(record.options.mark().trailing_zeros());
        step(MASQ, &rule, listing.position(MASQ, &rule));
    }
    steps
}

/// Whether a rule is about the claim's protocol and port.
fn names(rule: &str, claim: &Claim) -> bool {
    let ports = option(rule, "--dports").or_else(|| option(rule, "--dport")).unwrap_or_default();
    let port = claim.port.to_string();
    option(rule, "-p").as_deref() == Some(claim.protocol.name())
        && ports.split(',').any(|own| own == port)
}

/// Attachments in a table nat that are not `recorded`, by their chains.
#[must_use]
pub fn leftovers(
    place: &str,
    family: crate::model::Family,
    listing: &Listing,
    recorded: &BTreeSet<&str>,
) -> Vec<Leftover> {
    let named = listing.attachments();
    listing
        .chains
        .keys()
        .filter(|chain| chain.starts_with("CNI-DN-") && !recorded.contains(chain.as_str()))
        .map(|chain| {
            let found = named.iter().find(|found| found.chain == *chain);
            Leftover {
                place: place.to_owned(),
                object: match listing.jumps(DNAT, chain).next() {
                    Some(_) => format!("chain {chain}"),
                    None => format!("chain {chain}, which nothing leads to"),
                },
                network: found.map(|found| found.network.clone()).unwrap_or_default(),
                container_id: found.map(|found| found.container_id.clone()).unwrap_or_default(),
                forwards: listing.forwards(chain, family),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::iptables::rules::SETMARK;
    use crate::model::{BackendKind, Family};
    use crate::record::samples::record;

    fn whole(record: &Record) -> String {
        let mut text = format!("-P PREROUTING ACCEPT\n-N {}\n", record.chain);
        for (chain, rules) in [
            ("PREROUTING", vec![DNAT_JUMP.to_owned()]),
            ("OUTPUT", vec![DNAT_JUMP.to_owned()]),
            (DNAT, entry_rules(record, Family::V4)),
            (&record.chain, chain_rules(record, Family::V4)),
            ("POSTROUTING", vec![MASQ_JUMP.to_owned()]),
            (MASQ, vec![masq_rule(13)]),
        ] {
            for rule in rules {
                text += &format!("-A {chain} {rule}\n");
            }
        }
        text
    }

    #[test]
    fn the_way_is_that_of_one_claim_and_shows_what_is_missing() {
        let record =
            record("a", &["10.0.0.2/24"], &["tcp 80 8080", "udp 53 53"], BackendKind::Iptables, 1);
        let claim = Claim {
            family: Family::V4,
            protocol: crate::model::Protocol::Tcp,
            address: None,
            port: 80,
        };
        let text = whole(&record);
        let places = |text: &str| -> Vec<(String, bool)> {
            steps(&record, &claim, &Listing::parse(text))
                .into_iter()
                .map(|step| (step.place, step.found))
                .collect()
        };
        let chain = format!("nat {}", record.chain);
        let names = [
            "nat PREROUTING",
            "nat OUTPUT",
            "nat CNI-HOSTPORT-DNAT",
            &chain,
            &chain,
            &chain,
            "nat POSTROUTING",
            "nat CNI-HOSTPORT-MASQ",
        ];
        let all: Vec<(String, bool)> =
            names.iter().map(|name| ((*name).to_owned(), true)).collect();
        assert_eq!(places(&text), all);
        let without: String = text
            .lines()
            .filter(|line| !line.contains("--dports 80"))
            .map(|line| format!("{line}\n"))
            .collect();
        let missing: Vec<usize> = places(&without)
            .iter()
            .enumerate()
            .filter(|(_, (_, found))| !found)
            .map(|(at, _)| at)
            .collect();
        assert_eq!(missing, [2]);
    }

    #[test]
    fn what_has_no_record_is_named_by_its_comment() {
        let record = record("a", &["10.0.0.2/24"], &["tcp 80 8080"], BackendKind::Iptables, 1);
        let listing = Listing::parse(&(whole(&record) + "-N CNI-DN-0123\n-N " + SETMARK));
        let found = leftovers("iptables-nft", Family::V4, &listing, &BTreeSet::new());
        let words: Vec<String> = found
            .iter()
            .map(|one| {
                format!(
                    "{} {:?} {:?} {}",
                    one.object,
                    one.network,
                    one.container_id,
                    one.forwards.len()
                )
            })
            .collect();
        assert_eq!(
            words,
            [
                "chain CNI-DN-0123, which nothing leads to \"\" \"\" 0".to_owned(),
                format!("chain {} \"portmap\" \"a\" 1", record.chain),
            ]
        );
        let recorded = BTreeSet::from([record.chain.as_str(), "CNI-DN-0123"]);
        assert_eq!(leftovers("iptables-nft", Family::V4, &listing, &recorded), []);
    }
}
