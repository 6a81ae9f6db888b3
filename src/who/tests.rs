#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use super::evidence::{Listener, Service};
use super::*;
use crate::inventory::{Attached, Inventory};
use crate::record::Record;
use crate::record::samples::record;
use crate::sys::iptables::Variant;
use crate::sys::netlink::socket_diag::Waiting;

const NODE: &str = "192.0.2.1";

fn tcp(family: Family, address: Option<&str>) -> Claim {
    let address = address.map(|ip| ip.parse().unwrap());
    Claim { family, protocol: Protocol::Tcp, address, port: 80 }
}

fn evidence() -> Evidence {
    let local = [NODE, "127.0.0.1", "::1"].map(|ip| ip.parse().unwrap()).into();
    Evidence { local, ..Evidence::default() }
}

fn nat(chain: &str, rules: &str) -> (Family, Variant, crate::backend::iptables::listing::Listing) {
    let text = format!(
        "-N CNI-HOSTPORT-DNAT\n-N {chain}\n{rules}-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT\n"
    );
    (Family::V4, Variant::Nft, crate::backend::iptables::listing::Listing::parse(&text))
}

const NODE_PORT: &str = "-N KUBE-NODEPORTS\n-A PREROUTING -j KUBE-NODEPORTS\n-A KUBE-NODEPORTS -p tcp -m comment --comment \"a/b\" -m tcp --dport 80 -j DNAT --to-destination 10.9.9.9:80\n";

/// What is said of a call, from outside and from the node, and whether a hostPort answers.
fn said(
    records: &[Record],
    problems: &[&str],
    evidence: &Evidence,
    call: Claim,
) -> (String, String, bool) {
    let attached = |record: &Record| Attached {
        record: record.clone(),
        alive: !record.netns.contains("gone"),
        problems: Some(problems.iter().map(|text| (*text).to_owned()).collect()),
    };
    let inventory =
        Inventory { attached: records.iter().map(attached).collect(), ..Inventory::default() };
    let records = inventory.records();
    let entries = inventory.entries(&records);
    let steps = vec![Step { place: "cgroup /".into(), what: String::new(), found: true }];
    let answer = judge(call, &entries, &[], evidence, steps).unwrap();
    (answer.outside, answer.node, answer.answered)
}

fn pod(backend: BackendKind) -> Record {
    let mut record = record("a", &["10.0.0.2/24"], &["tcp 80 8080"], backend, 1);
    record.localnet_device = Some("cni0".into());
    record
}

#[test]
fn a_port_is_a_number_and_perhaps_a_protocol() {
    assert_eq!("8080".parse(), Ok(Port { number: 8080, protocol: None }));
    assert_eq!("53/UDP".parse(), Ok(Port { number: 53, protocol: Some(Protocol::Udp) }));
    for bad in ["", "0", "70000", "x", "80/", "80/icmp", "80/tcp/udp"] {
        assert!(bad.parse::<Port>().is_err(), "{bad}");
    }
}

#[test]
fn calls_are_asked_for_every_address_that_is_claimed() {
    let record =
        record("a", &["10.0.0.2/24"], &["tcp 80 1 192.0.2.1", "tcp 81 1"], BackendKind::Ebpf, 1);
    let inventory = Inventory {
        attached: vec![Attached { record: record.clone(), alive: true, problems: None }],
        ..Inventory::default()
    };
    let records = [record];
    let entries = inventory.entries(&records);
    let asked = |port: &str, ip: Option<&str>| -> Vec<String> {
        let ip = ip.map(|ip| ip.parse().unwrap());
        calls(port.parse().unwrap(), ip, &entries, &[]).iter().map(ToString::to_string).collect()
    };
    assert_eq!(asked("80/tcp", None), ["tcp 0.0.0.0:80", "tcp 192.0.2.1:80", "tcp [::]:80"]);
    assert_eq!(asked("80/tcp", Some("192.0.2.7")), ["tcp 192.0.2.7:80"]);
    assert_eq!(asked("80/udp", Some("::")), ["udp [::]:80"]);
    assert_eq!(asked("80", Some("::1")).len(), 3);
}

