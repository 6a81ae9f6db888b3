//! `portmap restore` after what firewalls and people do to rules, on every backend.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use portmap::demo::links::{Links, Subnet};
use portmap::demo::netns::Netns;
use portmap::demo::plugin::{self, Attachment, Output};
use portmap::demo::topology::{BRIDGE, Lab, Options, Shape};
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use portmap::record::chain_name;
use serde_json::{Value, json};

#[path = "support/mod.rs"]
mod support;
use support::{
    GONE_NETNS, Node, PORTMAP, RULES, VARIANTS, Variant, attachment, golden, prev_result,
};

fn last_line(output: &Output) -> &str {
    output.stdout.lines().last().unwrap_or_default()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_was_removed_comes_back_for_live_attachments() {
    for variant in VARIANTS {
        let lab = Lab::build(Options { pods: 3, ..Options::new(Shape::Ptp) }).unwrap();
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let config = |pod: usize, port: u16| {
            let mappings = json!([{"hostPort": port, "containerPort": 80}]);
            node.config(mappings, prev_result(&lab, pod, "1.0.0"))
        };
        let live: Vec<(Value, Attachment)> = (0..2)
            .map(|pod: usize| {
                let port = 8080 + u16::try_from(pod).unwrap();
                (config(pod, port), attachment(&lab.pods[pod], &format!("live-{pod}")))
            })
            .collect();
        let mut gone = attachment(&lab.pods[2], "gone");
        gone.netns = GONE_NETNS.into();
        // The newest of port 8080, before its namespace went.
        let gone = (config(2, 8080), gone);
        for (config, pod) in live.iter().chain([&gone]) {
            node.ok("ADD", config, pod);
        }

        let whole = node.snapshot();
        assert_eq!(last_line(&node.restore(false)), "2 attachments, 0 repaired", "{variant:?}");
        assert_eq!(node.snapshot(), whole, "{variant:?}: nothing was wrong");

        node.damage();
        let (code, text) = node.fails("CHECK", &live[0].0, &live[0].1);
        assert_eq!(code, 102, "{variant:?} {text}");
        let output = node.restore(false);
        assert_eq!(last_line(&output), "2 attachments, 2 repaired", "{variant:?}");
        assert!(output.stdout.contains("left alone container gone"), "{}", output.stdout);
        for (config, pod) in &live {
            node.ok("CHECK", config, pod);
        }
        let (code, text) = node.fails("CHECK", &gone.0, &gone.1);
        assert_eq!(code, 102, "{variant:?}: nobody lives there: {text}");

        let report: Value = serde_json::from_str(&node.restore(true).stdout).unwrap();
        assert_eq!(report["attachments"], 2, "{variant:?}");
        assert_eq!(report["repaired"], json!([]), "{variant:?}");
        assert_eq!(report["dead"][0]["containerID"], "gone", "{variant:?}");

        for (config, pod) in live.iter().chain([&gone]) {
            node.ok("DEL", config, pod);
        }
        node.assert_clean(&before);
        assert_eq!(last_line(&node.restore(false)), "0 attachments, 0 repaired");
        node.assert_clean(&before);
    }
}

/// The bridge of a dead pod goes on routing 127.0.0.0/8 until its DEL, and others of it may not need that.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_guard_stays_as_long_as_route_localnet_is_on() {
    for variant in RULES {
        let lab = Lab::build(Options::new(Shape::Bridge)).unwrap();
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let config = |pod: usize, host_ip: &str| {
            let mappings =
                json!([{"hostPort": 8080 + pod, "containerPort": 80, "hostIP": host_ip}]);
            node.config(mappings, prev_result(&lab, pod, "1.0.0"))
        };
        let mut dead = (config(0, ""), attachment(&lab.pods[0], "dead"));
        dead.1.netns = GONE_NETNS.into();
        let address = lab.second_node_address(Family::V4).to_string();
        let live = (config(1, &address), attachment(&lab.pods[1], "live"));
        [&dead, &live].into_iter().for_each(|(config, pod)| drop(node.ok("ADD", config, pod)));
        let guarded = || {
            let localnet = lab.node.sysctl(&format!("ipv4/conf/{BRIDGE}/route_localnet")).unwrap();
            let rules = node.shell(match variant {
                Variant::Nftables => "nft list ruleset",
                _ => "iptables -t raw -S",
            });
            let lines = match variant {
                Variant::Nftables => ["priority raw", "ip daddr 127.0.0.0/8 drop"],
                _ => ["-A PREROUTING -d 127.0.0.0/8 ! -i lo", "-A PORTMAP-GUARD -j DROP"],
            };
            (localnet, lines.iter().all(|line| rules.contains(line)))
        };
        assert_eq!(guarded(), ("1".to_owned(), true), "{variant:?}");
        let chain = chain_name(&node.network, "live");
        let light = match variant {
            Variant::Nftables => {
                format!("nft delete element inet portmap ip4_addr {{ {address} . tcp . 8081 }}")
            }
            _ => format!("iptables -t nat -F {chain}"),
        };
        for all in [false, true] {
            match all {
                false => drop(node.shell(&light)),
                true => node.damage(),
            }
            assert_eq!(last_line(&node.restore(false)), "1 attachment, 1 repaired", "{variant:?}");
            assert_eq!(guarded(), ("1".to_owned(), true), "{variant:?}");
            node.ok("CHECK", &live.0, &live.1);
        }
        node.ok("DEL", &dead.0, &dead.1);
        assert_eq!(guarded(), ("0".to_owned(), false), "{variant:?}");
        node.ok("CHECK", &live.0, &live.1);
        node.ok("DEL", &live.0, &live.1);
        node.assert_clean(&before);
    }
}

