//! Byte for byte what upstream's portmap writes, and each removes and checks what the other made.
//!
//! The peer is Debian's containernetworking-plugins (1.1.1). Run as root:
//! `cargo test --test interop -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "interop/devices.rs"]
mod devices;
mod support;
#[path = "interop/tables.rs"]
mod tables;

use serde_json::{Value, json};
use support::bare::{
    NODE_V4, NODE_V6, POD_V4, POD_V6, assert_same, attachment, mapping, nat, netns, ours,
    prev_result, upstream, upstream_check,
};
use support::{IPTABLES, Node, Variant};

/// What an attachment asks for, and what the node has before.
struct Case {
    name: &'static str,
    network: String,
    container_id: String,
    addresses: Vec<String>,
    /// Members of the configuration beside the usual ones.
    members: Value,
    mappings: Vec<Value>,
    /// Commands that prepare the node.
    before: &'static str,
}

fn case(name: &'static str) -> Case {
    Case {
        name,
        network: "portmap".into(),
        container_id: "0123456789ab".into(),
        addresses: vec![format!("{POD_V4}/24")],
        members: json!({}),
        mappings: vec![mapping(8080, 80, "tcp")],
        before: "",
    }
}

fn with_host_ip(mut mapping: Value, host_ip: &str) -> Value {
    mapping["hostIP"] = json!(host_ip);
    mapping
}

fn dual() -> Vec<String> {
    vec![format!("{POD_V4}/24"), format!("{POD_V6}/64")]
}

fn host_prefixes() -> Vec<String> {
    vec![format!("{POD_V4}/32"), format!("{POD_V6}/128")]
}

const EXTERNAL: &str = "iptables -t nat -N KUBE-MARK-MASQ; ip6tables -t nat -N KUBE-MARK-MASQ; \
     iptables -t nat -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000";

fn cases() -> Vec<Case> {
    let many = |protocol: &str, from: u16, count: u16| -> Vec<Value> {
        (from..from + count).map(|port| mapping(port, port - 7000, protocol)).collect()
    };
    let mixed = vec![
        mapping(8080, 80, "udp"),
        mapping(8081, 81, "tcp"),
        mapping(8082, 82, "sctp"),
        mapping(8083, 83, "tcp"),
        mapping(8080, 84, "tcp"),
    ];
    let v4 = |ip| vec![with_host_ip(mapping(8080, 80, "tcp"), ip)];
    let id = |length| "c".repeat(length);
    vec![
        case("one port"),
        Case { mappings: many("tcp", 8000, 15), ..case("15 ports") },
        Case { mappings: many("tcp", 8000, 17), ..case("17 ports") },
        Case { mappings: mixed.clone(), addresses: dual(), ..case("three protocols") },
        Case { mappings: v4(NODE_V4), ..case("hostIP of the node") },
        Case { mappings: v4("0.0.0.0"), addresses: dual(), ..case("hostIP 0.0.0.0") },
        Case { mappings: v4("::"), addresses: dual(), ..case("hostIP ::") },
        Case { mappings: v4(NODE_V6), addresses: dual(), ..case("hostIP of IPv6") },
        Case { mappings: v4("127.0.0.1"), ..case("hostIP 127.0.0.1") },
        Case {
            mappings: [v4(NODE_V4), vec![mapping(8081, 81, "udp")], v4("203.0.113.9")].concat(),
            addresses: dual(),
            ..case("several hostIPs")
        },
        Case { addresses: dual(), ..case("dual-stack") },
        Case { addresses: host_prefixes(), mappings: mixed, ..case("host prefixes") },
        Case { addresses: vec![format!("{POD_V4}/32")], ..case("host prefix") },
        Case { addresses: vec![format!("{POD_V6}/64")], ..case("IPv6 only") },
        Case { addresses: vec![format!("{POD_V6}/128")], ..case("IPv6 host prefix") },
        Case { addresses: dual(), members: json!({"snat": false}), ..case("snat false") },
        Case {
            addresses: host_prefixes(),
            members: json!({"markMasqBit": 5}),
            ..case("markMasqBit")
        },
        Case { members: json!({"markMasqBit": 31}), ..case("highest markMasqBit") },
        Case {
            addresses: dual(),
            members: json!({"externalSetMarkChain": "KUBE-MARK-MASQ"}),
            before: EXTERNAL,
            ..case("externalSetMarkChain")
        },
        Case {
            addresses: dual(),
            members: json!({
                "conditionsV4": ["!", "-s", "192.0.2.0/24", "-i", "eth+"],
                "conditionsV6": ["!", "-d", "fd00:7::/64"],
            }),
            ..case("conditions")
        },
        Case { container_id: id(1), ..case("container ID of 1") },
        Case { container_id: id(64), ..case("container ID of 64") },
        Case { container_id: id(200), ..case("container ID of 200") },
        Case { container_id: id(227), ..case("comment of 254") },
        Case { container_id: id(228), ..case("comment of 255") },
        Case { container_id: id(229), ..case("comment of 256") },
        Case { container_id: id(255), addresses: dual(), ..case("container ID of 255") },
        Case { container_id: id(400), ..case("container ID of 400") },
        Case { network: "a.b-c_d.example".into(), addresses: dual(), ..case("dots") },
        Case {
            container_id: "A.b_c-D.9".into(),
            mappings: many("sctp", 9000, 2),
            ..case("punctuation")
        },
    ]
}

