//! The kernel's own answers, each test in a network namespace of its own, cross-checked with the
//! tools that people use.
//!
//! Run with `cargo test --test netlink -- --ignored`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking"
)]

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sched::{CloneFlags, unshare};
use portmap::model::{Family, Protocol};
use portmap::sys::netlink::conntrack;
use portmap::sys::netlink::nftables::{BaseChain, Chain, Element, NftFamily, NftReader};
use portmap::sys::netlink::nftkey::Key;
use portmap::sys::netlink::route::{self, DefaultRoute};
use portmap::sys::sysctl;

/// Runs `test` in a new network namespace with `lo` up. Only the thread enters it, and with it the
/// processes that it starts.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("root is needed");
        run("ip link set lo up");
        test();
    });
    thread.join().expect("the test failed");
}

/// Runs a command of words without spaces; a missing tool is a failure.
fn run(command: &str) -> String {
    fed(command, "")
}

fn fed(command: &str, input: &str) -> String {
    let mut words = command.split_whitespace();
    let mut child = Command::new(words.next().unwrap())
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Tracks a flow to `destination`:`port`.
fn track(protocol: &str, source: &str, destination: &str, port: u16, more: &str) {
    run(&format!(
        "conntrack -I -p {protocol} -s {source} -d {destination} \
         --sport 40000 --dport {port} -t 600 {more}"
    ));
}

fn tracked(family: &str) -> usize {
    run(&format!("conntrack -L -f {family}")).lines().count()
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn conntrack_entries_of_one_port_and_destination_go() {
    in_namespace(|| {
        track("udp", "192.0.2.9", "192.0.2.1", 8080, "");
        track("udp", "192.0.2.10", "192.0.2.1", 8080, "");
        track("udp", "192.0.2.9", "198.51.100.1", 8080, "");
        track("udp", "192.0.2.9", "192.0.2.1", 8081, "");
        track("tcp", "192.0.2.9", "192.0.2.1", 8080, "--state ESTABLISHED");
        track("udp", "2001:db8::9", "2001:db8::1", 8080, "");

        let local = "192.0.2.1".parse::<std::net::IpAddr>().unwrap();
        let udp = [(Protocol::Udp, 8080)];
        let delete = |ports: &[_]| {
            conntrack::delete(Family::V4, ports, |flow| {
                assert_eq!(flow.family, Family::V4);
                assert_eq!(flow.original.source, flow.reply.destination);
                flow.original.destination.ip() == local
            })
            .unwrap()
        };
        assert_eq!(delete(&udp), 2);
        assert_eq!(delete(&udp), 0);
        let left = run("conntrack -L -f ipv4");
        assert_eq!(left.lines().count(), 3, "{left}");
        assert!(
            !left.contains("udp      17 599 src=192.0.2.9 dst=192.0.2.1 sport=40000 dport=8080")
        );
        assert_eq!(tracked("ipv6"), 1);

        assert_eq!(delete(&[]), 0);
        // Two ports of one protocol, and two protocols: the other two forms of the request.
        track("udp", "192.0.2.9", "192.0.2.1", 8080, "");
        assert_eq!(delete(&[(Protocol::Udp, 8080), (Protocol::Udp, 8081)]), 2);
        assert_eq!(delete(&[(Protocol::Udp, 8080), (Protocol::Tcp, 8080)]), 1);
        assert_eq!(tracked("ipv4"), 1);
        assert_eq!(conntrack::delete(Family::V6, &udp, |_| true).unwrap(), 1);
        assert_eq!(tracked("ipv6"), 0);
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn conntrack_zones_and_sctp() {
    in_namespace(|| {
        track("udp", "192.0.2.9", "192.0.2.1", 53, "--zone 7");
        track("udp", "192.0.2.9", "192.0.2.1", 53, "--orig-zone 8");
        track("udp", "192.0.2.9", "192.0.2.1", 53, "--reply-zone 9");
        track(
            "sctp",
            "192.0.2.9",
            "192.0.2.1",
            53,
            "--state ESTABLISHED --orig-vtag 1 --reply-vtag 2",
        );
        assert_eq!(tracked("ipv4"), 4);
        let udp = [(Protocol::Udp, 53)];
        assert_eq!(conntrack::delete(Family::V4, &udp, |_| true).unwrap(), 3);
        let sctp = [(Protocol::Sctp, 53)];
        assert_eq!(conntrack::delete(Family::V4, &sctp, |_| true).unwrap(), 1);
        assert_eq!(tracked("ipv4"), 0);
    });
}

/// Fills the table with flows to 100 ports of two protocols, in one process.
fn fill(total: usize) {
    sysctl::write(&["net", "netfilter", "nf_conntrack_max"], "400000").ok();
    let mut input = String::new();
    for number in 0..total {
        let (a, b) = (number / 250 % 250, number % 250);
        input += &format!(
            "-I -p udp -s 10.{}.{a}.{b} -d 192.0.2.1 --sport 40000 --dport {} -t 600\n",
            number / 62_500,
            10_000 + number % 100
        );
    }
    fed("conntrack -R -", &input);
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn a_hundred_thousand_other_flows_cost_little() {
    in_namespace(|| {
        fill(100_000);
        for source in 1..=20 {
            track("udp", &format!("192.0.2.{source}"), "192.0.2.1", 53, "");
        }
        let before = run("conntrack -C");
        for ports in [
            &[(Protocol::Udp, 53)][..],
            &[(Protocol::Udp, 54), (Protocol::Udp, 55)],
            &[(Protocol::Udp, 54), (Protocol::Sctp, 54)],
        ] {
            let start = Instant::now();
            let deleted = conntrack::delete(Family::V4, ports, |_| true).unwrap();
            println!("{ports:?}: {deleted} of {} in {:?}", before.trim(), start.elapsed());
            assert_eq!(deleted, if ports.len() == 1 { 20 } else { 0 });
            assert!(start.elapsed().as_secs() < 5);
        }
        let start = Instant::now();
        run("conntrack -L -p udp --orig-port-dst 53");
        println!("conntrack -L of one port: {:?}", start.elapsed());
        assert_eq!(run("conntrack -C").trim(), "100000");
    });
}

const RULESET: &str = r#"
table inet t {
    map v4ip { type inet_proto . inet_service : ipv4_addr; }
    map v4port { type inet_proto . inet_service : inet_service; }
    map both {
        type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
        elements = { 127.0.0.1 . udp . 53 comment "dns" : 10.0.0.3 . 5353 }
    }
    map six {
        type ipv6_addr . inet_proto . inet_service : verdict
        elements = { 2001:db8::1 . sctp . 9 : jump pod }
    }
    map where { type inet_service : verdict; }
    set ports { type inet_service; elements = { 80 comment "web" } }
    chain pre {
        type nat hook prerouting priority dstnat + 1; policy accept;
        dnat ip to meta l4proto . th dport map @v4ip comment "first"
        counter
        th dport vmap @where comment "third, äöü \ and all"
    }
    chain out { type filter hook output priority -300; policy accept; }
    chain pod { }
    chain empty { }
}
table ip t { chain other { type nat hook postrouting priority srcnat; }; }
add element inet t v4ip { tcp . 8080 comment "pod-1" : 10.0.0.2 }
add element inet t v4port { tcp . 8080 : 80 }
add element inet t where { 443 comment "owner" : goto pod }
"#;

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn nftables_objects_are_read_back() {
    in_namespace(|| {
        fed("nft -f -", RULESET);
        let mut reader = NftReader::open().unwrap();
        assert!(reader.table_exists(NftFamily::Inet, "t").unwrap());
        assert!(reader.table_exists(NftFamily::Ip, "t").unwrap());
        assert!(!reader.table_exists(NftFamily::Ip6, "t").unwrap());
        assert!(!reader.table_exists(NftFamily::Inet, "none").unwrap());

        let base = |name: &str, hook, priority, kind: &str| Chain {
            name: name.into(),
            base: Some(BaseChain { hook, priority, kind: kind.into() }),
        };
        let plain = |name: &str| Chain { name: name.into(), base: None };
        let mut chains = reader.chains(NftFamily::Inet, "t").unwrap();
        chains.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(
            chains,
            [
                plain("empty"),
                base("out", 3, -300, "filter"),
                plain("pod"),
                base("pre", 0, -99, "nat")
            ]
        );
        assert_eq!(reader.chains(NftFamily::Ip, "t").unwrap(), [base("other", 4, 100, "nat")]);
        assert!(reader.chains(NftFamily::Inet, "none").unwrap().is_empty());
        for chain in chains {
            let one = reader.chain(NftFamily::Inet, "t", &chain.name).unwrap();
            assert_eq!(one, Some(chain));
        }
        assert_eq!(reader.chain(NftFamily::Inet, "t", "other").unwrap(), None);

        let comments = reader.rule_comments(NftFamily::Inet, "t", "pre").unwrap();
        let expected = [Some("first"), None, Some("third, äöü \\ and all")];
        assert_eq!(comments, expected.map(|comment| comment.map(str::to_owned)));
        for (table, chain) in [("t", "empty"), ("t", "none"), ("none", "pre")] {
            assert!(reader.rule_comments(NftFamily::Inet, table, chain).unwrap().is_empty());
        }
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn nftables_elements_are_read_back() {
    in_namespace(|| {
        fed("nft -f -", RULESET);
        let mut reader = NftReader::open().unwrap();
        let mut get =
            |set: &str, key: Key| reader.element(NftFamily::Inet, "t", set, &key.bytes()).unwrap();
        let local = Key::new().v4([127, 0, 0, 1].into());
        let six = Key::new().v6("2001:db8::1".parse().unwrap());
        assert_eq!(
            get("v4ip", Key::new().proto(6).port(8080)),
            Some(Element {
                data: Some(vec![10, 0, 0, 2]),
                goto: None,
                comment: Some("pod-1".into())
            })
        );
        assert_eq!(get("v4ip", Key::new().proto(17).port(8080)), None);
        let port = get("v4port", Key::new().proto(6).port(8080)).unwrap();
        assert_eq!(port.data, Some(Key::new().port(80).bytes()));
        let both = get("both", local.clone().proto(17).port(53)).unwrap();
        let target = Key::new().v4([10, 0, 0, 3].into()).port(5353);
        assert_eq!(both.data, Some(target.bytes()));
        assert_eq!(both.comment.as_deref(), Some("dns"));
        assert_eq!(get("both", local.proto(17).port(54)), None);
        assert_eq!(get("six", six.proto(132).port(9)).unwrap().goto.as_deref(), Some("pod"));
        let verdict = get("where", Key::new().port(443)).unwrap();
        assert_eq!((verdict.goto.as_deref(), verdict.data), (Some("pod"), None));
        assert_eq!(verdict.comment.as_deref(), Some("owner"));
        assert_eq!(get("ports", Key::new().port(80)).unwrap().comment.as_deref(), Some("web"));
        assert_eq!(get("ports", Key::new().port(81)), None);
        assert_eq!(get("none", Key::new().port(80)), None);

        let short = reader.element(NftFamily::Inet, "t", "v4ip", &[6, 0, 0, 0]);
        assert_eq!(short.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn ten_thousand_elements_do_not_slow_a_lookup() {
    in_namespace(|| {
        let key = |port: u16| Key::new().proto(6).port(port).bytes();
        let elements: Vec<String> = (1..=10_000)
            .map(|port| format!("tcp . {port} comment \"pod-{port}\" : 10.0.0.2"))
            .collect();
        let mut ruleset = format!(
            "table inet t {{\nmap m {{ type inet_proto . inet_service : ipv4_addr; elements = {{ {} }} }}\n",
            elements.join(", ")
        );
        for number in 0..1000 {
            ruleset += &format!("chain c{number} {{ counter comment \"of {number}\"; }}\n");
        }
        fed("nft -f -", &(ruleset + "}"));
        let mut reader = NftReader::open().unwrap();
        let keys: Vec<_> = (1..=10_001).map(key).collect();
        let start = Instant::now();
        let found = reader.elements(NftFamily::Inet, "t", "m", &keys).unwrap();
        println!("element: {:?} each", start.elapsed() / 10_001);
        assert_eq!(found.len(), 10_001);
        assert_eq!(found[9_999].as_ref().unwrap().comment.as_deref(), Some("pod-10000"));
        assert_eq!(found[10_000], None);
        let start = Instant::now();
        assert!(reader.chain(NftFamily::Inet, "t", "c500").unwrap().is_some());
        println!("one chain of 1000: {:?}", start.elapsed());
        let start = Instant::now();
        assert_eq!(reader.chains(NftFamily::Inet, "t").unwrap().len(), 1000);
        println!("1000 chains: {:?}", start.elapsed());
        let start = Instant::now();
        let comments = reader.rule_comments(NftFamily::Inet, "t", "c999").unwrap();
        println!("rules of one chain of 1000: {:?}", start.elapsed());
        assert_eq!(comments, [Some("of 999".to_owned())]);
        let start = Instant::now();
        run("nft get element inet t m { tcp . 5000 }");
        println!("nft get element: {:?}", start.elapsed());
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn links_addresses_and_routes() {
    in_namespace(|| {
        for command in [
            "link add br0 type bridge",
            "link add v0 type veth peer name v1",
            "link set v0 master br0 up",
            "link set v1 up",
            "link set br0 up",
            "addr add 192.0.2.1/24 dev br0",
            "addr add 198.51.100.1 peer 198.51.100.2/32 dev v1",
            "addr add 2001:db8::1/64 dev br0 nodad",
        ] {
            run(&format!("ip {command}"));
        }
        let links = route::links().unwrap();
        let named = |name: &str| links.iter().find(|link| link.name == name).unwrap();
        let (lo, bridge) = (named("lo"), named("br0").index);
        assert!(lo.loopback && lo.up && lo.kind.is_none() && lo.peer.is_none());
        let (v0, v1) = (named("v0"), named("v1"));
        assert_eq!((v0.kind.as_deref(), v0.master), (Some("veth"), Some(bridge)));
        assert_eq!((v0.peer, v1.peer), (Some(v1.index), Some(v0.index)));
        assert_eq!((v1.master, v1.up, v1.loopback), (None, true, false));
        assert_eq!(named("br0").kind.as_deref(), Some("bridge"));
        let listed = run("ip -o link").lines().count();
        assert_eq!(links.len(), listed);

        let addresses = route::addresses().unwrap();
        assert_eq!(addresses.len(), run("ip -o addr").lines().count());
        let with = |ip: &str| {
            let ip: std::net::IpAddr = ip.parse().unwrap();
            addresses.iter().find(|address| address.ip == ip)
        };
        let own = with("192.0.2.1").unwrap();
        assert_eq!((own.index, own.prefix, own.global), (bridge, 24, true));
        assert!(!with("127.0.0.1").unwrap().global);
        assert!(!with("::1").unwrap().global);
        assert!(with("2001:db8::1").unwrap().global);
        let own = with("198.51.100.1").unwrap();
        assert_eq!((own.index, own.prefix), (v1.index, 32));
        assert!(with("198.51.100.2").is_none());

        assert_eq!(route::default_routes().unwrap(), []);
        let towards = |ip: &str| route::device_towards(ip.parse().unwrap()).unwrap();
        assert_eq!(towards("203.0.113.1"), None);
        assert_eq!(towards("2001:db9::1"), None);
        assert_eq!(towards("192.0.2.77"), Some(bridge));
        assert_eq!(towards("2001:db8::77"), Some(bridge));
        assert_eq!(towards("192.0.2.1"), Some(lo.index));
        for kind in ["unreachable", "blackhole", "prohibit", "throw"] {
            for net in ["10.9.0.0/16", "2001:db9::/32"] {
                run(&format!("ip route add {kind} {net}"));
                assert_eq!(towards("10.9.0.1"), None, "{kind}");
                assert_eq!(towards("2001:db9::1"), None, "{kind}");
                run(&format!("ip route del {kind} {net}"));
            }
        }

        run("ip route add default nexthop via 192.0.2.2 nexthop via 198.51.100.2");
        run("ip -6 route add default via 2001:db8::2");
        run("ip route add default via 192.0.2.2 table 100");
        run("ip route add unreachable default metric 4000");
        let (v4, v6) = (Family::V4, Family::V6);
        assert_eq!(
            route::default_routes().unwrap(),
            [
                DefaultRoute { family: v4, index: bridge },
                DefaultRoute { family: v4, index: v1.index },
                DefaultRoute { family: v6, index: bridge },
            ]
        );
        run("ip -6 route del default");
        run("ip -6 route add default nexthop via 2001:db8::2 nexthop via fe80::2 dev v1");
        run("ip -4 route del default nexthop via 192.0.2.2 nexthop via 198.51.100.2");
        let routes = route::default_routes().unwrap();
        let mut devices: Vec<_> = routes.iter().map(|route| route.index).collect();
        devices.sort_unstable();
        let mut expected = [bridge, v1.index];
        expected.sort_unstable();
        assert_eq!(devices, expected);
        assert!(routes.iter().all(|route| route.family == v6));
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn sysctls_of_devices_with_dots() {
    in_namespace(|| {
        run("ip link add d.0 type veth");
        let key = ["net", "ipv4", "conf", "d.0", "route_localnet"];
        assert_eq!(sysctl::read(&key).unwrap(), "0");
        sysctl::write(&key, "1").unwrap();
        assert_eq!(sysctl::read(&key).unwrap(), "1");
        assert_eq!(run("sysctl -n net/ipv4/conf/d.0/route_localnet").trim(), "1");
        let refused = sysctl::write(&key, "nonsense").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
        let missing = sysctl::write(&["net", "ipv4", "conf", "gone", "route_localnet"], "1");
        assert_eq!(missing.unwrap_err().kind(), std::io::ErrorKind::NotFound);
    });
}
