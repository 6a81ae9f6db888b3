//! Which tables of netfilter there are, and with which tools they can be read. A table that is not
//! there is not asked for, since asking iptables for it makes it.

use std::collections::BTreeMap;
use std::io;

use super::super::Told;
use super::super::localhost::Guard;
use crate::backend::iptables::check::raw_problems;
use crate::backend::iptables::listing::{Listing, option, target_of};
use crate::model::Family;
use crate::sys::iptables::{self, Variant};
use crate::sys::netlink::nftables::{Chain, NftFamily, NftReader};
use crate::sys::{Host, legacy};

/// Tables of iptables that are there.
pub struct Tables {
    /// By variant and family, or why they are not known.
    present: Vec<(Variant, Family, Told<Vec<String>>)>,
    /// The tool for each variant and family that has one.
    tools: BTreeMap<(Variant, Family), String>,
    /// All base chains of nf_tables with their tables.
    pub base_chains: Told<Vec<(NftFamily, String, Chain)>>,
    /// The variant that `iptables` is, if it tells.
    pub used: Option<Variant>,
}

impl Tables {
    pub fn find(host: &Host) -> Self {
        let base_chains = base_chains().map_err(|error| error.to_string());
        let mut present = Vec::new();
        let mut tools = BTreeMap::new();
        for family in Family::ALL {
            let legacy = legacy::tables(family).map_err(|error| error.to_string());
            present.push((Variant::Legacy, family, legacy));
            let nft = base_chains.clone().map(|chains| iptables_tables(family, &chains));
            present.push((Variant::Nft, family, nft));
            for variant in [Variant::Legacy, Variant::Nft] {
                if let Some(tool) = tool(host, variant, family) {
                    tools.insert((variant, family), tool);
                }
            }
        }
        let used = iptables::used(host, Family::V4);
        Tables { present, tools, base_chains, used }
    }

    /// Every variant and family that has a table of this name, or may have.
    pub fn with(&self, table: &str) -> impl Iterator<Item = (Variant, Family, Told<()>)> {
        self.present.iter().filter_map(move |(variant, family, tables)| match tables {
            Err(reason) => Some((*variant, *family, Err(reason.clone()))),
            Ok(tables) => {
                tables.iter().any(|name| name == table).then_some((*variant, *family, Ok(())))
            }
        })
    }

    /// The tool that lists a variant's tables.
    pub fn tool(&self, variant: Variant, family: Family) -> Told<&str> {
        self.tools
            .get(&(variant, family))
            .map(String::as_str)
            .ok_or_else(|| format!("{} is not in PATH", named(variant.name(), family)))
    }

    /// A table as `iptables -S` lists it.
    pub fn list(&self, host: &Host, variant: Variant, family: Family, table: &str) -> Told<String> {
        let tool = self.tool(variant, family)?;
        let args = ["-w", "3", "-t", table, "-S"];
        host.tools.run(tool, &args, "").map_err(|error| error.to_string())
    }

    /// How much there is in tables nat and filter of a variant.
    pub fn count(&self, variant: Variant) -> Told<usize> {
        let mut sum = 0;
        for table in ["nat", "filter"] {
            for (_, family, present) in self.with(table).filter(|(found, ..)| *found == variant) {
                present?;
                sum += match variant {
                    Variant::Legacy => {
                        legacy::entries(family, table).map_err(|error| error.to_string())?
                    }
                    Variant::Nft => rules(family, table).map_err(|error| error.to_string())?,
                };
            }
        }
        Ok(sum)
    }

    /// What keeps packets for 127.0.0.0/8 from other hosts out.
    pub fn guard(&self, host: &Host) -> Told<Guard> {
        if self.has_native_guard() {
            return Ok(Guard::Ours);
        }
        let (mut foreign, mut unread) = (None, None);
        // Before conntrack, and where the kubelet has its rule.
        for table in ["raw", "filter"] {
            for (variant, family, present) in self.with(table) {
                if family != Family::V4 {
                    continue;
                }
                let listing = present.and_then(|()| self.list(host, variant, family, table));
                match listing.map(|text| Listing::parse(&text)) {
                    Ok(listing) if table == "raw" && raw_problems(&listing).is_empty() => {
                        return Ok(Guard::Ours);
                    }
                    Ok(listing) => foreign = foreign.or_else(|| drops_loopback(&listing)),
                    Err(reason) => unread = Some(reason),
                }
            }
        }
        match (foreign, unread) {
            (Some(rule), _) => Ok(Guard::Foreign(rule)),
            (None, Some(reason)) => Err(reason),
            (None, None) => Ok(Guard::None),
        }
    }

