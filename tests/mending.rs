//! Steps that fail or were interrupted half-way, and records that cannot be read: nobody else loses
//! anything, and nothing is left.
//!
//! Run as root: `cargo test --test mending -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "support/executable.rs"]
mod executable;
mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use executable::write_executable;
use portmap::demo::plugin;
use portmap::demo::topology::{BRIDGE, Lab, Options, Shape};
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use portmap::record::chain_name;
use serde_json::{Value, json};
use support::{GONE_NETNS, IPTABLES, Node, PORTMAP, VARIANTS, Variant, attachment, prev_result};

fn lab(shape: Shape, pods: usize) -> Lab {
    Lab::build(Options { pods, ..Options::new(shape) }).unwrap()
}

/// A node with the tools of every backend.
fn with_all_tools(node: &mut Node) {
    std::os::unix::fs::symlink("/usr/sbin/nft", node.path.join("nft")).unwrap();
}

fn mappings(ports: &[u16]) -> Value {
    ports.iter().map(|port| json!({"hostPort": port, "containerPort": 80})).collect()
}

/// Which pod answers the outside client.
fn who_answers(lab: &Lab, port: u16) -> Option<String> {
    let target = SocketAddr::new(lab.node_address(Family::V4), port);
    let call = Call::new(Transport::Tcp, target, Duration::from_millis(1200));
    reach(&lab.client, call).ok().map(|reply| reply.server)
}

fn route_localnet(lab: &Lab, device: &str) -> String {
    lab.node.sysctl(&format!("ipv4/conf/{device}/route_localnet")).unwrap()
}

