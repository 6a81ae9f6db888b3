//! Whether the table is this plugin's: anybody can give one its name.

use std::collections::BTreeSet;
use std::io;

use super::scaffold::TABLE;
use super::{failed, is_base, scaffold, script};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::record::Part;
use crate::sys::Host;
use crate::sys::netlink::nftables::{NftFamily, NftReader};
use crate::sys::nft;

/// Takes the table away, unless it is somebody else's.
pub fn remove(host: &Host, facts: &NodeFacts) -> Result<()> {
    match foreign_chains()? {
        Some(_) => Ok(()),
        None => nft::apply(host, &script::restore(&[], facts)).map_err(failed),
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
