//! `hostIP`: a mapping answers on the addresses that it names, and on no other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portmap::demo::matrix::{Case, Place, Source};
use portmap::demo::topology::Shape;
use portmap::model::Family;

use crate::rig::{
    Container, INSIDE, PORT, Stage, assert_calls, assert_unmapped, client, mapped, mapped_at,
    pod_seen, reaches, refused,
};
use crate::support::{Node, Variant};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOCALHOST_V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Calls to one address of the node from everywhere: the client, the node, both pods.
fn answers(variant: Variant, stage: &Stage, ip: IpAddr) -> Vec<Case> {
    let lab = &stage.lab;
    let family = Family::of(&ip);
    let to = |from, source| reaches(from, ip, PORT, "pod-a", source);
    [
        to(Place::Client, client(lab, family)),
        to(Place::Node, Source::Node),
        to(Place::Pod(0), pod_seen(variant, lab, 0, 0, family)),
        to(Place::Pod(1), pod_seen(variant, lab, 1, 0, family)),
    ]
    .concat()
}

/// The same calls, none of which is for the pod.
fn silent(ip: IpAddr) -> Vec<Case> {
    [Place::Client, Place::Node, Place::Pod(0), Place::Pod(1)]
        .into_iter()
        .flat_map(|from| refused(from, ip, PORT))
        .collect()
}

/// One mapping from ADD to DEL, with CHECK in between.
fn life(variant: Variant, stage: &Stage, host_ip: &str, cases: Vec<Case>) {
    let node = Node::new(&stage.lab.node, variant);
    let before = node.snapshot();
    let container = Container::new(&node, &stage.lab, 0, mapped_at(host_ip, PORT, INSIDE));
    container.add();
    assert_calls(&format!("hostIP {host_ip:?}"), &stage.lab, cases.clone());
    container.check();
    container.del();
    assert_unmapped(&format!("after DEL of hostIP {host_ip:?}"), &stage.lab, &cases);
    node.assert_clean(&before);
}

/// eBPF's programs are at links, which differ by shape. What rules do by shape is asked in `shapes`.
fn on_each_stage(variant: Variant, test: fn(Variant, &Stage)) {
    test(variant, &Stage::bypassing());
    if variant == Variant::Ebpf {
        for shape in [Shape::Ptp, Shape::Bridge, Shape::Mixed] {
            test(variant, &Stage::new(shape));
        }
    }
}

fn a_specific_address_answers_alone_on(variant: Variant, stage: &Stage) {
    let lab = &stage.lab;
    for family in Family::ALL {
        let other = match family {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        };
        let own = lab.node_address(family);
        let cases = [
            answers(variant, stage, own),
            silent(lab.second_node_address(family)),
            silent(lab.node_address(other)),
            refused(Place::Node, LOCALHOST, PORT),
            refused(Place::Node, LOCALHOST_V6, PORT),
        ];
        life(variant, stage, &own.to_string(), cases.concat());
    }
}

fn unspecified_addresses_mean_their_family_on(variant: Variant, stage: &Stage) {
    let lab = &stage.lab;
    let both = |family| [lab.node_address(family), lab.second_node_address(family)];
    let [v4, v6] = Family::ALL.map(both);
    let cases = [
        v4.map(|ip| answers(variant, stage, ip)).concat(),
        v6.map(silent).concat(),
        reaches(Place::Node, LOCALHOST, PORT, "pod-a", Source::Node),
    ];
    life(variant, stage, "0.0.0.0", cases.concat());
    let cases = [
        v6.map(|ip| answers(variant, stage, ip)).concat(),
        v4.map(silent).concat(),
        refused(Place::Node, LOCALHOST, PORT),
        // IPv6 has no route_localnet that rules could use.
        match variant {
            Variant::Ebpf => reaches(Place::Node, LOCALHOST_V6, PORT, "pod-a", Source::Node),
            _ => refused(Place::Node, LOCALHOST_V6, PORT),
        },
    ];
    life(variant, stage, "::", cases.concat());
}

fn localhost_is_for_the_node_itself_on(variant: Variant, stage: &Stage) {
    let lab = &stage.lab;
    let cases = [
        reaches(Place::Node, LOCALHOST, PORT, "pod-a", Source::Node),
        silent(lab.node_address(Family::V4)),
        silent(lab.second_node_address(Family::V4)),
        silent(lab.node_address(Family::V6)),
        refused(Place::Node, LOCALHOST_V6, PORT),
    ];
    life(variant, stage, "127.0.0.1", cases.concat());
    if variant == Variant::Ebpf {
        let cases = [
            reaches(Place::Node, LOCALHOST_V6, PORT, "pod-a", Source::Node),
            refused(Place::Node, LOCALHOST, PORT),
            silent(lab.node_address(Family::V6)),
            silent(lab.second_node_address(Family::V6)),
            silent(lab.node_address(Family::V4)),
        ];
        life(variant, stage, "::1", cases.concat());
    }
}

on_each_variant! {
    fn a_specific_address_answers_alone(variant: Variant) {
        on_each_stage(variant, a_specific_address_answers_alone_on);
    }

    fn unspecified_addresses_mean_their_family(variant: Variant) {
        on_each_stage(variant, unspecified_addresses_mean_their_family_on);
    }

    fn localhost_is_for_the_node_itself(variant: Variant) {
        on_each_stage(variant, localhost_is_for_the_node_itself_on);
    }

    /// A pod with IPv6 alone cannot serve an IPv4 hostIP: that mapping is left out, the others hold.
    fn another_family_than_the_pod_s_is_skipped(variant: Variant) {
        let stage = Stage::bypassing();
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let v4 = lab.node_address(Family::V4);
        let v6 = lab.node_address(Family::V6);
        let only_v6 = |mappings| {
            let mut container = Container::new(&node, lab, 0, mappings);
            let ips = container.config["prevResult"]["ips"].as_array_mut().unwrap();
            ips.retain(|ip| ip["address"].as_str().unwrap().contains(':'));
            assert_eq!(ips.len(), 1);
            container
        };

        let alone = only_v6(mapped_at(&v4.to_string(), PORT, INSIDE));
        alone.add();
        assert_calls("IPv4 hostIP alone", lab, [silent(v4), silent(v6)].concat());
        alone.check();
        alone.del();
        node.assert_clean(&before);

        let mappings =
            [mapped_at(&v4.to_string(), PORT, INSIDE), mapped(PORT + 1, INSIDE)].concat();
        let among_others = only_v6(mappings);
        among_others.add();
        let source = client(lab, Family::V6);
        let cases = [
            silent(v4),
            silent(v6),
            refused(Place::Client, v4, PORT + 1),
            reaches(Place::Client, v6, PORT + 1, "pod-a", source),
        ];
        assert_calls("IPv4 hostIP and none", lab, cases.concat());
        among_others.check();
        among_others.del();
        node.assert_clean(&before);
    }
}
