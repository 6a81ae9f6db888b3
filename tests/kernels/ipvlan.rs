//! Pods that share the uplink's MAC address (ipvlan). What comes in by the uplink is handed to them by
//! its IP address, which is the pod's by then.

use std::net::{IpAddr, SocketAddr};

use portmap::demo::netns::Netns;
use portmap::demo::server::Servers;
use portmap::demo::topology::{Shape, UPLINK};
use portmap::demo::traffic::{Call, Failure, Transport};
use portmap::model::Family;
use serde_json::json;

use crate::come;
use crate::rig::{INSIDE, PORT, SILENCE, Stage, TIMEOUT, TRANSPORTS, all, shell};

const ADDRESSES: [&str; 2] = ["198.51.100.50", "fd00:51::50"];

#[test]
#[ignore = "guest: needs ipvlan devices"]
fn outside_clients_reach_an_ipvlan_pod() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let pod = Netns::new("ipvlan").unwrap();
    let [v4, v6] = ADDRESSES;
    shell(
        &lab.node,
        &format!(
            "ip link add link {UPLINK} name iv0 type ipvlan mode l2
             ip link set iv0 netns {}",
            pod.path().display()
        ),
    );
    shell(
        &pod,
        &format!(
            "ip link set lo up; ip link set iv0 name eth0 up
             ip address add {v4}/24 dev eth0; ip address add {v6}/64 dev eth0 nodad"
        ),
    );
    let _servers = Servers::start(&pod, "ipvlan", &[INSIDE], &[INSIDE]).unwrap();
    let brief = shell(&pod, "ip -brief link show eth0");
    let mac = brief.split_whitespace().nth(2).unwrap();
    let result = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "mac": mac, "sandbox": pod.path()}],
        "ips": [
            {"address": format!("{v4}/24"), "interface": 0},
            {"address": format!("{v6}/64"), "interface": 0},
        ],
    });
    let (node, config, attachment) = come(lab, &pod, result);
    let to = |family| SocketAddr::new(lab.node_address(family), PORT);
    let call = |family, transport| (&lab.client, Call::new(transport, to(family), TIMEOUT));
    let calls: Vec<_> =
        Family::ALL.into_iter().flat_map(|family| TRANSPORTS.map(|by| call(family, by))).collect();
    for (result, (_, call)) in all(&calls).into_iter().zip(&calls) {
        let reply = result.unwrap_or_else(|error| panic!("{call:?}: {error}"));
        assert_eq!(reply.server, "ipvlan");
        assert_eq!(reply.seen.ip(), lab.client_address(Family::of(&call.target.ip())));
    }
    // A limit: the kernel keeps ipvlan devices and what they share apart.
    let inside: [IpAddr; 2] = [lab.node_address(Family::V4), "127.0.0.1".parse().unwrap()];
    for ip in inside {
        let target = SocketAddr::new(ip, PORT);
        let failed = all(&[(&lab.node, Call::new(Transport::Tcp, target, SILENCE))]);
        assert!(failed[0].is_err(), "{failed:?}");
    }
    node.ok("DEL", &config, &attachment);
    for result in all(&calls[..2]) {
        assert_eq!(result.unwrap_err(), Failure::Refused);
    }
}