fn record_file(node: &Node, container: &str) -> PathBuf {
    let records = std::fs::read_dir(node.state_dir.join("records")).unwrap();
    let mut paths = records.map(|entry| entry.unwrap().path());
    paths.find(|path| std::fs::read_to_string(path).unwrap().contains(container)).unwrap()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_failed_repetition_of_add_leaves_the_former_mapping_in_place() {
    let lab = lab(Shape::Bridge, 1);
    let _servers = lab.pods[0].serve(&[80], &[]).unwrap();
    for variant in [Variant::IptablesNft, Variant::IptablesLegacy] {
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let pod = attachment(&lab.pods[0], "c1");
        let good = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
        node.ok("ADD", &good, &pod);
        let device = lab.pods[0].host_link.clone();
        let values = || (route_localnet(&lab, BRIDGE), route_localnet(&lab, &device));
        let localnet = values();
        let mut bad = node.config(mappings(&[8081]), prev_result(&lab, 0, "1.0.0"));
        bad["externalSetMarkChain"] = json!("NO-SUCH-CHAIN");
        assert_eq!(node.fails("ADD", &bad, &pod).0, 7);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        assert_eq!(who_answers(&lab, 8081), None, "{variant:?}");
        assert_eq!(values(), localnet);
        node.ok("CHECK", &good, &pod);
        node.ok("DEL", &good, &pod);
        node.assert_clean(&before);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_backend_that_does_not_work_takes_nothing_from_others() {
    let lab = lab(Shape::Bridge, 2);
    let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
    let node = Node::new(&lab.node, Variant::IptablesNft);
    let before = node.snapshot();
    let (a, b) = (attachment(&lab.pods[0], "a"), attachment(&lab.pods[1], "b"));
    let config_a = node.config(mappings(&[8080, 8081]), prev_result(&lab, 0, "1.0.0"));
    node.ok("ADD", &config_a, &a);
    let mut config_b = node.config(mappings(&[8080]), prev_result(&lab, 1, "1.0.0"));
    config_b["backend"] = json!("nftables");
    node.fails("ADD", &config_b, &b);
    node.ok("DEL", &config_b, &b);
    for port in [8080, 8081] {
        assert_eq!(who_answers(&lab, port).as_deref(), Some("pod-a"));
    }
    node.ok("CHECK", &config_a, &a);
    node.ok("DEL", &config_a, &a);
    node.assert_clean(&before);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_newest_wins_across_backends() {
    let lab = lab(Shape::Bridge, 3);
    let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
    let mut node = Node::new(&lab.node, Variant::IptablesNft);
    with_all_tools(&mut node);
    let before = node.snapshot();
    let call = |pod: usize, ports: &[u16], backend: &str| {
        let mut config = node.config(mappings(ports), prev_result(&lab, pod, "1.0.0"));
        config["backend"] = json!(backend);
        (config, attachment(&lab.pods[pod], &format!("c{pod}")))
    };
    // The third shares a port with the first alone, and the second with the first alone.
    let calls = [
        call(0, &[8080, 8081], "nftables"),
        call(1, &[8080], "nftables"),
        call(2, &[8081], "iptables"),
    ];
    for (config, pod) in &calls {
        node.ok("ADD", config, pod);
    }
    assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-b"));
    assert_eq!(who_answers(&lab, 8081).as_deref(), Some("pod-c"));
    node.ok("DEL", &calls[2].0, &calls[2].1);
    assert_eq!(who_answers(&lab, 8081).as_deref(), Some("pod-a"));
    node.ok("DEL", &calls[1].0, &calls[1].1);
    assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"));
    node.ok("DEL", &calls[0].0, &calls[0].1);
    node.assert_clean(&before);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_damaged_record_is_cleaned_up_by_whoever_meets_it() {
    let labs = [Shape::Cilium, Shape::Bridge].map(|shape| lab(shape, 1));
    for (lab, variant) in labs.iter().flat_map(|lab| VARIANTS.map(|variant| (lab, variant))) {
        let mut node = Node::new(&lab.node, variant);
        node.cni_version = "1.1.0".into();
        let before = node.snapshot();
        let pod = attachment(&lab.pods[0], "c1");
        let config = node.config(mappings(&[8080]), prev_result(lab, 0, "1.1.0"));
        let damage = || {
            node.ok("ADD", &config, &pod);
            std::fs::write(record_file(&node, "c1"), r#"{"format":1,"netw"#).unwrap();
        };
        damage();
        let without = node.config(Value::Null, Value::Null);
        node.ok("DEL", &without, &pod);
        node.assert_clean(&before);

        // What these leave is named, and the status tells.
        damage();
        for words in [&["restore"][..], &["flush", "--all", "--yes"]] {
            let mut command = std::process::Command::new(PORTMAP);
            command.env_clear().env("PATH", &node.path).args(words);
            command.arg("--state-dir").arg(&node.state_dir);
            let output = plugin::run(&mut command, b"", node.netns).unwrap();
            assert_eq!(output.status, Some(1), "{words:?}: {output:?}");
            assert!(output.stdout.contains("note: record "), "{words:?}: {output:?}");
        }
        node.ok("DEL", &without, &pod);
        node.assert_clean(&before);

        damage();
        // By nobody's call: what is readable says that nobody lives there.
        node.ok("ADD", &config, &pod);
        let dead = json!({"format": 1, "netns": GONE_NETNS}).to_string();
        std::fs::write(record_file(&node, "c1"), dead).unwrap();
        let mut gc = std::process::Command::new(PORTMAP);
        gc.env_clear().env("PATH", &node.path).args(["gc", "--state-dir"]).arg(&node.state_dir);
        let output = plugin::run(&mut gc, b"", node.netns).unwrap();
        // What other variants have left in this laboratory has no tool here, which is told.
        assert!(output.stdout.contains("1 removed, 0 stay"), "{output:?}");
        node.assert_clean(&before);

        let other_port = node.config(mappings(&[9090]), prev_result(lab, 0, "1.1.0"));
        node.ok("ADD", &other_port, &pod);
        node.ok("CHECK", &other_port, &pod);
        node.ok("DEL", &other_port, &pod);
        node.assert_clean(&before);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_the_rules_know_of_the_node_is_checked_and_repaired() {
    let lab = lab(Shape::Cilium, 1);
    let _servers = lab.pods[0].serve(&[80], &[]).unwrap();
    for (variant, damage) in [
        (Variant::IptablesNft, "iptables -t nat -F PORTMAP-NEIGHBOURS"),
        (Variant::IptablesLegacy, "iptables -t nat -F PORTMAP-NEIGHBOURS"),
        (Variant::Nftables, "nft flush set inet portmap nodes4"),
        (Variant::Nftables, "nft flush set inet portmap uplinks"),
    ] {
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let pod = attachment(&lab.pods[0], "c1");
        let config = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
        node.ok("ADD", &config, &pod);
        node.shell(damage);
        assert_eq!(node.fails("CHECK", &config, &pod).0, 102, "{variant:?} {damage}");
        node.ok("ADD", &config, &pod);
        node.ok("CHECK", &config, &pod);
        // The outside client has kept its address.
        let target = SocketAddr::new(lab.node_address(Family::V4), 8080);
        let reply = reach(&lab.client, Call::new(Transport::Tcp, target, Duration::from_secs(1)));
        assert_eq!(
            reply.unwrap().seen.ip(),
            lab.client_address(Family::V4),
            "{variant:?} {damage}"
        );
        node.ok("DEL", &config, &pod);
        node.assert_clean(&before);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_newer_portmap_s_record_is_left_alone() {
    let lab = lab(Shape::Cilium, 1);
    let node = Node::new(&lab.node, Variant::Nftables);
    let pod = attachment(&lab.pods[0], "c1");
    let config = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
    node.ok("ADD", &config, &pod);
    let file = record_file(&node, "c1");
    let newer = r#"{"format":99,"whatever":true}"#;
    std::fs::write(&file, newer).unwrap();
    // Its rules are in order, whatever they are: nothing is said of them.
    for verb in ["ADD", "CHECK"] {
        let (code, text) = node.fails(verb, &config, &pod);
        assert!(code == 104 && text.contains(file.to_str().unwrap()), "{verb}: {code} {text}");
    }
    let output = node.ok("DEL", &config, &pod);
    assert!(output.stderr.contains("newer"), "{}", output.stderr);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), newer);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_check_names_a_damaged_record_and_not_the_rules() {
    let lab = lab(Shape::Cilium, 1);
    let node = Node::new(&lab.node, Variant::Nftables);
    let pod = attachment(&lab.pods[0], "c1");
    let config = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
    node.ok("ADD", &config, &pod);
    let file = record_file(&node, "c1");
    std::fs::write(&file, "{").unwrap();
    let (code, text) = node.fails("CHECK", &config, &pod);
    assert!(code == 102 && text.contains(file.to_str().unwrap()), "{code} {text}");
    assert!(!text.contains("expected"), "{text}");
    node.ok("DEL", &config, &pod);
}

/// After a rollback: what a newer plugin's attachments have is not understood, and is still theirs.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_newer_portmap_s_attachment_keeps_its_hostport_while_others_come_and_go() {
    for variant in VARIANTS {
        let lab = lab(Shape::Cilium, 3);
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
        let node = Node::new(&lab.node, variant);
        let call = |pod: usize, port: u16| {
            let config = node.config(mappings(&[port]), prev_result(&lab, pod, "1.0.0"));
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        };
        let [newer, other, third] = [call(0, 8080), call(1, 8081), call(2, 8082)];
        let localnet = || route_localnet(&lab, &lab.pods[0].host_link);
        node.ok("ADD", &newer.0, &newer.1);
        let before = localnet();
        let file = record_file(&node, "c0");
        let known = std::fs::read_to_string(&file).unwrap();
        let unknown = known.replacen(r#""format":1,"#, r#""format":99,"new":{},"#, 1);
        std::fs::write(&file, &unknown).unwrap();
        node.ok("ADD", &other.0, &other.1);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        assert_eq!(who_answers(&lab, 8081).as_deref(), Some("pod-b"), "{variant:?}");
        node.ok("DEL", &other.0, &other.1);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        assert_eq!(localnet(), before, "{variant:?}");
        // Where all would have to be made anew from what is known, nothing is done.
        let damage = match variant {
            Variant::Nftables => "nft flush chain inet portmap guard",
            Variant::Ebpf => "rm /sys/fs/bpf/portmap/m1/pm_flows",
            _ => {
                std::fs::write(&file, &known).unwrap();
                node.ok("DEL", &newer.0, &newer.1);
                continue;
            }
        };
        node.ok("ADD", &other.0, &other.1);
        node.shell(damage);
        let (code, text) = node.fails("ADD", &third.0, &third.1);
        assert!(code == 104 && text.contains("format 99 is a newer portmap's"), "{code} {text}");
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        for (config, pod) in [&third, &other] {
            node.ok("DEL", config, pod);
        }
        // The newer one is back.
        std::fs::write(&file, &known).unwrap();
        node.ok("DEL", &newer.0, &newer.1);
        node.ok("DEL", &third.0, &third.1);
        node.ok("DEL", &other.0, &other.1);
        assert_eq!(who_answers(&lab, 8080), None, "{variant:?}");
        node.flush();
    }
}

/// Where others' chains stay, what all share is made anew around them.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_newer_portmap_s_attachment_keeps_its_rules_where_iptables_is_put_in_order() {
    for variant in IPTABLES {
        let bypass = Options { pods: 3, bypass: true, ..Options::new(Shape::Cilium) };
        let lab = Lab::build(bypass).unwrap();
        let _server = lab.pods[0].serve(&[80], &[]).unwrap();
        let node = Node::new(&lab.node, variant);
        let bare = node.snapshot();
        let call = |pod: usize, snat: bool| {
            let mappings = mappings(&[8080 + u16::try_from(pod).unwrap()]);
            let mut config = node.config(mappings, prev_result(&lab, pod, "1.0.0"));
            config["snat"] = json!(snat);
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        };
        let newer = call(0, true);
        node.ok("ADD", &newer.0, &newer.1);
        let file = record_file(&node, "c0");
        let known = std::fs::read_to_string(&file).unwrap();
        let unknown = known.replacen(r#""format":1,"#, r#""format":99,"new":{},"#, 1);
        std::fs::write(&file, &unknown).unwrap();
        let alone = node.snapshot();
        let chain = chain_name(&node.network, "c0");
        let rules = || -> Vec<String> {
            let listing = node.shell("iptables -t nat -S; ip6tables -t nat -S; iptables -t raw -S");
            let own = |line: &&str| line.contains(&chain) || line.contains("PORTMAP-GUARD");
            listing.lines().filter(own).map(str::to_owned).collect()
        };
        let whole = rules();
        // A third pod that needs all that is shared, and one that needs hardly any of it.
        for (pod, snat, jump) in [
            (1, true, "PREROUTING -m addrtype --dst-type LOCAL -j PORTMAP-NEIGHBOURS"),
            (2, false, "OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT"),
        ] {
            let third = call(pod, snat);
            node.shell(&format!("iptables -t nat -D {jump}; ip6tables -t nat -D {jump}"));
            node.ok("ADD", &third.0, &third.1);
            node.ok("CHECK", &third.0, &third.1);
            assert_eq!(rules(), whole, "{variant:?} {snat}");
            let target = SocketAddr::new(lab.node_address(Family::V4), 8080);
            for caller in [&lab.client, &lab.pods[1].netns] {
                let call = Call::new(Transport::Tcp, target, Duration::from_millis(1200));
                let reply = reach(caller, call).map(|reply| reply.server);
                assert_eq!(reply.as_deref(), Ok("pod-a"), "{variant:?} {snat}");
            }
            // The newest comes first.
            node.shell("iptables -t nat -D CNI-HOSTPORT-DNAT 1");
            node.ok("DEL", &third.0, &third.1);
            node.snapshot()
                .same_rules(&alone)
                .unwrap_or_else(|lines| panic!("{variant:?} {lines}"));
        }
        std::fs::write(&file, &known).unwrap();
        node.ok("DEL", &newer.0, &newer.1);
        node.assert_clean(&bare);
    }
}

/// Somebody has cleared /run.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_attachment_without_its_record_keeps_its_rules_until_its_del() {
    for (variant, lost_first) in IPTABLES.into_iter().flat_map(|it| [(it, true), (it, false)]) {
        let lab = lab(Shape::Cilium, 3);
        let node = Node::new(&lab.node, variant);
        let call = |pod: usize, lengths: [&str; 2]| {
            let mappings = mappings(&[8080 + u16::try_from(pod).unwrap()]);
            let mut config = node.config(mappings, prev_result(&lab, pod, "1.0.0"));
            for ip in config["prevResult"]["ips"].as_array_mut().unwrap() {
                let address = ip["address"].as_str().unwrap().split('/').next().unwrap();
                let length = lengths[usize::from(address.contains(':'))];
                ip["address"] = json!(format!("{address}/{length}"));
            }
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        };
        let hosts = ["32", "128"];
        // The last one needs all that is shared but what is for neighbours.
        let [lost, other, bridged] = [call(0, hosts), call(1, hosts), call(2, ["24", "64"])];
        node.ok("ADD", &lost.0, &lost.1);
        std::fs::remove_dir_all(&node.state_dir).unwrap();
        let chain = chain_name(&node.network, "c0");
        let listing = || node.shell("iptables -t nat -S; ip6tables -t nat -S");
        let rules = || -> Vec<String> {
            listing().lines().filter(|line| line.contains(&chain)).map(str::to_owned).collect()
        };
        let whole = rules();
        node.ok("ADD", &other.0, &other.1);
        node.ok("ADD", &bridged.0, &bridged.1);
        assert_eq!(rules(), whole, "{variant:?}");
        if !lost_first {
            node.ok("DEL", &other.0, &other.1);
            assert_eq!(rules(), whole, "{variant:?}");
        }
        node.ok("DEL", &lost.0, &lost.1);
        assert_eq!(rules(), Vec::<String>::new(), "{variant:?}");
        if lost_first {
            node.ok("CHECK", &other.0, &other.1);
            node.ok("DEL", &other.0, &other.1);
        }
        node.ok("CHECK", &bridged.0, &bridged.1);
        node.ok("DEL", &bridged.0, &bridged.1);
        assert!(!listing().contains("PORTMAP-"), "{variant:?} {lost_first}: {}", listing());
    }
}

/// A call was killed half-way, and the next ones have not got the tool to finish it with.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_interrupted_step_waits_for_a_call_that_can_finish_it() {
    let lab = lab(Shape::Bridge, 2);
    let mut node = Node::new(&lab.node, Variant::IptablesNft);
    with_all_tools(&mut node);
    let before = node.snapshot();
    let call = |pod: usize, backend: &str| {
        let mut config = node.config(mappings(&[8080]), prev_result(&lab, pod, "1.0.0"));
        config["backend"] = json!(backend);
        (config, attachment(&lab.pods[pod], &format!("c{pod}")))
    };
    let [first, second] = [call(0, "iptables"), call(1, "nftables")];
    let mut other = second.0.clone();
    other["runtimeConfig"]["portMappings"] = mappings(&[9090]);
    let tool = node.path.join("iptables");
    let elsewhere = node.path.join("iptables-that-is-not-here");
    let pending = node.state_dir.join("notes/pending");
    for is_listed in [true, false] {
        node.ok("ADD", &first.0, &first.1);
        // As if the record had gone and its rules had not.
        let file = record_file(&node, "c0");
        match is_listed {
            true => {
                let record = std::fs::read_to_string(file).unwrap();
                std::fs::write(&pending, format!("[{record}]")).unwrap();
            }
            false => std::fs::hard_link(file, &pending).unwrap(),
        }
        std::fs::rename(&tool, &elsewhere).unwrap();
        for verb in ["ADD", "DEL"] {
            let note = node.ok(verb, &other, &second.1).stderr;
            assert!(note.contains("an interrupted call is not finished yet"), "{note}");
            let kept = std::fs::read_to_string(&pending).unwrap();
            assert!(kept.contains("\"c0\"") && !kept.contains("\"c1\""), "{kept}");
        }
        std::fs::rename(&elsewhere, &tool).unwrap();
        let note = node.ok("DEL", &first.0, &first.1).stderr;
        assert!(!note.contains("interrupted") && !pending.exists(), "{note}");
        node.assert_clean(&before);
    }
}

/// Another state directory's attachments are none of this flush's.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_network_that_is_not_there_is_flushed_without_harm() {
    let lab = lab(Shape::Cilium, 1);
    let _servers = lab.pods[0].serve(&[80], &[]).unwrap();
    let node = Node::new(&lab.node, Variant::Ebpf);
    let pod = attachment(&lab.pods[0], "c1");
    let config = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
    node.ok("ADD", &config, &pod);
    let mut flush = std::process::Command::new(support::PORTMAP);
    flush.env_clear().args(["flush", "--network", "portmap", "--yes", "--state-dir"]);
    flush.arg(node.state_dir.join("elsewhere"));
    let output = portmap::demo::plugin::run(&mut flush, b"", node.netns).unwrap();
    assert!(output.success(), "{}", output.stderr);
    assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"));
    node.ok("CHECK", &config, &pod);
    node.ok("DEL", &config, &pod);
    node.flush();
}

/// What is left of a record that cannot be read is all that a repeated DEL has to go by.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_damaged_record_stays_until_its_rules_are_gone() {
    let lab = lab(Shape::Cilium, 1);
    let node = Node::new(&lab.node, Variant::Nftables);
    let before = node.snapshot();
    let pod = attachment(&lab.pods[0], "c1");
    let config = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
    node.ok("ADD", &config, &pod);
    let file = record_file(&node, "c1");
    std::fs::write(&file, r#"{"format":1,"netw"#).unwrap();
    let (tool, elsewhere) = (node.path.join("nft"), node.path.join("nft-that-is-not-here"));
    std::fs::rename(&tool, &elsewhere).unwrap();
    node.fails("DEL", &config, &pod);
    assert!(file.exists());
    std::fs::rename(&elsewhere, &tool).unwrap();
    node.ok("DEL", &config, &pod);
    assert!(!file.exists());
    node.assert_clean(&before);
}

/// One that cannot be removed keeps no other one, and none of them from being named.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_gc_goes_on_after_failures_and_reports_them_all() {
    let lab = lab(Shape::Cilium, 3);
    let mut node = Node::new(&lab.node, Variant::IptablesNft);
    with_all_tools(&mut node);
    node.cni_version = "1.1.0".into();
    let before = node.snapshot();
    let call = |pod: usize, backend: &str| {
        let port = 8080 + u16::try_from(pod).unwrap();
        let mut config = node.config(mappings(&[port]), prev_result(&lab, pod, "1.1.0"));
        config["backend"] = json!(backend);
        (config, attachment(&lab.pods[pod], &format!("c{pod}")))
    };
    for (config, pod) in [call(0, "nftables"), call(1, "iptables"), call(2, "nftables")] {
        node.ok("ADD", &config, &pod);
    }
    let mut gc = node.config(Value::Null, Value::Null);
    gc["cni.dev/valid-attachments"] = json!([]);
    let nobody = attachment(&lab.pods[0], "");
    let (tool, elsewhere) = (node.path.join("nft"), node.path.join("nft-that-is-not-here"));
    std::fs::rename(&tool, &elsewhere).unwrap();
    let (code, text) = node.fails("GC", &gc, &nobody);
    assert_eq!(code, 105, "{text}");
    for line in ["container c0 ", "container c2 "] {
        let line = text.lines().find(|one| one.contains(line)).unwrap_or_else(|| panic!("{text}"));
        assert!(line.contains("nft is not installed"), "{text}");
    }
    assert_eq!(node.records().len(), 2);
    std::fs::rename(&elsewhere, &tool).unwrap();
    for _ in 0..2 {
        node.ok("GC", &gc, &nobody);
        node.assert_clean(&before);
    }
}

/// Tools of both variants, those without a suffix being of `first`.
fn path_of_both(node: &mut Node, first: Variant) {
    let dir = node.state_dir.with_file_name(format!("both-{first:?}"));
    std::fs::create_dir_all(&dir).unwrap();
    for (variant, infix) in [(Variant::IptablesNft, "-nft"), (Variant::IptablesLegacy, "-legacy")] {
        let tools = variant.path(&dir);
        for tool in std::fs::read_dir(&tools).unwrap() {
            let tool = tool.unwrap();
            let name = tool.file_name().into_string().unwrap();
            let program = std::fs::read_link(tool.path()).unwrap();
            let (head, tail) = name.split_at(name.find('-').unwrap_or(name.len()));
            let mut names = vec![format!("{head}{infix}{tail}")];
            names.extend((variant == first).then_some(name));
            for name in names {
                drop(std::os::unix::fs::symlink(&program, dir.join(name)));
            }
        }
    }
    node.path = dir;
}

/// `update-alternatives --config iptables`, or another image of the node.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn rules_of_the_other_iptables_go_with_their_attachment() {
    let variants = [Variant::IptablesNft, Variant::IptablesLegacy];
    for (first, then) in [(variants[0], variants[1]), (variants[1], variants[0])] {
        for restored in [false, true] {
            let lab = lab(Shape::Bridge, 2);
            let _servers: Vec<_> =
                lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
            let mut node = Node::new(&lab.node, first);
            let before = node.snapshot();
            path_of_both(&mut node, first);
            let pods = [0, 1].map(|pod: usize| {
                let ports = mappings(&[8080 + u16::try_from(pod).unwrap()]);
                let config = node.config(ports, prev_result(&lab, pod, "1.0.0"));
                (config, attachment(&lab.pods[pod], &format!("c{pod}")))
            });
            pods.iter().for_each(|(config, pod)| drop(node.ok("ADD", config, pod)));
            path_of_both(&mut node, then);
            if restored {
                assert!(node.restore(false).stdout.contains("2 repaired"));
            }
            let [gone, stays] = &pods;
            for _ in 0..2 {
                node.ok("DEL", &gone.0, &gone.1);
                for tool in ["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"]
                {
                    let rules = node.shell(&format!("{tool} -t nat -S"));
                    assert!(!rules.contains("\"c0"), "{first:?} {tool}: {rules}");
                }
                assert_eq!(who_answers(&lab, 8080), None, "{first:?}");
                assert_eq!(who_answers(&lab, 8081).as_deref(), Some("pod-b"), "{first:?}");
            }
            node.ok("CHECK", &stays.0, &stays.1);
            node.ok("DEL", &stays.0, &stays.1);
            node.assert_clean(&before);
        }
    }
}

/// An nftables.conf has a table of this name, on a node whose tools are iptables-legacy.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_table_that_iptables_nft_cannot_read_keeps_no_pod_from_going() {
    for (table, added_by) in [("nat", Variant::IptablesLegacy), ("raw", Variant::IptablesNft)] {
        let lab = lab(Shape::Bridge, 1);
        let _servers = lab.pods[0].serve(&[80], &[]).unwrap();
        let mut node = Node::new(&lab.node, Variant::IptablesLegacy);
        path_of_both(&mut node, added_by);
        // What was there before is not taken away on the fast path.
        support::foreign::install_upstream_scaffold(&node);
        let config = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
        let pod = attachment(&lab.pods[0], "c1");
        if table == "raw" {
            node.ok("ADD", &config, &pod);
        }
        support::foreign::install_unreadable(&node, table);
        let refusal = node.shell(&format!("iptables-nft -t {table} -S 2>&1 || true"));
        assert!(refusal.contains("is incompatible"), "{refusal}");
        path_of_both(&mut node, Variant::IptablesLegacy);
        if table == "nat" {
            node.ok("ADD", &config, &pod);
        }
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{table}");
        let output = node.ok("DEL", &config, &pod);
        let warning = format!("table {table} of iptables-nft (IPv4) cannot be read");
        assert!(output.stderr.contains(&warning), "{}", output.stderr);
        assert_eq!(who_answers(&lab, 8080), None, "{table}");
        assert!(!node.shell("nft list ruleset; iptables-legacy-save").contains("CNI-DN-"));
        node.snapshot().no_records().unwrap();
    }
}

/// k3s's iptables-detect.sh and iptables-wrappers of Kubernetes' images choose one of the tools; images
/// that are made by copying have no links.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn tools_whose_names_do_not_tell_the_variant_keep_their_rules() {
    for (variant, copied) in [
        (Variant::IptablesNft, false),
        (Variant::IptablesNft, true),
        (Variant::IptablesLegacy, false),
        (Variant::IptablesLegacy, true),
    ] {
        let lab = lab(Shape::Bridge, 2);
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
        let mut node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        path_of_both(&mut node, variant);
        let infix = if variant == Variant::IptablesNft { "-nft" } else { "-legacy" };
        for tool in ["iptables", "ip6tables"] {
            for suffix in ["", "-save", "-restore"] {
                let link = node.path.join(format!("{tool}{suffix}"));
                let program = std::fs::read_link(&link).unwrap();
                let content = match copied {
                    true => std::fs::read(program).unwrap(),
                    false => {
                        format!("#!/bin/sh\nexec /usr/sbin/{tool}{infix}{suffix} \"$@\"\n").into()
                    }
                };
                write_executable(&link, content);
            }
        }
        let pods = [0, 1].map(|pod: usize| {
            let ports = mappings(&[8080 + u16::try_from(pod).unwrap()]);
            let config = node.config(ports, prev_result(&lab, pod, "1.0.0"));
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        });
        let answers = |pod: usize, port| {
            let name = ["pod-a", "pod-b"][pod];
            assert_eq!(who_answers(&lab, port).as_deref(), Some(name), "{variant:?} {copied}");
            node.ok("CHECK", &pods[pod].0, &pods[pod].1);
        };
        // The first takes the slow path, the second the fast one, and a DEL both.
        node.ok("ADD", &pods[0].0, &pods[0].1);
        answers(0, 8080);
        node.ok("ADD", &pods[1].0, &pods[1].1);
        answers(1, 8081);
        node.ok("DEL", &pods[0].0, &pods[0].1);
        assert_eq!(who_answers(&lab, 8080), None);
        answers(1, 8081);
        node.damage();
        assert!(node.restore(false).stdout.contains("1 repaired"));
        answers(1, 8081);
        node.ok("DEL", &pods[1].0, &pods[1].1);
        node.assert_clean(&before);
    }
}

/// A firewall's reload takes rules and sets with it, and may come back without the set.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_set_that_is_gone_is_the_matter_of_who_named_it() {
    for variant in [Variant::IptablesNft, Variant::IptablesLegacy] {
        let lab = lab(Shape::Bridge, 3);
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
        let node = Node::new(&lab.node, variant);
        node.shell("ipset create clients hash:net; ipset add clients 198.51.100.0/24");
        let before = node.snapshot();
        let pods = [0, 1, 2].map(|pod: usize| {
            let ports = mappings(&[8080 + u16::try_from(pod).unwrap()]);
            let config = node.config(ports, prev_result(&lab, pod, "1.0.0"));
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        });
        let [mut named, other, newer] = pods;
        named.0["conditionsV4"] = json!(["-m", "set", "--match-set", "clients", "src"]);
        for (config, pod) in [&named, &other] {
            node.ok("ADD", config, pod);
        }
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        node.damage();
        node.shell("ipset destroy clients");
        let output = node.ok("ADD", &newer.0, &newer.1);
        assert!(output.stderr.contains("c0") && output.stderr.contains("clients"), "{output:?}");
        for (pod, (config, key)) in [("pod-b", &other), ("pod-c", &newer)] {
            node.ok("CHECK", config, key);
            let port = if pod == "pod-b" { 8081 } else { 8082 };
            assert_eq!(who_answers(&lab, port).as_deref(), Some(pod), "{variant:?}");
        }
        node.fails("CHECK", &named.0, &named.1);
        let (_, text) = node.fails("ADD", &named.0, &named.1);
        assert!(text.contains("clients"), "{text}");
        node.shell("ipset create clients hash:net; ipset add clients 198.51.100.0/24");
        node.ok("ADD", &named.0, &named.1);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        for (config, pod) in [&other, &named, &newer] {
            node.ok("DEL", config, pod);
        }
        node.assert_clean(&before);
    }
}

/// A node may have iptables without ip6tables, and nft.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn pods_with_ipv6_get_a_backend_that_has_it() {
    for variant in [Variant::IptablesNft, Variant::IptablesLegacy] {
        let lab = lab(Shape::Bridge, 2);
        let mut node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        with_all_tools(&mut node);
        for tool in ["", "-save", "-restore"] {
            std::fs::remove_file(node.path.join(format!("ip6tables{tool}"))).unwrap();
        }
        let pods = [0, 1].map(|pod: usize| {
            let ports = mappings(&[8080 + u16::try_from(pod).unwrap()]);
            let mut config = node.config(ports, prev_result(&lab, pod, "1.0.0"));
            config.as_object_mut().unwrap().remove("backend");
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        });
        let [mut ipv4, dual] = pods;
        let ips = ipv4.0["prevResult"]["ips"].as_array_mut().unwrap();
        ips.retain(|ip| !ip["address"].as_str().unwrap().contains(':'));
        for _ in 0..2 {
            for ((config, pod), backend) in [(&ipv4, "iptables"), (&dual, "nftables")] {
                node.ok("ADD", config, pod);
                let record =
                    std::fs::read_to_string(record_file(&node, &pod.container_id)).unwrap();
                assert!(record.contains(&format!("\"backend\":\"{backend}\"")), "{record}");
            }
        }
        for (config, pod) in [&ipv4, &dual] {
            node.ok("CHECK", config, pod);
            node.ok("DEL", config, pod);
        }
        node.assert_clean(&before);
    }
}

