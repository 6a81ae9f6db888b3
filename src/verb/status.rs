//! STATUS: whether an ADD would work. Runtimes turn a failure into "node not ready", so it is
//! reported only if the next ADD could not succeed. Whether pods have IPv6 addresses nobody has said yet.

use crate::backend::{self, Unusable};
use crate::cni::envelope::Envelope;
use crate::conf::NetConf;
use crate::engine::probe_briefly;
use crate::error::{Error, Result};
use crate::request;
use crate::sys::Host;
use crate::sys::store::check_usable;

/// "The plugin is not available" (specification, section "Error").
pub const NOT_AVAILABLE: u32 = 50;

pub fn run(envelope: &Envelope, host: &Host) -> Result<()> {
    envelope.version.require("STATUS", "1.1.0")?;
    let conf = NetConf::parse(envelope)?;
    check_usable(&request::state_dir(conf.state_dir.clone()))?;
    let result = match conf.backend {
        Some(kind) => backend::of(kind).probe(host).map_err(|unusable| match unusable {
            Unusable::Busy(error) => error,
            Unusable::Broken(reason) => {
                Error::BackendUnusable { backend: kind.to_string(), reason }
            }
        }),
        None => probe_briefly(host).map(drop),
    };
    match result {
        // Somebody else is at work, and an ADD would wait for that.
        Err(Error::Busy { .. }) => Ok(()),
        other => other,
    }
}
