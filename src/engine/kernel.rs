//! What the kernel can do, asked once per boot, and the programs that it has.

use serde::{Deserialize, Serialize};

use super::Engine;
use crate::backend::{self, Backend};
use crate::error::{Error, Result};
use crate::model::BackendKind;
use crate::sys::bpf::features::Features;
use crate::sys::bpf::numbers::Numbers;

/// Name of the note with what is known of eBPF here. State of an earlier boot is discarded, and so is this.
const NOTE: &str = "kernel";

#[derive(Serialize, Deserialize)]
struct Known {
    features: Features,
    #[serde(default)]
    programs: Numbers,
}

impl Engine<'_> {
    /// The implementation of a kind, which knows the kernel as far as it has to.
    pub fn backend(&self, kind: BackendKind) -> Result<&'static dyn Backend> {
        if kind == BackendKind::Ebpf {
            self.know_kernel()?;
        }
        Ok(backend::of(kind))
    }

    /// [`Engine::backend`], which knows no more than what was found out earlier.
    pub(super) fn known(&self, kind: BackendKind) -> Result<&'static dyn Backend> {
        if kind == BackendKind::Ebpf {
            self.recall_kernel()?;
        }
        Ok(backend::of(kind))
    }

    /// Tells the host what was found out about the kernel earlier, or finds it out.
    fn know_kernel(&self) -> Result<()> {
        if self.recall_kernel()? {
            return Ok(());
        }
        self.host.kernel()?;
        self.remember_kernel()
    }

    /// Notes what the host knows of the kernel and of the programs that are loaded.
    pub(super) fn remember_kernel(&self) -> Result<()> {
        let programs = Numbers::clone(&self.host.programs());
        let known = Known { features: self.host.kernel()?.clone(), programs };
        let text =
            serde_json::to_string(&known).map_err(|error| Error::Decode(error.to_string()))?;
        self.store.set_note(NOTE, Some(&text))
    }

    /// Tells the host what was found out about the kernel earlier; false if nothing was.
    pub fn recall_kernel(&self) -> Result<bool> {
        if self.host.knows_kernel() {
            return Ok(true);
        }
        let known = self.store.note(NOTE)?;
        let Some(known) = known.and_then(|text| serde_json::from_str::<Known>(&text).ok()) else {
            return Ok(false);
        };
        self.host.remember_kernel(known.features);
        self.host.remember_programs(known.programs);
        Ok(true)
    }
}
