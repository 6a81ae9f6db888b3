//! Proves the laboratory that other privileged tests and `portmap demo` stand on.
//!
//! Run as root: `cargo test --test lab -- --ignored`.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use portmap::demo::netns::Netns;
use portmap::demo::plugin::{self, Attachment};
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::demo::traffic::{Call, Failure, Reply, Session, Transport, reach};
use portmap::demo::{self, DemoOptions};
use portmap::model::Family;
use serde_json::json;

const SHAPES: [Shape; 4] = [Shape::Cilium, Shape::Ptp, Shape::Bridge, Shape::Mixed];
const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected];
const TIMEOUT: Duration = Duration::from_millis(1500);
/// The distribution's copy of the plugin that this one is compatible with.
const UPSTREAM: &str = "/usr/lib/cni/portmap";

fn call(from: &Netns, transport: Transport, target: SocketAddr) -> Result<Reply, Failure> {
    reach(from, Call::new(transport, target, TIMEOUT))
}

fn assert_direct_paths(options: Options) {
    let lab = Lab::build(options).unwrap();
    let servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[80]).unwrap()).collect();
    let outside = Servers::start(&lab.client, "client", &[80], &[80]).unwrap();
    for family in &lab.options.families {
        let address = |number: usize| lab.pods[number].address(*family).unwrap();
        let client = lab.client_address(*family);
        for transport in TRANSPORTS {
            for (from, source, server, target) in [
                (&lab.client, client, "pod-a", address(0)),
                (&lab.pods[1].netns, address(1), "pod-a", address(0)),
                (&lab.pods[0].netns, address(0), "pod-b", address(1)),
                (&lab.pods[0].netns, address(0), "client", client),
            ] {
                let reply = call(from, transport, SocketAddr::new(target, 80));
                let reply = reply.unwrap_or_else(|failure| {
                    panic!(
                        "{:?}: {} to {server} by {transport}: {failure}",
                        lab.options,
                        from.name()
                    )
                });
                assert_eq!((reply.server.as_str(), reply.seen.ip()), (server, source));
            }
            // The second address of the node is the node's: nothing listens there.
            let second = SocketAddr::new(lab.second_node_address(*family), 80);
            if transport != Transport::UdpUnconnected {
                let refused = call(&lab.client, transport, second);
                assert_eq!(refused, Err(Failure::Refused), "{transport} to {second}");
            }
        }
    }
    drop((servers, outside));
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn every_shape_connects_client_and_pods() {
    for shape in SHAPES {
        assert_direct_paths(Options::new(shape));
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn one_family_alone_works() {
    for shape in SHAPES {
        for family in Family::ALL {
            let mut options = Options::new(shape);
            options.families = vec![family];
            assert_direct_paths(options);
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn bypass_keeps_direct_paths() {
    for shape in [Shape::Cilium, Shape::Ptp] {
        let mut options = Options::new(shape);
        options.bypass = true;
        options.pods = 3;
        assert_direct_paths(options);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_session_goes_on_until_its_server_ends() {
    let lab = Lab::build(Options::new(Shape::Cilium)).unwrap();
    let servers = lab.pods[0].serve(&[80], &[]).unwrap();
    let target = SocketAddr::new(lab.pods[0].address(Family::V4).unwrap(), 80);
    let mut session =
        Session::open(&lab.client, Call::new(Transport::Tcp, target, TIMEOUT)).unwrap();
    assert_eq!(session.ask().unwrap(), session.ask().unwrap());
    drop(servers);
    let started = std::time::Instant::now();
    while session.ask().is_ok() {
        assert!(started.elapsed() < Duration::from_secs(10), "it goes on");
    }
    assert_eq!(call(&lab.client, Transport::Tcp, target), Err(Failure::Refused));
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_namespace_is_separate_and_vanishes() {
    let here = std::fs::read_link("/proc/self/ns/net").unwrap();
    let netns = Netns::with_private_bpffs("throw-away").unwrap();
    let there = netns.run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    assert_ne!(here, there);
    assert_eq!(here, std::fs::read_link("/proc/self/ns/net").unwrap());
    let mut command = std::process::Command::new("readlink");
    let output = plugin::run(command.arg("/proc/self/ns/net"), b"", &netns).unwrap();
    assert_eq!(output.stdout.trim(), there.to_str().unwrap());
    let seen_by_others = std::fs::metadata(netns.path()).unwrap();
    assert_eq!(
        format!("net:[{}]", std::os::unix::fs::MetadataExt::ino(&seen_by_others)),
        there.to_str().unwrap()
    );
    if Path::new("/sys/fs/bpf").is_dir() {
        // Kernels with preloaded iterators put two read-only files into every bpffs.
        let foreign = netns.run(|| {
            let entries = std::fs::read_dir("/sys/fs/bpf").unwrap();
            entries.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
        });
        assert_eq!(foreign.unwrap(), 0, "the private bpffs starts empty");
    }
    // The path is no witness: other tests of this process open descriptors, and get the number that
    // is free. A link goes with its namespace (in a work queue of the kernel), and takes its peer.
    let remains = Netns::new("remains").unwrap();
    let path = netns.path();
    let mut link = std::process::Command::new("ip");
    link.args(["link", "add", "pm-here", "type", "veth", "peer", "name", "pm-there", "netns"]);
    let made = plugin::run(link.arg(path), b"", &remains).unwrap();
    assert!(made.success(), "{made:?}");
    let is_there = || {
        let devices = remains.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        devices.unwrap().contains("pm-here")
    };
    assert!(is_there());
    drop(netns);
    let started = std::time::Instant::now();
    while is_there() {
        assert!(started.elapsed() < Duration::from_secs(10), "the namespace did not vanish");
        std::thread::sleep(Duration::from_millis(20));
    }
}

type FromNeighbourAndOutside = [Result<Reply, Failure>; 2];

/// What pod-b and the client get from the node's hostPort under upstream's plugin. With
/// `masquerade_all`, every translated connection is given the node's address as its source, which is
/// what newer upstreams do for `masqAll` (the distribution's does not know that option).
fn upstream(
    bypass: bool,
    masquerade_all: bool,
) -> Vec<(Family, Transport, FromNeighbourAndOutside)> {
    let mut options = Options::new(Shape::Cilium);
    options.bypass = bypass;
    let lab = Lab::build(options).unwrap();
    let servers = lab.pods[0].serve(&[80], &[80]).unwrap();
    let attachment = Attachment::of(&lab.pods[0], "lab");
    let config = json!({
        "cniVersion": "1.0.0",
        "name": "portmap",
        "type": "portmap",
        "runtimeConfig": {"portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 8080, "containerPort": 80, "protocol": "udp"},
        ]},
        "prevResult": lab.prev_result(&lab.pods[0], "1.0.0"),
    });
    let added = plugin::invoke(Path::new(UPSTREAM), "ADD", &config, &attachment, &lab.node);
    let added = added.expect("upstream's portmap is installed");
    assert!(added.success(), "{}", added.reason());
    if masquerade_all {
        for tool in ["iptables", "ip6tables"] {
            let mut rule = std::process::Command::new(tool);
            rule.args("-t nat -A POSTROUTING -m conntrack --ctstate DNAT -j MASQUERADE".split(' '));
            let output = plugin::run(&mut rule, b"", &lab.node).unwrap();
            assert!(output.success(), "{}", output.reason());
        }
    }
    let mut results = Vec::new();
    for family in lab.options.families.clone() {
        for transport in TRANSPORTS {
            let target = lab.node_socket(family, 8080);
            let neighbour = call(&lab.pods[1].netns, transport, target);
            let outside = call(&lab.client, transport, target);
            if let Ok(reply) = &outside {
                let kept = reply.seen.ip() == lab.client_address(family);
                assert_eq!(kept, !masquerade_all);
            }
            results.push((family, transport, [neighbour, outside]));
        }
    }
    drop(servers);
    results
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn without_bypass_a_neighbour_reaches_upstreams_host_port() {
    for (family, transport, results) in upstream(false, false) {
        for result in results {
            assert!(result.is_ok(), "{family} {transport}: {result:?}");
        }
    }
}

/// cilium#9784: the reply goes past the node's connection tracking, so it arrives from an address
/// that the caller had not called.
#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn bypass_makes_a_neighbour_time_out_on_upstreams_host_port() {
    for (family, transport, [neighbour, outside]) in upstream(true, false) {
        assert!(outside.is_ok(), "{family} {transport}: {outside:?}");
        let expected = match transport {
            Transport::Tcp | Transport::Udp => matches!(neighbour, Err(Failure::TimedOut)),
            Transport::UdpUnconnected => matches!(neighbour, Err(Failure::WrongSource(_))),
        };
        assert!(expected, "{family} {transport}: {neighbour:?}");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn masquerading_everything_mends_the_bypass() {
    for (family, transport, results) in upstream(true, true) {
        for result in results {
            assert!(result.is_ok(), "{family} {transport}: {result:?}");
        }
    }
}

/// The demonstration tells the truth about a plugin that leaves its chains behind.
#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap and iptables"]
fn the_demonstration_finds_fault_with_upstream() {
    let options = DemoOptions { backend: None, plugin: UPSTREAM.into() };
    let mut report = Vec::new();
    let held = demo::run(&options, &mut report).unwrap();
    let report = String::from_utf8(report).unwrap();
    assert!(!held, "{report}");
    for line in [
        "ok      ADD pod-a",
        "ok      DEL pod-b",
        // The distribution's CHECK compares IPv6 rules with the IPv4 address.
        "FAILED  CHECK pod-a",
        "left: :CNI-HOSTPORT-DNAT -",
        "ok      no record is left",
    ] {
        assert!(report.contains(line), "no {line:?} in:\n{report}");
    }
    // cilium#9784, on the path that it is about.
    let neighbour = report.lines().find(|line| line.contains("other pod (pod-b)"));
    assert!(neighbour.unwrap().ends_with("FAILED"), "{report}");
    if std::env::var_os("SHOW_DEMO").is_some() {
        std::io::Write::write_all(&mut std::io::stderr(), report.as_bytes()).unwrap();
    }
}
