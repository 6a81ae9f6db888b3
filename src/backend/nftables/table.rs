//! The table as it is found: whether it is this plugin's, since anybody can give one its name, and whole.

use std::collections::BTreeSet;
use std::io;

use serde_json::Value;

use super::scaffold::{BaseChain, TABLE};
use super::{failed, scaffold, script};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::record::Part;
use crate::sys::Host;
use crate::sys::netlink::nftables::{Chain, NftFamily, NftReader};
use crate::sys::nft;

/// Takes the table away, unless it is somebody else's.
pub fn remove(host: &Host, facts: &NodeFacts) -> Result<()> {
    match foreign_chains()? {
        Some(_) => Ok(()),
        None => nft::apply(host, &script::restore(&[], &BTreeSet::new(), facts)).map_err(failed),
    }
}

/// The chains of a table with our name that has nothing of ours: neither a base chain nor a rule of the
/// scaffold. The state directory may have been lost, so that records do not tell.
pub fn foreign_chains() -> Result<Option<Vec<String>>> {
    let read = |error| Error::io("read the nftables rules (netlink)", error);
    let mut reader = NftReader::open().map_err(read)?;
    let chains = match reader.chains(NftFamily::Inet, TABLE) {
        // Who may not read may not write either, which nft says in its own words.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        other => other.map_err(read)?,
    };
    let bases = scaffold::base_chains(&BTreeSet::from([Part::Guard]));
    if chains.iter().any(|chain| bases.iter().any(|base| is_base(chain, base))) {
        return Ok(None);
    }
    for chain in &chains {
        let comments = reader.rule_comments(NftFamily::Inet, TABLE, &chain.name).map_err(read)?;
        if comments.iter().flatten().any(|comment| scaffold::is_comment(&chain.name, comment)) {
            return Ok(None);
        }
    }
    Ok((!chains.is_empty()).then(|| chains.into_iter().map(|chain| chain.name).collect()))
}

/// What of the scaffold is missing or not as made.
pub fn problem(parts: &BTreeSet<Part>) -> io::Result<Option<String>> {
    let mut reader = NftReader::open()?;
    for base in scaffold::base_chains(parts) {
        if !is_hooked(&mut reader, &base)? {
            return Ok(Some(format!(
                "table inet {TABLE} has no base chain {} at priority {}",
                base.name, base.priority
            )));
        }
    }
    for (chain, rules) in scaffold::chains(parts) {
        let expected = comments_of(chain, &rules);
        let found = reader.rule_comments(NftFamily::Inet, TABLE, chain)?;
        if found != expected {
            let named = |comments: Vec<Option<String>>| {
                let names = comments.into_iter().map(|one| one.unwrap_or("a foreign one".into()));
                match names.collect::<Vec<_>>().join(", ") {
                    none if none.is_empty() => "none".to_owned(),
                    names => names,
                }
            };
            return Ok(Some(format!(
                "chain {chain} of table inet {TABLE}: rules expected: {}, found: {}",
                named(expected),
                named(found)
            )));
        }
    }
    Ok(None)
}

/// Whether a base chain is there and hooked where it should be.
pub fn is_hooked(reader: &mut NftReader, base: &BaseChain) -> io::Result<bool> {
    let found = reader.chain(NftFamily::Inet, TABLE, base.name)?;
    Ok(found.is_some_and(|found| is_base(&found, base)))
}

fn is_base(found: &Chain, base: &BaseChain) -> bool {
    found.name == base.name
        && found.base.as_ref().is_some_and(|found| {
            found.priority == base.priority && found.hook == hook_number(base.hook)
        })
}

/// The comments that a chain of the scaffold has, by which it is known to be whole.
pub fn comments_of(chain: &str, rules: &[Value]) -> Vec<Option<String>> {
    let comment = |(index, rule)| Some(scaffold::comment(chain, index, rule));
    rules.iter().enumerate().map(comment).collect()
}

/// `NF_INET_*` (linux/netfilter.h).
fn hook_number(hook: nftables::types::NfHook) -> u32 {
    use nftables::types::NfHook;
    match hook {
        NfHook::Prerouting => 0,
        NfHook::Input => 1,
        NfHook::Forward => 2,
        NfHook::Output => 3,
        _ => 4,
    }
}