    fn has_native_guard(&self) -> bool {
        use crate::backend::nftables::scaffold::TABLE;
        let based = self.base_chains.as_ref().is_ok_and(|chains| {
            chains.iter().any(|(family, table, chain)| {
                *family == NftFamily::Inet && table == TABLE && chain.name == "guard"
            })
        });
        based
            && NftReader::open()
                .and_then(|mut reader| reader.rule_comments(NftFamily::Inet, TABLE, "guard"))
                .is_ok_and(|rules| !rules.is_empty())
    }

    /// The command that makes one.
    pub fn make_guard(&self) -> String {
        let tool = [Variant::Nft, Variant::Legacy]
            .into_iter()
            .filter(|variant| self.used.is_none_or(|used| used == *variant))
            .find_map(|variant| self.tool(variant, Family::V4).ok());
        match tool {
            Some(tool) => format!("{tool} -t raw -I PREROUTING -d 127.0.0.0/8 ! -i lo -j DROP"),
            None => {
                "sysctl -w net.ipv4.conf.all.route_localnet=0, and the same for each device".into()
            }
        }
    }
}

/// A rule of somebody that drops what is for 127.0.0.0/8.
fn drops_loopback(listing: &Listing) -> Option<String> {
    let rules = listing.chains.values().flatten();
    let mut found = rules.filter(|rule| {
        option(rule, "-d").as_deref() == Some("127.0.0.0/8")
            && matches!(target_of(rule).as_deref(), Some("DROP" | "REJECT"))
    });
    found.next().cloned()
}

/// `ip6tables-nft` for IPv6.
pub fn named(tool: &str, family: Family) -> String {
    match family {
        Family::V4 => tool.to_owned(),
        Family::V6 => tool.replacen("ip", "ip6", 1),
    }
}

fn tool(host: &Host, variant: Variant, family: Family) -> Option<String> {
    let own = named(variant.name(), family);
    let plain = named("iptables", family);
    let plain_is_it = iptables::used(host, family) == Some(variant);
    [(plain, plain_is_it), (own, true)]
        .into_iter()
        .find(|(tool, fits)| *fits && host.tools.find(tool).is_some())
        .map(|(tool, _)| tool)
}

fn base_chains() -> io::Result<Vec<(NftFamily, String, Chain)>> {
    let mut all = Vec::new();
    for family in [NftFamily::Inet, NftFamily::Ip, NftFamily::Ip6, NftFamily::Netdev] {
        let read = NftReader::open().and_then(|mut reader| reader.all_chains(family));
        match read {
            Ok(chains) => all.extend(
                chains
                    .into_iter()
                    .filter(|(_, chain)| chain.base.is_some())
                    .map(|(table, chain)| (family, table, chain)),
            ),
            // The kernel has no nf_tables, or not for this family.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(
                        libc::EINVAL
                            | libc::EPROTONOSUPPORT
                            | libc::EOPNOTSUPP
                            | libc::EAFNOSUPPORT
                    )
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// Tables with a base chain that has the name of one of iptables': nft's own are in lower case.
fn iptables_tables(family: Family, chains: &[(NftFamily, String, Chain)]) -> Vec<String> {
    const CHAINS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
    let mut tables: Vec<String> = chains
        .iter()
        .filter(|(of, _, chain)| *of == family.into() && CHAINS.contains(&chain.name.as_str()))
        .map(|(_, table, _)| table.clone())
        .collect();
    tables.sort_unstable();
    tables.dedup();
    tables
}

fn rules(family: Family, table: &str) -> io::Result<usize> {
    let mut reader = NftReader::open()?;
    let mut sum = 0;
    for chain in reader.chains(family.into(), table)? {
        sum += reader.rule_comments(family.into(), table, &chain.name)?.len();
    }
    Ok(sum)
}
