//! ADD: the attachment's mappings become its record and rules; prevResult goes out as it came in.

use std::path::Path;

use ipnetwork::IpNetwork;

use super::to_json;
use crate::backend::ebpf::objects::is_reserved;
use crate::backend::iptables::script;
use crate::backend::nftables::taken_by_upstream;
use crate::cni::envelope::Envelope;
use crate::cni::invocation::Invocation;
use crate::conf::{ConflictPolicy, DEFAULT_MARK_MASQ_BIT};
use crate::engine::{Engine, behind_upstream};
use crate::error::{Error, Result};
use crate::facts::{NodeFacts, is_bridge_of_pods};
use crate::model::{BackendKind, Family};
use crate::record::{IndexKey, Record, chain_name_of_interface, record_id};
use crate::request::Request;
use crate::sys::command::ToolError;
use crate::sys::namespace::{Life, Recalled};
use crate::sys::store::{Found, is_recorded, newer_record, uses_backend};
use crate::sys::{Host, iptables, namespace, netlink, nft, survey};

pub fn run(invocation: &Invocation, envelope: &Envelope, host: &Host) -> Result<String> {
    // As in libcni, that the namespace is the plugin's own is said before all else.
    let own_netns = || Error::OwnNetns { path: invocation.netns.clone() };
    let may_be_own = !invocation.netns_override;
    let request = match Request::read(invocation, envelope) {
        Err(_) if may_be_own && namespace::is_own(&invocation.netns) => return Err(own_netns()),
        other => other?,
    };
    let reply = to_json(&request.result)?;
    let dir = request.state_dir();
    let recalled = request.forwards().then(|| Recalled::of(host, &dir));
    let view = recalled.as_ref().and_then(|recalled| recalled.own?.view(&invocation.netns));
    let is_own = match &recalled {
        Some(_) => view.is_some_and(|view| view.is_of_node()),
        None => namespace::is_own(&invocation.netns),
    };
    if is_own && may_be_own {
        return Err(own_netns());
    }
    let id = record_id(&request.attachment);
    if !request.forwards() {
        if !request.conf.mappings.is_empty() {
            host.warn(format!(
                "{} has no address in prevResult: its {} port mappings are not forwarded",
                request.attachment,
                request.conf.mappings.len()
            ));
        }
        // Containers without mappings are the rule: they cost no lock and no process, but where they
        // would not reach hostPorts until their links are known.
        if !is_recorded(&dir, &id) {
            if uses_backend(&dir, BackendKind::Ebpf) {
                welcome(host, &dir, &request);
            }
            return Ok(reply);
        }
    }
    let engine = Engine::lock_to_change(host, &dir)?;
    let old = match engine.store.get(&id)? {
        Found::Newer(format) => return Err(newer_record(&dir, &id, format)),
        Found::Damaged(reason) => {
            host.warn(format!("the record of {} is damaged: {reason}", request.attachment));
            engine.repair(&id)?;
            None
        }
        found => found.record(),
    };
    if !request.forwards() {
        if let Some(old) = old {
            engine.remove(&old)?;
        }
        return Ok(reply);
    }
    let ipv6 = request.addresses.iter().any(IpNetwork::is_ipv6);
    let kind = engine.choose_backend(request.conf.backend, ipv6)?;
    let facts = host.node_facts()?;
    if let Some((name, text)) = recalled.and_then(|recalled| recalled.note()) {
        engine.store.set_note(name, Some(&text))?;
    }
    let record = Record { view, ..plan(&engine, &request, kind, old.as_deref(), &facts)? };
    resolve_conflicts(&engine, &request, &record)?;
    engine.add(&record, old.as_deref(), &facts)?;
    // By now it is known, without looking again, which ports nobody else has.
    let rivals = engine.remove_dead_rivals(&record)?;
    adopt_from_other_backends(&engine, record.backend, rivals, &facts)?;
    engine.take_from_upstream(&record, &facts);
    warn_about_shadows(host, &record, &facts);
    warn_about_host_routing(host, &record);
    Ok(reply)
}

/// A pod without mappings is none the worse for not reaching hostPorts: it gets its reply all the same.
fn welcome(host: &Host, dir: &Path, request: &Request) {
    let done = Engine::lock_soon(host, dir)
        .and_then(|engine| engine.welcome(BackendKind::Ebpf, &request.links));
    if let Err(error) = done {
        host.warn(format!(
            "{} may not reach hostPorts of this node: {error}: {}",
            request.attachment,
            error.details()
        ));
    }
}

