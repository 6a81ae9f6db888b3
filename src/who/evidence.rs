//! What others have on the node that could take a port's packets, as it was read.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::cilium::{self, Entries, Frontend};
use crate::backend::iptables::listing::Listing;
use crate::backend::nftables::{scaffold, upstream};
use crate::error::Result;
use crate::model::{Claim, Family, Protocol};
use crate::sys::Host;
use crate::sys::bpf::map::Map;
use crate::sys::iptables::{Variant, nat_tables};
use crate::sys::netlink::nftables::{NftFamily, NftReader};
use crate::sys::netlink::nftkey::Key;
use crate::sys::netlink::socket_diag::{Waiting, waiting_on};
use crate::sys::process::{Process, owners};

/// kube-proxy's table in the families ip and ip6 (its mode nftables, Kubernetes 1.29).
const KUBE_PROXY: &str = "kube-proxy";

/// A NodePort in kube-proxy's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub family: Family,
    pub protocol: Protocol,
    /// Where its element leads; names the Service.
    pub chain: String,
    /// The node's addresses that have it; empty: all of them.
    pub addresses: BTreeSet<IpAddr>,
    /// Of the base chain that looks it up.
    pub priority: i32,
}

impl Service {
    /// Where it was found.
    #[must_use]
    pub fn place(&self) -> String {
        format!("table {} {KUBE_PROXY} @service-nodeports", ip_name(self.family))
    }
}

/// A process's socket that waits for traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    pub protocol: Protocol,
    pub socket: Waiting,
    /// None if /proc does not tell.
    pub processes: BTreeSet<Process>,
}

/// Everything about one port.
#[derive(Debug, Clone, Default)]
pub struct Evidence {
    /// The node's addresses, those of loopback included.
    pub local: BTreeSet<IpAddr>,
    /// Addresses of the calls that are the node's by a route alone.
    pub routed: BTreeSet<IpAddr>,
    pub nat: Vec<(Family, Variant, Listing)>,
    pub services: Vec<Service>,
    pub listeners: Vec<Listener>,
    /// Entries of Cilium's maps of services, of any port.
    pub cilium: BTreeMap<Family, Entries>,
}

impl Evidence {
    /// Cilium's frontends of a call.
    #[must_use]
    pub fn frontends(&self, call: &Claim) -> Vec<Frontend> {
        let entries = self.cilium.get(&call.family);
        entries.map(|entries| cilium::frontends(call, entries)).unwrap_or_default()
    }

    /// The processes that would get a call if nothing were forwarded, in words.
    #[must_use]
    pub fn processes(&self, call: &Claim) -> Vec<String> {
        let gets =
            |listener: &&Listener| listener.protocol == call.protocol && listener.socket.gets(call);
        let mut words: Vec<String> = self
            .listeners
            .iter()
            .filter(gets)
            .map(|listener| describe(listener, call.port))
            .collect();
        words.dedup();
        words
    }

    /// Reads it. What cannot be read is a warning of the host; of tables nat the survey has said it.
    pub fn read(
        host: &Host,
        port: u16,
        protocols: &[Protocol],
        calls: &BTreeSet<Claim>,
    ) -> Result<Self> {
        let facts = host.node_facts()?;
        let called = calls.iter().filter_map(|call| call.address);
        let is_routed = |ip: &IpAddr| !facts.binds_services && host.is_local_by_route(&facts, *ip);
        let routed = called.filter(is_routed).collect();
        let mut local = facts.addresses;
        local.extend([IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]);
        let mut evidence = Evidence { local, routed, ..Self::default() };
        for family in Family::ALL {
            for (variant, listing) in nat_tables(host, family) {
                evidence.nat.extend(listing.ok().map(|listing| (family, variant, listing)));
            }
            // A kernel without bpf(2) has no bpffs, and so no path.
            let opened = Map::from_pin(Path::new(cilium::map_path(family)));
            match opened.and_then(|map| map.map(|map| map.entries()).transpose()) {
                Ok(entries) => drop(evidence.cilium.insert(family, entries.unwrap_or_default())),
                Err(error) => {
                    host.warn(format!("{} cannot be read: {error}", cilium::map_path(family)));
                }
            }
        }
        if let Err(error) = evidence.read_tables(host, port, protocols) {
            host.warn(format!("nf_tables cannot be read: {error}"));
        }
        if let Err(error) = evidence.read_sockets(port, protocols) {
            host.warn(format!("whether processes wait for it cannot be read: {error}"));
        }
        Ok(evidence)
    }

