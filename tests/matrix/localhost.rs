//! What `route_localnet` opens, the guard keeps shut (CVE-2020-8558): packets to 127.0.0.1 from
//! outside of the node reach neither a pod nor a service that the node keeps to itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use portmap::demo::netns::Netns;
use portmap::demo::server::Servers;
use portmap::demo::topology::UPLINK;
use portmap::demo::traffic::{Call, Failure, Transport};
use portmap::model::Family;

use crate::rig::{Container, INSIDE, PORT, SILENCE, Stage, TIMEOUT, all, bound, mapped_at, shell};
use crate::support::{Node, Variant};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOCALHOST_V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
/// A service of the node for itself.
const PRIVATE: u16 = 9999;

/// Makes a machine send packets for 127.0.0.1 to its gateway, and take answers from there. The kernel
/// does so when the address is not its own.
fn become_attacker(attacker: &Netns, gateway: IpAddr) {
    attacker.set_sysctl("ipv4/conf/eth0/route_localnet", "1").unwrap();
    shell(
        attacker,
        &format!("ip -4 address flush dev lo; ip route add 127.0.0.1 via {gateway} dev eth0"),
    );
}

/// What an attacker gets from a loopback address of the node within `patience`.
fn attacks(
    attackers: &[(&Netns, IpAddr)],
    ip: IpAddr,
    port: u16,
    patience: Duration,
) -> Vec<Result<String, Failure>> {
    let target = SocketAddr::new(ip, port);
    let calls: Vec<(&Netns, Call)> = attackers
        .iter()
        .flat_map(|(attacker, source)| {
            [Transport::Tcp, Transport::Udp]
                .map(|transport| (*attacker, bound(transport, *source, target, patience)))
        })
        .collect();
    all(&calls).into_iter().map(|result| result.map(|reply| reply.server)).collect()
}

on_each_variant_with_rules! {
    fn packets_from_outside_to_127_0_0_1_are_dropped(variant: Variant) {
        let stage = Stage::bypassing();
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let mut servers = Servers::default();
        for transport in [Transport::Tcp, Transport::Udp] {
            let address = SocketAddr::new(LOCALHOST, PRIVATE);
            servers.add(&lab.node, "node", transport, address).unwrap();
        }
        let pod = &lab.pods[0];
        let from_client = (&lab.client, lab.client_address(Family::V4));
        let from_pod = (&pod.netns, pod.address(Family::V4).unwrap());
        become_attacker(&lab.client, lab.node_address(Family::V4));
        become_attacker(&pod.netns, lab.gateway(Family::V4));

        // Something else on this node has opened the uplink, as kube-proxy does. That alone lets
        // the client in: without this, the rest of the test would prove nothing.
        let localnet = |link: &str| format!("ipv4/conf/{link}/route_localnet");
        lab.node.set_sysctl(&localnet(UPLINK), "1").unwrap();
        lab.node.set_sysctl(&localnet(&pod.host_link), "1").unwrap();
        let open = vec![Ok("node".to_owned()); 4];
        assert_eq!(attacks(&[from_client, from_pod], LOCALHOST, PRIVATE, TIMEOUT), open);
        lab.node.set_sysctl(&localnet(&pod.host_link), "0").unwrap();
        let before = node.snapshot();

        for host_ip in ["127.0.0.1", ""] {
            let container = Container::new(&node, lab, 0, mapped_at(host_ip, PORT, INSIDE));
            container.add();
            assert_eq!(
                lab.node.sysctl(&localnet(&pod.host_link)).unwrap(),
                "1",
                "the plugin itself has opened the pod's link"
            );
            for port in [PRIVATE, PORT] {
                let dropped = vec![Err(Failure::TimedOut); 4];
                assert_eq!(attacks(&[from_client, from_pod], LOCALHOST, port, SILENCE), dropped, "port {port}");
            }
            // The node's own way to both is open.
            for (port, server) in [(PRIVATE, "node"), (PORT, "pod-a")] {
                let target = SocketAddr::new(LOCALHOST, port);
                let calls = [Transport::Tcp, Transport::Udp]
                    .map(|transport| (&lab.node, Call::new(transport, target, TIMEOUT)));
                for reply in all(&calls) {
                    assert_eq!(reply.unwrap().server, server);
                }
            }
            container.check();
            container.del();
            node.assert_clean(&before);
        }
        assert_eq!(attacks(&[from_client], LOCALHOST, PRIVATE, TIMEOUT), open[..2], "the guard went with its user");
    }
}

/// eBPF opens nothing, so that there is nothing to guard: what the node has opened itself stays as open
/// as it is, and a hostPort of 127.0.0.1 or ::1 is for the sockets of the node alone. That takes programs
/// which look away from packets to these addresses.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_takes_no_packets_to_loopback_addresses() {
    let stage = Stage::bypassing();
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let pod = &lab.pods[1];
    let attackers = |family| {
        [(&lab.client, lab.client_address(family)), (&pod.netns, pod.address(family).unwrap())]
    };
    become_attacker(&lab.client, lab.node_address(Family::V4));
    become_attacker(&pod.netns, lab.gateway(Family::V4));
    for (machine, gateway) in
        [(&lab.client, lab.node_address(Family::V6)), (&pod.netns, lab.gateway(Family::V6))]
    {
        shell(
            machine,
            &format!("ip -6 address flush dev lo; ip route add ::1 via {gateway} dev eth0"),
        );
    }
    let localnet = |link: &str| format!("ipv4/conf/{link}/route_localnet");
    let closed = node.snapshot();
    for host_ip in ["127.0.0.1", "::1", ""] {
        let container = Container::new(&node, lab, 0, mapped_at(host_ip, PORT, INSIDE));
        container.add();
        node.snapshot().same_sysctls(&closed).unwrap();
        for open in ["1", "0"] {
            for link in [UPLINK, pod.host_link.as_str()] {
                lab.node.set_sysctl(&localnet(link), open).unwrap();
            }
            // Martians are dropped where the link is closed; behind an open one nothing listens.
            let (v4, patience) = match open {
                "1" => (Failure::Refused, TIMEOUT),
                _ => (Failure::TimedOut, SILENCE),
            };
            let found = attacks(&attackers(Family::V4), LOCALHOST, PORT, patience);
            assert_eq!(found, vec![Err(v4); 4]);
            let v6 = vec![Err(Failure::TimedOut); 4];
            assert_eq!(attacks(&attackers(Family::V6), LOCALHOST_V6, PORT, SILENCE), v6);
        }
        for ip in [LOCALHOST, LOCALHOST_V6] {
            let mapped = host_ip.is_empty() || host_ip == ip.to_string();
            let target = SocketAddr::new(ip, PORT);
            let calls = [Transport::Tcp, Transport::Udp]
                .map(|transport| (&lab.node, Call::new(transport, target, TIMEOUT)));
            let expected = if mapped { Ok("pod-a".to_owned()) } else { Err(Failure::Refused) };
            for result in all(&calls) {
                assert_eq!(result.map(|reply| reply.server), expected, "{host_ip:?}: {ip}");
            }
        }
        container.check();
        container.del();
    }
}
