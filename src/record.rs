//! Records: what an attachment asked for and what was done about it.
//!
//! Desired state is a pure function of all records, so a record holds everything that rendering
//! needs. It is written before the kernel is changed and removed after.

mod keys;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256, Sha512};

use crate::conf::Options;
use crate::error::{Error, Result};
use crate::model::{Attachment, BackendKind, Claim, Family, Forward, Mapping};
pub use keys::{IndexKey, Part};

/// Version of the records' format. Readers leave newer ones alone.
pub const FORMAT: u32 = 1;

/// The pod behind a container, as Kubernetes runtimes name it in `CNI_ARGS`; empty if unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PodIdentity {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// What a path has led to, and where it was given: in other PID and mount namespaces it may lead elsewhere,
/// and a process's number is another's one day. All but `dir` are inodes of namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Of a path below /proc, which is another process's elsewhere.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pids: Option<u64>,
    pub mounts: u64,
    /// The node's network namespace, in which the rules are.
    pub node: u64,
    /// The pod's network namespace; `None` if the path did not lead to one.
    pub netns: Option<u64>,
    /// Device and inode of the directory that the path is in, other than of a process.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dir: Option<(u64, u64)>,
}

/// One attachment with mappings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub format: u32,
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Path of the pod's network namespace, as the runtime gave it.
    pub netns: String,
    /// Where that path was given.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub view: Option<View>,
    #[serde(default)]
    pub pod: PodIdentity,
    pub mappings: Vec<Mapping>,
    /// The pod's address and mask, at most one per family, IPv4 first.
    pub addresses: Vec<IpNetwork>,
    #[serde(default)]
    pub options: Options,
    pub backend: BackendKind,
    /// The attachment's chain in iptables' table nat.
    pub chain: String,
    /// The device whose `route_localnet` the attachment needs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub localnet_device: Option<String>,
    /// `conditionsV4` and `conditionsV6` as nft's JSON statements (nftables backend only).
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub statements_v4: Vec<serde_json::Value>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub statements_v6: Vec<serde_json::Value>,
    /// eBPF: the node's addresses that masqAll shows to the pod, at most one per family.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub masquerade_as: Vec<IpAddr>,
    /// eBPF: the MAC address of a pod that shares a device of the node (macvlan), as
    /// `02:00:00:00:00:01`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mac: Option<String>,
    /// Nanoseconds since boot (CLOCK_BOOTTIME) of the ADD: the newest claim has the highest.
    pub order: u64,
    /// Seconds since 1970 of the ADD, for people.
    pub time: u64,
    #[serde(skip)]
    pub known_id: KnownId,
}

/// A record's id, once somebody has asked for it: a hash, which everything asks for that is done with a
/// record. It is no part of what records say: all are equal, and a copy, which may become another
/// attachment's record, begins without.
#[derive(Debug, Default)]
pub struct KnownId(OnceLock<String>);

impl Clone for KnownId {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for KnownId {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for KnownId {}

/// Name of a record: hex digits, from all three parts of the key.
#[must_use]
pub fn record_id(attachment: &Attachment) -> String {
    let mut hash = Sha256::new();
    for part in [&attachment.network, &attachment.container_id, &attachment.ifname] {
        // Lengths frame the parts, so that "ab" + "c" is not "a" + "bc".
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hex(&hash.finalize(), 32)
}

/// Who rules belong to, for comments: start of the container ID, interface and network, cut
/// to nft's limit of 128 bytes with the terminator.
#[must_use]
pub fn owner_of(attachment: &Attachment) -> String {
    let Attachment { network, container_id, ifname } = attachment;
    let container: String = container_id.chars().take(64).collect();
    let mut owner = format!("{container} {ifname} {network}");
    owner.truncate(127);
    owner
}

/// Upstream's chain name: `CNI-DN-` and 21 hex digits of SHA-512 over network name and container
/// ID, 28 characters in all. Never change it: running pods have these chains.
#[must_use]
pub fn chain_name(network: &str, container_id: &str) -> String {
    let mut hash = Sha512::new();
    hash.update(network);
    hash.update(container_id);
    format!("CNI-DN-{}", hex(&hash.finalize(), 21))
}

/// The chain of a further interface of the same container on the same network, for which upstream
/// would use the first one's.
#[must_use]
pub fn chain_name_of_interface(attachment: &Attachment) -> String {
    let mut hash = Sha512::new();
    for part in [&attachment.network, &attachment.container_id, &attachment.ifname] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    format!("CNI-DN-{}", hex(&hash.finalize(), 21))
}

/// The chain that upstream before 0.7 made for masquerading; still to be removed on DEL.
#[must_use]
pub fn old_snat_chain(chain: &str) -> String {
    chain.replacen("CNI-DN-", "CNI-SN-", 1)
}

/// The first hex digits of a digest.
#[must_use]
pub fn hex(bytes: &[u8], digits: usize) -> String {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)]);
        text.push(DIGITS[usize::from(byte & 0xf)]);
    }
    text.truncate(digits);
    text
}

