//! Base chains that packets meet on their way to a pod.

use super::super::rules::{Base, Insert, drops, of_iptables, of_nft};
use super::tables::{Tables, named};
use crate::model::Family;
use crate::sys::iptables::Variant;
use crate::sys::netlink::nftables::{BaseChain, NftFamily, NftReader};
use crate::sys::{Host, nft};

// linux/netfilter.h: `NF_INET_*` and `NF_NETDEV_INGRESS`.
const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const INGRESS: u32 = 5;
const NETDEV_INGRESS: u32 = 0;
/// `NF_IP_PRI_NAT_DST`.
const DSTNAT: i32 = -100;

/// Where packets meet chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Before rules translate them.
    Early,
    /// After the route has been chosen.
    Forwarded,
}

impl Stage {
    /// The name of the chain in tables of iptables, and those of its tables that are for filtering.
    fn of_iptables(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Stage::Early => ("PREROUTING", &["raw", "mangle"]),
            Stage::Forwarded => ("FORWARD", &["filter", "mangle", "security"]),
        }
    }

    fn has(self, family: NftFamily, base: &BaseChain) -> bool {
        match (self, family) {
            (Stage::Early, NftFamily::Netdev) => base.hook == NETDEV_INGRESS,
            (Stage::Early, NftFamily::Inet) if base.hook == INGRESS => true,
            (Stage::Early, _) => base.hook == PREROUTING && base.priority < DSTNAT,
            (Stage::Forwarded, NftFamily::Netdev) => false,
            (Stage::Forwarded, _) => base.hook == FORWARD,
        }
    }
}

/// Chains, and where such chains could not be looked for, and why.
pub fn chains(host: &Host, tables: &Tables, stage: Stage) -> (Vec<Base>, Vec<(String, String)>) {
    let (mut chains, mut unread) = (Vec::new(), Vec::new());
    of_legacy(host, tables, stage, &mut chains, &mut unread);
    match &tables.base_chains {
        Err(reason) => unread.push(("the chains of nf_tables".to_owned(), reason.clone())),
        Ok(all) => {
            for (family, table, chain) in all {
                if let Some(base) = chain.base.as_ref().filter(|base| stage.has(*family, base)) {
                    let found =
                        of_nftables(host, tables, stage, *family, table, &chain.name, base.drops);
                    chains.extend(found);
                }
            }
        }
    }
    (chains, unread)
}

fn of_legacy(
    host: &Host,
    tables: &Tables,
    stage: Stage,
    chains: &mut Vec<Base>,
    unread: &mut Vec<(String, String)>,
) {
    let (entry, names) = stage.of_iptables();
    for table in names {
        for (variant, family, present) in tables.with(table) {
            if variant != Variant::Legacy {
                continue;
            }
            match present.and_then(|()| tables.list(host, variant, family, table)) {
                Err(reason) => {
                    let tool = named(variant.name(), family);
                    let what = format!("chain {entry} of table {table} ({tool})");
                    // Which tables there are is read at once.
                    if unread.last().is_none_or(|(_, known)| *known != reason) {
                        unread.push((what, reason));
                    }
                }
                Ok(text) => {
                    let policy = drops(&text, entry);
                    chains.push(of_tool(tables, variant, family, table, entry, policy, Ok(&text)));
                }
            }
        }
    }
}

/// The chain of iptables, by what `iptables -S` says.
fn of_tool(
    tables: &Tables,
    variant: Variant,
    family: Family,
    table: &str,
    entry: &str,
    drops: bool,
    text: Result<&str, String>,
) -> Base {
    let tool = tables.tool(variant, family).unwrap_or_default();
    let rules = text.map(of_iptables);
    // Docker's is made for that, and outlives its restarts.
    let docker = rules.as_ref().is_ok_and(|rules| rules.contains_key("DOCKER-USER"));
    let chain = if docker { "DOCKER-USER" } else { entry };
    Base {
        place: format!(
            "chain {entry} of table {table} ({}, {family})",
            named(variant.name(), family)
        ),
        families: vec![family],
        entry: entry.to_owned(),
        drops,
        rules,
        insert: Insert::Iptables(match table {
            "filter" => format!("{tool} -I {chain}"),
            table => format!("{tool} -t {table} -I {chain}"),
        }),
    }
}

/// `None` for one that lets everything through.
fn of_nftables(
    host: &Host,
    tables: &Tables,
    stage: Stage,
    family: NftFamily,
    table: &str,
    entry: &str,
    drops: bool,
) -> Option<Base> {
    // Tools list whole tables, those of Services among them.
    let is_empty = || {
        NftReader::open()
            .and_then(|mut reader| reader.rule_comments(family, table, entry))
            .is_ok_and(|rules| rules.is_empty())
    };
    if !drops && is_empty() {
        return None;
    }
    let (name, families) = match family {
        NftFamily::Inet => ("inet", Family::ALL.to_vec()),
        NftFamily::Ip => ("ip", vec![Family::V4]),
        NftFamily::Ip6 => ("ip6", vec![Family::V6]),
        NftFamily::Netdev => ("netdev", Family::ALL.to_vec()),
    };
    let (chain, names) = stage.of_iptables();
    if entry == chain
        && names.contains(&table)
        && let [only] = families.as_slice()
        && tables.tool(Variant::Nft, *only).is_ok()
    {
        let text = tables.list(host, Variant::Nft, *only, table);
        let text = text.as_deref().map_err(Clone::clone);
        return Some(of_tool(tables, Variant::Nft, *only, table, entry, drops, text));
    }
    let rules = nft::list_table(host, name, table).map_err(|error| error.to_string());
    Some(Base {
        place: format!("chain {entry} of table {name} {table} (nftables)"),
        families,
        entry: entry.to_owned(),
        drops,
        rules: rules.map(|objects| of_nft(&objects)),
        insert: Insert::Nft(format!("nft insert rule {name} {table} {entry}")),
    })
}
