//! What the table has of attachments, read over netlink.

use std::collections::BTreeMap;
use std::io;

use super::elements;
use super::objects::{Data, Element, Place};
use super::scaffold::TABLE;
use crate::error::{Error, Result};
use crate::sys::netlink::nftables::{NftFamily, NftReader};

/// Elements, and the rules of the chains that some of them lead to, each with its comment: whose it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Present {
    pub elements: BTreeMap<Place, Element>,
    /// Handles and owners, in the order of the rules.
    pub chains: BTreeMap<String, Vec<(u64, String)>>,
}

impl Present {
    /// Everything there is; nothing where the kernel has no nf_tables.
    pub fn read() -> Result<Self> {
        let failed = |error| Error::io("read the nftables rules (netlink)", error);
        Present::of_kernel().map_err(failed)
    }

    fn of_kernel() -> io::Result<Self> {
        let mut present = Present::default();
        let mut reader = match NftReader::open() {
            // A kernel without netfilter has no table to look at.
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                return Ok(present);
            }
            other => other?,
        };
        if !reader.table_exists(NftFamily::Inet, TABLE).unwrap_or(false) {
            return Ok(present);
        }
        for set in reader.sets(NftFamily::Inet, TABLE)? {
            for (key, found) in reader.all_elements(NftFamily::Inet, TABLE, &set)? {
                if let Some((place, data)) = elements::read(&set, &key, &found) {
                    let owner = found.comment.unwrap_or_default();
                    present.elements.insert(place, Element { data, owner });
                }
            }
        }
        for element in present.elements.values() {
            if let Data::Jump(chain) = &element.data {
                let rules = reader.rule_owners(NftFamily::Inet, TABLE, chain)?;
                present.chains.insert(chain.clone(), rules);
            }
        }
        Ok(present)
    }
}
