//! Rules of the node beside programs that translate before them: a packet must look to netfilter like a
//! connection to the pod, in both directions.

use std::net::IpAddr;

use portmap::demo::matrix::{Place, Source};
use portmap::demo::topology::{Lab, Shape};
use portmap::model::Family;
use serde_json::json;

use crate::rig::{Container, INSIDE, PORT, Stage, assert_calls, client, mapped, reaches, shell};
use crate::support::{Node, Variant};

/// What kube-proxy, Cilium and VPC plugins have: nothing passes that conntrack has not seen begin, and
/// what leaves the node gets its address.
fn install_rules(lab: &Lab) {
    for (tool, family) in [("iptables", Family::V4), ("ip6tables", Family::V6)] {
        let pod = lab.pods[0].address(family).unwrap();
        shell(
            &lab.node,
            &format!(
                "{tool} -A FORWARD -m conntrack --ctstate INVALID -j DROP\n\
                 {tool} -A FORWARD -m conntrack --ctstate ESTABLISHED -m comment --comment answers\n\
                 {tool} -t nat -A POSTROUTING -s {pod} -o eth0 -j MASQUERADE"
            ),
        );
    }
}

/// Entries of the node's conntrack, without those of its own calls.
fn tracked(lab: &Lab, protocol: &str, family: Family) -> Vec<String> {
    let family = if family == Family::V4 { "ipv4" } else { "ipv6" };
    let text = shell(&lab.node, &format!("conntrack -L -f {family} -p {protocol} 2>/dev/null"));
    text.lines().map(str::to_owned).collect()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn connections_are_tracked_as_what_they_are() {
    let stage = Stage::new(Shape::Cilium);
    let lab = &stage.lab;
    install_rules(lab);
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.add();
    for family in Family::ALL {
        let ip = lab.node_address(family);
        assert_calls("rules", lab, reaches(Place::Client, ip, PORT, "pod-a", client(lab, family)));
        let (client, pod): (IpAddr, IpAddr) =
            (lab.client_address(family), lab.pods[0].address(family).unwrap());
        for protocol in ["tcp", "udp"] {
            let entries = tracked(lab, protocol, family);
            let there = format!("src={client} dst={pod} ");
            let back = format!("src={pod} dst={client} ");
            let is_right = |entry: &&String| {
                let [there, back] = [&there, &back].map(|way| entry.find(way));
                there < back && there.is_some() && entry.contains(&format!("dport={INSIDE}"))
            };
            let right: Vec<_> = entries.iter().filter(is_right).collect();
            // One by TCP; by UDP a connected and an unconnected socket.
            assert_eq!(right.len(), if protocol == "tcp" { 1 } else { 2 }, "{entries:#?}");
            assert_eq!(right.len(), entries.len(), "{entries:#?}");
            if protocol == "tcp" {
                assert!(right[0].contains("[ASSURED]"), "{entries:#?}");
            }
            assert!(!entries.iter().any(|entry| entry.contains("[UNREPLIED]")), "{entries:#?}");
        }
        // From the other pod too.
        assert_calls("rules", lab, reaches(Place::Pod(1), ip, PORT, "pod-a", Source::Any));
    }
    container.check();
}

/// The AWS VPC CNI marks connections by the node's address that they came to, and sends answers of pods
/// on secondary interfaces back by that mark.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_is_not_chosen_where_marks_of_connections_would_be_bypassed() {
    let stage = Stage::new(Shape::Ptp);
    let lab = &stage.lab;
    let node = Node::new(&lab.node, Variant::Ebpf);
    let mut container = Container::new(&node, lab, 0, mapped(PORT, INSIDE));
    container.config["backend"] = json!("auto");
    shell(&lab.node, "ip rule add from all fwmark 0x80/0x80 lookup main priority 1024");
    let (code, text) = node.fails("ADD", &container.config, &container.attachment);
    assert_eq!(code, 101, "{text}");
    assert!(text.contains("the AWS VPC CNI marks connections in netfilter"), "{text}");
    assert!(text.contains("set \"backend\": \"ebpf\" to use it all the same"), "{text}");

    // Asked for, it is used.
    container.config["backend"] = json!("ebpf");
    container.add();
    let ip = lab.node_address(Family::V4);
    let expected = || reaches(Place::Client, ip, PORT, "pod-a", client(lab, Family::V4));
    assert_calls("asked for", lab, expected());
    container.del();

    // Another mark is nothing to it.
    shell(&lab.node, "ip rule del priority 1024; ip rule add fwmark 0x80/0xf80 lookup main");
    container.config["backend"] = json!("auto");
    container.add();
    assert_calls("chosen", lab, expected());
    container.del();
}
