//! Ways to forward. Each backend renders records (pure), changes the kernel in one transaction,
//! and reads it back. Inside each: what follows from records, the scripts sent, the way back.

pub mod ebpf;
pub mod iptables;
pub mod nftables;

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::model::{Attachment, BackendKind, Claim, Family, Forward};
use crate::record::{IndexKey, Part, Record};
use crate::sys::Host;

/// A step from one set of records to another.
pub struct Change<'a> {
    pub added: Option<&'a Record>,
    pub removed: Option<&'a Record>,
    /// Every other record of this backend that shares a port or a pod address with these two,
    /// oldest first.
    pub related: &'a [Record],
    /// Parts that records need before and after the step.
    pub parts_before: &'a BTreeSet<Part>,
    pub parts_after: &'a BTreeSet<Part>,
    /// No attachment had this backend before.
    pub is_first: bool,
    /// The node as the rules know it, and as it is.
    pub facts_before: &'a NodeFacts,
    pub facts: &'a NodeFacts,
    /// Parts that were there before this plugin needed them: others' scaffold.
    pub kept: &'a BTreeSet<Part>,
}

impl Change<'_> {
    /// Families of either record.
    #[must_use]
    pub fn families(&self) -> BTreeSet<Family> {
        self.added.iter().chain(&self.removed).flat_map(|record| record.families()).collect()
    }

    /// Parts that nothing needs any more.
    #[must_use]
    pub fn gone(&self) -> BTreeSet<Part> {
        self.parts_before.difference(self.parts_after).copied().collect()
    }

    /// Whether a part is needed for the first time.
    #[must_use]
    pub fn begins_a_part(&self) -> bool {
        !self.parts_after.is_subset(self.parts_before)
    }
}

/// What the whole of a backend's rules should be.
pub struct Desired<'a> {
    /// All records of this backend, oldest first.
    pub records: &'a [Record],
    /// Parts that any record of this backend needs, also a dead pod's and a newer portmap's, for which
    /// nothing else is put back: their `route_localnet` is on, and needs its guard.
    pub parts: &'a BTreeSet<Part>,
    /// The one of them that is being added.
    pub added: Option<&'a Record>,
    /// Chains of attachments that must be gone.
    pub purge: &'a BTreeSet<String>,
    /// Families that must be brought in order even if no record has them.
    pub families: &'a BTreeSet<Family>,
    pub facts: &'a NodeFacts,
    /// As in `Change`.
    pub kept: &'a BTreeSet<Part>,
    /// Parts that a record had which is gone or replaced.
    pub gone: &'a BTreeSet<Part>,
    /// Parts that a record needs for the first time: those that exist are somebody else's.
    pub first: &'a BTreeSet<Part>,
}

/// How a transaction on the fast path ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The kernel is not in the state the step begins from, or the step is of a kind that only
    /// the slow path can do. Nothing was changed, or not in every table.
    NeedsRestore(String),
}

/// Why a backend cannot be used.
#[derive(Debug)]
pub enum Unusable {
    /// For good, as far as can be told.
    Broken(String),
    /// Another process has what the trial needs, or what is on the node took too long: nothing was found out.
    Busy(Error),
}

/// What forwards and has no record: upstream's plugin made it, or the record is lost.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leftover {
    /// Where it is, such as `iptables-legacy`.
    pub place: String,
    /// Chain or entry, for people who look for it.
    pub object: String,
    /// As its comments tell; empty if they do not.
    pub network: String,
    pub container_id: String,
    pub forwards: BTreeSet<Forward>,
}

impl Leftover {
    /// Whether upstream's nftables backend has made it, in a table of its own.
    #[must_use]
    pub fn is_of_upstream(&self) -> bool {
        self.place == "nftables" && self.object.ends_with(nftables::upstream::TABLE)
    }

