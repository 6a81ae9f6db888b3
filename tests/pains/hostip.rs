//! Who gets a port: by address, by age, and against processes of the node.

use std::net::IpAddr;

use portmap::demo::server::Servers;
use portmap::demo::topology::Options;
use portmap::demo::traffic::Transport;
use portmap::model::Family;
use serde_json::{Value, json};

use crate::site::{Site, at, bridge, named, on_each, tcp, udp, with};
use crate::support::VARIANTS;

fn answers(site: &Site, transport: Transport, ip: IpAddr, port: u16) -> String {
    let reply = site.ask(&site.lab.client, transport, ip, port);
    named(&reply).map_or_else(ToString::to_string, str::to_owned)
}

/// kubernetes#118417, rancher#14550: a port for any address shadowed the same port for a specific one
/// if it came first. The specific one wins in both orders, and the other serves the rest.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_16_the_specific_address_wins_in_both_orders() {
    on_each(&VARIANTS, &bridge(), |site| {
        for family in Family::ALL {
            let (first, second) =
                (site.lab.node_address(family), site.lab.second_node_address(family));
            let specific = [at(second, tcp(8080)), at(second, udp(8053))];
            let any = [tcp(8080), udp(8053)];
            for specific_first in [true, false] {
                if specific_first {
                    site.add(1, "specific", &specific);
                }
                site.add(0, "any", &any);
                if !specific_first {
                    site.add(1, "specific", &specific);
                }
                for (transport, port) in [(Transport::Tcp, 8080), (Transport::Udp, 8053)] {
                    assert_eq!(answers(site, transport, first, port), "pod-a");
                    assert_eq!(answers(site, transport, second, port), "pod-b");
                }
                site.check(0, "any", &any);
                site.check(1, "specific", &specific);
                // Either may go first; the other one stays.
                if specific_first {
                    site.del(0, "any", &any);
                    assert_eq!(answers(site, Transport::Tcp, second, 8080), "pod-b");
                    assert_eq!(answers(site, Transport::Tcp, first, 8080), "refused");
                    site.del(1, "specific", &specific);
                } else {
                    site.del(1, "specific", &specific);
                    assert_eq!(answers(site, Transport::Tcp, second, 8080), "pod-a");
                    site.del(0, "any", &any);
                }
                site.assert_clean();
            }
        }
    });
}

/// Kubernetes' conformance test "hostPort, different hostIP and protocol": three pods, one port.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_16_one_port_with_different_addresses_and_protocols_is_no_conflict() {
    let mut options: Options = bridge();
    options.pods = 3;
    on_each(&VARIANTS, &options, |site| {
        let (first, second) =
            (site.lab.node_address(Family::V4), site.lab.second_node_address(Family::V4));
        let deny = json!({"conflictPolicy": "deny"});
        let mappings = [at(first, tcp(54323)), at(second, tcp(54323)), at(second, udp(54323))];
        for (pod, mapping) in mappings.iter().enumerate() {
            let config = with(site.config(pod, std::slice::from_ref(mapping)), deny.clone());
            site.node.ok("ADD", &config, &site.of(pod, &format!("c{pod}")));
        }
        assert_eq!(answers(site, Transport::Tcp, first, 54323), "pod-a");
        assert_eq!(answers(site, Transport::Tcp, second, 54323), "pod-b");
        assert_eq!(answers(site, Transport::Udp, second, 54323), "pod-c");
        assert_eq!(answers(site, Transport::Udp, first, 54323), "refused");
    });
}

/// plugins#149, kubernetes#73702: a hostIP that cannot be read, or a protocol or port that is none, gave
/// success without a mapping, or a tool's syntax error after half of the work.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_16_bad_mappings_are_refused_by_name_before_anything_is_done() {
    let bad: [(Value, &str, &str); 10] = [
        (json!({"hostIP": "not-an-ip"}), "hostIP", "not-an-ip"),
        (json!({"hostIP": "192.0.2.0/24"}), "hostIP", "192.0.2.0/24"),
        (json!({"hostIP": "fe80::1%eth0"}), "hostIP", "fe80::1%eth0"),
        (json!({"hostPort": 0}), "hostPort", "0"),
        (json!({"hostPort": 65536}), "hostPort", "65536"),
        (json!({"hostPort": -1}), "hostPort", "-1"),
        (json!({"containerPort": 70000}), "containerPort", "70000"),
        (json!({"containerPort": 0}), "containerPort", "0"),
        (json!({"protocol": "udplite"}), "protocol", "udplite"),
        (json!({"protocol": "icmp"}), "protocol", "icmp"),
    ];
    on_each(&VARIANTS, &bridge(), |site| {
        for (keys, field, value) in &bad {
            let config = site.config(0, &[tcp(8081), with(tcp(8080), keys.clone())]);
            let (code, message) = site.node.fails("ADD", &config, &site.of(0, "a"));
            assert_eq!(code, 7, "{message}");
            assert!(message.contains(&format!("portMappings[1].{field}")), "{message}");
            assert!(message.contains(value), "{message}");
            // A DEL must not fail for ever over what was refused (cri-o and the kubelet repeat it).
            site.node.ok("DEL", &config, &site.of(0, "a"));
        }
        site.assert_clean();
        for protocol in [json!("TCP"), json!("Tcp"), json!(""), json!(null)] {
            let mapping = with(tcp(8080), json!({ "protocol": protocol }));
            site.add(0, "a", std::slice::from_ref(&mapping));
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.del(0, "a", &[mapping]);
        }
    });
}

/// cni#46, kubernetes#31307, cri-o#2342, nerdctl#1530: two live pods with one port. The newest gets it,
/// and when it goes the older one gets it back; with `conflictPolicy: deny` the second is refused.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_17_two_live_pods_of_one_port() {
    on_each(&VARIANTS, &bridge(), |site| {
        let mappings = [tcp(8080), tcp(8081)];
        site.add(0, "a", &mappings);
        let deny = with(site.config(1, &[tcp(8080)]), json!({"conflictPolicy": "deny"}));
        let (code, message) = site.node.fails("ADD", &deny, &site.of(1, "b"));
        assert_eq!(code, 103, "{message}");
        for part in ["container a", "8080"] {
            assert!(message.contains(part), "{message}");
        }
        site.check(0, "a", &mappings);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.add(1, "b", &[tcp(8080)]);
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.reaches(Transport::Tcp, 8081, "pod-a");
        site.del(1, "b", &[tcp(8080)]);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.check(0, "a", &mappings);
        site.del(0, "a", &mappings);
        site.assert_clean();
    });
}

/// kubernetes#42960, cri-o#4312, kubernetes#63906: a process of the node listens on the port and is
/// silently shadowed. The operator is told which port it is.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_17_a_process_that_listens_on_the_port_is_named_in_a_warning() {
    on_each(&VARIANTS, &bridge(), |site| {
        let servers = Servers::start(&site.lab.node, "node", &[8080], &[8053]).unwrap();
        let output = site.add(0, "a", &[tcp(8080), tcp(8081), udp(8053)]);
        let notes: Vec<&str> =
            output.stderr.lines().filter(|line| line.contains("listens")).collect();
        for (port, expected) in [(8080, true), (8053, true), (8081, false)] {
            let told = notes.iter().any(|note| note.contains(&port.to_string()));
            assert_eq!(told, expected, "{port}: {}", output.stderr);
        }
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.del(0, "a", &[]);
        site.reaches(Transport::Tcp, 8080, "node");
        drop(servers);
    });
}