/// A timer without a tool in its PATH still serves those who need none.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_backend_that_cannot_be_read_keeps_nobody_else_from_being_restored() {
    let lab = Lab::build(Options { pods: 2, ..Options::new(Shape::Ptp) }).unwrap();
    let node = Node::new(&lab.node, Variant::IptablesNft);
    let call = |pod: usize, backend: &str| {
        let mappings = json!([{"hostPort": 8080 + pod, "containerPort": 80}]);
        let mut config = node.config(mappings, prev_result(&lab, pod, "1.0.0"));
        config["backend"] = json!(backend);
        (config, attachment(&lab.pods[pod], &format!("c{pod}")))
    };
    let pods = [call(0, "iptables"), call(1, "ebpf")];
    pods.iter().for_each(|(config, pod)| drop(node.ok("ADD", config, pod)));
    node.shell("rm -r /sys/fs/bpf/portmap; iptables -t nat -F");
    let run = |path: &std::path::Path, arguments: &[&str]| {
        let mut command = std::process::Command::new(PORTMAP);
        command.env_clear().env("PATH", path).args(arguments);
        plugin::run(command.arg("--state-dir").arg(&node.state_dir), b"", node.netns).unwrap()
    };
    let restore = |path| run(path, &["restore"]);
    // What was done is told with what was not.
    let partly = |arguments: &[&str]| {
        let output = run(&node.state_dir, arguments);
        assert_eq!(output.status, Some(1), "{}", output.stderr);
        serde_json::from_str::<serde_json::Value>(&output.stdout).unwrap()
    };
    let output = restore(&node.state_dir);
    assert_eq!(output.status, Some(1), "{}", output.stdout);
    assert!(output.stdout.contains("repaired container c1"), "{}", output.stdout);
    assert!(output.stderr.contains("iptables"), "{}", output.stderr);
    node.ok("CHECK", &pods[1].0, &pods[1].1);
    node.fails("CHECK", &pods[0].0, &pods[0].1);
    let found = partly(&["restore", "--json"]);
    assert_eq!((&found["repaired"], &found["failed"][0]["what"]), (&json!([]), &json!("iptables")));
    assert!(restore(&node.path).success());
    pods.iter().for_each(|(config, pod)| drop(node.ok("CHECK", config, pod)));
    let found = partly(&["flush", "--all", "--yes", "--json"]);
    assert_eq!(found["removed"][0]["containerID"], "c1", "{found}");
    let what = "container c0 interface eth0 on network portmap";
    assert_eq!((&found["failed"][0]["what"], &found["failed"][1]), (&json!(what), &json!(null)));
    node.ok("DEL", &pods[0].0, &pods[0].1);
    node.flush();
}