impl Record {
    /// A record as it follows from a call alone: made nowhere, of no time, with upstream's chain name.
    #[must_use]
    pub fn new(
        attachment: Attachment,
        mappings: Vec<Mapping>,
        addresses: Vec<IpNetwork>,
        options: Options,
        backend: BackendKind,
    ) -> Self {
        Record {
            format: FORMAT,
            chain: chain_name(&attachment.network, &attachment.container_id),
            attachment,
            netns: String::new(),
            view: None,
            pod: PodIdentity::default(),
            mappings,
            addresses,
            options,
            backend,
            localnet_device: None,
            statements_v4: Vec::new(),
            statements_v6: Vec::new(),
            masquerade_as: Vec::new(),
            mac: None,
            order: 0,
            time: 0,
            known_id: KnownId::default(),
        }
    }

    /// [`record_id`] of the attachment, which is not to change from then on.
    #[must_use]
    pub fn id(&self) -> &str {
        self.known_id.0.get_or_init(|| record_id(&self.attachment))
    }

    /// The record as it is in its file.
    ///
    /// # Errors
    ///
    /// None that is known of: a record has nothing that JSON cannot say.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|error| Error::Decode(error.to_string()))
    }

    /// The pod's address and mask of one family.
    #[must_use]
    pub fn network(&self, family: Family) -> Option<IpNetwork> {
        self.addresses.iter().copied().find(|network| Family::of(&network.ip()) == family)
    }

    /// Families in which the pod has an address.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        Family::ALL.into_iter().filter(|family| self.network(*family).is_some())
    }

    /// Forwards of one family, in the order of the mappings.
    #[must_use]
    pub fn forwards(&self, family: Family) -> Vec<Forward> {
        let Some(network) = self.network(family) else {
            return Vec::new();
        };
        self.mappings
            .iter()
            .filter_map(|mapping| {
                Some(Forward {
                    claim: mapping.claim(family)?,
                    target: SocketAddr::new(network.ip(), mapping.container_port),
                })
            })
            .collect()
    }

    /// Claims of both families.
    #[must_use]
    pub fn claims(&self) -> BTreeSet<Claim> {
        Family::ALL
            .into_iter()
            .flat_map(|family| self.forwards(family))
            .map(|forward| forward.claim)
            .collect()
    }

    /// Whether sources on the same node must be masqueraded although the mask does not show them:
    /// a host prefix says nothing about neighbours, and their replies may bypass the host's stack
    /// (Cilium, cilium/cilium#9784).
    #[must_use]
    pub fn masquerades_neighbours(&self, family: Family) -> bool {
        // eBPF puts replies right at the pods' links, whichever way they take.
        self.backend != BackendKind::Ebpf
            && !self.options.no_snat
            && !self.options.masq_all
            && self.network(family).is_some_and(|network| network.prefix() == family.max_prefix())
            && !self.forwards(family).is_empty()
    }

    /// Whether connections from 127.0.0.1 are to be forwarded by rules, for which they need
    /// `route_localnet`. eBPF acts before there are packets.
    #[must_use]
    pub fn routes_loopback(&self) -> bool {
        self.backend != BackendKind::Ebpf
            && !self.options.no_snat
            && self.forwards(Family::V4).iter().any(|forward| forward.claim.covers_loopback())
    }

    /// Whether the pod never sees a caller's own address.
    #[must_use]
    pub fn masquerades_all(&self) -> bool {
        self.options.masq_all && !self.options.no_snat
    }

    /// [`owner_of`] the attachment.
    #[must_use]
    pub fn owner(&self) -> String {
        owner_of(&self.attachment)
    }

    /// What other records are found by: everything two records could compete for or share.
    #[must_use]
    pub fn index_keys(&self) -> BTreeSet<IndexKey> {
        let devices = self.localnet_device.iter().map(|device| IndexKey::Localnet(device.clone()));
        let chain = self.has_chain().then(|| IndexKey::Chain(self.chain.clone()));
        self.rival_keys()
            .chain(devices)
            .chain(chain)
            .chain([IndexKey::Backend(self.backend)])
            .chain(self.parts().into_iter().map(|part| IndexKey::Part(self.backend, part)))
            .collect()
    }

    /// Whether the kernel has a chain of this attachment, whose name nobody else may have.
    #[must_use]
    pub fn has_chain(&self) -> bool {
        self.backend != BackendKind::Ebpf
    }

    /// Those of the `index_keys` by which records are in each other's way: ports and pods' addresses.
    pub fn rival_keys(&self) -> impl Iterator<Item = IndexKey> + '_ {
        let pods = self.addresses.iter().map(|network| IndexKey::Pod(network.ip()));
        self.port_keys().chain(pods)
    }

    /// Those of the `index_keys` that stand for ports.
    pub fn port_keys(&self) -> impl Iterator<Item = IndexKey> + '_ {
        self.mappings.iter().map(|mapping| IndexKey::Port(mapping.protocol, mapping.host_port))
    }

    /// The shared pieces of the backend's rules that the attachment needs. None of eBPF's: what is loaded stays
    /// when the last attachment goes.
    #[must_use]
    pub fn parts(&self) -> BTreeSet<Part> {
        let mut parts = BTreeSet::new();
        if self.backend == BackendKind::Ebpf {
            return parts;
        }
        for family in self.families() {
            parts.insert(Part::Base(family));
            if self.options.no_snat {
                continue;
            }
            match self.backend {
                BackendKind::Iptables if self.options.external_set_mark_chain.is_none() => {
                    parts.insert(Part::Mark(family, self.options.mark().trailing_zeros()));
                }
                BackendKind::Nftables if self.options.mark_masq_bit.is_some() => {
                    parts.insert(Part::Mark(family, self.options.mark().trailing_zeros()));
                }
                BackendKind::Nftables => {
                    if let Some(network) = self.network(family).filter(|_| !self.options.masq_all) {
                        parts.insert(Part::Near(family, network.prefix()));
                    }
                }
                BackendKind::Iptables | BackendKind::Ebpf => {}
            }
            if self.masquerades_neighbours(family) {
                parts.insert(Part::Neighbours(family));
            }
        }
        for family in self.families().filter(|family| self.needs_own_chains(*family)) {
            parts.insert(Part::OwnChains(family));
        }
        if self.localnet_device.is_some() {
            parts.insert(Part::Guard);
        }
        parts
    }

    /// nftables: conditions and marks cannot be map elements.
    #[must_use]
    pub fn needs_own_chains(&self, family: Family) -> bool {
        self.backend == BackendKind::Nftables
            && (self.options.mark_masq_bit.is_some() || !self.options.conditions(family).is_empty())
    }
}

