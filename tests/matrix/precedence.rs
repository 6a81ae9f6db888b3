//! A specific hostIP goes before the wildcard, whoever came first.

use std::net::SocketAddr;

use portmap::demo::matrix::{Case, Place};
use portmap::demo::server::Servers;
use portmap::demo::topology::Shape;
use portmap::demo::traffic::Transport;
use portmap::model::Family;

use crate::rig::{
    Container, INSIDE, PORT, Stage, assert_calls, client, mapped, mapped_at, reaches, refused,
};
use crate::support::{Node, Variant};

/// Calls of the client to the specific and to the other address; no name is a closed port.
fn answers(
    stage: &Stage,
    family: Family,
    specific: Option<&str>,
    other: Option<&str>,
) -> Vec<Case> {
    let lab = &stage.lab;
    [(lab.node_address(family), specific), (lab.second_node_address(family), other)]
        .into_iter()
        .flat_map(|(ip, server)| match server {
            Some(server) => reaches(Place::Client, ip, PORT, server, client(lab, family)),
            None => refused(Place::Client, ip, PORT),
        })
        .collect()
}

on_each_variant! {
    fn across_two_pods(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        // A specific claim may stand beside wildcards of the same container, for other ports.
        for (family, specific_first, mixed) in [
            (Family::V4, true, false),
            (Family::V4, false, false),
            (Family::V4, true, true),
            (Family::V4, false, true),
            (Family::V6, true, true),
            (Family::V6, false, false),
        ] {
            let wildcard = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
            let address = lab.node_address(family).to_string();
            let mut mappings = mapped_at(&address, PORT, INSIDE);
            if mixed {
                mappings.extend(mapped(PORT + 1, INSIDE));
            }
            let specific = Container::new(&node, lab, 1, mappings);
            if specific_first {
                specific.add();
                wildcard.add();
            } else {
                wildcard.add();
                specific.add();
            }
            let what = format!("{family}, specific first: {specific_first}, mixed: {mixed}");
            assert_calls(&what, lab, answers(&stage, family, Some("pod-b"), Some("pod-a")));
            specific.check();
            wildcard.check();
            // Whichever goes, the other one has what is left.
            if specific_first {
                specific.del();
                assert_calls(&what, lab, answers(&stage, family, Some("pod-a"), Some("pod-a")));
                wildcard.check();
                wildcard.del();
            } else {
                wildcard.del();
                assert_calls(&what, lab, answers(&stage, family, Some("pod-b"), None));
                specific.check();
                specific.del();
            }
            node.assert_clean(&before);
        }
    }

    /// Two pods want all of a port, and one address of it each.
    fn each_its_own_address_and_the_newest_the_rest(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        for family in Family::ALL {
            let own = [lab.node_address(family), lab.second_node_address(family)];
            let pods = [0, 1].map(|pod| {
                let specific = mapped_at(&own[pod].to_string(), PORT, INSIDE);
                Container::new(&node, lab, pod, [mapped(PORT, INSIDE), specific].concat())
            });
            let assert_rest = |what: &str, server: &str| {
                let rest = lab.gateway(family);
                let cases = reaches(Place::Client, rest, PORT, server, client(lab, family));
                assert_calls(what, lab, cases);
            };
            for newest in [0, 1] {
                let oldest = 1 - newest;
                pods[oldest].add();
                pods[newest].add();
                assert_calls("both", lab, answers(&stage, family, Some("pod-a"), Some("pod-b")));
                assert_rest("both", &lab.pods[newest].name);
                pods.iter().for_each(Container::check);
                pods[newest].del();
                let left = Some(lab.pods[oldest].name.as_str());
                assert_calls("one", lab, answers(&stage, family, left, left));
                assert_rest("one", &lab.pods[oldest].name);
                pods[oldest].check();
                pods[oldest].del();
                node.assert_clean(&before);
            }
        }
    }

    fn inside_one_attachment(variant: Variant) {
        const OTHER: u16 = 81;
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let mut servers = Servers::default();
        for family in Family::ALL {
            for transport in [Transport::Tcp, Transport::Udp] {
                let address = SocketAddr::new(lab.pods[0].address(family).unwrap(), OTHER);
                servers.add(&lab.pods[0].netns, "port-81", transport, address).unwrap();
            }
        }
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        for (family, specific_first) in Family::ALL.into_iter().flat_map(|f| [(f, true), (f, false)]) {
            let wildcard = mapped(PORT, INSIDE);
            let specific = mapped_at(&lab.node_address(family).to_string(), PORT, OTHER);
            let mappings = if specific_first { [specific, wildcard] } else { [wildcard, specific] };
            let container = Container::new(&node, lab, 0, mappings.concat());
            container.add();
            let what = format!("{family}, specific first: {specific_first}");
            assert_calls(&what, lab, answers(&stage, family, Some("port-81"), Some("pod-a")));
            container.check();
            container.del();
            node.assert_clean(&before);
        }
    }
}