/// The owner's tools may have left the node with its image, and the owner be dead.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_owner_whose_tools_are_gone_does_not_keep_its_port() {
    for (first, then) in
        [(Variant::IptablesNft, Variant::Nftables), (Variant::Nftables, Variant::IptablesLegacy)]
    {
        let lab = lab(Shape::Bridge, 2);
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
        let mut node = Node::new(&lab.node, first);
        let before = node.snapshot();
        let pods = [0, 1].map(|pod: usize| {
            let mut config = node.config(mappings(&[8080]), prev_result(&lab, pod, "1.0.0"));
            config.as_object_mut().unwrap().remove("backend");
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        });
        let [owner, newer] = &pods;
        let tools_of_owner = node.path.clone();
        node.ok("ADD", &owner.0, &owner.1);
        node.path = then.path(&node.state_dir.with_file_name("then"));
        let whole = node.snapshot();
        let output = node.ok("ADD", &newer.0, &newer.1);
        let warned =
            format!("claims the same port through {} and cannot be moved", first.backend());
        assert!(output.stderr.contains(&warned), "{}", output.stderr);
        let output = node.ok("DEL", &newer.0, &newer.1);
        assert!(!output.stderr.contains("interrupted"), "{}", output.stderr);
        assert_eq!(node.snapshot().same_rules(&whole), Ok(()));
        node.path = tools_of_owner;
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{first:?}");
        node.ok("DEL", &owner.0, &owner.1);
        node.assert_clean(&before);
    }
}

