//! Which calls to a hostPort should arrive, from where, and with which source address: as data.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::netns::Netns;
use super::topology::Lab;
use super::traffic::{Call, Failure, Reply, Transport, reach};
use crate::model::Family;

const LOCALHOST_V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOCALHOST_V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// A hostPort of a laboratory pod.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    /// Index into [`Lab::pods`].
    pub pod: usize,
    /// TCP, or UDP in either way of calling it.
    pub transport: Transport,
    pub host_port: u16,
}

/// What a backend can do beyond what every backend must.
#[derive(Debug, Clone, Copy, Default)]
pub struct Capabilities {
    /// Whether the node reaches `[::1]:hostPort`; `None` if either is right. Netfilter cannot
    /// forward from `::1`: IPv6 has no `route_localnet`.
    pub localhost_v6: Option<bool>,
}

/// Where a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Client,
    Node,
    /// Index into [`Lab::pods`].
    Pod(usize),
}

impl Place {
    /// The namespace to call from; `None` if the laboratory has no such pod.
    #[must_use]
    pub fn netns(self, lab: &Lab) -> Option<&Netns> {
        match self {
            Place::Client => Some(&lab.client),
            Place::Node => Some(&lab.node),
            Place::Pod(index) => lab.pods.get(index).map(|pod| &pod.netns),
        }
    }
}

/// Which source address a server may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Exactly this one: not masqueraded.
    Kept(IpAddr),
    /// One of the node's, and not of its loopback link.
    Node,
    /// Anything but this one: masqueraded, so that the answer comes back through the node.
    Other(IpAddr),
    Any,
}

impl Source {
    fn allows(self, seen: IpAddr, lab: &Lab) -> bool {
        match self {
            Source::Kept(ip) => seen == ip,
            Source::Node => lab.is_node_address(seen),
            Source::Other(ip) => seen != ip && !seen.is_loopback(),
            Source::Any => true,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Kept(_) => f.pad("the caller's own"),
            Source::Node => f.pad("the node's"),
            Source::Other(_) => f.pad("masqueraded"),
            Source::Any => f.pad("any"),
        }
    }
}

/// What should come of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The service's pod answers and saw such a source.
    Reached(Source),
    /// The call is not touched: refused at once where nothing listens, never black-holed.
    LeftAlone,
    /// Either of the two.
    ReachedOrLeftAlone(Source),
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expect::Reached(source) => source.fmt(f),
            Expect::LeftAlone => f.pad("refused at once"),
            Expect::ReachedOrLeftAlone(source) => f.pad(&format!("{source}, or refused at once")),
        }
    }
}

/// One call and what should come of it.
#[derive(Debug, Clone)]
pub struct Case {
    /// Where it comes from and which address it uses, for people.
    pub path: String,
    pub from: Place,
    pub transport: Transport,
    pub target: SocketAddr,
    /// The name that the right server answers with.
    pub server: String,
    pub expect: Expect,
}

/// A case and what came of it.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub case: Case,
    pub result: Result<Reply, Failure>,
    pub ok: bool,
}