    /// How it may have come about, and what takes it away.
    #[must_use]
    pub fn explain(&self) -> &'static str {
        match self.place.as_str() {
            "ebpf" => {
                "its record is lost; the container's DEL or the next repair of the maps removes it"
            }
            "nftables" if !self.is_of_upstream() => {
                "its record is lost; the container's DEL or its network's GC removes it"
            }
            "nftables" => "upstream's portmap made it; the container's DEL removes it",
            _ => {
                "upstream's portmap made it, or the record is lost; the container's DEL or its network's GC removes it"
            }
        }
    }
}

/// One thing that a packet meets on its way to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Where, such as `nat PREROUTING`.
    pub place: String,
    /// The rule or entry: as it is, or as it should be.
    pub what: String,
    /// Whether it is there.
    pub found: bool,
}

/// Packets of a claim so far; bytes are those of IP packets.
pub use ebpf::layout::Traffic as Counters;

/// Reading.
pub trait Observe {
    /// Whether the backend works on this node, tried out in a network namespace of its own.
    fn probe(&self, host: &Host) -> Result<(), Unusable>;

    /// Whether one that works does so for IPv6, where that is a matter of its own.
    fn probe_ipv6(&self, _host: &Host) -> Result<(), Unusable> {
        Ok(())
    }

    /// Whether one that works can do so beside what others have in this network namespace.
    fn probe_node(&self, _host: &Host, _ipv6: bool) -> Result<(), Unusable> {
        Ok(())
    }

    /// Why it should not be chosen without being asked for although it works, and how to ask for it.
    fn objection(&self, _host: &Host) -> Option<String> {
        None
    }

    /// Where the kernel differs from what the record asks for, in the field's terms. `related` as in
    /// `Change`; `parts` are those that all records need, `facts` the node as the
    /// rules know it. `recorded` is false for an attachment
    /// that upstream's plugin made.
    fn problems(
        &self,
        host: &Host,
        record: &Record,
        related: &[Record],
        parts: &BTreeSet<Part>,
        facts: &NodeFacts,
        recorded: bool,
    ) -> Result<Vec<String>>;

    /// `problems` of each of the backend's records, which are all of them.
    fn survey(
        &self,
        host: &Host,
        records: &[Record],
        parts: &BTreeSet<Part>,
        facts: &NodeFacts,
    ) -> Result<Vec<Vec<String>>> {
        records
            .iter()
            .zip(related(records))
            .map(|(record, related)| self.problems(host, record, &related, parts, facts, true))
            .collect()
    }

    /// What a backend has counted for claims that are active.
    fn counters(
        &self,
        _host: &Host,
        _claims: &BTreeSet<Claim>,
    ) -> Result<BTreeMap<Claim, Counters>> {
        Ok(BTreeMap::new())
    }

    /// What has become of packets that concern hostPorts, since the maps that count them were made: how many, by
    /// the name of the reason. Nothing from a backend that counts claims or rules alone.
    fn packets(&self, _host: &Host) -> Result<BTreeMap<&'static str, u64>> {
        Ok(BTreeMap::new())
    }

    /// What forwards and belongs to none of the records, which are all of the backend's. What cannot
    /// be read is a warning of the host.
    fn leftovers(&self, host: &Host, records: &[Record]) -> Result<Vec<Leftover>>;

    /// What a packet to a claim of the record meets here, in its order. The rest is as in `problems`.
    fn path(
        &self,
        host: &Host,
        record: &Record,
        claim: &Claim,
        related: &[Record],
        parts: &BTreeSet<Part>,
    ) -> Result<Vec<Step>>;
}

/// For each of the records, in their order, the others that share a port or a pod's address with it.
fn related(records: &[Record]) -> Vec<Vec<Record>> {
    let mut users: BTreeMap<IndexKey, BTreeSet<usize>> = BTreeMap::new();
    for (index, record) in records.iter().enumerate() {
        for key in record.rival_keys() {
            users.entry(key).or_default().insert(index);
        }
    }
    let mut related: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); records.len()];
    for users in users.values() {
        for index in users {
            if let Some(related) = related.get_mut(*index) {
                related.extend(users.iter().filter(|other| *other != index));
            }
        }
    }
    let record = |index: usize| records.get(index).cloned();
    related.into_iter().map(|others| others.into_iter().filter_map(record).collect()).collect()
}

