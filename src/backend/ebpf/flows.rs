//! What programs remember of connections, and what goes when a claim changes hands.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use zerocopy::{FromBytes, IntoBytes};

use super::entries::Former;
use super::layout::{FlowKey, FlowValue, SocketKey, SocketValue, claim_flags, flow_flags};
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
    flows.flows.remove_where(|key, value| {
        let entry = FlowKey::read_from_bytes(key).ok().zip(FlowValue::read_from_bytes(value).ok());
        entry.is_some_and(|(key, value)| former.iter().any(|one| had_flow(one, &key, &value)))
    })?;
    let udp = |former: &&Former| {
        former.key.protocol == Protocol::Udp.number() && former.value.flags & claim_flags::SELF == 0
    };
    let former: Vec<&Former> = former.iter().filter(udp).collect();
    let mut callers = Callers::new();
    if former.is_empty() {
        return Ok(callers);
    }
    flows.sockets.remove_where(|key, value| {
        let entry =
            SocketKey::read_from_bytes(key).ok().zip(SocketValue::read_from_bytes(value).ok());
        let Some((socket, called)) = entry else {
            return false;
        };
        let lost = former.iter().any(|former| was_called(former, &socket, &called));
        if lost {
            callers.entry(socket.pod()).or_default().insert(socket.cookie);
        }
        lost
    })?;
    Ok(callers)
}

/// Direct connections to a pod are those of its own entry.
fn had_flow(former: &Former, key: &FlowKey, value: &FlowValue) -> bool {
    let called = value.called(key);
    let any = value.flags & flow_flags::ANY != 0;
    value.owner == former.value.owner
        && (called == former.key || (any && called.of_any() == former.key))
}

fn was_called(former: &Former, socket: &SocketKey, called: &SocketValue) -> bool {
    let called = called.called(socket);
    socket.pod() == former.value.target() && (called == former.key || called.of_any() == former.key)
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
