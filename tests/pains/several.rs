//! Several networks, interfaces and configurations.

use std::net::{IpAddr, SocketAddr};

use portmap::demo::plugin::Attachment;
use portmap::demo::traffic::Transport;
use portmap::model::Family;
use serde_json::{Value, json};

use crate::site::{Site, bridge, named, on_each, tcp, with};
use crate::support::{IPTABLES, RULES, VARIANTS, Variant};

/// podman#6065, podman#26044, moby#40740, multus#208: one container on two networks. Upstream's nftables
/// backend knows rules by the container alone, so that the DEL of one network removes the other's.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_15_two_networks_of_one_container_are_two() {
    on_each(&VARIANTS, &bridge(), |site| {
        // The addresses of two pods stand for the container's on two networks.
        site.add(0, "both", &[tcp(8080)]);
        site.node.network = "second".into();
        site.add(1, "both", &[tcp(8081)]);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.reaches(Transport::Tcp, 8081, "pod-b");
        site.del(1, "both", &[tcp(8081)]);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.refuses(8081);
        site.node.network = "portmap".into();
        site.check(0, "both", &[tcp(8080)]);
        site.del(0, "both", &[tcp(8080)]);
        site.assert_clean();
    });
}

/// podman#6065: podman hands the same mappings to every network of a container, also under a policy
/// that refuses ports of others.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_15_the_same_mappings_on_two_networks_are_no_conflict() {
    on_each(&VARIANTS, &bridge(), |site| {
        let deny = json!({"conflictPolicy": "deny"});
        let config = |pod: usize, network: &str| {
            with(with(site.config(pod, &[tcp(8080)]), deny.clone()), json!({ "name": network }))
        };
        site.node.ok("ADD", &config(0, "first"), &site.of(0, "both"));
        site.node.ok("ADD", &config(1, "second"), &site.of(1, "both"));
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.node.ok("DEL", &config(1, "second"), &site.of(1, "both"));
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.node.ok("DEL", &config(0, "first"), &site.of(0, "both"));
        site.assert_clean();
    });
}

/// multus#568: two interfaces of one container on one network share a chain in upstream's layout, so
/// that the DEL of `net1` killed `eth0`'s mappings.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_15_two_interfaces_on_one_network_are_two() {
    on_each(&VARIANTS, &bridge(), |site| {
        let net1 = || {
            let mut attachment = site.of(1, "both");
            attachment.ifname = "net1".into();
            attachment
        };
        // What the network plugin reported calls the container's interface by the same name.
        let mut config = site.config(1, &[tcp(8081)]);
        config["prevResult"]["interfaces"][1]["name"] = json!("net1");
        site.add(0, "both", &[tcp(8080)]);
        site.node.ok("ADD", &config, &net1());
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.reaches(Transport::Tcp, 8081, "pod-b");
        site.node.ok("CHECK", &config, &net1());
        site.check(0, "both", &[tcp(8080)]);

        site.node.ok("DEL", &config, &net1());
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.refuses(8081);
        // Once more, as runtimes do, and when no record says whose chain it is.
        site.node.ok("DEL", &config, &net1());
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.check(0, "both", &[tcp(8080)]);
        site.del(0, "both", &[tcp(8080)]);
        site.assert_clean();
    });
}

/// With eBPF an attachment has no chain, and when it moves to rules a sibling may have upstream's name for it.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn pain_15_two_interfaces_stay_two_when_they_move_between_backends() {
    on_each(&IPTABLES, &bridge(), |site| {
        let net1 = Attachment { ifname: "net1".into(), ..site.of(1, "both") };
        let mut config = site.config(1, &[tcp(8081)]);
        config["prevResult"]["interfaces"][1]["name"] = json!("net1");
        let programs = with(site.config(0, &[tcp(8080)]), json!({"backend": "ebpf"}));
        let ends = |site: &Site| {
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.reaches(Transport::Tcp, 8081, "pod-b");
            site.node.ok("DEL", &config, &net1);
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.refuses(8081);
            site.node.ok("ADD", &config, &net1);
            site.del(0, "both", &[]);
            site.reaches(Transport::Tcp, 8081, "pod-b");
            site.refuses(8080);
            site.node.ok("DEL", &config, &net1);
            site.node.flush();
            site.assert_clean();
        };
        // By a later configuration of its own, ...
        site.node.ok("ADD", &programs, &site.of(0, "both"));
        site.node.ok("ADD", &config, &net1);
        site.add(0, "both", &[tcp(8080)]);
        ends(site);
        // ... and because another pod asks for its port.
        site.node.ok("ADD", &programs, &site.of(0, "both"));
        site.node.ok("ADD", &config, &net1);
        site.add(1, "rival", &[tcp(8080)]);
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.del(1, "rival", &[]);
        ends(site);
    });
}

/// The condition that a packet goes to this address of the node, in the backend's own words.
fn only_to(site: &Site, ip: IpAddr) -> Value {
    let digit = if ip.is_ipv4() { ("conditionsV4", "ip") } else { ("conditionsV6", "ip6") };
    let words = match site.node.variant {
        Variant::Nftables => json!([format!("{} daddr {ip}", digit.1)]),
        _ => json!(["-d", ip.to_string()]),
    };
    json!({ digit.0: words })
}

/// Upstream's nftables backend writes conditions into the base chain at every ADD, so that the last
/// configuration's hold for everybody. They hold for their own attachment, also of one port.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_15_conditions_hold_for_their_own_attachment_only() {
    on_each(&RULES, &bridge(), |site| {
        let (first, second) =
            (site.lab.node_address(Family::V4), site.lab.second_node_address(Family::V4));
        let restricted = with(site.config(1, &[tcp(8080), tcp(8081)]), only_to(site, second));
        let answers = |ip: IpAddr, port: u16, server: Option<&str>| {
            let reply = site.ask(&site.lab.client, Transport::Tcp, ip, port);
            assert_eq!(named(&reply).ok(), server, "{}", SocketAddr::new(ip, port));
        };
        // Once with the restricted one as the newer, once as the older.
        for restricted_last in [true, false] {
            if !restricted_last {
                site.node.ok("ADD", &restricted, &site.of(1, "restricted"));
            }
            site.add(0, "open", &[tcp(8080), tcp(8082)]);
            if restricted_last {
                site.node.ok("ADD", &restricted, &site.of(1, "restricted"));
            }
            answers(first, 8080, Some("pod-a"));
            answers(second, 8080, Some(if restricted_last { "pod-b" } else { "pod-a" }));
            answers(first, 8081, None);
            answers(second, 8081, Some("pod-b"));
            answers(first, 8082, Some("pod-a"));
            answers(second, 8082, Some("pod-a"));
            site.check(0, "open", &[tcp(8080), tcp(8082)]);
            site.node.ok("CHECK", &restricted, &site.of(1, "restricted"));
            site.node.ok("DEL", &restricted, &site.of(1, "restricted"));
            answers(second, 8080, Some("pod-a"));
            answers(second, 8081, None);
            site.del(0, "open", &[]);
            site.assert_clean();
        }
    });
}