#[test]
fn a_claim_answers_unless_it_is_broken_or_its_container_gone() {
    let any = tcp(Family::V4, None);
    let (outside, node, answered) = said(&[pod(BackendKind::Nftables)], &[], &evidence(), any);
    assert_eq!(outside, "goes to 10.0.0.2:8080 of a");
    assert_eq!(node, "goes to 10.0.0.2:8080 of a; by 127.0.0.1 as well");
    assert!(answered);
    let (outside, _, answered) = said(&[pod(BackendKind::Nftables)], &["x"], &evidence(), any);
    assert!(outside.contains("portmap restore") && !answered, "{outside}");
    let dead = Record { netns: "/gone".into(), ..pod(BackendKind::Nftables) };
    let (outside, _, answered) = said(&[dead], &[], &evidence(), any);
    assert!(outside.contains("portmap gc") && !answered, "{outside}");
}

#[test]
fn a_service_is_met_before_rules_and_behind_programs() {
    let any = tcp(Family::V4, None);
    let fate = |backend: BackendKind| {
        let record = pod(backend);
        let evidence = Evidence { nat: vec![nat(&record.chain, NODE_PORT)], ..evidence() };
        let (outside, _, answered) = said(&[record], &[], &evidence, any);
        (outside, answered)
    };
    let service = ("goes to the NodePort of a Service (a/b)".to_owned(), false);
    assert_eq!(fate(BackendKind::Iptables), service);
    assert_eq!(fate(BackendKind::Nftables), service);
    assert_eq!(fate(BackendKind::Ebpf), ("goes to 10.0.0.2:8080 of a".to_owned(), true));
}

#[test]
fn a_service_in_the_other_variant_s_table_may_be_met_first() {
    let record = pod(BackendKind::Iptables);
    let evidence = Evidence { nat: vec![nat("OTHER", NODE_PORT)], ..evidence() };
    let (outside, _, answered) = said(&[record], &[], &evidence, tcp(Family::V4, None));
    assert_eq!(
        outside,
        "goes to 10.0.0.2:8080 of a, unless the NodePort of a Service (a/b) takes it before"
    );
    assert!(answered);
}

/// kube-proxy in IPVS mode: an ACCEPT ends the way through its own table, and no other one's.
#[test]
fn what_another_table_spares_is_forwarded() {
    const SPARED: &str =
        "-N KUBE-SERVICES\n-A PREROUTING -j KUBE-SERVICES\n-A KUBE-SERVICES -j ACCEPT\n";
    let fate = |backend, chain| {
        let evidence = Evidence { nat: vec![nat(chain, SPARED)], ..evidence() };
        said(&[pod(backend)], &[], &evidence, tcp(Family::V4, None)).0
    };
    let own = pod(BackendKind::Iptables).chain;
    assert_eq!(fate(BackendKind::Iptables, &own), "goes to a Service");
    assert_eq!(fate(BackendKind::Iptables, "OTHER"), "goes to 10.0.0.2:8080 of a");
    assert_eq!(fate(BackendKind::Nftables, "OTHER"), "goes to 10.0.0.2:8080 of a");
    // What stands behind it is not met, and a rule that spares some packets leaves the others.
    let behind = |first: &str| {
        let rules = format!("-A PREROUTING {first}-j ACCEPT\n{NODE_PORT}");
        let evidence = Evidence { nat: vec![nat("OTHER", &rules)], ..evidence() };
        said(&[pod(BackendKind::Nftables)], &[], &evidence, tcp(Family::V4, None)).0
    };
    assert_eq!(behind(""), "goes to 10.0.0.2:8080 of a");
    assert_eq!(behind("-m set --match-set x dst "), "goes to the NodePort of a Service (a/b)");
}

#[test]
fn an_address_may_be_the_node_s_by_a_route_alone() {
    let call = tcp(Family::V4, Some("203.0.113.5"));
    for backend in BackendKind::ALL {
        let (outside, node, answered) = said(&[pod(backend)], &[], &evidence(), call);
        assert!(outside.ends_with("is not an address of this node") && !answered, "{outside}");
        assert_eq!(node, outside);
        let routed = ["203.0.113.5".parse().unwrap()].into();
        let evidence = Evidence { routed, ..evidence() };
        let (outside, node, answered) = said(&[pod(backend)], &[], &evidence, call);
        assert_eq!((outside.as_str(), answered), ("goes to 10.0.0.2:8080 of a", true));
        assert_eq!(node == outside, backend != BackendKind::Ebpf, "{node}");
    }
}