/// The mere existence of a table makes kube-proxy, and people, think that it is used.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_repeated_del_makes_no_table_of_iptables() {
    let lab = lab(Shape::Bridge, 1);
    let mut node = Node::new(&lab.node, Variant::Nftables);
    path_of_both(&mut node, Variant::IptablesLegacy);
    with_all_tools(&mut node);
    let config = node.config(mappings(&[8080]), prev_result(&lab, 0, "1.0.0"));
    let pod = attachment(&lab.pods[0], "c0");
    let names = "cat /proc/thread-self/net/ip_tables_names /proc/thread-self/net/ip6_tables_names";
    node.ok("ADD", &config, &pod);
    for _ in 0..2 {
        node.ok("DEL", &config, &pod);
        assert_eq!(node.shell(names), "");
        assert!(!node.shell("nft list tables").contains(" nat"));
    }
}

/// Whose container, as `list` shows what has no record.
fn unrecorded(node: &Node) -> Vec<String> {
    let mut list = std::process::Command::new(PORTMAP);
    list.env_clear().env("PATH", &node.path).args(["list", "--json", "--state-dir"]);
    list.arg(&node.state_dir);
    let output = plugin::run(&mut list, b"", node.netns).unwrap();
    let report: Value = serde_json::from_str(&output.stdout).unwrap();
    let mut forwards: Vec<String> = report["unrecorded"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|one| {
            one["forwards"]
                .as_array()
                .unwrap()
                .iter()
                .map(move |forward| format!("{} {}", one["containerID"], forward["hostPort"]))
        })
        .collect();
    forwards.sort();
    // Both families'.
    forwards.dedup();
    forwards
}