impl Case {
    fn addresses(&self) -> Vec<&str> {
        self.addresses.iter().map(String::as_str).collect()
    }

    fn config(&self, node: &Node) -> Value {
        let mut config = node.config(json!(self.mappings), prev_result(&self.addresses()));
        config["name"] = json!(self.network);
        for (key, value) in self.members.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Where upstream can show its rules. `ip6tables-legacy -C` of Debian 12 (1.8.9) does not look at
    /// ports, so that upstream there takes its second IPv6 mapping for made and leaves it out. The
    /// other variant has all of them, in the same text.
    fn reference(&self, variant: Variant) -> Variant {
        let misled =
            self.mappings.len() > 1 && self.addresses.iter().any(|address| address.contains(':'));
        if misled { Variant::IptablesNft } else { variant }
    }
}

/// Text after ADD, CHECK by the other, DEL by the other.
fn hold(case: &Case, variant: Variant) {
    let what = format!("{variant:?}, {}", case.name);
    let container = attachment(&case.container_id);
    let (first, second) = (netns(), netns());
    let theirs = Node::new(&first, case.reference(variant));
    let own = Node::new(&second, variant);
    for node in [&theirs, &own] {
        node.shell(&format!(":; {}", case.before));
    }
    let empty = nat(&own);

    upstream(&theirs, "ADD", &case.config(&theirs), &container);
    ours(&own, "ADD", &case.config(&own), &container);
    let (added, ours_added) = (nat(&theirs), nat(&own));
    assert_same(&ours_added, &added, &format!("{what}: after ADD"));

    // Each finds the other's work right.
    ours(&theirs, "CHECK", &case.config(&theirs), &container);
    let checked = upstream_check(&own, &case.config(&own), &case.addresses(), &container);
    checked.unwrap_or_else(|reason| panic!("{what}: upstream's CHECK of ours: {reason}"));
    assert_same(&nat(&own), &added, &format!("{what}: CHECK changed something"));

    // Upstream takes ours away. What it leaves are shared chains, which go with our record.
    upstream(&own, "DEL", &case.config(&own), &container);
    let deleted = nat(&own);
    assert!(!deleted.contains("CNI-DN-"), "{what}: upstream's DEL left\n{deleted}");
    ours(&own, "DEL", &case.config(&own), &container);
    assert_same(&nat(&own), &empty, &format!("{what}: after our DEL"));
    assert!(!own.shell("iptables -S -t raw; iptables -S -t nat").contains("PORTMAP-"), "{what}");
    assert_eq!(std::fs::read_dir(own.state_dir.join("records")).unwrap().count(), 0, "{what}");

    // We take upstream's away, and leave what its own DEL would have left.
    let mut config = case.config(&theirs);
    config.as_object_mut().unwrap().remove("prevResult");
    for _ in 0..2 {
        ours(&theirs, "DEL", &config, &container);
        assert_same(&nat(&theirs), &deleted, &format!("{what}: after our DEL of upstream's"));
    }
    assert!(!theirs.state_dir.join("records").exists(), "{what}: CHECK and DEL record nothing");
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn iptables_nft_is_upstream_s_text_and_each_removes_the_other_s() {
    cases().iter().for_each(|case| hold(case, Variant::IptablesNft));
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn iptables_legacy_is_upstream_s_text_and_each_removes_the_other_s() {
    cases().iter().for_each(|case| hold(case, Variant::IptablesLegacy));
}

/// A pod on the usual network, by its container ID and the last part of its address.
fn pod(node: &Node, last: u8, host_port: u16) -> Value {
    node.config(
        json!([mapping(host_port, 80, "tcp"), mapping(host_port, 53, "udp")]),
        prev_result(&[&format!("198.18.2.{last}/24")]),
    )
}

/// The lines that name a chain, in either way.
fn lines_of(text: &str, container_id: &str) -> Vec<String> {
    let chain = portmap::record::chain_name("portmap", container_id);
    let named =
        |line: &&str| line.contains(&chain) || line.contains(&format!("\\\"{container_id}\\\""));
    text.lines().filter(named).map(str::to_owned).collect()
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn pods_of_upstream_stay_as_they_are_while_ours_come_and_go() {
    for variant in IPTABLES {
        let netns = netns();
        let node = Node::new(&netns, variant);
        let (old, late) = (attachment("made-by-upstream"), attachment("upstream-again"));
        let (first, second) = (attachment("ours-1"), attachment("ours-2"));
        upstream(&node, "ADD", &pod(&node, 10, 8010), &old);
        let before = nat(&node);
        // The second is of a kind that makes shared rules.
        ours(&node, "ADD", &pod(&node, 11, 8011), &first);
        let mut marked = pod(&node, 12, 8012);
        marked["markMasqBit"] = json!(7);
        ours(&node, "ADD", &marked, &second);
        assert_eq!(
            lines_of(&nat(&node), "made-by-upstream"),
            lines_of(&before, "made-by-upstream")
        );
        ours(&node, "CHECK", &pod(&node, 10, 8010), &old);
        // A rollback and a roll forward again: upstream adds while ours are there.
        upstream(&node, "ADD", &pod(&node, 13, 8013), &late);
        for (config, attachment) in [(pod(&node, 11, 8011), &first), (marked, &second)] {
            ours(&node, "CHECK", &config, attachment);
            ours(&node, "DEL", &config, attachment);
        }
        ours(&node, "CHECK", &pod(&node, 13, 8013), &late);
        upstream(&node, "DEL", &pod(&node, 13, 8013), &late);
        assert_same(&nat(&node), &before, &format!("{variant:?}"));
        node.snapshot().no_records().unwrap();
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn masquerading_chains_of_old_upstreams_go_with_the_pod() {
    for variant in IPTABLES {
        let netns = netns();
        let node = Node::new(&netns, variant);
        let (gone, stays) = (attachment("old"), attachment("other"));
        upstream(&node, "ADD", &pod(&node, 11, 8011), &stays);
        let before = nat(&node);
        upstream(&node, "ADD", &pod(&node, 10, 8010), &gone);
        let chain = portmap::record::chain_name("portmap", "old").replace("CNI-DN-", "CNI-SN-");
        node.shell(&format!(
            "iptables -t nat -N {chain}
             iptables -t nat -A {chain} -s 127.0.0.1/32 -d 198.18.2.10/32 -p tcp --dport 80 -j MASQUERADE
             iptables -t nat -A POSTROUTING -m comment --comment 'snat name: \"portmap\" id: \"old\"' \
                 -s 127.0.0.1/32 ! -d 127.0.0.1/32 -j {chain}"
        ));
        let mut config = pod(&node, 10, 8010);
        config.as_object_mut().unwrap().remove("prevResult");
        ours(&node, "DEL", &config, &gone);
        assert_same(&nat(&node), &before, &format!("{variant:?}"));
    }
}

/// What upstream's nftables backend (1.6.0 and later) makes for a container.
fn upstream_nftables(container_id: &str, last: u8) -> String {
    ["ip", "ip6"].map(|family| {
        let pod = if family == "ip" { format!("198.18.2.{last}") } else { format!("fd00:18::{last}") };
        let target = if family == "ip" { format!("{pod}:80") } else { format!("[{pod}]:80") };
        let node = if family == "ip" { NODE_V4 } else { NODE_V6 };
        format!(
            "table {family} cni_hostport {{
                 chain hostports {{ tcp dport 80{last} dnat to {target} comment \"{container_id}\"; }}
                 chain hostip_hostports {{ {family} daddr {node} tcp dport 81{last} dnat to {target} comment \"{container_id}\"; }}
                 chain prerouting {{ type nat hook prerouting priority -100; }}
                 chain masquerading {{
                     type nat hook postrouting priority 100;
                     {family} saddr {pod} {family} daddr {pod} masquerade comment \"{container_id}\";
                 }}
             }}\n"
        )
    }).concat()
}

/// A node that has lost nft goes on: whose pod it is does not matter, and DEL is repeated until it succeeds.
#[test]
#[ignore = "privileged: makes network namespaces, needs nftables"]
fn what_no_tool_can_remove_keeps_no_del_and_no_gc_from_its_work() {
    let netns = netns();
    let mut node = Node::new(&netns, Variant::Nftables);
    node.cni_version = "1.1.0".into();
    node.shell(&format!("nft -f - <<'END'\n{}END\n", upstream_nftables("theirs", 10)));
    let config = pod(&node, 10, 8010);
    let mut valid = config.clone();
    valid["cni.dev/valid-attachments"] = json!([]);
    node.path = "/nowhere".into();
    let said = "table ip cni_hostport of upstream's portmap cannot be read, and is left as it is: nft is not installed";
    for _ in 0..2 {
        let output = node.ok("DEL", &config, &attachment("theirs"));
        assert!(output.stderr.contains(said), "{}", output.stderr);
    }
    node.ok("GC", &valid, &attachment("theirs"));
    assert!(node.shell("nft list table ip cni_hostport").contains("198.18.2.10"));
}

#[test]
#[ignore = "privileged: makes network namespaces, needs nftables"]
fn rules_of_upstream_s_nftables_backend_are_checked() {
    let netns = netns();
    let node = Node::new(&netns, Variant::Nftables);
    let host_ip = |ip| with_host_ip(mapping(8110, 80, "tcp"), ip);
    let mappings = json!([mapping(8010, 80, "tcp"), host_ip(NODE_V4), host_ip(NODE_V6)]);
    let addresses = prev_result(&["198.18.2.10/24", "fd00:18::10/64"]);
    let container = attachment("theirs");
    let make = || {
        let others = upstream_nftables("others", 11);
        node.shell(&format!("nft -f - <<'END'\n{}{others}END\n", upstream_nftables("theirs", 10)));
    };
    // Without iptables upstream takes nftables unasked, too.
    for backend in [json!("nftables"), Value::Null] {
        let mut config = node.config(mappings.clone(), addresses.clone());
        match backend.is_null() {
            true => drop(config.as_object_mut().unwrap().remove("backend")),
            false => config["backend"] = backend,
        }
        make();
        ours(&node, "CHECK", &config, &container);
        for (damage, missing) in [
            ("flush chain ip cni_hostport hostports", "tcp 0.0.0.0:8010 -> 198.18.2.10:80"),
            ("flush chain ip6 cni_hostport hostports", "tcp [::]:8010 -> [fd00:18::10]:80"),
            (
                "flush chain ip cni_hostport hostip_hostports",
                "tcp 203.0.113.1:8110 -> 198.18.2.10:80",
            ),
            ("delete table ip6 cni_hostport", "tcp [fd00:99::1]:8110 -> [fd00:18::10]:80"),
        ] {
            node.shell(&format!("nft {damage}"));
            let (code, text) = node.fails("CHECK", &config, &container);
            let expected = format!("{missing} expected in table");
            assert!(code == 102 && text.contains(&expected), "{damage}: {code} {text}");
            node.shell("nft flush ruleset");
            make();
        }
        node.shell("nft flush ruleset");
        node.fails("CHECK", &config, &container);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs nftables"]
fn rules_of_upstream_s_nftables_backend_go_with_the_pod() {
    let netns = netns();
    let node = Node::new(&netns, Variant::Nftables);
    let ruleset = || node.shell("nft list ruleset");
    node.shell(&format!("nft -f - <<'END'\n{}END\n", upstream_nftables("stays", 11)));
    let before = ruleset();
    node.shell(&format!("nft -f - <<'END'\n{}END\n", upstream_nftables("gone", 10)));
    assert_ne!(ruleset(), before);
    for _ in 0..2 {
        ours(&node, "DEL", &pod(&node, 10, 8010), &attachment("gone"));
        assert_same(&ruleset(), &before, "after DEL");
    }
}

/// Whether its container lives they do not tell: who is to be spared may.
#[test]
#[ignore = "privileged: makes network namespaces, needs nftables"]
fn rules_of_upstream_s_nftables_backend_are_spared_by_a_policy_of_denial() {
    let netns = netns();
    let node = Node::new(&netns, Variant::Nftables);
    node.shell(&format!("nft -f - <<'END'\n{}END\n", upstream_nftables("theirs", 10)));
    let before = node.shell("nft list ruleset");
    let mut config = pod(&node, 11, 8010);
    config["conflictPolicy"] = json!("deny");
    let (code, text) = node.fails("ADD", &config, &attachment("ours"));
    assert!(code == 103 && text.contains("8010") && text.contains("theirs"), "{code} {text}");
    assert_same(&node.shell("nft list ruleset"), &before, "after a denied ADD");
    // Its own are none of another's, beside which they do not hide these.
    node.shell(&format!("nft -f - <<'END'\n{}END\n", upstream_nftables("others", 11)));
    let mut both = config.clone();
    both["runtimeConfig"]["portMappings"] =
        json!([mapping(8010, 80, "tcp"), mapping(8011, 80, "tcp")]);
    let (code, text) = node.fails("ADD", &both, &attachment("theirs"));
    assert!(code == 103 && text.contains("8011") && text.contains("others"), "{code} {text}");
    ours(&node, "ADD", &config, &attachment("theirs"));
    ours(&node, "DEL", &config, &attachment("theirs"));
    config["conflictPolicy"] = json!("takeover");
    node.shell("nft flush ruleset");
    node.shell(&format!("nft -f - <<'END'\n{}END\n", upstream_nftables("theirs", 10)));
    // What conditions do not match stays whose it was.
    config["conditionsV4"] = json!(["ip", "saddr", "192.0.2.0/24"]);
    config["prevResult"] = prev_result(&["198.18.2.11/24", "fd00:18::11/64"]);
    let said = ours(&node, "ADD", &config, &attachment("ours")).stderr;
    assert!(said.contains("which goes before the conditions of"), "{said}");
    assert!(node.shell("nft list table ip cni_hostport").contains("tcp dport 8010"));
    assert!(!node.shell("nft list table ip6 cni_hostport").contains("tcp dport 8010"));
    assert!(node.shell("nft list table ip6 cni_hostport").contains("tcp dport 8110"));
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn garbage_collection_takes_what_upstream_left_of_this_network_alone() {
    for variant in IPTABLES {
        let netns = netns();
        let node = Node::new(&netns, variant);
        let mut other = pod(&node, 12, 8012);
        other["name"] = json!("other");
        upstream(&node, "ADD", &pod(&node, 11, 8011), &attachment("valid"));
        upstream(&node, "ADD", &other, &attachment("elsewhere"));
        ours(&node, "ADD", &pod(&node, 13, 8013), &attachment("ours-valid"));
        let before = nat(&node);
        upstream(&node, "ADD", &pod(&node, 10, 8010), &attachment("lost"));
        ours(&node, "ADD", &pod(&node, 14, 8014), &attachment("ours-lost"));
        let mut config = json!({
            "cniVersion": "1.1.0",
            "name": "portmap",
            "type": "portmap",
            "stateDir": node.state_dir,
            "cni.dev/valid-attachments": [
                {"containerID": "valid", "ifname": "eth0"},
                {"containerID": "ours-valid", "ifname": "eth0"},
            ],
        });
        ours(&node, "GC", &config, &attachment(""));
        assert_same(&nat(&node), &before, &format!("{variant:?}: after GC"));
        config["cni.dev/valid-attachments"] = json!([]);
        ours(&node, "GC", &config, &attachment(""));
        let left = nat(&node);
        assert!(lines_of(&left, "valid").is_empty() && lines_of(&left, "ours-valid").is_empty());
        assert!(left.contains("id: \\\"elsewhere\\\""), "{variant:?}: of another network:\n{left}");
        ours(&node, "CHECK", &other, &attachment("elsewhere"));
    }
}

const GOLDEN_ID: &str = "d629b42b837dcb40bc6a45f2486e76616c72ca15a3dc5cefe2f881ebd0d8222c";
const GOLDEN: &str = r#"-N CNI-DN-dae2e2caa00ed8d022728
-N CNI-HOSTPORT-DNAT
-N CNI-HOSTPORT-MASQ
-N CNI-HOSTPORT-SETMARK
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-DN-dae2e2caa00ed8d022728 -s 198.18.2.27/32 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-dae2e2caa00ed8d022728 -s 127.0.0.1/32 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-dae2e2caa00ed8d022728 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 198.18.2.27:80
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"portmap\" id: \"d629b42b837dcb40bc6a45f2486e76616c72ca15a3dc5cefe2f881ebd0d8222c\"" -m multiport --dports 8080 -j CNI-DN-dae2e2caa00ed8d022728
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
"#;

/// cilium/cilium#9784's own pod: rules that people have in their notes and dashboards.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_issue_s_pod_gets_the_issue_s_rules() {
    for variant in IPTABLES {
        let netns = netns();
        let node = Node::new(&netns, variant);
        let config =
            node.config(json!([mapping(8080, 80, "tcp")]), prev_result(&["198.18.2.27/32"]));
        ours(&node, "ADD", &config, &attachment(GOLDEN_ID));
        // The variants list chains in different orders; rules are what counts.
        let sorted = |text: &str| {
            let (mut chains, rules): (Vec<_>, Vec<_>) =
                text.lines().map(str::to_owned).partition(|line| line.starts_with("-N "));
            chains.sort();
            (chains, rules)
        };
        assert_eq!(sorted(&nat(&node)), sorted(GOLDEN), "{variant:?}");
    }
}
