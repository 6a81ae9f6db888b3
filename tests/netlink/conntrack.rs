use std::time::Instant;

use portmap::model::{Family, Protocol};
use portmap::sys::netlink::conntrack;

use crate::{fed, in_namespace, run};

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
        track("udp", "192.0.2.9", "192.0.2.1", 8080, "");
        assert_eq!(delete(&[(Protocol::Udp, 8080), (Protocol::Udp, 8081)]), 2);
        assert_eq!(delete(&[(Protocol::Udp, 8080), (Protocol::Tcp, 8080)]), 1);
        assert_eq!(tracked("ipv4"), 1);
        // Many ports, of one protocol and of two, take the other two forms of the request.
        track("udp", "192.0.2.9", "192.0.2.1", 8080, "");
        let mut many: Vec<_> = (8000..8100).map(|port| (Protocol::Udp, port)).collect();
        assert_eq!(delete(&many), 1);
        track("udp", "192.0.2.9", "192.0.2.1", 8080, "");
        many.push((Protocol::Sctp, 8080));
        assert_eq!(delete(&many), 1);
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

/// Fills the table with UDP flows to 100 ports, in one process.
fn fill(total: usize) {
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
    // The node's limit (nf_conntrack_max) must allow as many.
    assert_eq!(run("conntrack -C").trim(), total.to_string());
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
        let many: Vec<_> = (1..=20).map(|port| (Protocol::Udp, port)).collect();
        let mut mixed = many.clone();
        mixed.push((Protocol::Sctp, 1));
        let mut times = Vec::new();
        for (name, ports, expected) in [
            ("one port", &[(Protocol::Udp, 53)][..], 20),
            ("two ports", &[(Protocol::Udp, 54), (Protocol::Sctp, 54)], 0),
            ("20 ports", &many, 0),
            ("20 ports of two protocols", &mixed, 0),
        ] {
            let start = Instant::now();
            let deleted = conntrack::delete(Family::V4, ports, |_| true).unwrap();
            times.push(start.elapsed());
            println!("{name}: {:?}", start.elapsed());
            assert_eq!(deleted, expected, "{name} of {before}");
            assert!(start.elapsed().as_secs() < 5, "{name}");
        }
        // Else the kernel's filter is not in use.
        assert!(times[0] * 2 < times[3], "{times:?}");
        let start = Instant::now();
        run("conntrack -L -p udp --orig-port-dst 53");
        println!("conntrack -L of one port: {:?}", start.elapsed());
        assert_eq!(run("conntrack -C").trim(), "100000");
    });
}