/// The record that follows from the request and the node.
fn plan(
    engine: &Engine,
    request: &Request,
    kind: BackendKind,
    old: Option<&Record>,
    facts: &NodeFacts,
) -> Result<Record> {
    let host = engine.host;
    let mut record = Record {
        netns: request.netns.clone(),
        pod: request.pod.clone(),
        order: host.since_boot(),
        time: host.now(),
        ..Record::new(
            request.attachment.clone(),
            request.conf.mappings.clone(),
            request.addresses.clone(),
            request.conf.options.clone(),
            kind,
        )
    };
    choose_chain(engine, &mut record, old)?;
    if kind == BackendKind::Iptables {
        for family in Family::ALL {
            validate_conditions(host, &record, family)?;
        }
    }
    if kind == BackendKind::Nftables {
        record.statements_v4 = compile(host, request, Family::V4)?;
        record.statements_v6 = compile(host, request, Family::V6)?;
    }
    if kind == BackendKind::Ebpf && shares_an_uplink(host, &record, facts)? {
        record.mac = request.mac.clone();
    }
    fit_to_backend(host, &mut record)?;
    Ok(record)
}

/// Whether the way to the pod leads over a device that leads out of the node as well: a macvlan or
/// ipvlan pod, which has no link of its own on the host. Those of a bridge's pods are its ports.
fn shares_an_uplink(host: &Host, record: &Record, facts: &NodeFacts) -> Result<bool> {
    let links = host.links()?;
    let has_links =
        |name: &str| links.iter().any(|link| link.name == name && is_bridge_of_pods(link, &links));
    for network in &record.addresses {
        let device = host.device_towards(network.ip())?;
        if device.is_some_and(|device| facts.uplinks.contains(&device) && !has_links(&device)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the record's backend needs to know of the way to the pod.
fn fit_to_backend(host: &Host, record: &mut Record) -> Result<()> {
    record.localnet_device = None;
    record.masquerade_as = Vec::new();
    if record.backend == BackendKind::Nftables {
        let neighbours =
            Family::ALL.into_iter().any(|family| record.masquerades_neighbours(family));
        // Postrouting chains know the input device since Linux 5.7 (28f8bfd1ac94); before, the
        // decision is made in prerouting and carried by a packet mark.
        if neighbours && host.kernel_version().is_some_and(|version| version < (5, 7)) {
            record.options.mark_masq_bit.get_or_insert(DEFAULT_MARK_MASQ_BIT);
        }
    }
    if record.backend == BackendKind::Ebpf && record.masquerades_all() {
        for network in &record.addresses {
            match host.source_towards(network.ip())? {
                Some(source) => record.masquerade_as.push(source),
                None => host.warn(format!(
                    "no route leads to {}: the sources of its connections stay as they are",
                    network.ip()
                )),
            }
        }
    }
    if record.routes_loopback()
        && let Some(network) = record.network(Family::V4)
    {
        record.localnet_device = host.device_towards(network.ip())?.filter(|device| device != "lo");
        if record.localnet_device.is_none() {
            host.warn(format!("no device leads to {}: 127.0.0.1 will not reach it", network.ip()));
        }
    }
    Ok(())
}

/// Leaves the record the chain that the attachment has by now, or upstream's name, unless another interface
/// of the container on this network has that.
fn choose_chain(engine: &Engine, record: &mut Record, old: Option<&Record>) -> Result<()> {
    if let Some(old) = old.filter(|old| old.has_chain()) {
        record.chain.clone_from(&old.chain);
    } else if record.has_chain()
        && engine.store.has_other(&IndexKey::Chain(record.chain.clone()), record.id())?
    {
        record.chain = chain_name_of_interface(&record.attachment);
    }
    Ok(())
}

/// Has iptables read the conditions without acting on them, so that a mistake is found before anything
/// is changed. Sets and other things they refer to must exist.
fn validate_conditions(host: &Host, record: &Record, family: Family) -> Result<()> {
    let conditions = record.options.conditions(family);
    if conditions.is_empty() || record.network(family).is_none() {
        return Ok(());
    }
    let text = script::entries_alone(record, family);
    match iptables::test(host, family, &text) {
        Err(ToolError::Failed { stderr, .. }) => Err(Error::Config(format!(
            "{} is {conditions:?}: iptables does not take it: {stderr}",
            conditions_key(family)
        ))),
        // Whatever else there is the change itself will meet.
        _ => Ok(()),
    }
}

fn conditions_key(family: Family) -> &'static str {
    match family {
        Family::V4 => "conditionsV4",
        Family::V6 => "conditionsV6",
    }
}

fn compile(host: &Host, request: &Request, family: Family) -> Result<Vec<serde_json::Value>> {
    let conditions = request.conf.options.conditions(family);
    if conditions.is_empty() {
        return Ok(Vec::new());
    }
    let key = conditions_key(family);
    let text = conditions.join(" ");
    nft::compile(host, &text).map_err(|reason| {
        Error::Config(format!("{key} is {text:?}: nft does not take it: {reason}"))
    })
}

/// Refuses a claim whose owner is alive, or may be, if the configuration says so; else the newest wins.
/// An owner whose network namespace is gone cannot object.
fn resolve_conflicts(engine: &Engine, request: &Request, record: &Record) -> Result<()> {
    if request.conf.conflict_policy != ConflictPolicy::Deny {
        return Ok(());
    }
    let claims = record.claims();
    for other in engine.rivals(record)? {
        // The same container on another network asks for the same ports (podman does).
        if other.attachment.container_id == record.attachment.container_id {
            continue;
        }
        let taken = other.claims().into_iter().find(|claim| claims.contains(claim));
        if let Some(claim) = taken.filter(|_| namespace::life(&other) != Life::Gone) {
            return Err(Error::PortTaken {
                claim: claim.to_string(),
                owner: other.attachment.container_id,
            });
        }
    }
    // Whether a container of upstream's plugin lives, its rules do not tell.
    let contested = behind_upstream(engine.host, record);
    match taken_by_upstream(engine.host, &contested, &record.attachment.container_id) {
        Some((claim, owner)) => Err(Error::PortTaken { claim: claim.to_string(), owner }),
        None => Ok(()),
    }
}

/// Backends see packets in a fixed order, whatever the age of their claims. Where a port is claimed
/// through several, the older attachments move to the backend of the newest, and with them those that
/// share other ports with them, so that precedence is decided in one place. Rules in one backend's own
/// syntax cannot move.
fn adopt_from_other_backends(
    engine: &Engine,
    backend: BackendKind,
    mut rivals: Vec<Record>,
    facts: &NodeFacts,
) -> Result<()> {
    let mut todo = Vec::new();
    loop {
        for other in rivals {
            if other.backend == backend {
                continue;
            }
            let options = &other.options;
            let fixed = options.external_set_mark_chain.is_some()
                || Family::ALL.iter().any(|family| !options.conditions(*family).is_empty());
            if fixed {
                engine.host.warn(format!(
                    "{} claims the same port through {} with options that {backend} has not: the order of the hooks decides which one is reached",
                    other.attachment, other.backend
                ));
                continue;
            }
            let mut moved = Record { backend, ..other.clone() };
            let done = fit_to_backend(engine.host, &mut moved)
                .and_then(|()| choose_chain(engine, &mut moved, Some(&other)))
                .and_then(|()| engine.add(&moved, Some(&other), facts));
            match done {
                Ok(()) => todo.push(moved),
                // Its tools may have left the node, and the pod be dead: a port that is asked for
                // now does not wait for it.
                Err(error) => engine.host.warn(format!(
                    "{} claims the same port through {} and cannot be moved to {backend}: {error}: {}",
                    other.attachment,
                    other.backend,
                    error.details()
                )),
            }
        }
        let Some(moved) = todo.pop() else {
            return Ok(());
        };
        rivals = engine.rivals(&moved)?;
    }
}

/// What the operator would otherwise search for: a hostIP that no packet has, a server of the node
/// that is not reached any more.
fn warn_about_shadows(host: &Host, record: &Record, facts: &NodeFacts) {
    let claims = record.claims();
    let served = netlink::socket_diag::served(&claims, &facts.addresses).unwrap_or_default();
    for claim in claims {
        if let Some(ip) = claim.address.filter(|ip| !ip.is_loopback()) {
            // Services' addresses are local by a route as well: iptables alone takes the kernel's word for it.
            let listed_only = facts.binds_services && record.backend != BackendKind::Iptables;
            if !facts.is_local(&ip) && (listed_only || !host.is_local_by_route(facts, ip)) {
                host.warn(format!(
                    "hostIP {ip} of {claim} is not an address of this node: nothing will be forwarded"
                ));
            } else if record.backend == BackendKind::Ebpf && is_reserved(&ip) {
                let taken =
                    if ip.is_ipv4() { "from the node's own processes only" } else { "from nobody" };
                host.warn(format!(
                    "hostIP {ip} of {claim} is link-local, which eBPF takes {taken}: set \"backend\" to \"nftables\" or \"iptables\" to have it forwarded"
                ));
            }
        }
        if served.contains(&claim) {
            host.warn(format!("a process of this node listens on {claim}: connections to it now reach the container"));
        }
    }
}

/// Rules do not see answers that Cilium's programs put past them.
fn warn_about_host_routing(host: &Host, record: &Record) {
    if record.backend == BackendKind::Ebpf || !host.has_cilium() {
        return;
    }
    if let Some((true, by)) = survey::cilium_settings().routes_in_bpf() {
        host.warn(format!(
            "Cilium routes past netfilter (BPF host routing, shown by {by}): hostPorts that are forwarded by {} may get no answers; set cni.chainingMode=portmap or bpf.hostLegacyRouting=true in its Helm values, or \"backend\" to \"ebpf\"",
            record.backend
        ));
    }
}
