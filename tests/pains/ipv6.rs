//! Nodes without IPv6.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

use portmap::demo::plugin;
use portmap::demo::traffic::Transport;
use portmap::model::Family;
use serde_json::{Value, json};

use crate::site::{Site, bridge, named, on_each, tcp, udp, v4_only, with};
use crate::support::{PORTMAP, VARIANTS};

/// By `disable_ipv6`, as hardened nodes have it, unless the kernel itself has none (`ipv6.disable=1`).
fn take_ipv6_away(site: &Site) {
    let pods = site.lab.pods.iter().map(|pod| &pod.netns);
    for netns in [&site.lab.node, &site.lab.client].into_iter().chain(pods) {
        if netns.sysctl("ipv6/conf/all/disable_ipv6").is_ok() {
            netns.set_sysctl("ipv6/conf/all/disable_ipv6", "1").unwrap();
            netns.set_sysctl("ipv6/conf/default/disable_ipv6", "1").unwrap();
        }
    }
    assert_eq!(site.node.shell("ip -6 address"), "");
}

/// What doctor finds amiss, but for the list and the binary, which nobody has installed here.
fn findings(site: &Site) -> Vec<String> {
    let mut command = Command::new(PORTMAP);
    command.env_clear().env("PATH", &site.node.path).args(["doctor", "--json", "--state-dir"]);
    command.arg(&site.node.state_dir).args(["--conf-dir", "/nowhere", "--dest", "/nowhere"]);
    let output = plugin::run(&mut command, b"", site.node.netns).unwrap();
    let report: Value = serde_json::from_str(&output.stdout).unwrap();
    let all = report["findings"].as_array().unwrap().iter();
    all.filter(|finding| finding["severity"] != "fine" && finding["area"] != "installation")
        // The state directory is on no file system in memory.
        .filter(|finding| finding["area"] != "state")
        .map(ToString::to_string)
        .collect()
}

/// cri-o#3914, plugins#819: mappings are of both families unless they say otherwise, and that there is but
/// one is no fault.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_12_a_node_without_ipv6_forwards_ipv4() {
    on_each(&VARIANTS, &v4_only(bridge()), |site| {
        take_ipv6_away(site);
        let any = json!({"hostPort": 8081, "containerPort": 80, "hostIP": "::"});
        let mappings = [tcp(8080), udp(5353), any];
        let quiet = |verb: &str| {
            let output = site.node.ok(verb, &site.config(0, &mappings), &site.of(0, "c"));
            assert_eq!(output.stderr, "", "{:?} {verb}", site.node.variant);
        };
        let answers = || {
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.reaches(Transport::Udp, 5353, "pod-a");
            site.refuses(8081);
            let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
            let reply = site.ask(&site.lab.node, Transport::Tcp, localhost, 8080);
            assert_eq!(named(&reply), Ok("pod-a"), "{:?}", site.node.variant);
            let node = site.lab.node_address(Family::V4);
            let reply = site.ask(&site.pod(1).netns, Transport::Tcp, node, 8080);
            assert_eq!(named(&reply), Ok("pod-a"), "{:?}", site.node.variant);
        };
        let bare = with(site.node.config(json!([]), json!(null)), json!({"cniVersion": "1.1.0"}));
        site.node.ok("STATUS", &bare, &site.of(0, "c"));
        assert_eq!(findings(site), Vec::<String>::new(), "{:?}", site.node.variant);
        quiet("ADD");
        answers();
        quiet("CHECK");
        site.node.ok("STATUS", &bare, &site.of(0, "c"));
        let output = site.node.restore(false);
        assert!(output.stdout.contains("0 repaired"), "{}", output.stdout);
        assert_eq!(findings(site), Vec::<String>::new(), "{:?}", site.node.variant);

        site.flush_everything();
        let output = site.node.restore(false);
        assert!(output.stdout.contains("1 repaired"), "{}", output.stdout);
        answers();
        quiet("CHECK");
        quiet("DEL");
        site.refuses(8080);
        site.assert_clean();

        // And what the network's GC removes.
        quiet("ADD");
        let none = with(bare, json!({"cni.dev/valid-attachments": []}));
        let output = site.node.ok("GC", &none, &site.of(0, "c"));
        assert_eq!(output.stderr, "", "{:?}", site.node.variant);
        site.refuses(8080);
        site.assert_clean();
    });
}

/// The backend that is chosen is one that serves what there is.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_12_every_backend_is_chosen_without_ipv6() {
    on_each(&VARIANTS, &v4_only(bridge()), |site| {
        take_ipv6_away(site);
        let config = with(site.config(0, &[tcp(8080)]), json!({"backend": "auto"}));
        let output = site.node.ok("ADD", &config, &site.of(0, "c"));
        assert_eq!(output.stderr, "", "{:?}", site.node.variant);
        let records = std::fs::read_dir(site.node.state_dir.join("records")).unwrap();
        let record = std::fs::read_to_string(records.last().unwrap().unwrap().path()).unwrap();
        let backend = format!("\"backend\":\"{}\"", site.node.variant.backend());
        assert!(record.contains(&backend), "{:?}: {record}", site.node.variant);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.node.ok("DEL", &config, &site.of(0, "c"));
        site.assert_clean();
    });
}

/// Pods that came while the node had IPv6 go without it.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_12_ipv6_may_go_before_its_pods() {
    on_each(&VARIANTS, &bridge(), |site| {
        assert_eq!(site.lab.options.families.len(), 2, "the kernel has no IPv6 that could go");
        site.add(0, "c", &[tcp(8080)]);
        take_ipv6_away(site);
        let ip = site.lab.node_address(Family::V4);
        let answered = || {
            let reply = site.ask(&site.lab.client, Transport::Tcp, ip, 8080);
            named(&reply) == Ok("pod-a")
        };
        assert!(answered(), "{:?}", site.node.variant);
        // Of both pods and as before, whatever the node can do with it.
        site.add(1, "d", &[tcp(8081)]);
        assert!(answered(), "{:?}", site.node.variant);
        site.del(1, "d", &[tcp(8081)]);
        site.del(0, "c", &[tcp(8080)]);
        assert!(!answered(), "{:?}", site.node.variant);
        site.assert_clean();
    });
}
