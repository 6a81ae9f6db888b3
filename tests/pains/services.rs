//! HostPorts keep to what is theirs: Services and passing traffic are not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use portmap::demo::plugin;
use portmap::demo::server::Servers;
use portmap::demo::traffic::{Failure, Transport};
use portmap::model::Family;
use serde_json::json;

use crate::site::{Site, at, bridge, named, on_each, tcp, udp, v4_only};
use crate::support::{VARIANTS, Variant};

/// Addresses of Services.
const BOUND: [&str; 2] = ["10.96.0.10", "fd00:96::10"];

/// Sends port 8080 of the node to pod-b, in the way in which kube-proxy of that kind would do it.
fn make_service(site: &Site, nft: bool) {
    for (family, ip, tool) in [(Family::V4, "ip", "iptables"), (Family::V6, "ip6", "ip6tables")] {
        let node = site.lab.node_address(family);
        let pod = site.pod(1).address(family).unwrap();
        let target = std::net::SocketAddr::new(pod, 80);
        if nft {
            site.node.shell(&format!(
                "nft add table {ip} services
                 nft 'add chain {ip} services nat {{ type nat hook prerouting priority dstnat; }}'
                 nft add rule {ip} services nat {ip} daddr {node} tcp dport 8080 dnat to {target}"
            ));
        } else {
            // kube-proxy puts its jump first, whenever it comes.
            site.node.shell(&format!(
                "{tool} -t nat -N KUBE-SERVICES
                 {tool} -t nat -A KUBE-SERVICES -d {node} -p tcp --dport 8080 \
                   -j DNAT --to-destination {target}
                 {tool} -t nat -I PREROUTING -j KUBE-SERVICES"
            ));
        }
    }
}

/// CVE-2019-9946, plugins#269, kubernetes#72522, #61938, kubeadm#985, k3s#1204, talos#9223, #9883: a
/// hostPort took the port of a Service. Services win, whoever came first; with nft's priorities that
/// had been a matter of luck.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_08_services_win_in_both_orders() {
    for service_first in [true, false] {
        let run = |variant: Variant, nft: bool| {
            on_each(&[variant], &bridge(), |site| {
                println!("service first: {service_first}, of nft: {nft}");
                if service_first {
                    make_service(site, nft);
                }
                site.add(0, "a", &[tcp(8080), tcp(8081)]);
                if !service_first {
                    make_service(site, nft);
                }
                site.reaches(Transport::Tcp, 8080, "pod-b");
                site.reaches(Transport::Tcp, 8081, "pod-a");
                // Rules that are made anew must not come before the Service's.
                site.drop_own_jumps();
                site.add(0, "a", &[tcp(8080), tcp(8081)]);
                site.reaches(Transport::Tcp, 8080, "pod-b");
                site.reaches(Transport::Tcp, 8081, "pod-a");
            });
        };
        run(Variant::IptablesNft, false);
        run(Variant::IptablesLegacy, false);
        run(Variant::Nftables, true);
        run(Variant::Nftables, false);
    }
}

/// kube-proxy in IPVS mode, with rules of the iptables variant: Services' addresses are bound to a device of
/// the node, and spared the rest of kube-proxy's own chain.
fn bind_services(site: &Site, proxy: &str) {
    site.node.shell(&format!(
        "ip link add kube-ipvs0 type veth peer name kube-ipvs0-peer
         ip address add {}/32 dev kube-ipvs0
         ip address add {}/128 dev kube-ipvs0 nodad
         ip link set kube-ipvs0 up",
        BOUND[0], BOUND[1]
    ));
    for (ip, tool, family) in [(BOUND[0], "iptables", "inet"), (BOUND[1], "ip6tables", "inet6")] {
        let (tool, set) = (format!("{tool}-{proxy}"), format!("services-{family}"));
        site.node.shell(&format!(
            "ipset create {set} hash:ip,port family {family}
             ipset add {set} {ip},tcp:443
             ipset add {set} {ip},udp:5353
             {tool} -t nat -N KUBE-SERVICES
             {tool} -t nat -A KUBE-SERVICES -m set --match-set {set} dst,dst -j ACCEPT
             {tool} -t nat -I PREROUTING -j KUBE-SERVICES
             {tool} -t nat -I OUTPUT -j KUBE-SERVICES"
        ));
    }
}