/// A second uplink, after the last ADD: its clients are no neighbours of the pods.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_new_uplink_is_made_known() {
    for variant in VARIANTS.into_iter().filter(|variant| *variant != Variant::Ebpf) {
        let lab = Lab::build(Options::new(Shape::Cilium)).unwrap();
        let _server = lab.pods[0].serve(&[80], &[]).unwrap();
        let node = Node::new(&lab.node, variant);
        let mappings = json!([{"hostPort": 8080, "containerPort": 80}]);
        let config = node.config(mappings, prev_result(&lab, 0, "1.0.0"));
        let pod = attachment(&lab.pods[0], "c0");
        node.ok("ADD", &config, &pod);
        node.ok("CHECK", &config, &pod);
        let client = Netns::new("second").unwrap();
        let mut near = Links::open(&lab.node).unwrap();
        near.add_veth("up2", "eth0", &client).unwrap();
        let mut far = Links::open(&client).unwrap();
        for (links, name, address) in
            [(&mut near, "up2", "203.0.113.1/24"), (&mut far, "eth0", "203.0.113.2/24")]
        {
            links.add_address(name, address.parse().unwrap(), Subnet::OnLink).unwrap();
            links.set_up(name).unwrap();
        }
        let gateway = "203.0.113.1".parse().unwrap();
        far.add_route("0.0.0.0/0".parse().unwrap(), Some(gateway), "eth0").unwrap();
        let seen = || {
            let target = lab.node_socket(Family::V4, 8080);
            let call = Call::new(Transport::Tcp, target, Duration::from_secs(2));
            reach(&client, call).unwrap().seen.ip().to_string()
        };
        assert_ne!(seen(), "203.0.113.2", "{variant:?}: this test tests nothing");
        let (code, text) = node.fails("CHECK", &config, &pod);
        assert!(code == 102 && text.contains("up2 leads out of the node"), "{code} {text}");
        assert_eq!(last_line(&node.restore(false)), "1 attachment, 1 repaired", "{variant:?}");
        assert_eq!(seen(), "203.0.113.2", "{variant:?}");
        node.ok("CHECK", &config, &pod);
        node.shell("ip link del up2");
        node.ok("CHECK", &config, &pod);
        node.ok("DEL", &config, &pod);
    }
}

/// A chain of somebody else's that an attachment builds on is for them to put back.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_cannot_be_put_back_is_not_called_repaired() {
    for variant in [Variant::IptablesNft, Variant::IptablesLegacy] {
        let lab = Lab::build(Options { pods: 2, ..Options::new(Shape::Ptp) }).unwrap();
        let node = Node::new(&lab.node, variant);
        let make = "for t in iptables ip6tables; do $t -t nat -N THEIRS; $t -t nat -A THEIRS -j MARK --set-xmark 1/1; done";
        node.shell(make);
        let before = node.snapshot();
        let call = |pod: usize| {
            let mappings = json!([{"hostPort": 8080 + pod, "containerPort": 80}]);
            let config = node.config(mappings, prev_result(&lab, pod, "1.0.0"));
            (config, attachment(&lab.pods[pod], &format!("c{pod}")))
        };
        let mut pods = [call(0), call(1)];
        pods[0].0["externalSetMarkChain"] = json!("THEIRS");
        pods.iter().for_each(|(config, pod)| drop(node.ok("ADD", config, pod)));
        node.damage();
        let restore = || {
            let mut command = std::process::Command::new(PORTMAP);
            command.env_clear().env("PATH", &node.path).args(["restore", "--state-dir"]);
            plugin::run(command.arg(&node.state_dir), b"", node.netns).unwrap()
        };
        for repaired in [1, 0] {
            let output = restore();
            assert_eq!(output.status, Some(1), "{}", output.stdout);
            let expected = format!("2 attachments, {repaired} repaired");
            assert!(output.stdout.contains(&expected), "{variant:?} {}", output.stdout);
            assert!(!output.stdout.contains("repaired container c0"), "{}", output.stdout);
            let named = "container c0 interface eth0 on network portmap: not repaired: ";
            assert!(output.stderr.contains(named), "{}", output.stderr);
            let missing = "its externalSetMarkChain THEIRS is missing (IPv6)";
            assert!(output.stdout.contains(missing), "{}", output.stdout);
            node.ok("CHECK", &pods[1].0, &pods[1].1);
        }
        node.shell(make);
        assert!(restore().success());
        for (config, pod) in &pods {
            node.ok("CHECK", config, pod);
            node.ok("DEL", config, pod);
        }
        node.assert_clean(&before);
    }
}

