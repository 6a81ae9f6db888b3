//! Order and survival of programs at devices. A program of Cilium's ends the chain, so that ours must
//! run first; and its agent clears filters of others from the devices that it takes over.

use std::fs;

use portmap::demo::netns::Netns;
use portmap::demo::topology::{Shape, UPLINK};
use portmap::model::Family;
use portmap::sys::bpf::clsact::{Clsact, Slot};
use portmap::sys::bpf::program::Program;
use portmap::sys::bpf::{Direction, tcx};

use crate::rig::{
    Container, INSIDE, PORT, Stage, assert_calls, client, mapped, reaches, refused, shell,
};
use crate::standins::{Cilium, chain, link};
use crate::support::programs::classifier;
use crate::support::{Node, Variant};
use portmap::demo::matrix::{Case, Place, Source};

/// What an outside client and the other pod see of pod-a.
fn calls(stage: &Stage) -> Vec<Case> {
    let lab = &stage.lab;
    lab.options
        .families
        .iter()
        .flat_map(|family| {
            let ip = lab.node_address(*family);
            let from_outside = reaches(Place::Client, ip, PORT, "pod-a", client(lab, *family));
            let from_pod = reaches(Place::Pod(1), ip, PORT, "pod-a", Source::Any);
            [from_outside, from_pod].concat()
        })
        .collect()
}

fn drift(container: &Container, node: &Node) -> String {
    let (code, text) = node.fails("CHECK", &container.config, &container.attachment);
    assert_eq!(code, 102, "{text}");
    text
}

/// Attaches a program by a filter in a slot of Cilium's: priority 1, handle 1.
fn attach_filter(node: &Netns, device: &str, direction: Direction, program: &Program) {
    let index = link(node, device).index;
    node.run(|| {
        let mut clsact = Clsact::open().unwrap();
        clsact.ensure(index).unwrap();
        let slot = Slot { priority: 1, handle: 1 };
        clsact.put(index, direction, slot, "cil_from_container-lxc", program).unwrap();
    })
    .unwrap();
}

