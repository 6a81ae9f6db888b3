//! Chains that forwarded packets meet, and packets to hostPorts.

use super::super::firewall::{Facts, Sample};
use super::super::rules::Packet;
use super::chains::{Stage, chains};
use super::tables::Tables;
use crate::facts::NodeFacts;
use crate::model::{BackendKind, Claim, Family, Protocol};
use crate::record::Record;
use crate::sys::Host;
use crate::sys::iptables::Variant;
use crate::sys::netlink::route::Link;

pub fn facts(
    host: &Host,
    tables: &Tables,
    live: &[&Record],
    chosen: Option<BackendKind>,
    node: &NodeFacts,
    links: &[Link],
) -> Facts {
    let (chains, unread) = chains(host, tables, Stage::Forwarded);
    let mut samples = real(host, live);
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
        uplinks: node.uplinks.iter().cloned().collect(),
        samples,
        real,
    }
}

/// First packets to the hostPorts that there are.
fn real(host: &Host, live: &[&Record]) -> Vec<Sample> {
    let mut samples = Vec::new();
    for record in live {
        for family in Family::ALL {
            for forward in record.forwards(family) {
                let claim = forward.claim;
                let packet = Packet {
                    who: who(record, &claim),
                    // Without a route there is no device, and no rule for one is met.
                    device: host.device_towards(forward.target.ip()).ok().flatten(),
                    protocol: claim.protocol,
                    target: Some(forward.target),
                    is_local: false,
                    translated: record.backend != BackendKind::Ebpf,
                };
                samples.push((family, packet));
            }
        }
    }
    samples
}

/// `tcp 8080 of default/web`.
pub fn who(record: &Record, claim: &Claim) -> String {
    let pod = match record.pod.name.is_empty() {
        true => record.attachment.container_id.clone(),
        false => format!("{}/{}", record.pod.namespace, record.pod.name),
    };
    format!("{} {} of {pod}", claim.protocol, claim.port)
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
            device,
            protocol: Protocol::Tcp,
            target: None,
            is_local: false,
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
