//! An uplink that is a VLAN of another device. What comes in by that one with a tag is the VLAN's, and
//! is translated once.

use std::net::IpAddr;

use portmap::backend::ebpf::entries;
use portmap::backend::ebpf::layout::{ClaimKey, REASONS};
use portmap::backend::ebpf::loaded::Maps;
use portmap::demo::matrix::{Place, Source};
use portmap::demo::netns::Netns;
use portmap::demo::topology::{Shape, UPLINK};
use portmap::model::{Claim, Family, Protocol};

use crate::rig::{Container, INSIDE, PORT, Stage, assert_calls, mapped, reaches, refused, shell};
use crate::support::ebpf::map;
use crate::support::entries::maps;
use crate::support::{Node, Variant};

const ADDRESSES: [[&str; 2]; 2] =
    [["203.0.113.1/24", "203.0.113.2/24"], ["fd00:203::1/64", "fd00:203::2/64"]];

fn ip(text: &str) -> IpAddr {
    text.split_once('/').unwrap().0.parse().unwrap()
}

/// Datagrams to the claim and from it.
fn datagrams(maps: &Maps, family: Family) -> [u64; 2] {
    let claim = Claim { family, protocol: Protocol::Udp, address: None, port: PORT };
    let traffic = entries::traffic(maps, &ClaimKey::of(&claim)).unwrap().unwrap();
    [traffic.packets_in, traffic.packets_out]
}

/// How many flows have got another port than their peer's.
fn remapped(node: &Netns) -> u64 {
    let index = REASONS.iter().position(|reason| *reason == "remapped").unwrap() as u32;
    let values =
        node.run(|| map("pm_reasons").get(&index.to_ne_bytes())).unwrap().unwrap().unwrap();
    values.chunks_exact(8).map(|value| u64::from_ne_bytes(value.try_into().unwrap())).sum()
}

#[test]
#[ignore = "guest: needs VLAN devices"]
fn host_ports_are_reached_by_a_vlan() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    for (end, netns) in [&lab.node, &lab.client].into_iter().enumerate() {
        let [v4, v6] = ADDRESSES.map(|ends| ends[end]);
        shell(
            netns,
            &format!(
                "ip link add link {UPLINK} name {UPLINK}.7 type vlan id 7
                 ip link set {UPLINK}.7 up
                 ip address add {v4} dev {UPLINK}.7; ip address add {v6} dev {UPLINK}.7 nodad"
            ),
        );
    }
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    container.check();
    let mut cases = Vec::new();
    for family in Family::ALL {
        let [near, far] = ADDRESSES[family as usize].map(ip);
        cases.extend(reaches(Place::Client, near, PORT, "pod-a", Source::Kept(far)));
        cases.extend(reaches(Place::Pod(1), near, PORT, "pod-a", Source::Any));
        cases.extend(reaches(Place::Node, near, PORT, "pod-a", Source::Any));
        let untagged = lab.node_address(family);
        let source = Source::Kept(lab.client_address(family));
        cases.extend(reaches(Place::Client, untagged, PORT, "pod-a", source));
    }
    assert_calls("by a VLAN and without", lab, cases);
    // Two of each caller that is not the node itself.
    let (maps, _) = maps(&lab.node).unwrap();
    for family in Family::ALL {
        assert_eq!(datagrams(&maps, family), [6, 6], "{family}");
    }
    assert_eq!(remapped(&lab.node), 0);
    container.del();
    let near = ADDRESSES[0].map(ip)[0];
    assert_calls("after DEL", lab, refused(Place::Client, near, PORT));
    node.assert_clean(&before);
}
