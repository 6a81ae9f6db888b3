//! Uplinks with names that mean something to the tools.

use serde_json::json;

use super::support::bare::{attachment, mapping, netns, ours, prev_result};
use super::support::{Node, RULES, Variant};

#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and ip"]
fn uplinks_may_have_any_name() {
    for variant in RULES {
        let netns = netns();
        let node = Node::new(&netns, variant);
        node.shell(
            r#"id=0
            for name in '@eth' 'eth*' '*' 'a\*' '\*' 'a"b' 'a\b' "$(printf 'ab\377\376\375\374\373')"
            do id=$((id + 1)); ip link add "$name" type vxlan id $id dstport 4789; done"#,
        );
        let config =
            node.config(json!([mapping(8010, 80, "tcp")]), prev_result(&["198.18.2.10/32"]));
        let warnings = ours(&node, "ADD", &config, &attachment("a")).stderr;
        ours(&node, "CHECK", &config, &attachment("a"));
        if variant == Variant::Nftables {
            let set = node.shell("nft list set inet portmap uplinks");
            for name in ["eth*", "a\"b", "a\\b"] {
                assert!(set.contains(&format!("\"{name}\"")), "{name}: {set}");
            }
            for name in ["\"@eth\"", "\"a\\\\*\"", "\"\\\\*\""] {
                assert!(warnings.contains(name), "{name}: {warnings}");
            }
        }
        ours(&node, "DEL", &config, &attachment("a"));
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs nft"]
fn conditions_name_devices_by_iifname() {
    let netns = netns();
    let node = Node::new(&netns, Variant::Nftables);
    let mut config =
        node.config(json!([mapping(8010, 80, "tcp")]), prev_result(&["198.18.2.10/32"]));
    config["conditionsV4"] = json!(["iif", "pods"]);
    let (code, text) = node.fails("ADD", &config, &attachment("a"));
    assert_eq!(code, 7, "{text}");
    assert!(text.contains("iifname"), "{text}");
    config["conditionsV4"] = json!(["iifname", "pods"]);
    for verb in ["ADD", "CHECK", "DEL"] {
        ours(&node, verb, &config, &attachment("a"));
    }
}