/// Writing.
pub trait Apply {
    /// Fails where nothing may be changed: what there is, is a newer portmap's.
    fn admit(&self, _host: &Host) -> Result<()> {
        Ok(())
    }

    /// Fails where an ADD would stop half-way for want of something that can be known before.
    fn prepare(&self, _host: &Host) -> Result<()> {
        Ok(())
    }

    /// The fast path.
    fn change(&self, host: &Host, change: &Change) -> Result<Outcome>;

    /// The slow path: from whatever there is to what is desired. Parts that turn out to be somebody
    /// else's are added to `kept`, also when it fails.
    fn restore(&self, host: &Host, desired: &Desired, kept: &mut BTreeSet<Part>) -> Result<()>;

    /// Removes what attachments have of which there is no record, because upstream's plugin made them or
    /// the record is lost. What that forwarded, and others' packets may still follow in conntrack, is
    /// added to `removed`, also when it fails.
    fn remove_unrecorded(
        &self,
        host: &Host,
        unrecorded: &Unrecorded,
        records: Recorded,
        removed: &mut BTreeSet<Forward>,
    ) -> Result<()>;

    /// A pod without mappings has come, which may call others' hostPorts. `links` are the names of
    /// its links on the host as the previous plugin tells them, possibly none.
    fn welcome(&self, _host: &Host, _links: &[String]) -> Result<()> {
        Ok(())
    }

    /// Takes away what outlives the last record.
    fn unload(&self, _host: &Host) -> Result<()> {
        Ok(())
    }
}

/// Attachments without a record.
pub enum Unrecorded<'a> {
    One {
        attachment: &'a Attachment,
        /// Upstream's name of its chain. `None`: another interface of the container on the network, which has
        /// a record, has what upstream's plugin would have made.
        chain: Option<&'a str>,
    },
    /// All of a network but these container IDs.
    AllBut {
        network: &'a str,
        keep: &'a BTreeSet<&'a str>,
        /// Chains that have a record.
        recorded: &'a BTreeSet<String>,
        /// Who is to stay, as [`crate::record::owner_of`] names it.
        owners: &'a BTreeSet<String>,
        /// Whether there is a record, even one that cannot be read.
        is_recorded: &'a dyn Fn(&Attachment) -> bool,
    },
}

/// All records of a backend, but that of the one attachment which is in question. Most often nobody has to
/// read them.
pub type Recorded<'a> = &'a dyn Fn() -> Result<Vec<Record>>;

/// A backend, both ways.
pub trait Backend: Observe + Apply {}

impl<T: Observe + Apply> Backend for T {}

/// The implementation of a kind.
#[must_use]
pub fn of(kind: BackendKind) -> &'static dyn Backend {
    match kind {
        BackendKind::Iptables => &iptables::Iptables,
        BackendKind::Nftables => &nftables::Nftables,
        BackendKind::Ebpf => &ebpf::Ebpf,
    }
}

/// An attachment that uses everything a backend has to be able to do, for probes. Its addresses are
/// of the ranges for documentation (RFC 5737, RFC 3849).
fn probe_record(backend: BackendKind, family: Family) -> Record {
    use crate::model::{Mapping, Protocol};
    let attachment =
        Attachment { network: "probe".into(), container_id: "probe".into(), ifname: "eth0".into() };
    let mapping = |protocol| Mapping { protocol, host_port: 1, container_port: 1, host_ip: None };
    let address: std::net::IpAddr = match family {
        Family::V4 => [192, 0, 2, 1].into(),
        Family::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into(),
    };
    Record {
        localnet_device: Some("eth0".into()),
        ..Record::new(
            attachment,
            vec![mapping(Protocol::Tcp), mapping(Protocol::Udp)],
            vec![address.into()],
            crate::conf::Options::default(),
            backend,
        )
    }
}