#[cfg(test)]
pub mod samples {
    //! Records for tests of other modules.

    use super::*;
    use crate::model::Protocol;

    /// A record of container `id` with the given addresses and mappings
    /// (`protocol hostPort containerPort [hostIP]`).
    pub fn record(
        id: &str,
        addresses: &[&str],
        mappings: &[&str],
        backend: BackendKind,
        order: u64,
    ) -> Record {
        let mappings = mappings
            .iter()
            .map(|text| {
                let mut words = text.split(' ');
                let mut word = || words.next();
                Mapping {
                    protocol: Protocol::parse(word().unwrap_or_default()).unwrap_or(Protocol::Tcp),
                    host_port: word().and_then(|port| port.parse().ok()).unwrap_or(1),
                    container_port: word().and_then(|port| port.parse().ok()).unwrap_or(1),
                    host_ip: word().and_then(|ip| ip.parse().ok()),
                }
            })
            .collect();
        let attachment = Attachment {
            network: "portmap".into(),
            container_id: id.into(),
            ifname: "eth0".into(),
        };
        let addresses = addresses.iter().filter_map(|text| text.parse().ok()).collect();
        let record = Record::new(attachment, mappings, addresses, Options::default(), backend);
        Record { order, ..record }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    const ID: &str = "d629b42b837dcb40bc6a45f2486e76616c72ca15a3dc5cefe2f881ebd0d8222c";

    #[test]
    fn chain_names_are_upstream_s() {
        assert_eq!(chain_name("portmap", ID), "CNI-DN-dae2e2caa00ed8d022728");
        assert_eq!(chain_name("portmap", ID).len(), 28);
        assert_eq!(old_snat_chain("CNI-DN-dae2e2caa00ed8d022728"), "CNI-SN-dae2e2caa00ed8d022728");
    }

    #[test]
    fn all_three_parts_of_the_key_count() {
        let key = |network: &str, container_id: &str, ifname: &str| {
            record_id(&Attachment {
                network: network.into(),
                container_id: container_id.into(),
                ifname: ifname.into(),
            })
        };
        let all =
            [key("ab", "c", "e"), key("a", "bc", "e"), key("a", "b", "ce"), key("a", "b", "c")];
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 4);
        assert!(all.iter().all(|id| id.len() == 32));
    }

    #[test]
    fn a_copy_may_become_another_attachment_s() {
        let one = samples::record("a", &["10.0.0.2/32"], &["tcp 80 80"], BackendKind::Ebpf, 1);
        let id = one.id().to_owned();
        let mut other = one.clone();
        assert_eq!(one, other);
        other.attachment.ifname = "net1".into();
        assert_ne!(other.id(), id);
        assert_eq!(one.id(), record_id(&one.attachment));
    }

    #[test]
    fn only_rules_reserve_a_chain() {
        for kind in BackendKind::ALL {
            let one = samples::record("a", &["10.0.0.2/32"], &["tcp 80 80"], kind, 1);
            let chain = IndexKey::Chain(one.chain.clone());
            assert_eq!(one.index_keys().contains(&chain), kind != BackendKind::Ebpf);
        }
    }

    #[test]
    fn records_survive_their_file() {
        let mut record = samples::record(
            ID,
            &["10.0.1.7/32", "fd00::7/128"],
            &["tcp 80 8080 192.0.2.1", "udp 53 53"],
            BackendKind::Nftables,
            7,
        );
        record.options.conditions_v4 = vec!["ip saddr 10.0.0.0/8".into()];
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        for part in record.parts() {
            assert_eq!(Part::parse(&part.name()), Some(part));
        }
    }
}
