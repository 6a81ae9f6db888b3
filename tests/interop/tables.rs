//! A table `inet portmap` that has no record: somebody else's is left alone, our own is made anew.

use super::pod;
use super::support::bare::{assert_same, attachment, netns, ours};
use super::support::{Node, Variant};

/// What an administrator forwards by a table of the same name.
const FOREIGN: &str = "nft add table inet portmap
    nft add chain inet portmap hostports
    nft add rule inet portmap hostports tcp dport 8080 dnat ip to 198.18.2.99 comment '\"mine\"'
    nft 'add chain inet portmap prerouting { type nat hook prerouting priority dstnat; }'
    nft add rule inet portmap prerouting jump hostports";

#[test]
#[ignore = "privileged: makes network namespaces, needs nftables"]
fn somebody_else_s_table_of_our_name_stays() {
    let netns = netns();
    let node = Node::new(&netns, Variant::Nftables);
    node.shell(FOREIGN);
    let before = node.shell("nft list ruleset");
    let config = pod(&node, 10, 8010);
    let (code, text) = node.fails("ADD", &config, &attachment("a"));
    assert_eq!(code, 101, "{text}");
    assert!(text.contains("nft delete table inet portmap"), "{text}");
    assert!(text.contains("hostports, prerouting"), "{text}");
    assert_same(&node.shell("nft list ruleset"), &before, "after ADD");
    ours(&node, "DEL", &config, &attachment("a"));
    assert_same(&node.shell("nft list ruleset"), &before, "after DEL");
    node.snapshot().no_records().unwrap();
    node.shell("nft delete table inet portmap");
    for verb in ["ADD", "CHECK", "DEL"] {
        ours(&node, verb, &config, &attachment("a"));
    }
    assert_eq!(node.shell("nft list ruleset"), "");
}

/// Whatever is left of it tells that it is ours: base chains without rules, or rules without base chains.
#[test]
#[ignore = "privileged: makes network namespaces, needs nftables"]
fn our_own_table_is_made_anew_without_its_records() {
    for damage in [
        "true",
        "nft flush table inet portmap",
        "for chain in prerouting output postrouting guard
         do nft flush chain inet portmap $chain; nft delete chain inet portmap $chain; done",
    ] {
        let netns = netns();
        let node = Node::new(&netns, Variant::Nftables);
        ours(&node, "ADD", &pod(&node, 10, 8010), &attachment("lost"));
        std::fs::remove_dir_all(&node.state_dir).unwrap();
        node.shell(damage);
        let config = pod(&node, 11, 8011);
        ours(&node, "ADD", &config, &attachment("new"));
        ours(&node, "CHECK", &config, &attachment("new"));
        assert!(!node.shell("nft list ruleset").contains("8010"), "{damage}");
        ours(&node, "DEL", &config, &attachment("new"));
        assert_eq!(node.shell("nft list ruleset"), "", "{damage}");
    }
}
