//! Where the kernel differs from what records ask for.

use std::collections::BTreeSet;

use super::devices::{self, Matter};
use super::loaded::Loaded;
use super::{entries, failed, objects, sockets};
use crate::error::Result;
use crate::facts::SERVICES_UNKNOWN;
use crate::record::Record;
use crate::sys::Host;
use crate::sys::netlink::route::Link;

/// Where the maps differ from what a record asks for.
pub fn of_entries(loaded: &Loaded, record: &Record, related: &[Record]) -> Result<Vec<String>> {
    let keys = objects::keys(record);
    let expected = objects::claims_at(&keys, related, Some(record));
    let problems = entries::problems(&loaded.maps, &keys, &expected);
    let mut problems = problems.map_err(failed("read the eBPF maps"))?;
    if !loaded.expects(&expected)? {
        problems.push(
            "the eBPF programs take it for granted that there is no masqAll, or no hostIP".into(),
        );
    }
    Ok(problems)
}

/// What is wrong for all attachments, or for one of them and those that it has to do with.
pub fn of_node(host: &Host, loaded: &Loaded, of: Option<&Record>) -> Result<Vec<String>> {
    // As they are now: pods and the node's own sockets reach no others.
    let now = host.node_facts()?;
    let mut problems = entries::address_problems(&loaded.maps, &objects::addresses(&now))
        .map_err(failed("read the eBPF maps"))?;
    if now.binds_services && !loaded.takes_listed_only()? {
        problems.push(SERVICES_UNKNOWN.to_owned());
    }
    let links = host.links()?;
    let matter = match of {
        Some(record) => Matter::Of(devices_of(host, record, &links)?),
        None => Matter::All,
    };
    problems.extend(devices::problems(host, loaded, &links, &now, &matter)?);
    problems.extend(sockets::problems(host, loaded)?);
    Ok(problems)
}

/// What an attachment's packets pass on the node: its links, what leads to it, and bridges of these.
fn devices_of(host: &Host, record: &Record, links: &[Link]) -> Result<BTreeSet<u32>> {
    let mut own = host.links_of_pod(&record.netns);
    for network in &record.addresses {
        let device = host.device_towards(network.ip())?;
        own.extend(
            links.iter().filter(|link| device == Some(link.name.clone())).map(|link| link.index),
        );
    }
    let masters = links.iter().filter(|link| own.contains(&link.index));
    own.extend(masters.filter_map(|link| link.master).collect::<Vec<_>>());
    Ok(own)
}