/// The kernel alone knows then whose what is, and others live on.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_del_finds_what_is_its_own_when_the_state_directory_is_lost() {
    for variant in VARIANTS {
        let lab = lab(Shape::Cilium, 3);
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
        let mut node = Node::new(&lab.node, variant);
        node.cni_version = "1.1.0".into();
        let call = |pod: usize, port: u16| {
            let config = node.config(mappings(&[port]), prev_result(&lab, pod, "1.1.0"));
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        };
        let calls = [call(0, 8080), call(1, 8081), call(2, 8082)];
        let answers = || [8080, 8081, 8082].map(|port| who_answers(&lab, port));
        let [a, b, c] = ["pod-a", "pod-b", "pod-c"].map(|name| Some(name.to_owned()));
        for (config, pod) in &calls {
            node.ok("ADD", config, pod);
        }
        assert_eq!(answers(), [a, b.clone(), c.clone()], "{variant:?}");
        assert_eq!(unrecorded(&node), [""; 0], "{variant:?}");
        std::fs::remove_dir_all(&node.state_dir).unwrap();
        assert_eq!(answers(), [Some("pod-a".into()), b.clone(), c.clone()], "{variant:?}");
        assert_eq!(unrecorded(&node).len(), 3, "{variant:?}");

        // As runtimes do it, and twice.
        for _ in 0..2 {
            node.ok("DEL", &calls[0].0, &calls[0].1);
            assert_eq!(answers(), [None, b.clone(), c.clone()], "{variant:?}");
        }
        let left = unrecorded(&node);
        assert!(left.len() == 2 && !left.iter().any(|one| one.contains("8080")), "{left:?}");
        if variant == Variant::Ebpf {
            // Entries do not tell whose network they are of.
            node.ok("DEL", &calls[1].0, &calls[1].1);
        } else {
            let mut gc = node.config(Value::Null, Value::Null);
            gc["cni.dev/valid-attachments"] = json!([{"containerID": "c2", "ifname": "eth0"}]);
            let mut others = gc.clone();
            others["name"] = json!("another");
            node.ok("GC", &others, &calls[0].1);
            assert_eq!(answers(), [None, b, c.clone()], "{variant:?}");
            node.ok("GC", &gc, &calls[0].1);
        }
        assert_eq!(answers(), [None, None, c], "{variant:?}");
        // Whoever comes next has the port, and leaves nothing of itself.
        let again = call(0, 8081);
        node.ok("DEL", &calls[2].0, &calls[2].1);
        assert_eq!(answers(), [None, None, None], "{variant:?}");
        assert_eq!(unrecorded(&node), [""; 0], "{variant:?}");
        node.ok("ADD", &again.0, &again.1);
        node.ok("CHECK", &again.0, &again.1);
        assert_eq!(who_answers(&lab, 8081).as_deref(), Some("pod-a"), "{variant:?}");
        node.ok("DEL", &again.0, &again.1);
        assert_eq!(node.records(), [""; 0]);
        node.flush();
    }
}