/// A runtime's call has the lock.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn who_has_to_wait_is_told_for_what() {
    let lab = Lab::build(Options::new(Shape::Ptp)).unwrap();
    let node = Node::new(&lab.node, Variant::Nftables);
    let mappings = json!([{"hostPort": 8080, "containerPort": 80}]);
    let config = node.config(mappings, prev_result(&lab, 0, "1.0.0"));
    let pod = attachment(&lab.pods[0], "c1");
    node.ok("ADD", &config, &pod);
    let commands: [&[&str]; 5] = [
        &["list"],
        &["who", "8080"],
        &["restore"],
        &["gc"],
        &["flush", "--network", "other", "--yes"],
    ];
    for arguments in commands {
        let mut command = std::process::Command::new(PORTMAP);
        command.env_clear().env("PATH", &node.path).args(arguments);
        command.arg("--state-dir").arg(&node.state_dir);
        let file = std::fs::File::open(node.state_dir.join("lock")).unwrap();
        let lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        let output = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| plugin::run(&mut command, b"", node.netns).unwrap());
            std::thread::sleep(Duration::from_millis(1500));
            lock.unlock().unwrap();
            waiting.join().unwrap()
        });
        assert!(output.success(), "{arguments:?} {}", output.stderr);
        let expected = format!("portmap {}: waiting for the node's lock", arguments[0]);
        assert!(output.stderr.starts_with(&expected), "{}", output.stderr);
    }
    node.ok("DEL", &config, &pod);
}

/// What people read, of a node with nftables.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_restore_and_flush_say_is_golden() {
    let lab = Lab::build(Options { pods: 2, ..Options::new(Shape::Ptp) }).unwrap();
    let node = Node::new(&lab.node, Variant::Nftables);
    let says = |name: &str, output: &Output| {
        // As runtimes name them, for who reads it in the documentation.
        let text =
            format!("{}{}", output.stdout, output.stderr).replace(GONE_NETNS, "/run/netns/gone");
        // What takes longer than a second is told, on a busy machine.
        let said = text.split_inclusive('\n').filter(|line| !line.ends_with(" …\n"));
        let text: String = said.collect();
        golden::holds(&format!("commands/{name}"), &text);
    };
    let add = |pod: usize| {
        let port = 8080 + u16::try_from(pod).unwrap();
        let mappings = json!([
            {"hostPort": port, "containerPort": 80},
            {"hostPort": port, "containerPort": 53, "protocol": "udp", "hostIP": "198.51.100.1"},
        ]);
        let config = node.config(mappings, prev_result(&lab, pod, "1.0.0"));
        let mut key = attachment(&lab.pods[pod], ["4e16b3d1", "9f0c2a77"][pod]);
        key.args = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=".to_owned() + ["web-0", "web-1"][pod];
        if pod == 1 {
            key.netns = GONE_NETNS.into();
        }
        node.ok("ADD", &config, &key);
    };
    add(0);
    add(1);
    node.shell("nft delete element inet portmap any4_addr { tcp . 8080 }; nft flush chain inet portmap guard");
    says("restore", &node.restore(false));
    says("restore-again", &node.restore(false));
    node.damage();
    says("restore.json", &node.restore(true));
    let flush = |arguments: &[&str]| {
        let mut command = std::process::Command::new(PORTMAP);
        command.env_clear().env("PATH", &node.path).arg("flush").args(arguments);
        command.arg("--state-dir").arg(&node.state_dir);
        plugin::run(&mut command, b"", node.netns).unwrap()
    };
    says("flush-nothing", &flush(&["--network", "other", "--yes"]));
    says("flush.json", &flush(&["--network", "portmap", "--yes", "--json"]));
    add(0);
    says("flush-refused", &flush(&["--all"]));
    says("flush", &flush(&["--all", "--yes"]));
}
