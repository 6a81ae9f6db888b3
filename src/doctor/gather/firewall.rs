//! Chains that forwarded packets meet, and packets to hostPorts.

use super::super::firewall::{Facts, ForwardChain, Sample};
use super::super::forward::{Packet, of_iptables, of_nft};
use super::tables::{Tables, named};
use crate::facts::NodeFacts;
use crate::model::{BackendKind, Family, Protocol};
use crate::record::Record;
use crate::sys::iptables::Variant;
use crate::sys::netlink::nftables::{NftFamily, NftReader};
use crate::sys::netlink::route::Link;
use crate::sys::{Host, nft};

/// `NF_INET_FORWARD`.
const FORWARD: u32 = 2;

pub fn facts(
    host: &Host,
    tables: &Tables,
    live: &[&Record],
    chosen: Option<BackendKind>,
    node: &NodeFacts,
    links: &[Link],
) -> Facts {
    let (mut chains, mut unread) = (Vec::new(), Vec::new());
    of_legacy(host, tables, &mut chains, &mut unread);
    match &tables.base_chains {
        Err(reason) => unread.push(("the chains of nf_tables".to_owned(), reason.clone())),
        Ok(all) => {
            for (family, table, chain) in all {
                if let Some(base) = chain.base.as_ref().filter(|base| base.hook == FORWARD) {
                    let found = of_nftables(host, tables, *family, table, &chain.name, base.drops);
                    chains.extend(found);
                }
            }
        }
    }
    let mut samples = real(host, live, node);
    let real = !samples.is_empty();
    if !real {
        samples = possible(chosen, node, links);
    }
    Facts {
        legacy: tables.count(Variant::Legacy),
        nft: tables.count(Variant::Nft),
        used: tables.used.map(Variant::name),
        chains,
        unread,
        samples,
        real,
    }
}

/// Tables of iptables with a chain FORWARD that drops what its rules or its policy say.
const TABLES: [&str; 3] = ["filter", "mangle", "security"];

fn of_legacy(
    host: &Host,
    tables: &Tables,
    chains: &mut Vec<ForwardChain>,
    unread: &mut Vec<(String, String)>,
) {
    for table in TABLES {
        for (variant, family, present) in tables.with(table) {
            if variant != Variant::Legacy {
                continue;
            }
            match present.and_then(|()| tables.list(host, variant, family, table)) {
                Err(reason) => {
                    let tool = named(variant.name(), family);
                    let what = format!("chain FORWARD of table {table} ({tool})");
                    // Which tables there are is read at once.
                    if unread.last().is_none_or(|(_, known)| *known != reason) {
                        unread.push((what, reason));
                    }
                }
                Ok(text) => chains.push(of_tool(tables, variant, family, table, Ok(&text))),
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
    text: Result<&str, String>,
) -> ForwardChain {
    let tool = tables.tool(variant, family).unwrap_or_default();
    let (drops, rules) = match text.map(of_iptables) {
        Ok((drops, rules)) => (drops, Ok(rules)),
        Err(reason) => (false, Err(reason)),
    };
    // Docker's is made for that, and outlives its restarts.
    let docker = rules.as_ref().is_ok_and(|rules| rules.contains_key("DOCKER-USER"));
    let chain = if docker { "DOCKER-USER" } else { "FORWARD" };
    let insert = match table {
        "filter" => format!("{tool} -I {chain}"),
        table => format!("{tool} -t {table} -I {chain}"),
    };
    ForwardChain {
        place: format!(
            "chain FORWARD of table {table} ({}, {family})",
            named(variant.name(), family)
        ),
        families: vec![family],
        entry: "FORWARD".into(),
        drops,
        rules,
        accept_translated: format!("{insert} -m conntrack --ctstate DNAT -j ACCEPT"),
        accept_device: format!("{insert} -o DEVICE -j ACCEPT; {insert} -i DEVICE -j ACCEPT"),
    }
}

/// `None` for one that lets everything through.
fn of_nftables(
    host: &Host,
    tables: &Tables,
    family: NftFamily,
    table: &str,
    entry: &str,
    drops: bool,
) -> Option<ForwardChain> {
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
    };
    if entry == "FORWARD"
        && TABLES.contains(&table)
        && let [only] = families.as_slice()
        && tables.tool(Variant::Nft, *only).is_ok()
    {
        let text = tables.list(host, Variant::Nft, *only, table);
        let text = text.as_deref().map_err(Clone::clone);
        return Some(ForwardChain { drops, ..of_tool(tables, Variant::Nft, *only, table, text) });
    }
    let rules = nft::list_table(host, name, table).map_err(|error| error.to_string());
    let insert = format!("nft insert rule {name} {table} {entry}");
    Some(ForwardChain {
        place: format!("chain {entry} of table {name} {table} (nftables)"),
        families,
        entry: entry.to_owned(),
        drops,
        rules: rules.map(|objects| of_nft(&objects)),
        accept_translated: format!("{insert} ct status dnat accept"),
        accept_device: format!("{insert} oifname DEVICE accept; {insert} iifname DEVICE accept"),
    })
}

/// First packets to the hostPorts that there are.
fn real(host: &Host, live: &[&Record], node: &NodeFacts) -> Vec<Sample> {
    let uplinks: Vec<String> = node.uplinks.iter().cloned().collect();
    let mut samples = Vec::new();
    for record in live {
        let pod = match record.pod.name.is_empty() {
            true => record.attachment.container_id.clone(),
            false => format!("{}/{}", record.pod.namespace, record.pod.name),
        };
        for family in Family::ALL {
            for forward in record.forwards(family) {
                let claim = forward.claim;
                let packet = Packet {
                    who: format!("{} {} of {pod}", claim.protocol, claim.port),
                    uplinks: uplinks.clone(),
                    // Without a route there is no device, and no rule for one is met.
                    device: host.device_towards(forward.target.ip()).ok().flatten(),
                    protocol: claim.protocol,
                    target: Some(forward.target),
                    translated: record.backend != BackendKind::Ebpf,
                };
                samples.push((family, packet));
            }
        }
    }
    samples
}

/// First packets to pods that may come: behind each device that does not lead out of the node.
fn possible(chosen: Option<BackendKind>, node: &NodeFacts, links: &[Link]) -> Vec<Sample> {
    let inside = links.iter().filter(|link| {
        // Docker's own containers are behind its bridge.
        !link.loopback
            && link.master.is_none()
            && !node.uplinks.contains(&link.name)
            && link.name != "docker0"
    });
    let mut devices: Vec<Option<String>> = inside.map(|link| Some(link.name.clone())).collect();
    if devices.is_empty() {
        devices.push(None);
    }
    let sample = |family: Family, device: Option<String>| {
        let packet = Packet {
            who: "a pod".into(),
            uplinks: node.uplinks.iter().cloned().collect(),
            device,
            protocol: Protocol::Tcp,
            target: None,
            translated: chosen != Some(BackendKind::Ebpf),
        };
        (family, packet)
    };
    Family::ALL
        .into_iter()
        .flat_map(|family| devices.iter().map(move |device| (family, device.clone())))
        .map(|(family, device)| sample(family, device))
        .collect()
}
