//! Several nodes on one machine, as containers are: they have the root of cgroup v2 in common, where eBPF
//! has its programs for sockets.

use std::collections::BTreeSet;

use portmap::demo::matrix::{Place, Source};
use portmap::demo::netns::Netns;
use portmap::demo::topology::Shape;
use portmap::model::Family;
use portmap::sys::bpf::cgroup;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::program::{Program, SocketHook};

use crate::rig::{Container, INSIDE, PORT, Stage, assert_calls, mapped, reaches, refused};
use crate::support::ebpf::map;
use crate::support::entries::socket_programs;
use crate::support::{Node, Variant};

fn assert_node_calls(what: &str, stage: &Stage, server: Option<&str>) {
    let lab = &stage.lab;
    let cases = Family::ALL.into_iter().flat_map(|family| match server {
        Some(server) => reaches(Place::Node, lab.node_address(family), PORT, server, Source::Node),
        None => refused(Place::Node, lab.node_address(family), PORT),
    });
    assert_calls(what, lab, cases.collect());
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn one_node_s_programs_are_not_another_s() {
    let stages = [Shape::Ptp, Shape::Bridge].map(Stage::new);
    let nodes = [0, 1].map(|number| Node::new(&stages[number].lab.node, Variant::Ebpf));
    let containers = [0, 1].map(|number: usize| {
        Container::new(&nodes[number], &stages[number].lab, number, mapped(PORT, INSIDE))
    });
    let programs = |number: usize| socket_programs(&stages[number].lab.node);
    containers[0].add();
    assert_eq!(programs(0).len(), SocketHook::ALL.len());
    assert_node_calls("the first", &stages[0], Some("pod-a"));
    assert_node_calls("nothing", &stages[1], None);
    let first = programs(0);
    containers[1].add();
    assert_eq!(
        programs(0),
        first,
        "the second node leaves the first one's programs where they are"
    );
    assert_eq!(programs(1).len(), SocketHook::ALL.len());
    assert_node_calls("the first", &stages[0], Some("pod-a"));
    assert_node_calls("the second", &stages[1], Some("pod-b"));
    containers.iter().for_each(Container::check);
    assert!(nodes[0].flush().success());
    assert!(first.is_disjoint(&programs(0)));
    assert_node_calls("nothing", &stages[0], None);
    assert_node_calls("the second", &stages[1], Some("pod-b"));
    containers[1].check();
    containers[1].del();
}

/// By what a node's programs know its network namespace. Kernels before 5.14 tell nobody else.
fn cookie(node: &Netns) -> u64 {
    let value = node.run(|| map("pm_config").get(&0_u32.to_ne_bytes()).unwrap().unwrap()).unwrap();
    u64::from_ne_bytes(value[..8].try_into().unwrap())
}

/// Ids of programs on connect4 that act in a network namespace: their configuration says so.
fn acting_in(cookie: u64) -> BTreeSet<u32> {
    let configuration = |id: u32| {
        let map = Map::from_id(id).unwrap()?;
        let is = map.definition().name == "pm_config";
        is.then(|| map.get(&0_u32.to_ne_bytes()).unwrap().unwrap())
    };
    let acts = |id: &u32| {
        let Some(program) = Program::from_id(*id).unwrap() else {
            return false;
        };
        let maps = program.map_ids().unwrap();
        maps.into_iter().filter_map(configuration).any(|value| value[..8] == cookie.to_ne_bytes())
    };
    let root = cgroup::root().unwrap();
    root.query(SocketHook::Connect4).unwrap().programs.into_iter().filter(acts).collect()
}

/// Maps and programs live on where they are attached when their bpffs is unmounted, and nobody can change
/// what they know any more. The next ADD makes new ones and takes the old ones away.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn programs_without_names_are_taken_away() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let old = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    let new = Container::new(&node, lab, 1, mapped(PORT, INSIDE));
    old.add();
    let before = socket_programs(&lab.node);
    let cookie = cookie(&lab.node);
    assert_eq!(acting_in(cookie).len(), 1);
    node.shell("umount /sys/fs/bpf; mount -t bpf bpf /sys/fs/bpf");
    assert_eq!(socket_programs(&lab.node), BTreeSet::new());
    new.add();
    let after = socket_programs(&lab.node);
    assert_eq!(after.len(), before.len());
    assert!(after.is_disjoint(&before));
    assert_eq!(acting_in(cookie).len(), 1);
    assert_node_calls("the newest", &stage, Some("pod-b"));
    new.check();
    node.shell("umount /sys/fs/bpf; mount -t bpf bpf /sys/fs/bpf");
    assert!(node.flush().success());
    assert_eq!(acting_in(cookie), BTreeSet::new(), "flush finds them without names as well");
    assert_node_calls("nothing", &stage, None);
}

/// All tests share the root cgroup with the machine that they run on: one that fails leaves nothing there.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_test_that_fails_takes_its_programs_along() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let mut known = 0;
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let node = Node::new(&lab.node, Variant::Ebpf);
        Container::new(&node, lab, 0, mapped(PORT, INSIDE)).add();
        known = cookie(&lab.node);
        assert_eq!(acting_in(known).len(), 1);
        panic!("as a test fails");
    }));
    assert_eq!(failed.unwrap_err().downcast_ref(), Some(&"as a test fails"));
    assert_eq!(acting_in(known), BTreeSet::new());
    assert_node_calls("nothing", &stage, None);
}