#[test]
fn link_local_addresses_are_nothing_to_ebpf() {
    let ip: IpAddr = "169.254.7.1".parse().unwrap();
    let mut evidence = evidence();
    evidence.local.insert(ip);
    let call = tcp(Family::V4, Some("169.254.7.1"));
    let (outside, node, answered) = said(&[pod(BackendKind::Ebpf)], &[], &evidence, call);
    assert!(outside.contains("eBPF takes no link-local") && !answered, "{outside}");
    assert_eq!(node, "goes to 10.0.0.2:8080 of a");
    assert!(said(&[pod(BackendKind::Nftables)], &[], &evidence, call).2);
    // The list of the node's addresses has none of IPv6.
    let ip: IpAddr = "fe80::1".parse().unwrap();
    let evidence = Evidence { routed: [ip].into(), ..super::tests::evidence() };
    let mut dual = pod(BackendKind::Ebpf);
    dual.addresses.push("fd00::2/64".parse().unwrap());
    let (outside, node, answered) = said(&[dual], &[], &evidence, tcp(Family::V6, Some("fe80::1")));
    assert!(outside.contains("eBPF takes no link-local") && !answered, "{outside}");
    assert_eq!(node, outside);
}

#[test]
fn kube_proxy_s_table_is_ordered_by_priority() {
    let fate = |backend, priority| {
        let service = Service {
            family: Family::V4,
            protocol: Protocol::Tcp,
            chain: "external-X-a/b".into(),
            addresses: [NODE.parse().unwrap()].into(),
            priority,
        };
        let evidence = Evidence { services: vec![service], ..evidence() };
        said(&[pod(backend)], &[], &evidence, tcp(Family::V4, None)).0
    };
    assert!(fate(BackendKind::Nftables, -100).starts_with("goes to the NodePort"));
    assert!(fate(BackendKind::Iptables, -100).contains("unless"));
    assert_eq!(fate(BackendKind::Ebpf, -200), "goes to 10.0.0.2:8080 of a");
}

#[test]
fn a_process_is_reached_where_nothing_is_forwarded() {
    let socket = Waiting { addresses: vec!["0.0.0.0".parse().unwrap()], v6only: false, inode: 1 };
    let listener = Listener {
        protocol: Protocol::Tcp,
        socket,
        processes: [crate::sys::process::Process { pid: 7, name: "nginx".into() }].into(),
    };
    let evidence = Evidence { listeners: vec![listener], ..evidence() };
    let any = tcp(Family::V4, None);
    let (outside, node, answered) = said(&[], &[], &evidence, any);
    assert_eq!((outside.as_str(), &node), ("reaches nginx (pid 7) on 0.0.0.0:80", &outside));
    assert!(!answered);
    let (outside, _, answered) = said(&[pod(BackendKind::Ebpf)], &[], &evidence, any);
    assert_eq!((outside.as_str(), answered), ("goes to 10.0.0.2:8080 of a", true));
    // Without masquerading nobody is forwarded from 127.0.0.1.
    let mut unmasqueraded = pod(BackendKind::Nftables);
    unmasqueraded.options.no_snat = true;
    let (_, node, answered) =
        said(&[unmasqueraded], &[], &evidence, tcp(Family::V4, Some("127.0.0.1")));
    assert_eq!(
        node,
        "reaches nginx (pid 7) on 0.0.0.0:80: connections to the loopback address are not forwarded"
    );
    assert!(!answered);
}

#[test]
fn an_address_of_somebody_else_is_not_forwarded() {
    let (outside, node, answered) =
        said(&[pod(BackendKind::Ebpf)], &[], &evidence(), tcp(Family::V4, Some("203.0.113.9")));
    assert_eq!(outside, "is not forwarded: 203.0.113.9 is not an address of this node");
    assert_eq!((node, answered), (outside, false));
}

#[test]
fn nobody_has_nothing_to_say() {
    assert!(judge(tcp(Family::V4, None), &[], &[], &evidence(), Vec::new()).is_none());
}
