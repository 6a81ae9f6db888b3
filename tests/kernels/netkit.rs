//! Pods behind netkit devices (Linux 6.8), which Cilium gives them instead of veth ones.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoNetkit, LinkAttribute, LinkInfo, LinkMessage, NetkitMode,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use portmap::demo::matrix::{Place, Source};
use portmap::demo::netns::Netns;
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Shape};
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use portmap::sys::netlink::socket::{Message, NetlinkSocket};
use serde_json::json;

use crate::come;
use crate::rig::{INSIDE, PORT, Stage, TIMEOUT, assert_calls, mapped, reaches, shell};

const ADDRESSES: [[&str; 2]; 2] = [["10.244.9.9", "10.244.9.254"], ["fd00:9::9", "fd00:9::fe"]];

/// A pod whose link's end on the node is `nk0`.
fn attach(lab: &Lab, mode: NetkitMode) -> Netns {
    let pod = Netns::new("netkit").unwrap();
    pod.set_sysctl("ipv6/conf/default/accept_dad", "0").unwrap();
    let mut peer = LinkMessage::default();
    peer.attributes =
        vec![LinkAttribute::IfName("eth0".into()), LinkAttribute::NetNsFd(pod.raw_fd())];
    let data = InfoData::Netkit(vec![InfoNetkit::Mode(mode), InfoNetkit::Peer(peer)]);
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName("nk0".into()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Netkit), LinkInfo::Data(data)]),
    ];
    let message = Message::of(&RouteNetlinkMessage::NewLink(message));
    let make = || {
        NetlinkSocket::open(NETLINK_ROUTE)?
            .request(&message, NLM_F_CREATE | NLM_F_EXCL, |_, _| None::<()>)
    };
    lab.node.run(make).unwrap().unwrap();
    shell(&lab.node, "ip link set nk0 up");
    shell(&pod, "ip link set lo up; ip link set eth0 up");
    for [own, gateway] in ADDRESSES {
        let full = if own.contains(':') { 128 } else { 32 };
        shell(
            &lab.node,
            &format!(
                "ip address add {gateway}/{full} dev nk0 nodad
                 ip route add {own} dev nk0"
            ),
        );
        shell(
            &pod,
            &format!(
                "ip address add {own}/{full} dev eth0 nodad
                 ip route add {gateway} dev eth0
                 ip route add default via {gateway} dev eth0"
            ),
        );
    }
    pod
}

#[test]
#[ignore = "guest: needs netkit devices"]
fn host_ports_of_netkit_pods_are_reached() {
    for mode in [NetkitMode::L2, NetkitMode::L3] {
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let pod = attach(lab, mode);
        let _servers = Servers::start(&pod, "netkit", &[INSIDE], &[INSIDE]).unwrap();
        let [v4, v6] = ADDRESSES.map(|[own, _]| own);
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "nk0"}, {"name": "eth0", "sandbox": pod.path()}],
            "ips": [
                {"address": format!("{v4}/32"), "interface": 1},
                {"address": format!("{v6}/128"), "interface": 1},
            ],
        });
        let (node, config, attachment) = come(lab, &pod, result);
        let mut cases = Vec::new();
        for family in Family::ALL {
            let ip = lab.node_address(family);
            let from_outside = Source::Kept(lab.client_address(family));
            cases.extend(reaches(Place::Client, ip, PORT, "netkit", from_outside));
            let other = Source::Kept(lab.pods[1].address(family).unwrap());
            cases.extend(reaches(Place::Pod(1), ip, PORT, "netkit", other));
            cases.extend(reaches(Place::Node, ip, PORT, "netkit", Source::Any));
        }
        assert_calls("a pod behind netkit", lab, cases);
        for family in Family::ALL {
            for transport in [Transport::Tcp, Transport::Udp] {
                let target = lab.node_socket(family, PORT);
                let reply =
                    reach(&pod, Call::new(transport, target, TIMEOUT)).unwrap_or_else(|error| {
                        panic!("itself, {mode:?} {transport} {target}: {error}")
                    });
                assert_eq!(reply.server, "netkit");
            }
        }
        // It calls others' hostPorts.
        let other = crate::rig::Container::new(&node, lab, 0, mapped(PORT + 1, INSIDE));
        other.add();
        for (family, [own, _]) in Family::ALL.into_iter().zip(ADDRESSES) {
            let own: IpAddr = own.parse().unwrap();
            let target = lab.node_socket(family, PORT + 1);
            let reply = reach(&pod, Call::new(Transport::Tcp, target, TIMEOUT)).unwrap();
            assert_eq!((reply.server.as_str(), reply.seen.ip()), ("pod-a", own));
        }
        node.ok("DEL", &config, &attachment);
    }
}
