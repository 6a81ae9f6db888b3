//! What programs remember of connections, and what goes when a claim changes hands.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use zerocopy::{FromBytes, IntoBytes};

use super::entries::Former;
use super::layout::{FlowKey, FlowValue, SocketKey, claim_flags};
use super::loaded::Flows;
use crate::model::Protocol;
use crate::record::Record;
use crate::sys::netlink::socket_diag::Connection;

/// Cookies of sockets by the pod that they called.
pub type Callers = BTreeMap<SocketAddr, BTreeSet<u64>>;

/// Forgets the flows of claims that have another owner now, or none: a pod that gets a former pod's
/// address must not inherit its connections, and a former pod's answers are not the claim's any more.
///
/// Returns the node's own UDP sockets that called a former pod, by pod and the socket's cookie. Packets
/// of connected sockets pass no hook of a claim, so that their owners have to be told.
pub fn forget(flows: &Flows, former: &[Former]) -> io::Result<Callers> {
    let is_lost = |value: &FlowValue| {
        former.iter().any(|former| {
            former.value.owner == value.owner
                && (former.value.flags & claim_flags::SELF != 0
                    || former.key.port() == value.host_port())
        })
    };
    flows.flows.remove_where(|_, value| {
        FlowValue::read_from_bytes(value).is_ok_and(|value| is_lost(&value))
    })?;
    let udp = Protocol::Udp.number();
    let pods: BTreeSet<SocketAddr> = former
        .iter()
        .filter(|former| former.key.protocol == udp && former.value.flags & claim_flags::SELF == 0)
        .map(|former| former.value.target())
        .collect();
    let mut callers = Callers::new();
    if pods.is_empty() {
        return Ok(callers);
    }
    flows.sockets.remove_where(|key, _| {
        let Ok(socket) = SocketKey::read_from_bytes(key) else {
            return false;
        };
        let pod = SocketAddr::new(socket.addr.ip(), socket.port());
        let called = socket.protocol == udp && pods.contains(&pod);
        if called {
            callers.entry(pod).or_default().insert(socket.cookie);
        }
        called
    })?;
    Ok(callers)
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
