//! Pods that share the node's uplink (macvlan in bridge mode) and have no link on the node. Packets for
//! them leave the uplink's ingress with the pod's MAC address, since what has the node's own never gets
//! to them.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use portmap::demo::links::Links;
use portmap::demo::netns::Netns;
use portmap::demo::plugin::Attachment;
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Shape, UPLINK};
use portmap::demo::traffic::{Call, Failure, Transport, reach};
use portmap::model::Family;
use serde_json::{Value, json};

use crate::rig::{INSIDE, PORT, SILENCE, Stage, TIMEOUT, TRANSPORTS, all, mapped, shell};
use crate::support::{Node, RULES, Variant};

const ADDRESSES: [&str; 2] = ["198.51.100.50", "fd00:51::50"];

/// A pod on the uplink's own subnet.
struct Pod {
    netns: Netns,
    mac: String,
    _servers: Servers,
}

impl Pod {
    fn new(lab: &Lab) -> Self {
        let netns = Netns::new("macvlan").unwrap();
        netns.set_sysctl("ipv6/conf/default/accept_dad", "0").unwrap();
        let path = netns.path();
        shell(
            &lab.node,
            &format!(
                "ip link add link {UPLINK} name mv0 type macvlan mode bridge
                 ip link set mv0 netns {}",
                path.display()
            ),
        );
        let [v4, v6] = ADDRESSES;
        shell(
            &netns,
            &format!(
                "ip link set lo up; ip link set mv0 name eth0 up
                 ip address add {v4}/24 dev eth0
                 ip address add {v6}/64 dev eth0 nodad"
            ),
        );
        let mac = Links::open(&netns).unwrap().link("eth0").unwrap().mac_text();
        let servers = Servers::start(&netns, "macvlan", &[INSIDE], &[INSIDE]).unwrap();
        Pod { netns, mac, _servers: servers }
    }

    /// What CNI's macvlan plugin reports.
    fn result(&self) -> Value {
        let [v4, v6] = ADDRESSES;
        json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "mac": self.mac, "sandbox": self.netns.path()}],
            "ips": [
                {"address": format!("{v4}/24"), "interface": 0},
                {"address": format!("{v6}/64"), "interface": 0},
            ],
        })
    }

    fn attachment(&self) -> Attachment {
        Attachment {
            container_id: "container-of-macvlan".into(),
            netns: self.netns.path(),
            ifname: "eth0".into(),
            args: String::new(),
        }
    }
}

fn calls_from<'a>(from: &'a Netns, lab: &Lab) -> Vec<(&'a Netns, Call)> {
    let to = |family| SocketAddr::new(lab.node_address(family), PORT);
    let call = |family, transport| (from, Call::new(transport, to(family), TIMEOUT));
    Family::ALL.into_iter().flat_map(|family| TRANSPORTS.map(|by| call(family, by))).collect()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn outside_clients_reach_a_pod_that_shares_the_uplink() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let pod = Pod::new(lab);
    let config = node.config(json!(mapped(PORT, INSIDE)), pod.result());
    node.ok("ADD", &config, &pod.attachment());
    for (result, (_, call)) in
        all(&calls_from(&lab.client, lab)).into_iter().zip(calls_from(&lab.client, lab))
    {
        let reply = result.unwrap_or_else(|error| panic!("{call:?}: {error}"));
        assert_eq!(reply.server, "macvlan");
        assert_eq!(reply.seen.ip(), lab.client_address(Family::of(&call.target.ip())));
    }
    // In several fragments, each of which needs the MAC address.
    for family in Family::ALL {
        let socket = lab.client.run(|| UdpSocket::bind(any(family))).unwrap().unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.send_to(&[7; 5000], lab.node_socket(family, PORT)).unwrap();
        let mut answer = [0; 512];
        let (length, from) = socket.recv_from(&mut answer).unwrap();
        assert_eq!(from, lab.node_socket(family, PORT));
        assert!(answer[..length].starts_with(b"macvlan "));
    }
    node.ok("CHECK", &config, &pod.attachment());

    // Nor can the node itself, and other pods through it, reach such a pod directly: the kernel keeps
    // macvlan devices and what they share apart.
    let direct: [IpAddr; 2] = ADDRESSES.map(|ip| ip.parse().unwrap());
    let mut unreachable: Vec<SocketAddr> =
        direct.into_iter().map(|ip| SocketAddr::new(ip, INSIDE)).collect();
    unreachable.extend(Family::ALL.map(|family| lab.node_socket(family, PORT)));
    unreachable.push("127.0.0.1:8080".parse().unwrap());
    for target in unreachable {
        for from in [&lab.node, &lab.pods[0].netns] {
            if target.ip().is_loopback() && !std::ptr::eq(from, &lab.node) {
                continue;
            }
            let failure = reach(from, Call::new(Transport::Tcp, target, SILENCE)).unwrap_err();
            assert!(failure == Failure::TimedOut || is_unreachable(&failure), "{failure:?}");
        }
    }
    node.ok("DEL", &config, &pod.attachment());
    for result in all(&calls_from(&lab.client, lab)[..2]) {
        assert_eq!(result.unwrap_err(), Failure::Refused);
    }
}

/// Any address and port of a family.
fn any(family: Family) -> SocketAddr {
    let text = if family == Family::V4 { "0.0.0.0:0" } else { "[::]:0" };
    text.parse().unwrap()
}

fn is_unreachable(failure: &Failure) -> bool {
    matches!(failure, Failure::Other(text) if text.contains("EHOSTUNREACH") || text.contains("No route to host"))
}

/// Rules translate behind the place where the uplink and the pod part.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn rules_cannot_reach_a_pod_that_shares_the_uplink() {
    for variant in RULES {
        let stage = Stage::new(Shape::Ptp);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let pod = Pod::new(lab);
        let config = node.config(json!(mapped(PORT, INSIDE)), pod.result());
        node.ok("ADD", &config, &pod.attachment());
        let target = lab.node_socket(Family::V4, PORT);
        let failure = reach(&lab.client, Call::new(Transport::Tcp, target, SILENCE)).unwrap_err();
        assert!(failure == Failure::TimedOut || is_unreachable(&failure), "{failure:?}");
        node.ok("DEL", &config, &pod.attachment());
    }
}
