//! The table as it is on this node.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{HOST_PORTS, Rule, TABLE, rules};
use crate::backend::nftables::failed;
use crate::backend::nftables::objects::ip_name;
use crate::error::Result;
use crate::model::{Claim, Family, Forward};
use crate::sys::command::ToolError;
use crate::sys::netlink::nftables::NftReader;
use crate::sys::{Host, nft};

/// Takes claims away from containers of upstream's plugin, whose rules stand before ours: the newest claim
/// wins. Returns what they were, with the containers' IDs.
///
/// # Errors
///
/// Those of nft.
pub fn take_from_upstream(host: &Host, claims: &BTreeSet<Claim>) -> Result<Vec<(Forward, String)>> {
    let gone = remove_of_upstream(host, &HOST_PORTS, |rule| has_one_of(rule, claims))?;
    Ok(gone.into_iter().filter_map(|rule| Some((rule.forward?, rule.container_id))).collect())
}

/// Which of the claims another container than this one has by upstream's plugin, and its ID. What cannot be read is a
/// warning of the host.
pub fn taken_by_upstream(
    host: &Host,
    claims: &BTreeSet<Claim>,
    container_id: &str,
) -> Option<(Claim, String)> {
    if claims.is_empty() {
        return None;
    }
    for (_, rules) in rules_of_upstream(host, &HOST_PORTS) {
        let rules = rules.unwrap_or_else(|error| {
            host.warn(format!("rules of upstream's portmap cannot be read: {error}"));
            Vec::new()
        });
        let is_others = |rule: &Rule| rule.container_id != container_id && has_one_of(rule, claims);
        if let Some(rule) = rules.into_iter().find(is_others) {
            return rule.forward.map(|forward| (forward.claim, rule.container_id));
        }
    }
    None
}

fn has_one_of(rule: &Rule, claims: &BTreeSet<Claim>) -> bool {
    rule.forward.is_some_and(|forward| claims.contains(&forward.claim))
}

/// Removes rules, and returns them. Those that no tool can read stay, with a warning of the host.
pub fn remove_of_upstream(
    host: &Host,
    chains: &[&str],
    goes: impl Fn(&Rule) -> bool,
) -> Result<Vec<Rule>> {
    let mut gone = Vec::new();
    for (family, rules) in rules_of_upstream(host, chains) {
        let mut rules = match rules {
            // Nobody could do it then, and runtimes would repeat the DEL of every pod for ever.
            Err(error @ ToolError::Missing { .. }) => {
                host.warn(format!(
                    "table {} {} of upstream's portmap cannot be read, and is left as it is: {error}",
                    ip_name(family),
                    TABLE
                ));
                continue;
            }
            other => other.map_err(failed)?,
        };
        rules.retain(&goes);
        if !rules.is_empty() {
            let removals: Vec<Value> = rules.iter().map(Rule::removal).collect();
            nft::apply(host, &json!({ "nftables": removals }).to_string()).map_err(failed)?;
            gone.extend(rules);
        }
    }
    Ok(gone)
}

/// What upstream's nftables backend has made, by family, where one of the chains has something.
pub fn rules_of_upstream(
    host: &Host,
    chains: &[&str],
) -> Vec<(Family, Result<Vec<Rule>, ToolError>)> {
    // A kernel without nf_tables has no table to look at.
    let Ok(mut reader) = NftReader::open() else {
        return Vec::new();
    };
    // The table outlives its pods, and nft takes milliseconds.
    let mut has_rules = |family: Family, chain: &&str| {
        let comments = reader.rule_comments(family.into(), TABLE, chain);
        comments.is_ok_and(|comments| comments.iter().any(Option::is_some))
    };
    let mut there = |family: &Family| chains.iter().any(|chain| has_rules(*family, chain));
    let list = |family| {
        nft::list_table(host, ip_name(family), TABLE).map(|objects| rules(family, &objects))
    };
    let families = Family::ALL.into_iter().filter(|family| there(family));
    families.map(|family| (family, list(family))).collect()
}

/// What of that forwards to a container.
pub fn forwards_of_upstream(host: &Host, container_id: &str) -> Result<BTreeSet<Forward>> {
    let mut forwards = BTreeSet::new();
    for (_, rules) in rules_of_upstream(host, &HOST_PORTS) {
        let mut rules = rules.map_err(|error| {
            error.into_error("cannot read the rules of upstream's plugin".into())
        })?;
        rules.retain(|rule| rule.container_id == container_id);
        forwards.extend(rules.into_iter().filter_map(|rule| rule.forward));
    }
    Ok(forwards)
}