/// k8s#61938, kubeadm#985, talos#9223: the same where kube-proxy uses IPVS, and the kernel calls Services'
/// addresses local.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and ipset"]
fn pain_08_services_win_where_their_addresses_are_bound_to_the_node() {
    // Between two variants of iptables it is chance whose chains come first (README, Limits).
    for (variant, proxy) in [
        (Variant::IptablesNft, "nft"),
        (Variant::IptablesLegacy, "legacy"),
        (Variant::Nftables, "nft"),
        (Variant::Nftables, "legacy"),
        (Variant::Ebpf, "nft"),
    ] {
        for service_first in [true, false] {
            on_each(&[variant], &bridge(), |site| {
                println!("kube-proxy by iptables-{proxy}, Services first: {service_first}");
                let mappings = [tcp(443), udp(5353)];
                if !service_first {
                    site.add(0, "a", &mappings);
                }
                bind_services(site, proxy);
                // What is new on the node is seen by the next call, or put right without one.
                match (service_first, variant) {
                    (false, Variant::Nftables | Variant::Ebpf) => {
                        let drift = site.drift(0, "a", &mappings);
                        assert!(drift.contains("take the ports of Services"), "{drift}");
                        site.node.restore(true);
                    }
                    _ => drop(site.add(0, "a", &mappings)),
                }
                let mut services = Servers::default();
                for (transport, port) in [(Transport::Tcp, 443), (Transport::Udp, 5353)] {
                    for vip in BOUND.map(|vip| vip.parse::<IpAddr>().unwrap()) {
                        let at = SocketAddr::new(vip, port);
                        services.add(&site.lab.node, "service", transport, at).unwrap();
                        for from in [&site.pod(1).netns, &site.lab.node] {
                            let reply = site.ask(from, transport, vip, port);
                            assert_eq!(named(&reply), Ok("service"), "{} {at}", from.name());
                        }
                    }
                    site.reaches(transport, port, "pod-a");
                    for from in [&site.pod(1).netns, &site.lab.node] {
                        for family in Family::ALL {
                            let reply =
                                site.ask(from, transport, site.lab.node_address(family), port);
                            assert_eq!(named(&reply), Ok("pod-a"), "{} {transport}", from.name());
                        }
                    }
                    let reply =
                        site.ask(&site.lab.node, transport, Ipv4Addr::LOCALHOST.into(), port);
                    assert_eq!(named(&reply), Ok("pod-a"), "{transport}");
                }
                site.check(0, "a", &mappings);
                if variant == Variant::Nftables {
                    // An address that moves between nodes (keepalived).
                    let moved = "198.51.100.77";
                    site.node.shell(&format!("ip address add {moved}/32 dev lo"));
                    let drift = site.drift(0, "a", &mappings);
                    assert!(drift.contains(moved), "{drift}");
                    site.node.restore(true);
                    site.check(0, "a", &mappings);
                    let from = &site.pod(1).netns;
                    let reply = site.ask(from, Transport::Tcp, moved.parse().unwrap(), 443);
                    assert_eq!(named(&reply), Ok("pod-a"));
                }
            });
        }
    }
}

/// CVE-2025-67499, golang/vulndb#4222: hostPort 53 captured DNS queries to any resolver. What passes
/// through the node, and what the node itself sends elsewhere, goes where it was sent.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_08_passing_traffic_is_not_touched() {
    on_each(&VARIANTS, &bridge(), |site| {
        let outside = Servers::start(&site.lab.client, "client", &[53], &[53]);
        let dns = |protocol: &str, inside: u16| json!({"hostPort": 53, "containerPort": inside, "protocol": protocol});
        site.add(0, "dns", &[dns("tcp", 80), dns("udp", 53)]);
        for transport in [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected] {
            site.reaches(transport, 53, "pod-a");
            for family in Family::ALL {
                let client = site.lab.client_address(family);
                for from in [&site.pod(1).netns, &site.pod(0).netns, &site.lab.node] {
                    let reply = site.ask(from, transport, client, 53);
                    assert_eq!(named(&reply), Ok("client"), "{} {transport}", from.name());
                }
            }
        }
        for family in Family::ALL {
            let pod = site.pod(1).address(family).unwrap();
            let reply = site.ask(&site.lab.client, Transport::Udp, pod, 53);
            assert_eq!(named(&reply), Ok("pod-b"));
        }
        drop(outside);
    });
}