    fn read_sockets(&mut self, port: u16, protocols: &[Protocol]) -> std::io::Result<()> {
        for protocol in protocols {
            let found = waiting_on(*protocol, port)?;
            self.listeners.extend(found.into_iter().map(|socket| Listener {
                protocol: *protocol,
                socket,
                processes: BTreeSet::new(),
            }));
        }
        let inodes = self.listeners.iter().map(|listener| listener.socket.inode).collect();
        let mut owners = owners(&inodes)?;
        for listener in &mut self.listeners {
            listener.processes = owners.remove(&listener.socket.inode).unwrap_or_default();
        }
        Ok(())
    }

    /// kube-proxy's table, and a note of others' chains, whose rules only nft could tell.
    fn read_tables(
        &mut self,
        host: &Host,
        port: u16,
        protocols: &[Protocol],
    ) -> std::io::Result<()> {
        let Ok(mut nft) = NftReader::open() else {
            return Ok(());
        };
        let mut others = BTreeSet::new();
        for (nft_family, name) in
            [(NftFamily::Ip, "ip"), (NftFamily::Ip6, "ip6"), (NftFamily::Inet, "inet")]
        {
            // EINVAL: the kernel has no nf_tables, or not for this family.
            let chains = nft.all_chains(nft_family).unwrap_or_default();
            let family = match nft_family {
                NftFamily::Ip => Some(Family::V4),
                NftFamily::Ip6 => Some(Family::V6),
                NftFamily::Inet | NftFamily::Netdev => None,
            };
            for (table, chain) in chains {
                let Some(base) =
                    chain.base.filter(|base| base.kind == "nat" && [0, 3].contains(&base.hook))
                else {
                    continue;
                };
                match (family, table.as_str()) {
                    (None, scaffold::TABLE) | (Some(_), upstream::TABLE | "nat") => {}
                    (Some(family), KUBE_PROXY) => {
                        if base.hook == 0 {
                            self.read_kube_proxy(&mut nft, family, base.priority, port, protocols)?;
                        }
                    }
                    _ => {
                        others.insert(format!(
                            "chain {} of table {name} {table} translates addresses at priority {} and was not looked into (nft list table {name} {table})",
                            chain.name, base.priority
                        ));
                    }
                }
            }
        }
        others.into_iter().for_each(|note| host.warn(note));
        Ok(())
    }

    fn read_kube_proxy(
        &mut self,
        nft: &mut NftReader,
        family: Family,
        priority: i32,
        port: u16,
        protocols: &[Protocol],
    ) -> std::io::Result<()> {
        let mut addresses = BTreeSet::new();
        for ip in self.local.iter().filter(|ip| Family::of(ip) == family) {
            let key = Key::new().ip(*ip).bytes();
            if nft.element(family.into(), KUBE_PROXY, "nodeport-ips", &key)?.is_some() {
                addresses.insert(*ip);
            }
        }
        for protocol in protocols {
            let key = Key::new().proto(protocol.number()).port(port).bytes();
            let found = nft.element(family.into(), KUBE_PROXY, "service-nodeports", &key)?;
            if let Some(chain) = found.and_then(|element| element.goto) {
                let addresses = addresses.clone();
                let protocol = *protocol;
                self.services.push(Service { family, protocol, chain, addresses, priority });
            }
        }
        Ok(())
    }
}

fn ip_name(family: Family) -> &'static str {
    crate::backend::nftables::objects::ip_name(family)
}

fn describe(listener: &Listener, port: u16) -> String {
    let bound: Vec<String> = listener
        .socket
        .addresses
        .iter()
        .map(|ip| std::net::SocketAddr::new(*ip, port).to_string())
        .collect();
    let who: Vec<String> = listener
        .processes
        .iter()
        .map(|process| format!("{} (pid {})", process.name, process.pid))
        .collect();
    let who = match who.is_empty() {
        true => "a process that /proc does not show".to_owned(),
        false => who.join(", "),
    };
    format!("{who} on {}", bound.join(", "))
}
