//! What the kernel can do, asked once per boot.

use super::Engine;
use crate::backend::{self, Backend};
use crate::error::{Error, Result};
use crate::model::BackendKind;
use crate::sys::bpf::features::Features;

/// Name of the note with what eBPF can do here. State of an earlier boot is discarded, and so is this.
const NOTE: &str = "kernel";

impl Engine<'_> {
    /// The implementation of a kind, which knows the kernel as far as it has to.
    pub fn backend(&self, kind: BackendKind) -> Result<&'static dyn Backend> {
        if kind == BackendKind::Ebpf {
            self.know_kernel()?;
        }
        Ok(backend::of(kind))
    }

    /// Tells the host what was found out about the kernel earlier, or finds it out.
    fn know_kernel(&self) -> Result<()> {
        if self.recall_kernel()? {
            return Ok(());
        }
        let text = serde_json::to_string(self.host.kernel()?)
            .map_err(|error| Error::Decode(error.to_string()))?;
        self.store.set_note(NOTE, Some(&text))
    }

    /// Tells the host what was found out about the kernel earlier; false if nothing was.
    pub(super) fn recall_kernel(&self) -> Result<bool> {
        if self.host.knows_kernel() {
            return Ok(true);
        }
        let known = self.store.note(NOTE)?;
        let known = known.and_then(|text| serde_json::from_str::<Features>(&text).ok());
        Ok(known.map(|features| self.host.remember_kernel(features)).is_some())
    }
}
