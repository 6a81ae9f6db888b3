//! SCTP: many kernels cannot open such sockets (no module), and forward such packets all the same.
//! So the rules are read instead of called.

use portmap::demo::topology::Shape;
use portmap::model::Family;
use serde_json::json;

use crate::rig::{Container, Stage};
use crate::support::{Node, Variant};

on_each_variant_with_rules! {
    fn rules_are_there_and_go(variant: Variant) {
        let stage = Stage::new(Shape::Cilium);
        let lab = &stage.lab;
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let own = lab.node_address(Family::V4);
        let mappings = vec![
            json!({"hostPort": 9000, "containerPort": 3868, "protocol": "sctp"}),
            json!({"hostPort": 9001, "containerPort": 3869, "protocol": "SCTP", "hostIP": own}),
        ];
        let container = Container::new(&node, lab, 0, mappings);
        container.add();
        let [v4, v6] = Family::ALL.map(|family| lab.pods[0].address(family).unwrap());
        let expected = match variant {
            Variant::Nftables => [
                ("nft list map inet portmap any4_addr", format!("sctp . 9000 {OWNER} : {v4}")),
                ("nft list map inet portmap any4_port", format!("sctp . 9000 {OWNER} : 3868")),
                ("nft list map inet portmap any6_addr", format!("sctp . 9000 {OWNER} : {v6}")),
                ("nft list map inet portmap ip4_port", format!("{own} . sctp . 9001 {OWNER} : 3869")),
                ("nft list set inet portmap flows4", format!("{v4} . sctp . 3868")),
                ("nft list chain inet portmap prerouting", "sctp".into()),
            ],
            _ => [
                ("iptables -t nat -S", "-p sctp -m sctp --dport 9000 -j DNAT".into()),
                ("iptables -t nat -S", format!("--to-destination {v4}:3868")),
                ("iptables -t nat -S", format!("-d {own}/32 -p sctp -m sctp --dport 9001 -j DNAT")),
                ("iptables -t nat -S", format!("--to-destination {v4}:3869")),
                ("ip6tables -t nat -S", "-p sctp -m sctp --dport 9000 -j DNAT".into()),
                ("ip6tables -t nat -S", format!("--to-destination [{v6}]:3868")),
            ],
        };
        for (command, words) in expected {
            let listing = node.shell(command);
            assert!(listing.contains(&words), "{command} has no {words:?}:\n{listing}");
        }
        container.check();
        container.del();
        node.assert_clean(&before);
    }
}

/// Comment of the map elements that belong to the container.
const OWNER: &str = "comment \"container-of-pod-a eth0 portmap\"";
