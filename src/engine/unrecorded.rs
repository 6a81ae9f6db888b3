//! Attachments that no record tells of: upstream's plugin made them, or the record is lost or damaged.

use std::collections::BTreeSet;

use super::Engine;
use super::effects::delete_flows;
use super::step::Lost;
use crate::backend::{self, Unrecorded, nftables};
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::flush::{Flush, Former};
use crate::model::{BackendKind, Claim, Family};
use crate::record::{Part, Record};
use crate::sys::Host;
use crate::sys::iptables::{self, Variant};
use crate::sys::store::Store;

/// Removes what there is of them, from all backends, and flows that it translated. Carries on
/// after an error and returns them all. `store` is `None` where nobody has a record.
pub fn remove_unrecorded(
    host: &Host,
    store: Option<&Store>,
    unrecorded: &Unrecorded,
) -> Vec<Error> {
    let mut removed = BTreeSet::new();
    let remove = |kind: BackendKind| {
        let records = || store.map_or(Ok(Vec::new()), |store| others(store, kind, unrecorded));
        backend::of(kind).remove_unrecorded(host, unrecorded, &records, &mut removed).err()
    };
    let errors = BackendKind::ALL.into_iter().filter_map(remove).collect();
    let former = Former::of_rules(&removed);
    if !former.is_empty() {
        match host.node_facts() {
            Ok(facts) => flush_former(host, store, &former, &facts),
            Err(error) => host.warn(format!("conntrack entries are not flushed: {error}")),
        }
    }
    errors
}

/// Claims for which rules of upstream's nftables backend would go before the record's, if there are any: programs
/// of eBPF see packets before rules do.
#[must_use]
pub fn behind_upstream(host: &Host, record: &Record) -> BTreeSet<Claim> {
    let is_behind = match record.backend {
        BackendKind::Nftables => true,
        // To ask a kernel whose iptables are legacy would load nf_tables.
        BackendKind::Iptables => iptables::used(host, Family::V4) == Some(Variant::Nft),
        BackendKind::Ebpf => false,
    };
    if is_behind { record.claims() } else { BTreeSet::new() }
}

/// The records of a backend that are to stay.
pub(super) fn others(
    store: &Store,
    kind: BackendKind,
    unrecorded: &Unrecorded,
) -> Result<Vec<Record>> {
    let goes = |record: &Record| match unrecorded {
        Unrecorded::One { attachment, .. } => record.attachment == **attachment,
        Unrecorded::AllBut { .. } => false,
    };
    let (mut records, _) = store.all()?;
    records.retain(|record| record.backend == kind && !goes(record));
    Ok(records)
}

fn flush_former(host: &Host, store: Option<&Store>, former: &Former, facts: &NodeFacts) {
    match store.map_or(Ok(Vec::new()), |store| store.sharing(&former.ports(), "")) {
        Ok(others) => delete_flows(host, &Flush::former(former, &others, facts)),
        Err(error) => host.warn(format!("conntrack entries are not flushed: {error}")),
    }
}

impl Engine<'_> {
    /// Lets the record have its claims where rules of upstream's nftables backend have them, too. Whether their
    /// container lives they do not tell; one that died without a DEL would have the port for good.
    pub fn take_from_upstream(&self, record: &Record, facts: &NodeFacts) {
        let claims = behind_upstream(self.host, record);
        // What conditions do not match is left to whoever has it.
        let (claims, conditional): (BTreeSet<Claim>, _) = claims
            .into_iter()
            .partition(|claim| record.options.conditions(claim.family).is_empty());
        let own = &record.attachment.container_id;
        if let Some((claim, owner)) = nftables::taken_by_upstream(self.host, &conditional, own) {
            self.host.warn(format!(
                "{claim} belongs to container {owner} by upstream's portmap, which goes before the conditions of {}: `portmap doctor` says how to remove it",
                record.attachment
            ));
        }
        if claims.is_empty() {
            return;
        }
        let gone = match nftables::take_from_upstream(self.host, &claims) {
            Ok(gone) => gone,
            Err(error) => {
                return self.host.warn(format!(
                    "rules of upstream's portmap may go before those of {}: {error}: {}",
                    record.attachment,
                    error.details()
                ));
            }
        };
        for (forward, container_id) in &gone {
            self.host.warn(format!(
                "{forward} of container {container_id}, which upstream's portmap has made, gives way to {}",
                record.attachment
            ));
        }
        let former = Former::of_rules(&gone.into_iter().map(|(forward, _)| forward).collect());
        if !former.is_empty() {
            flush_former(self.host, Some(&self.store), &former, facts);
        }
    }

    /// Removes what is left of a record that cannot be read: its index entries still say which
    /// backend, chain, families and ports it had.
    pub fn repair(&self, id: &str) -> Result<()> {
        let keys = self.store.index_of(id)?;
        let named = |kind: &str| {
            keys.iter()
                .filter(|(of, _)| of == kind)
                .map(|(_, name)| name.clone())
                .collect::<BTreeSet<_>>()
        };
        // The file goes last: it is what the next call sees if this one does not finish.
        self.release_unused_localnets(id)?;
        let facts = self.host.node_facts()?;
        for kind in
            BackendKind::ALL.into_iter().filter(|kind| named("backends").contains(kind.name()))
        {
            let parts: BTreeSet<Part> = named(&format!("parts-{kind}"))
                .iter()
                .filter_map(|name| Part::parse(name))
                .collect();
            let families = Family::ALL
                .into_iter()
                .filter(|family| parts.contains(&Part::Base(*family)))
                .collect();
            let lost = Lost { chains: named("chains"), families, parts, ..Lost::default() };
            self.restore_without(kind, None, None, &lost, &facts, &BTreeSet::new())?;
        }
        if named("backends").iter().any(|name| name != BackendKind::Ebpf.name()) {
            let former = Former::of_index(&named("ports"), &named("pods"));
            flush_former(self.host, Some(&self.store), &former, &facts);
        }
        self.store.forget(id, &keys)
    }
}