/// Every path to each service, in each of the laboratory's families. Callers are the outside client
/// (both node addresses), the node (localhost and its address), every other pod, the pod itself.
#[must_use]
pub fn cases(lab: &Lab, services: &[Service], capabilities: Capabilities) -> Vec<Case> {
    let mut cases = Vec::new();
    for family in &lab.options.families {
        for service in services {
            let Some(pod) = lab.pods.get(service.pod) else {
                continue;
            };
            let Some(own) = pod.address(*family) else {
                continue;
            };
            let mut add = |path: &str, from, target: IpAddr, expect| {
                cases.push(Case {
                    path: path.to_owned(),
                    from,
                    transport: service.transport,
                    target: SocketAddr::new(target, service.host_port),
                    server: pod.name.clone(),
                    expect,
                });
            };
            let node = lab.node_address(*family);
            let client = Source::Kept(lab.client_address(*family));
            add("outside client", Place::Client, node, Expect::Reached(client));
            add(
                "outside client, 2nd address",
                Place::Client,
                lab.second_node_address(*family),
                Expect::Reached(client),
            );
            let (localhost, expect) = match (family, capabilities.localhost_v6) {
                (Family::V4, _) => (LOCALHOST_V4, Expect::Reached(Source::Node)),
                (Family::V6, Some(true)) => (LOCALHOST_V6, Expect::Reached(Source::Node)),
                (Family::V6, Some(false)) => (LOCALHOST_V6, Expect::LeftAlone),
                (Family::V6, None) => (LOCALHOST_V6, Expect::ReachedOrLeftAlone(Source::Node)),
            };
            add("node, localhost", Place::Node, localhost, expect);
            add("node, own address", Place::Node, node, Expect::Reached(Source::Node));
            for (index, other) in lab.pods.iter().enumerate() {
                if index == service.pod {
                    let source = Source::Other(own);
                    add("pod to itself", Place::Pod(index), node, Expect::Reached(source));
                } else {
                    let path = format!("other pod ({})", other.name);
                    add(&path, Place::Pod(index), node, Expect::Reached(Source::Any));
                }
            }
        }
    }
    cases
}

/// The same calls, none of which should arrive any more.
#[must_use]
pub fn unmapped(cases: &[Case]) -> Vec<Case> {
    let mut cases = cases.to_vec();
    for case in &mut cases {
        case.expect = Expect::LeftAlone;
    }
    cases
}

/// Makes all calls at once, so that failing ones cost one `timeout` (connection and answer each)
/// and not the sum.
#[must_use]
pub fn run(lab: &Lab, cases: Vec<Case>, timeout: Duration) -> Vec<Outcome> {
    std::thread::scope(|scope| {
        let running: Vec<_> = cases
            .into_iter()
            .map(|case| {
                let call = Call::new(case.transport, case.target, timeout);
                let from = case.from.netns(lab);
                let thread = scope.spawn(move || match from {
                    Some(from) => reach(from, call),
                    None => Err(Failure::Other("no such pod".to_owned())),
                });
                (case, thread)
            })
            .collect();
        running
            .into_iter()
            .map(|(case, thread)| {
                let result = thread
                    .join()
                    .unwrap_or_else(|_| Err(Failure::Other("the caller's thread died".to_owned())));
                let ok = holds(&case, &result, lab);
                Outcome { case, result, ok }
            })
            .collect()
    })
}

/// [`run`], and then once more those that nothing has refused: the kernel limits the ICMP errors that it
/// sends, those to one address and those of the whole machine (`icmp_ratelimit`, `icmp_msgs_per_sec`).
#[must_use]
pub fn run_refused(lab: &Lab, cases: Vec<Case>, timeout: Duration) -> Vec<Outcome> {
    let (unanswered, mut outcomes): (Vec<_>, Vec<_>) =
        run(lab, cases, timeout).into_iter().partition(|outcome| {
            !outcome.ok
                && outcome.case.transport == Transport::Udp
                && matches!(outcome.result, Err(Failure::TimedOut))
        });
    for outcome in unanswered {
        outcomes.extend(run(lab, vec![outcome.case], timeout));
    }
    outcomes
}

fn holds(case: &Case, result: &Result<Reply, Failure>, lab: &Lab) -> bool {
    let reached = |source: Source| {
        let right =
            |reply: &Reply| reply.server == case.server && source.allows(reply.seen.ip(), lab);
        result.as_ref().is_ok_and(right)
    };
    let left_alone = || match result {
        // A program of the caller's own may listen there; no pod does.
        Ok(reply) => lab.pods.iter().all(|pod| pod.name != reply.server),
        // The kernel tells only connected UDP sockets about an ICMP "port unreachable".
        Err(Failure::TimedOut) => case.transport == Transport::UdpUnconnected,
        Err(failure) => *failure == Failure::Refused,
    };
    match case.expect {
        Expect::Reached(source) => reached(source),
        Expect::LeftAlone => left_alone(),
        Expect::ReachedOrLeftAlone(source) => reached(source) || left_alone(),
    }
}
