//! Every recorded previous result, played to the plugin for a pod that has its addresses.

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;
use portmap::demo::matrix::{Case, Place, Source};
use portmap::demo::server::Servers;
use portmap::demo::topology::{BRIDGE, Lab, Pod, Shape};
use portmap::model::Family;
use serde_json::{Value, json};

use crate::recordings::{addresses, recordings, results};
use crate::rig::{
    Container, INSIDE, PORT, Stage, assert_calls, client, mapped, pod_seen, reaches, refused,
};
use crate::support::{Node, Variant};

/// The wiring that a result comes from: host prefixes have a route each, Flannel a bridge.
fn shape(name: &str, networks: &[IpNetwork]) -> Shape {
    let host_prefix =
        |network: &IpNetwork| network.prefix() == Family::of(&network.ip()).max_prefix();
    if name.contains("flannel") {
        Shape::Bridge
    } else if networks.iter().all(host_prefix) {
        Shape::Cilium
    } else {
        Shape::Ptp
    }
}

/// The recorded result with the laboratory's addresses, gateways and link in the places of its own;
/// all else, what is absent included, stays as it was recorded.
fn resettled(lab: &Lab, pod: &Pod, recorded: &Value) -> Value {
    let mut result = recorded.clone();
    for ip in result["ips"].as_array_mut().unwrap() {
        let network: IpNetwork = ip["address"].as_str().unwrap().parse().unwrap();
        let family = Family::of(&network.ip());
        ip["address"] = json!(format!("{}/{}", pod.address(family).unwrap(), network.prefix()));
        if ip.get("gateway").is_some() {
            ip["gateway"] = json!(lab.gateway(family));
        }
    }
    for interface in result["interfaces"].as_array_mut().unwrap() {
        if interface.get("sandbox").is_none() && interface["name"] != BRIDGE {
            interface["name"] = json!(pod.host_link);
        }
    }
    result
}

/// From outside, and from the node by 127.0.0.1; families that the result lacks are left alone.
fn calls(variant: Variant, lab: &Lab, networks: &[IpNetwork]) -> Vec<Case> {
    let has = |family| networks.iter().any(|network| Family::of(&network.ip()) == family);
    let mut cases = Vec::new();
    for family in Family::ALL {
        let ip = lab.node_address(family);
        if has(family) {
            cases.extend(reaches(Place::Client, ip, PORT, "pod-a", client(lab, family)));
            cases.extend(reaches(
                Place::Pod(1),
                ip,
                PORT,
                "pod-a",
                pod_seen(variant, lab, 1, 0, family),
            ));
        } else {
            cases.extend(refused(Place::Client, ip, PORT));
        }
    }
    let localhost = "127.0.0.1".parse().unwrap();
    cases.extend(match has(Family::V4) {
        true => reaches(Place::Node, localhost, PORT, "pod-a", Source::Node),
        false => refused(Place::Node, localhost, PORT),
    });
    cases
}

fn life(name: &str, node: &Node, lab: &Lab, recorded: &Value) {
    let before = node.snapshot();
    let version = recorded["cniVersion"].as_str().unwrap();
    let networks = addresses(recorded);
    let container = Container::new(node, lab, 0, mapped(PORT, INSIDE))
        .with("cniVersion", json!(version))
        .with("prevResult", resettled(lab, &lab.pods[0], recorded));
    container.add();
    assert_calls(name, lab, calls(node.variant, lab, &networks));
    if version == "0.3.1" {
        container.del_by_key_alone();
    } else {
        container.check();
        container.del();
    }
    node.assert_clean(&before);
}

on_each_variant! {
    fn every_recorded_result(variant: Variant) {
        let mut stages: Vec<(Shape, Stage)> = Vec::new();
        for (name, recorded) in results() {
            let shape = shape(&name, &addresses(&recorded));
            if stages.iter().all(|(other, _)| *other != shape) {
                stages.push((shape, Stage::new(shape)));
            }
            let (_, stage) = stages.iter().find(|(other, _)| *other == shape).unwrap();
            life(&name, &Node::new(&stage.lab.node, variant), &stage.lab, &recorded);
        }
        assert_eq!(stages.len(), 3, "the recordings come from all three wirings");
    }

    /// The runtimes' own spelling of mappings, SCTP among them, does what it says.
    fn every_recorded_runtime(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let _dns: Servers = lab.pods[0].serve(&[], &[53]).unwrap();
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let own = lab.node_address(Family::V4);
        // The address that the recordings name, in this laboratory.
        let recordings: BTreeMap<_, _> = recordings()
            .into_iter()
            .filter(|(name, _)| name.starts_with("runtime/"))
            .map(|(name, text)| (name, text.replace("198.51.100.11", &own.to_string())))
            .collect();
        for (name, text) in recordings {
            let mappings: Vec<Value> = serde_json::from_str(&text).unwrap();
            let container = Container::new(&node, lab, 0, mappings.clone());
            container.add();
            let field = |mapping: &Value, key: &str| {
                let other = format!("{}{}", key[..1].to_uppercase(), &key[1..]);
                mapping.get(key).or_else(|| mapping.get(&other)).cloned().unwrap_or_default()
            };
            let mut cases = Vec::new();
            for mapping in &mappings {
                let port = u16::try_from(field(mapping, "hostPort").as_u64().unwrap()).unwrap();
                let mut calls = reaches(Place::Client, own, port, "pod-a", client(lab, Family::V4));
                let protocol = field(mapping, "protocol");
                calls.retain(|case| {
                    case.transport.to_string().split(' ').next() == protocol.as_str()
                });
                cases.extend(calls);
            }
            assert_calls(&name, lab, cases);
            container.check();
            container.del();
            node.assert_clean(&before);
        }
    }
}
