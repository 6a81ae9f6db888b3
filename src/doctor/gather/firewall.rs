//! Chains that drop forwarded packets, and the packets that they would drop.

use super::super::firewall::{DroppingChain, Facts, Sample};
use super::super::forward::{Packet, of_iptables, of_nft};
use super::tables::{Tables, named};
use crate::facts::NodeFacts;
use crate::model::{BackendKind, Family, Protocol};
use crate::record::Record;
use crate::sys::iptables::Variant;
use crate::sys::netlink::nftables::NftFamily;
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
    let (mut dropping, mut unread) = (Vec::new(), Vec::new());
    of_legacy(host, tables, &mut dropping, &mut unread);
    match &tables.base_chains {
        Err(reason) => unread.push(("the chains of nf_tables".to_owned(), reason.clone())),
        Ok(chains) => {
            let of_forward = chains.iter().filter(|(_, _, chain)| {
                chain.base.as_ref().is_some_and(|base| base.hook == FORWARD && base.drops)
            });
            for (family, table, chain) in of_forward {
                dropping.push(of_nftables(host, tables, *family, table, &chain.name));
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
        dropping,
        unread,
        samples,
        real,
    }
}

fn of_legacy(
    host: &Host,
    tables: &Tables,
    dropping: &mut Vec<DroppingChain>,
    unread: &mut Vec<(String, String)>,
) {
    for (variant, family, present) in tables.with("filter") {
        if variant != Variant::Legacy {
            continue;
        }
        match present.and_then(|()| tables.list(host, variant, family, "filter")) {
            Err(reason) => {
                unread.push((format!("chain FORWARD of {}", named(variant.name(), family)), reason))
            }
            Ok(text) => {
                let (drops, rules) = of_iptables(&text);
                if drops {
                    let tool = tables.tool(variant, family).unwrap_or_default();
                    let docker = rules.contains_key("DOCKER-USER");
                    dropping.push(DroppingChain {
                        rules: Ok(rules),
                        ..of_tool(variant, family, tool, docker)
                    });
                }
            }
        }
    }
}

/// The chain of iptables, with nothing known of its rules.
fn of_tool(variant: Variant, family: Family, tool: &str, docker: bool) -> DroppingChain {
    // Docker's is made for that, and outlives its restarts.
    let chain = if docker { "DOCKER-USER" } else { "FORWARD" };
    DroppingChain {
        place: format!(
            "chain FORWARD of table filter ({}, {family})",
            named(variant.name(), family)
        ),
        families: vec![family],
        entry: "FORWARD".into(),
        rules: Err(String::new()),
        accept_translated: format!("{tool} -I {chain} -m conntrack --ctstate DNAT -j ACCEPT"),
        accept_device: format!(
            "{tool} -I {chain} -o DEVICE -j ACCEPT; {tool} -I {chain} -i DEVICE -j ACCEPT"
        ),
    }
}

fn of_nftables(
    host: &Host,
    tables: &Tables,
    family: NftFamily,
    table: &str,
    entry: &str,
) -> DroppingChain {
    let (name, families) = match family {
        NftFamily::Inet => ("inet", Family::ALL.to_vec()),
        NftFamily::Ip => ("ip", vec![Family::V4]),
        NftFamily::Ip6 => ("ip6", vec![Family::V6]),
    };
    if (table, entry) == ("filter", "FORWARD")
        && let [only] = families.as_slice()
        && let Ok(tool) = tables.tool(Variant::Nft, *only)
    {
        let rules = tables.list(host, Variant::Nft, *only, table).map(|text| of_iptables(&text).1);
        let docker = rules.as_ref().is_ok_and(|rules| rules.contains_key("DOCKER-USER"));
        return DroppingChain { rules, ..of_tool(Variant::Nft, *only, tool, docker) };
    }
    let rules = nft::list_table(host, name, table).map_err(|error| error.to_string());
    let insert = format!("nft insert rule {name} {table} {entry}");
    DroppingChain {
        place: format!("chain {entry} of table {name} {table} (nftables)"),
        families,
        entry: entry.to_owned(),
        rules: rules.map(|objects| of_nft(&objects)),
        accept_translated: format!("{insert} ct status dnat accept"),
        accept_device: format!("{insert} oifname DEVICE accept; {insert} iifname DEVICE accept"),
    }
}

/// First packets to the hostPorts that there are.
fn real(host: &Host, live: &[&Record], node: &NodeFacts) -> Vec<Sample> {
    let uplink = node.uplinks.first();
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
                    uplink: uplink.cloned(),
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
            uplink: node.uplinks.first().cloned(),
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
