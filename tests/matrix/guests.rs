//! Pods without hostPorts of their own: by eBPF they reach those of others once their links are known.

use portmap::demo::matrix::{Case, Place, Source};
use portmap::demo::topology::Shape;
use portmap::model::Family;
use serde_json::json;

use crate::rig::{Container, INSIDE, PORT, Stage, assert_calls, mapped, reaches, refused};
use crate::support::{Node, PORTMAP, Variant};

/// Calls of pod-b to pod-a's hostPort.
fn calls(stage: &Stage, reached: bool) -> Vec<Case> {
    let lab = &stage.lab;
    let to = |family| {
        let ip = lab.node_address(family);
        match reached {
            true => {
                let own = lab.pods[1].address(family).unwrap();
                reaches(Place::Pod(1), ip, PORT, "pod-a", Source::Kept(own))
            }
            false => refused(Place::Pod(1), ip, PORT),
        }
    };
    Family::ALL.into_iter().flat_map(to).collect()
}

/// The link of pod-b is as new: the plugin has not been called for it yet.
fn renew_link(node: &Node, stage: &Stage) {
    node.shell(&format!("tc qdisc del dev {} clsact", stage.lab.pods[1].host_link));
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn pods_without_mappings_reach_others() {
    for shape in [Shape::Ptp, Shape::Bridge, Shape::Cilium] {
        let stage = Stage::new(shape);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, Variant::Ebpf);
        let before = node.snapshot();
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        container.add();
        let guest = Container::new(&node, lab, 1, vec![]);
        // Some network plugins say nothing of the host's link: all of them are looked at then.
        let mut silent = Container::new(&node, lab, 1, vec![]);
        let interfaces = silent.config["prevResult"]["interfaces"].as_array_mut().unwrap();
        interfaces.remove(0);
        for ip in silent.config["prevResult"]["ips"].as_array_mut().unwrap() {
            ip["interface"] = json!(0);
        }
        for guest in [guest, silent] {
            renew_link(&node, &stage);
            assert_calls("a link that nobody knows", lab, calls(&stage, false));
            // It is no fault of the pod with hostPorts, and one of the node.
            container.check();
            let listed = node
                .shell(&format!("{PORTMAP} list --state-dir {} || true", node.state_dir.display()));
            assert!(listed.contains("missing"), "{listed}");
            guest.add();
            assert_calls("a guest", lab, calls(&stage, true));
            container.check();
            guest.check();
            guest.del();
            assert_calls("a guest after its DEL", lab, calls(&stage, true));
        }
        container.del();
        assert_calls("nobody has the port", lab, calls(&stage, false));
        node.assert_clean(&before);
    }
}

/// Where nothing is forwarded by eBPF a guest is none of its business.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_first_guest_loads_nothing() {
    let stage = Stage::new(Shape::Ptp);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let guest = Container::new(&node, &stage.lab, 1, vec![]);
    guest.add();
    let pins = portmap::demo::snapshot::pins(&stage.lab.node).unwrap();
    assert_eq!(pins, Vec::<std::path::PathBuf>::new());
    assert!(!node.state_dir.exists());
}