/// Names of a device's filters, in the order in which they run.
fn filters(node: &Netns, device: &str, direction: Direction) -> Vec<String> {
    let index = link(node, device).index;
    let found = node.run(|| Clsact::open().unwrap().filters(index, direction).unwrap()).unwrap();
    found.into_iter().map(|filter| filter.name.unwrap_or(filter.kind)).collect()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_uplink_s_programs_run_before_cilium_s_whichever_came_first() {
    for cilium_first in [true, false] {
        let stage = Stage::new(Shape::Cilium);
        let node = Node::new(&stage.lab.node, Variant::Ebpf);
        let cilium = Cilium::load();
        let container = Container::new(&node, &stage.lab, 0, mapped(PORT, INSIDE));
        if cilium_first {
            cilium.take_uplink(node.netns, UPLINK);
        }
        container.add();
        if !cilium_first {
            cilium.take_uplink(node.netns, UPLINK);
        }
        let order = |direction| chain(node.netns, UPLINK, direction);
        assert_eq!(order(Direction::Ingress), ["pm_uplink_in", "cil_from_netdev"]);
        assert_eq!(order(Direction::Egress), ["pm_out", "cil_to_netdev"]);
        assert_calls("beside Cilium", &stage.lab, calls(&stage));
        container.check();
        // Packets to hostPorts are passed on to it.
        assert!(cilium.runs("cil_from_netdev") > 0 && cilium.runs("cil_to_netdev") > 0);
        container.del();
        node.flush();
        assert_eq!(order(Direction::Ingress), ["cil_from_netdev"]);
        assert_eq!(order(Direction::Egress), ["cil_to_netdev"]);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_program_that_was_put_before_ours_is_reported_and_overtaken() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    // 0 is TC_ACT_OK: nothing behind it runs.
    let foreign = classifier("foreign", 0);
    let uplink = link(node.netns, UPLINK).index;
    let first = || tcx::attach_first(uplink, Direction::Ingress, &foreign).unwrap();
    node.netns.run(first).unwrap();
    let ip = lab.node_address(Family::V4);
    assert_calls("hidden", lab, refused(Place::Client, ip, PORT));
    let text = drift(&container, &node);
    let expected =
        "eth0: program pm_uplink_in expected at the head of tcx ingress, found it behind";
    assert!(text.contains(expected), "{text}");

    // Any pod's ADD puts it right.
    Container::new(&node, lab, 1, mapped(PORT + 1, INSIDE)).add();
    assert_eq!(chain(node.netns, UPLINK, Direction::Ingress), ["pm_uplink_in", "foreign"]);
    assert_calls("overtaken", lab, calls(&stage));
    container.check();
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn filters_that_an_agent_has_cleared_are_reported_and_put_back() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let other = Container::new(&node, lab, 1, mapped(PORT + 1, INSIDE));
    container.add();
    let device = &lab.pods[0].host_link;
    let clear = [
        // What Cilium does after it has attached by tcx, and what its older agents did.
        format!("tc filter del dev {device} ingress; tc filter del dev {device} egress"),
        format!("tc qdisc del dev {device} clsact"),
    ];
    for script in clear {
        assert_eq!(filters(node.netns, device, Direction::Ingress).len(), 1);
        shell(node.netns, &script);
        let text = drift(&container, &node);
        for program in [
            "pm_pod_in expected as the first filter of clsact ingress",
            "pm_out expected as the first filter",
        ] {
            assert!(text.contains(&format!("{device}: program {program}")), "{text}");
        }
        other.add();
        assert_calls("put back", lab, calls(&stage));
        container.check();
        other.del();
    }
    container.del();
    node.flush();
    assert_eq!(shell(node.netns, &format!("tc qdisc show dev {device} clsact")), "");
}

/// By which mechanism the programs of a pod's link are attached.
fn mechanisms(node: &Node, device: &str) -> [Vec<String>; 2] {
    let tcx = Direction::ALL.iter().flat_map(|direction| chain(node.netns, device, *direction));
    let filters =
        Direction::ALL.iter().flat_map(|direction| filters(node.netns, device, *direction));
    [tcx.collect(), filters.collect()]
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_pod_s_link_has_filters_until_cilium_is_there() {
    let ours = ["pm_pod_in", "pm_out"];
    let traces = [
        None,
        Some("/sys/fs/bpf/cilium"),
        // Before Cilium 1.14 all of its maps were here.
        Some("/sys/fs/bpf/tc/globals/cilium_lxc"),
    ];
    for trace in traces {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, Variant::Ebpf);
        let cilium = Cilium::load();
        let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
        let device = &lab.pods[0].host_link;
        container.add();
        let [tcx, filters] = mechanisms(&node, device);
        assert_eq!((tcx.len(), filters.len()), (0, 2), "{tcx:?}");
        match trace {
            Some(path) => node.netns.run(|| fs::create_dir_all(path).unwrap()).unwrap(),
            None => cilium.take_pod(node.netns, device),
        }
        // Filters of ours would not run any more, or be removed at any moment.
        let text = drift(&container, &node);
        let expected = format!("{device}: program pm_pod_in expected at the head of tcx ingress");
        assert!(text.contains(&expected), "{text}");

        container.add();
        let [mut tcx, filters] = mechanisms(&node, device);
        tcx.retain(|name| name != "cil_from_contai");
        assert_eq!((tcx.as_slice(), filters.len()), (&ours.map(String::from)[..], 0));
        assert_eq!(chain(node.netns, device, Direction::Ingress)[0], "pm_pod_in");
        assert_calls("by tcx", lab, calls(&stage));
        container.check();
        if let Some(path) = trace {
            node.netns.run(|| fs::remove_dir(path).unwrap()).unwrap();
        }
        node.netns.run(|| drop(fs::remove_dir_all("/sys/fs/bpf/tc"))).unwrap();
    }
}

/// The bandwidth plugin puts an ingress qdisc to the pod's link, where clsact's would be.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_pod_whose_traffic_is_shaped_is_forwarded_to_and_hinders_nobody() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let other = Container::new(&node, lab, 1, mapped(PORT + 1, INSIDE));
    let device = &lab.pods[0].host_link;
    shell(node.netns, &format!("tc qdisc add dev {device} ingress"));
    container.add();
    let expected = [vec!["pm_pod_in".to_owned(), "pm_out".to_owned()], Vec::new()];
    assert_eq!(mechanisms(&node, device), expected);
    assert_calls("shaped", lab, calls(&stage));
    container.check();
    other.add();
    other.check();
    container.add();
    assert_eq!(mechanisms(&node, device), expected);
    container.del();
    other.del();
    node.flush();
    assert_eq!(mechanisms(&node, device), [Vec::<String>::new(), Vec::new()]);
    let qdiscs = shell(node.netns, &format!("tc qdisc show dev {device}"));
    assert!(qdiscs.contains("qdisc ingress ffff:"), "{qdiscs}");
}

/// A device beside whose program Cilium has a filter, and who is not served while that runs first.
struct Beside<'a> {
    device: &'a str,
    program: &'a str,
    unserved: Place,
}