/// CVE-2025-67499: a hostIP that is no address of the node catches nothing, and a warning says so.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_08_a_host_ip_elsewhere_catches_nothing() {
    on_each(&VARIANTS, &bridge(), |site| {
        let outside = Servers::start(&site.lab.client, "client", &[8080], &[8053]);
        let client = site.lab.client_address(Family::V4);
        let mappings = [crate::site::at(client, tcp(8080)), crate::site::at(client, udp(8053))];
        let output = site.add(0, "a", &mappings);
        assert!(output.stderr.contains(&format!("hostIP {client}")), "{}", output.stderr);
        for (transport, port) in [(Transport::Tcp, 8080), (Transport::Udp, 8053)] {
            for from in [&site.pod(1).netns, &site.lab.node] {
                let reply = site.ask(from, transport, client, port);
                assert_eq!(named(&reply), Ok("client"), "{} {transport}", from.name());
            }
        }
        site.del(0, "a", &mappings);
        site.assert_clean();
        drop(outside);
    });
}

/// A hostIP may be the node's by a route alone, as announced addresses are (AnyIP), and may be link-local.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_08_a_host_ip_need_not_be_on_a_device() {
    on_each(&VARIANTS, &v4_only(bridge()), |site| {
        site.node.shell(
            "ip route add local 203.0.113.5 dev lo
             ip address add 169.254.7.1/32 dev lo",
        );
        let (routed, link_local) = ("203.0.113.5", "169.254.7.1");
        for ip in [routed, link_local] {
            let via = site.lab.node_address(Family::V4).to_string();
            let mut route = std::process::Command::new("ip");
            let made =
                plugin::run(route.args(["route", "add", ip, "via", &via]), b"", &site.lab.client);
            assert!(made.unwrap().success());
        }
        let output = site.add(0, "a", &[at(routed, tcp(8080)), at(link_local, tcp(8081))]);
        let is_ebpf = site.node.variant == Variant::Ebpf;
        assert!(!output.stderr.contains(routed), "{}", output.stderr);
        assert_eq!(output.stderr.contains("hostIP 169.254.7.1"), is_ebpf, "{}", output.stderr);
        let ask = |ip: &str, port| {
            let reply = site.ask(&site.lab.client, Transport::Tcp, ip.parse().unwrap(), port);
            reply.map(|reply| reply.server)
        };
        assert_eq!(ask(routed, 8080).as_deref(), Ok("pod-a"));
        let expected = if is_ebpf { Err(&Failure::Refused) } else { Ok("pod-a") };
        assert_eq!(ask(link_local, 8081).as_deref(), expected);
        let reply = site.ask(&site.lab.node, Transport::Tcp, link_local.parse().unwrap(), 8081);
        assert_eq!(named(&reply), Ok("pod-a"));
    });
}

/// `[::1]` leads to the pod where that can be done, and to whoever listens there where it cannot.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_12_a_server_on_the_ipv6_loopback_address_answers_unless_the_pod_can() {
    on_each(&VARIANTS, &bridge(), |site| {
        let loopback = std::net::Ipv6Addr::LOCALHOST.into();
        let own = Servers::start(&site.lab.node, "node", &[8080], &[8053]);
        let expected = match site.node.variant {
            Variant::Ebpf => "pod-a",
            _ => "node",
        };
        let ask = |transport, port, by: &str| {
            let reply = site.ask(&site.lab.node, transport, loopback, port);
            assert_eq!(named(&reply), Ok(by), "{:?} {transport}", site.node.variant);
        };
        let ports = [(Transport::Tcp, 8080), (Transport::Udp, 8053)];
        ports.iter().for_each(|(transport, port)| ask(*transport, *port, "node"));
        site.add(0, "a", &[tcp(8080), udp(8053)]);
        ports.iter().for_each(|(transport, port)| ask(*transport, *port, expected));
        site.del(0, "a", &[tcp(8080), udp(8053)]);
        ports.iter().for_each(|(transport, port)| ask(*transport, *port, "node"));
        site.assert_clean();
        drop(own);
    });
}