/// One record of two for a port: the other one has it back.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_port_whose_record_is_lost_goes_to_the_next_owner() {
    let lab = lab(Shape::Cilium, 2);
    let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
    for variant in VARIANTS {
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let call = |pod: usize| {
            let config = node.config(mappings(&[8080]), prev_result(&lab, pod, "1.0.0"));
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        };
        let [older, newer] = [call(0), call(1)];
        node.ok("ADD", &older.0, &older.1);
        node.ok("ADD", &newer.0, &newer.1);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-b"), "{variant:?}");
        std::fs::remove_file(record_file(&node, "c1")).unwrap();
        node.ok("DEL", &newer.0, &newer.1);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        node.ok("CHECK", &older.0, &older.1);
        // The late one of a pod that has lost the port takes nothing.
        node.ok("DEL", &newer.0, &newer.1);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        node.ok("DEL", &older.0, &older.1);
        let now = node.snapshot();
        now.same_rules(&before).unwrap_or_else(|lines| panic!("{variant:?}:\n{lines}"));
        now.same_sysctls(&before).unwrap_or_else(|lines| panic!("{variant:?}:\n{lines}"));
        assert_eq!(node.records(), [""; 0]);
    }
}

/// Its rules are not in maps, but in chains that these lead to.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn chains_with_conditions_go_with_their_elements_when_the_record_is_lost() {
    let lab = lab(Shape::Bridge, 2);
    let node = Node::new(&lab.node, Variant::Nftables);
    let call = |pod: usize, port: u16| {
        let mut config = node.config(mappings(&[port]), prev_result(&lab, pod, "1.0.0"));
        config["conditionsV4"] = json!(["ip", "saddr", "192.0.2.0/24"]);
        (config, attachment(&lab.pods[pod], &format!("c{pod}")))
    };
    let calls = [call(0, 8080), call(1, 8081)];
    for (config, pod) in &calls {
        node.ok("ADD", config, pod);
    }
    std::fs::remove_dir_all(&node.state_dir).unwrap();
    let table = || node.shell("nft list table inet portmap");
    let address = |pod: usize| lab.pods[pod].address(Family::V4).unwrap().to_string();
    assert!(table().contains("chain any4_tcp_8080") && table().contains(&address(0)));
    node.ok("DEL", &calls[0].0, &calls[0].1);
    assert!(!table().contains("chain any4_tcp_8080"), "{}", table());
    assert!(!table().contains(&format!("{} ", address(0))), "{}", table());
    assert!(table().contains("chain any4_tcp_8081") && table().contains(&address(1)));
    node.ok("DEL", &calls[1].0, &calls[1].1);
    assert!(!table().contains("chain any4_tcp_8081"), "{}", table());
}

