//! What goes along with rules: `route_localnet` of pods' devices, and stale conntrack entries.

use super::Engine;
use crate::error::{Error, Result};
use crate::facts::NodeFacts;
use crate::flush::{self, Flush};
use crate::model::Family;
use crate::record::{IndexKey, Record};
use crate::sys::{Host, netlink, sysctl};

/// Beginning of the names of the notes with former values of `route_localnet`.
const LOCALNET_NOTE: &str = "localnet-";

impl Engine<'_> {
    /// Turns `route_localnet` on for the pod's device. Its guard is in place by now.
    pub(super) fn enable_localnet(&self, record: &Record) -> Result<()> {
        let Some(device) = &record.localnet_device else {
            return Ok(());
        };
        let path = localnet_path(device);
        let failed =
            |error| Error::io(format!("set net.ipv4.conf.{device}.route_localnet to 1"), error);
        let present = sysctl::read(&path).map_err(failed)?;
        if present == "1" {
            return Ok(());
        }
        self.store.set_note(&format!("{LOCALNET_NOTE}{device}"), Some(&present))?;
        sysctl::write(&path, "1").map_err(failed)
    }

    /// Gives `route_localnet` its former value back on every device that no record needs, or none but
    /// `id`. Before the guard goes.
    pub(super) fn release_unused_localnets(&self, id: &str) -> Result<()> {
        for note in self.store.notes(LOCALNET_NOTE)? {
            let device = note.strip_prefix(LOCALNET_NOTE).unwrap_or_default();
            if self.store.has_other(&IndexKey::Localnet(device.to_owned()), id)? {
                continue;
            }
            let former = self.store.note(&note)?.unwrap_or_default();
            match sysctl::write(&localnet_path(device), &former) {
                // The device went with its pod.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => self.host.warn(format!(
                    "cannot set net.ipv4.conf.{device}.route_localnet back to {former}: {error}"
                )),
                Ok(()) => {}
            }
            self.store.set_note(&note, None)?;
        }
        Ok(())
    }

    pub(super) fn flush_conntrack(
        &self,
        added: Option<&Record>,
        removed: Option<&Record>,
        facts: &NodeFacts,
    ) {
        let others = match self.related(added, removed) {
            Ok(others) => others,
            Err(error) => {
                return self.host.warn(format!("conntrack entries are not flushed: {error}"));
            }
        };
        delete_flows(self.host, &Flush::new(added, removed, &others, facts));
    }

    /// Of attachments whose rules may have been missing: a flow that began meanwhile was not translated,
    /// and would not be for as long as its packets keep coming.
    pub(super) fn flush_restored<'b>(
        &self,
        records: impl IntoIterator<Item = &'b Record>,
        facts: &NodeFacts,
    ) {
        let concerned: Vec<&Record> = records.into_iter().filter(|r| flush::concerns(r)).collect();
        if !concerned.is_empty() {
            delete_flows(self.host, &Flush::restored(&concerned, facts));
        }
    }
}

pub(super) fn delete_flows(host: &Host, flush: &Flush) {
    for family in Family::ALL {
        let ports = flush.ports(family);
        if let Err(error) = netlink::conntrack::delete(family, &ports, |flow| flush.takes(flow)) {
            host.warn(format!("conntrack entries of {family} are not flushed: {error}"));
        }
    }
}

/// Path of a device's `route_localnet` below /proc/sys.
#[must_use]
pub fn localnet_path(device: &str) -> [&str; 5] {
    ["net", "ipv4", "conf", device, "route_localnet"]
}
