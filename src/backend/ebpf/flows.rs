//! What programs remember of connections, and what goes when a claim changes hands.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    Addr, ClaimKey, ClaimValue, FlowKey, FlowValue, SocketKey, SocketValue, claim_flags,
};
use super::loaded::Flows;
use super::plan::Former;
use crate::model::Protocol;
use crate::record::Record;
use crate::sys::netlink::socket_diag::Connection;

/// Cookies of sockets by the pod that they called.
pub type Callers = BTreeMap<SocketAddr, BTreeSet<u64>>;

/// Forgets connections of former owners, as far as what they called leads elsewhere by now, or nowhere:
/// a pod that gets a former pod's address must not inherit its connections, and a former pod's answers
/// are not the claim's any more. `now` tells which claim takes what is called.
///
/// Returns the node's own UDP sockets that called a former pod, by pod and the socket's cookie. Packets
/// of connected sockets pass no hook of a claim, so that their owners have to be told.
pub fn forget(
    flows: &Flows,
    former: &[Former],
    now: impl Fn(&ClaimKey) -> io::Result<Option<ClaimValue>>,
) -> io::Result<Callers> {
    let owners: BTreeSet<u32> = former.iter().map(|former| former.value.owner).collect();
    let (mut known, mut failure) = (BTreeMap::new(), Ok(()));
    let mut is = |called: ClaimKey, right: &dyn Fn(&ClaimValue) -> bool| {
        let claim = known.entry(called).or_insert_with(|| now(&called));
        match claim {
            Ok(claim) => claim.is_some_and(|claim| right(&claim)),
            Err(error) => {
                failure = Err(io::Error::from(error.kind()));
                true
            }
        }
    };
    flows.flows.remove_where(|key, value| {
        let entry = FlowKey::read_from_bytes(key).ok().zip(FlowValue::read_from_bytes(value).ok());
        entry.is_some_and(|(key, value)| {
            owners.contains(&value.owner)
                && !is(value.called(&key), &|claim| {
                    claim.owner == value.owner && claim.target() == key.target()
                })
        })
    })?;
    let udp = Protocol::Udp.number();
    let claims = former.iter().filter(|former| former.value.flags & claim_flags::SELF == 0);
    let pods: BTreeSet<SocketAddr> = claims
        .filter(|former| former.key.protocol == udp)
        .map(|former| former.value.target())
        .collect();
    let mut callers = Callers::new();
    if !pods.is_empty() {
        flows.sockets.remove_where(|key, value| {
            let entry =
                SocketKey::read_from_bytes(key).ok().zip(SocketValue::read_from_bytes(value).ok());
            let Some((socket, called)) = entry else {
                return false;
            };
            let pod = socket.pod();
            let lost = socket.protocol == udp
                && pods.contains(&pod)
                && !is(called.called(&socket), &|claim| claim.target() == pod);
            if lost {
                callers.entry(pod).or_default().insert(socket.cookie);
            }
            lost
        })?;
    }
    failure.map(|()| callers)
}

/// Forgets connections to addresses that the node had: programs do not ask again whether an address is the
/// node's while a flow goes on, and whoever has it now is to be reached.
pub fn forget_hosts(flows: &Flows, gone: &BTreeSet<Addr>) -> io::Result<()> {
    let is_gone = |value: &[u8]| {
        FlowValue::read_from_bytes(value).is_ok_and(|value| gone.contains(&value.host))
    };
    flows.flows.remove_where(|_, value| is_gone(value)).map(drop)
}

/// Remembers connections that the node has open from ports that became hostPorts: their answers are
/// not for the pod. Later ones the programs see begin. `now` is CLOCK_MONOTONIC in 2^30 ns.
pub fn seed(
    flows: &Flows,
    record: &Record,
    now: u32,
    connected_from: impl Fn(Protocol, u16) -> io::Result<Vec<Connection>>,
) -> io::Result<()> {
    let ports: BTreeSet<(Protocol, u16)> = record
        .mappings
        .iter()
        .filter(|mapping| mapping.protocol != Protocol::Sctp)
        .map(|mapping| (mapping.protocol, mapping.host_port))
        .collect();
    for (protocol, port) in ports {
        for Connection { local, peer, .. } in connected_from(protocol, port)? {
            if !local.ip().is_loopback() {
                let key = FlowKey::new(local, peer, protocol);
                flows.flows.put_new(key.as_bytes(), FlowValue::of_node(now).as_bytes())?;
            }
        }
    }
    Ok(())
}
