//! A call that is ready to be carried out: nothing in it is "maybe set" any more. Pure.

use std::path::PathBuf;

use ipnetwork::IpNetwork;

use crate::cni::envelope::Envelope;
use crate::cni::invocation::Invocation;
use crate::cni::json::RawObject;
use crate::cni::result::{PodLinks, PrevResult, pass_through};
use crate::conf::NetConf;
use crate::error::{Error, Result};
use crate::model::Attachment;
use crate::record::PodIdentity;
use crate::sys::store::DEFAULT_DIR;

/// What ADD and CHECK are asked for.
#[derive(Debug)]
pub struct Request {
    pub attachment: Attachment,
    pub netns: String,
    pub pod: PodIdentity,
    pub conf: NetConf,
    /// Address and mask of the pod, at most one per family.
    pub addresses: Vec<IpNetwork>,
    /// MAC address of the pod's interface, if prevResult says it.
    pub mac: Option<String>,
    /// Names of the links on the host that prevResult tells of.
    pub links: Vec<String>,
    /// prevResult as it is to go out.
    pub result: RawObject,
}

impl Request {
    /// Reads the whole of a call; nothing is done before all of it is valid.
    pub fn read(invocation: &Invocation, envelope: &Envelope) -> Result<Self> {
        let conf = NetConf::parse(envelope)?;
        let prev_result = envelope.prev_result().ok_or_else(|| {
            Error::Config(
                "prevResult is absent: portmap must come after a plugin that makes the interface"
                    .into(),
            )
        })?;
        let result = pass_through(prev_result, envelope.version)?;
        let read = PrevResult::read(prev_result, envelope.version)?;
        let addresses = read.pod_addresses(&invocation.ifname)?;
        let PodLinks { mac, host } = read.pod_links(&invocation.ifname);
        Ok(Request {
            attachment: attachment(invocation, envelope),
            netns: invocation.netns.clone(),
            pod: pod(invocation),
            conf,
            addresses,
            mac,
            links: host,
            result,
        })
    }

    /// Whether there is anything to forward: mappings, and an address to forward to.
    #[must_use]
    pub fn forwards(&self) -> bool {
        !self.conf.mappings.is_empty() && !self.addresses.is_empty()
    }

    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        state_dir(self.conf.state_dir.clone())
    }
}

/// The state directory that a configuration means.
#[must_use]
pub fn state_dir(configured: Option<PathBuf>) -> PathBuf {
    configured.unwrap_or_else(|| PathBuf::from(DEFAULT_DIR))
}

/// The key of a call.
#[must_use]
pub fn attachment(invocation: &Invocation, envelope: &Envelope) -> Attachment {
    Attachment {
        network: envelope.name.clone(),
        container_id: invocation.container_id.clone(),
        ifname: invocation.ifname.clone(),
    }
}

fn pod(invocation: &Invocation) -> PodIdentity {
    let arg = |name: &str| invocation.args.get(name).cloned().unwrap_or_default();
    PodIdentity {
        namespace: arg("K8S_POD_NAMESPACE"),
        name: arg("K8S_POD_NAME"),
        uid: arg("K8S_POD_UID"),
    }
}