fn filters_of_cilium_s_priority(stage: &Stage, node: &Node, beside: &Beside) {
    let lab = &stage.lab;
    let container = Container::new(node, lab, 0, mapped(PORT, INSIDE));
    let Beside { device, program, unserved } = beside;
    let foreign = classifier("cil_from_contai", 0);
    let order = || filters(node.netns, device, Direction::Ingress);
    let theirs = "cil_from_container-lxc";

    // Cilium was here first.
    attach_filter(node.netns, device, Direction::Ingress, &foreign);
    container.add();
    assert_eq!(order(), ["portmap", theirs]);
    assert_calls("after Cilium", lab, calls(stage));
    container.check();

    // The agent takes its filter away and makes it anew: of one priority the newest runs first.
    let again = classifier("cil_from_contai", 0);
    shell(node.netns, &format!("tc filter del dev {device} ingress prio 1 handle 1 bpf"));
    attach_filter(node.netns, device, Direction::Ingress, &again);
    assert_eq!(order(), [theirs, "portmap"]);
    let ip = lab.node_address(Family::V4);
    assert_calls("hidden", lab, refused(*unserved, ip, PORT));
    let text = drift(&container, node);
    assert!(text.contains(&format!("{device}: program {program} expected")), "{text}");
    container.add();
    assert_eq!(order(), ["portmap", theirs]);
    assert_calls("overtaken", lab, calls(stage));
    container.check();
    // Replacing, as the agent does at a restart, changes nothing.
    attach_filter(node.netns, device, Direction::Ingress, &foreign);
    assert_eq!(order(), ["portmap", theirs]);
    container.check();
    container.del();
    node.flush();
    assert_eq!(order(), [theirs]);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn filters_of_cilium_s_priority_come_after_ours() {
    let stage = Stage::new(Shape::Ptp);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    let device = &stage.lab.pods[1].host_link;
    let beside = Beside { device, program: "pm_pod_in", unserved: Place::Pod(1) };
    filters_of_cilium_s_priority(&stage, &node, &beside);
}

/// Before Linux 6.6 uplinks have filters, too.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn filters_of_cilium_s_priority_come_after_ours_at_an_uplink_without_tcx() {
    let stage = Stage::new(Shape::Ptp);
    let node = Node::new(&stage.lab.node, Variant::Ebpf);
    node.pretend(|kernel| kernel.tcx = false);
    let beside = Beside { device: UPLINK, program: "pm_uplink_in", unserved: Place::Client };
    filters_of_cilium_s_priority(&stage, &node, &beside);
}
