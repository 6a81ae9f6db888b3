//! Every version of the specification that runtimes and lists in the field speak.

use ipnetwork::IpNetwork;
use portmap::cni::version::SUPPORTED;
use portmap::demo::matrix::Place;
use portmap::demo::topology::{Lab, Shape};
use portmap::model::Family;
use serde_json::{Value, json};

use crate::rig::{Container, INSIDE, PORT, Stage, assert_calls, client, mapped, reaches, refused};
use crate::support::{Node, Variant};

/// CHECK, and prevResult on DEL, came with this version.
const SINCE_0_4_0: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];

/// Results of 0.1.0 and 0.2.0 have one object per family.
fn per_family(lab: &Lab, version: &str) -> Value {
    let mut result = json!({"cniVersion": version, "dns": {}});
    for network in &lab.pods[0].addresses {
        let network: &IpNetwork = network;
        let family = Family::of(&network.ip());
        let (key, default) = match family {
            Family::V4 => ("ip4", "0.0.0.0/0"),
            Family::V6 => ("ip6", "::/0"),
        };
        let gateway = lab.gateway(family);
        result[key] = json!({
            "ip": network.to_string(), "gateway": gateway,
            "routes": [{"dst": default, "gw": gateway}],
        });
    }
    result
}

fn life(variant: Variant, stage: &Stage, version: &str) {
    let lab = &stage.lab;
    let mut node = Node::new(&lab.node, variant);
    node.cni_version = version.to_owned();
    let before = node.snapshot();
    let mut container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    if matches!(version, "0.1.0" | "0.2.0") {
        container = container.with("prevResult", per_family(lab, version));
    }
    container.add();
    assert_eq!(container.config["prevResult"]["cniVersion"], version, "ADD answered with it");
    let families = &lab.options.families;
    let reached = families.iter().flat_map(|family| {
        reaches(Place::Client, lab.node_address(*family), PORT, "pod-a", client(lab, *family))
    });
    assert_calls(version, lab, reached.collect());
    if SINCE_0_4_0.contains(&version) {
        container.check();
        container.del();
    } else {
        let (code, text) = node.fails("CHECK", &container.config, &container.attachment);
        assert_eq!(code, 1, "CHECK is newer than {version}: {text}");
        // Runtimes repeat it.
        (0..2).for_each(|_| container.del_by_key_alone());
    }
    let closed =
        families.iter().flat_map(|family| refused(Place::Client, lab.node_address(*family), PORT));
    assert_calls(version, lab, closed.collect());
    node.assert_clean(&before);
}

on_each_variant! {
    fn all_of_them(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        for version in SUPPORTED {
            life(variant, &stage, version);
        }
    }
}