/// Targets of a rolling update differ in their addresses alone.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_late_del_takes_nothing_from_whoever_took_the_port_over() {
    for variant in VARIANTS {
        let lab = lab(Shape::Cilium, 2);
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
        let node = Node::new(&lab.node, variant);
        let call = |pod: usize| {
            let config = node.config(mappings(&[8080]), prev_result(&lab, pod, "1.0.0"));
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        };
        let [older, newer] = [call(0), call(1)];
        for (verb, (config, pod)) in [("ADD", &older), ("ADD", &newer), ("DEL", &older)] {
            node.ok(verb, config, pod);
        }
        std::fs::remove_dir_all(&node.state_dir).unwrap();
        node.ok("DEL", &older.0, &older.1);
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-b"), "{variant:?}");
        assert_eq!(unrecorded(&node).len(), 1, "{variant:?}");
        node.ok("DEL", &newer.0, &newer.1);
        assert_eq!(who_answers(&lab, 8080), None, "{variant:?}");
        assert_eq!(unrecorded(&node), [""; 0], "{variant:?}");
    }
}

/// What upstream's plugin would have made for both is the other interface's.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_interface_s_record_may_be_lost_beside_its_sibling_s() {
    for variant in VARIANTS {
        let lab = lab(Shape::Cilium, 1);
        let _servers = lab.pods[0].serve(&[80], &[]).unwrap();
        let node = Node::new(&lab.node, variant);
        let first = attachment(&lab.pods[0], "c1");
        let second = plugin::Attachment { ifname: "net1".into(), ..first.clone() };
        let config = |port: u16| node.config(mappings(&[port]), prev_result(&lab, 0, "1.0.0"));
        let renamed = config(8081).to_string().replace("\"eth0\"", "\"net1\"");
        let renamed: Value = serde_json::from_str(&renamed).unwrap();
        node.ok("ADD", &config(8080), &first);
        node.ok("ADD", &renamed, &second);
        assert_eq!(who_answers(&lab, 8081).as_deref(), Some("pod-a"), "{variant:?}");
        std::fs::remove_file(record_file(&node, "\"net1\"")).unwrap();
        node.ok("DEL", &renamed, &second);
        assert_eq!(who_answers(&lab, 8081), None, "{variant:?}");
        assert_eq!(who_answers(&lab, 8080).as_deref(), Some("pod-a"), "{variant:?}");
        node.ok("DEL", &config(8080), &first);
        assert_eq!(unrecorded(&node), [""; 0], "{variant:?}");
    }
}
