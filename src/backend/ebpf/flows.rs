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
use crate::sys::netlink::socket_diag::Connection;

/// Cookies of sockets by the pod that they called.
pub type Callers = BTreeMap<SocketAddr, BTreeSet<u64>>;

/// Whose connections may be wrong.
#[derive(Debug, Clone, Copy)]
pub enum Suspects<'a> {
    Former(&'a [Former]),
    /// Of every claim's owner: a call may have been killed before it forgot any.
    All,
}

/// What came of looking at connections.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The node's own UDP sockets that called a former pod, by pod and the socket's cookie. Packets of
    /// connected sockets pass no hook of a claim, so that their owners have to be told.
    pub callers: Callers,
    /// Their keys, which are what leads to them: to be removed once that is done.
    told: Vec<Vec<u8>>,
    /// How many of the suspects' connections stay, by the claim that they are of.
    pub open: BTreeMap<ClaimKey, u64>,
}

/// Forgets connections of suspects, as far as what they called leads elsewhere by now, or nowhere: a
/// pod that gets a former pod's address must not inherit its connections, and a former pod's answers
/// are not the claim's any more. `now` tells which claim takes what is called.
pub fn forget(
    flows: &Flows,
    suspects: Suspects,
    now: impl Fn(&ClaimKey) -> io::Result<Option<(ClaimKey, ClaimValue)>>,
) -> io::Result<Seen> {
    let (mut known, mut failure) = (BTreeMap::new(), Ok(()));
    let mut open: BTreeMap<ClaimKey, u64> = BTreeMap::new();
    let mut is = |called: ClaimKey, right: &dyn Fn(&ClaimValue) -> bool| {
        let claim = known.entry(called).or_insert_with(|| now(&called));
        match claim {
            Ok(Some((key, claim))) if right(claim) => {
                *open.entry(*key).or_default() += 1;
                true
            }
            Ok(_) => false,
            Err(error) => {
                failure = Err(io::Error::from(error.kind()));
                true
            }
        }
    };
    let owners: Option<BTreeSet<u32>> = match suspects {
        Suspects::Former(former) => Some(former.iter().map(|former| former.value.owner).collect()),
        Suspects::All => None,
    };
    let is_suspect =
        |owner: u32| owners.as_ref().map_or(owner != 0, |owners| owners.contains(&owner));
    flows.flows.remove_where(|key, value| {
        let entry = FlowKey::read_from_bytes(key).ok().zip(FlowValue::read_from_bytes(value).ok());
        entry.is_some_and(|(key, value)| {
            is_suspect(value.owner)
                && !is(value.called(&key), &|claim| {
                    claim.owner == value.owner && claim.target() == key.target()
                })
        })
    })?;
    let udp = Protocol::Udp.number();
    let pods: Option<BTreeSet<SocketAddr>> = match suspects {
        Suspects::Former(former) => {
            let claims = former.iter().filter(|former| former.value.flags & claim_flags::SELF == 0);
            let of_udp = claims.filter(|former| former.key.protocol == udp);
            Some(of_udp.map(|former| former.value.target()).collect())
        }
        Suspects::All => None,
    };
    let (mut callers, mut told) = (Callers::new(), Vec::new());
    if pods.as_ref().is_none_or(|pods| !pods.is_empty()) {
        flows.sockets.for_each(|key, value| {
            let entry =
                SocketKey::read_from_bytes(key).ok().zip(SocketValue::read_from_bytes(value).ok());
            let Some((socket, called)) = entry else {
                return;
            };
            let pod = socket.pod();
            if socket.protocol == udp
                && pods.as_ref().is_none_or(|pods| pods.contains(&pod))
                && !is(called.called(&socket), &|claim| claim.target() == pod)
            {
                callers.entry(pod).or_default().insert(socket.cookie);
                told.push(key.to_vec());
            }
        })?;
    }
    failure.map(|()| Seen { callers, told, open })
}

/// The callers that were seen know by now.
pub fn forget_callers(flows: &Flows, seen: &Seen) -> io::Result<()> {
    flows.sockets.remove_all(&seen.told).map(drop)
}

/// Forgets connections to addresses that the node had: programs do not ask again whether an address is the
/// node's while a flow goes on, and whoever has it now is to be reached.
pub fn forget_hosts(flows: &Flows, gone: &BTreeSet<Addr>) -> io::Result<()> {
    let is_gone = |value: &[u8]| {
        FlowValue::read_from_bytes(value).is_ok_and(|value| gone.contains(&value.host))
    };
    flows.flows.remove_where(|_, value| is_gone(value)).map(drop)
}

/// Remembers connections that the node has open from `ports`, which became hostPorts: their answers are
/// not for the pod. Later ones the programs see begin. `now` is CLOCK_MONOTONIC in 2^30 ns.
pub fn seed(
    flows: &Flows,
    ports: &BTreeMap<Protocol, BTreeSet<u16>>,
    now: u32,
    connected_from: impl Fn(Protocol, &BTreeSet<u16>) -> io::Result<Vec<Connection>>,
) -> io::Result<()> {
    for (protocol, ports) in ports {
        for Connection { local, peer, .. } in connected_from(*protocol, ports)? {
            if !local.ip().is_loopback() {
                let key = FlowKey::new(local, peer, *protocol);
                flows.flows.put_new(key.as_bytes(), FlowValue::of_node(now).as_bytes())?;
            }
        }
    }
    Ok(())
}
