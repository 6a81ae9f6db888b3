//! Many calls at once: runtimes start and stop pods concurrently, and go-cni calls the networks of
//! one container at the same time.
//!
//! Run as root: `cargo test --test parallel -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

mod support;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use portmap::demo::plugin::{Attachment, Output};
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::demo::traffic::{Call, Failure, Transport, reach};
use portmap::model::Family;
use serde_json::{Value, json};
use support::ending::Ending;
use support::{Node, PORTMAP, VARIANTS, Variant, attachment, ebpf, prev_result};

const PODS: usize = 50;
const FIRST_PORT: u16 = 20_000;
/// The pods that are called.
const SAMPLE: [usize; 12] = [0, 1, 5, 10, 15, 24, 25, 30, 35, 40, 45, 49];
/// Long enough for a busy machine; a refusal comes back at once.
const TIMEOUT: Duration = Duration::from_secs(5);

fn lab(pods: usize) -> Lab {
    let lab = Lab::build(Options { pods, ..Options::new(Shape::Cilium) }).unwrap();
    // Every closed UDP port is refused, not some of them in a second.
    let unlimited = || {
        std::fs::write("/proc/sys/net/ipv4/icmp_ratemask", "0").unwrap();
        std::fs::write("/proc/sys/net/ipv6/icmp/ratelimit", "0").unwrap();
    };
    lab.node.run(unlimited).unwrap();
    lab
}

fn port(pod: usize) -> u16 {
    FIRST_PORT + u16::try_from(pod).unwrap()
}

fn config(lab: &Lab, node: &Node, pod: usize) -> Value {
    let mappings = json!([
        {"hostPort": port(pod), "containerPort": 80, "protocol": "tcp"},
        {"hostPort": port(pod), "containerPort": 53, "protocol": "udp"},
    ]);
    node.config(mappings, prev_result(lab, pod, &node.cni_version))
}

fn key(lab: &Lab, pod: usize) -> Attachment {
    attachment(&lab.pods[pod], &format!("c{pod}"))
}

/// Does all of it at the same moment, and fails the test unless all succeed.
fn at_once<T: Send + Sync>(node: &Node, all: &[T], call: impl Fn(&T) -> Output + Sync) {
    let barrier = Barrier::new(all.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter()
            .map(|one| {
                scope.spawn(|| {
                    barrier.wait();
                    call(one)
                })
            })
            .collect();
        for thread in threads {
            let output = thread.join().unwrap();
            assert!(output.success(), "{:?}: {}", node.variant, output.reason());
        }
    });
}

/// One verb for many pods at once.
fn every(lab: &Lab, node: &Node, verb: &str, pods: std::ops::Range<usize>) {
    all_at_once(lab, node, &pods.map(|pod| (verb, pod)).collect::<Vec<_>>());
}

/// Calls of several kinds at once.
fn all_at_once(lab: &Lab, node: &Node, calls: &[(&str, usize)]) {
    at_once(node, calls, |(verb, pod)| {
        node.call(PORTMAP, verb, &config(lab, node, *pod), &key(lab, *pod))
    });
}

fn serve(lab: &Lab, pods: impl IntoIterator<Item = usize>) -> Vec<Servers> {
    pods.into_iter().map(|pod| lab.pods[pod].serve(&[80], &[53]).unwrap()).collect()
}

fn assert_forwards(lab: &Lab, node: &Node, pod: usize) {
    for family in &lab.options.families {
        let target = lab.node_socket(*family, port(pod));
        for transport in [Transport::Tcp, Transport::Udp] {
            let reply = reach(&lab.client, Call::new(transport, target, TIMEOUT));
            let reply = reply.unwrap_or_else(|failure| {
                panic!("{:?}: {transport} {target}: {failure}", node.variant)
            });
            assert_eq!(reply.server, lab.pods[pod].name, "{:?} {transport}", node.variant);
        }
    }
}

fn assert_closed(lab: &Lab, node: &Node, pod: usize) {
    for family in &lab.options.families {
        let target = lab.node_socket(*family, port(pod));
        for transport in [Transport::Tcp, Transport::Udp] {
            let reply = reach(&lab.client, Call::new(transport, target, TIMEOUT));
            assert_eq!(reply, Err(Failure::Refused), "{:?}: {transport} {target}", node.variant);
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn fifty_adds_then_fifty_dels_leave_nothing() {
    let lab = lab(PODS);
    let servers = serve(&lab, SAMPLE);
    for variant in VARIANTS {
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        // From a bare start: eBPF programs are loaded by whoever comes first.
        every(&lab, &node, "ADD", 0..PODS);
        SAMPLE.into_iter().for_each(|pod| assert_forwards(&lab, &node, pod));
        every(&lab, &node, "CHECK", 0..PODS);
        assert_rules_of_all(&lab, &node);
        let hooks = ebpf::hooks(&lab.node);
        every(&lab, &node, "DEL", 0..PODS);
        SAMPLE.into_iter().for_each(|pod| assert_closed(&lab, &node, pod));
        node.assert_clean(&before);
        assert_eq!(ebpf::hooks(&lab.node), hooks);
        assert_only_addresses(&ebpf::entries(&lab.node));
        mix(&lab, &node);
        node.assert_clean(&before);
    }
    drop(servers);
}

/// 25 come while 25 go, and back.
fn mix(lab: &Lab, node: &Node) {
    let halves: [Vec<usize>; 2] = [(0..PODS / 2).collect(), (PODS / 2..PODS).collect()];
    every(lab, node, "ADD", 0..PODS / 2);
    for round in 0..2 {
        let (old, new) = (&halves[round % 2], &halves[(round + 1) % 2]);
        // Interleaved, so that both kinds wait for the lock side by side.
        let calls: Vec<_> =
            old.iter().zip(new).flat_map(|(old, new)| [("DEL", *old), ("ADD", *new)]).collect();
        all_at_once(lab, node, &calls);
        for pod in SAMPLE {
            match new.contains(&pod) {
                true => {
                    assert_forwards(lab, node, pod);
                    node.ok("CHECK", &config(lab, node, pod), &key(lab, pod));
                }
                false => assert_closed(lab, node, pod),
            }
        }
    }
    // Twice each, as runtimes do.
    let calls: Vec<_> = (0..PODS / 2).flat_map(|pod| [("DEL", pod), ("DEL", pod)]).collect();
    all_at_once(lab, node, &calls);
}

/// What is left of eBPF in the maps after the last pod is what they know of the node.
fn assert_only_addresses(entries: &[String]) {
    let of_pods = |entry: &&String| !entry.starts_with("pm_addresses ");
    assert_eq!(entries.iter().find(of_pods), None);
}

/// CHECK is the plugin's own word; this is the kernel's.
fn assert_rules_of_all(lab: &Lab, node: &Node) {
    let listing = match node.variant {
        Variant::Ebpf => return assert_entries_of_all(lab),
        Variant::Nftables => node.shell("nft list table inet portmap"),
        _ => node.shell("iptables-save -t nat; ip6tables-save -t nat"),
    };
    for pod in 0..PODS {
        for family in &lab.options.families {
            let address = lab.pods[pod].address(*family).unwrap();
            assert!(listing.contains(&address.to_string()), "{address} is in no rule:\n{listing}");
        }
        assert!(listing.contains(&port(pod).to_string()), "{} is in no rule", port(pod));
    }
}

/// Two claims and the two pods behind them in each family, and one program at each hook.
fn assert_entries_of_all(lab: &Lab) {
    let entries = ebpf::entries(&lab.node);
    let claims = entries.iter().filter(|entry| entry.starts_with("pm_claims "));
    assert_eq!(claims.count(), PODS * 4 * lab.options.families.len());
    let hooks = ebpf::hooks(&lab.node);
    let distinct: std::collections::BTreeSet<&String> = hooks.iter().collect();
    assert_eq!(hooks.len(), distinct.len(), "{hooks:#?}");
    // Qdiscs are listed too, and are no hooks.
    let at = |device: &str| {
        hooks.iter().filter(|hook| hook.starts_with(device) && !hook.ends_with(" clsact")).count()
    };
    for pod in &lab.pods {
        assert_eq!(at(&format!("{} ", pod.host_link)), 2, "{hooks:#?}");
    }
    assert_eq!((at("eth0 "), at("/ ")), (2, 8), "{hooks:#?}");
}

/// The second network of a pod: another name and interface, the same mappings and, here, address.
fn other_network(lab: &Lab, node: &Node, pod: usize, number: usize) -> (Value, Attachment) {
    let mut config = config(lab, node, pod);
    let mut attachment = key(lab, pod);
    attachment.ifname = format!("eth{number}");
    config["name"] = json!(format!("net-{number}"));
    config["prevResult"]["interfaces"][1]["name"] = json!(attachment.ifname);
    (config, attachment)
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_networks_of_one_container_may_be_called_at_once() {
    let lab = lab(3);
    let servers = serve(&lab, 0..3);
    for variant in VARIANTS {
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let all: Vec<_> = (0..3)
            .flat_map(|pod| (0..2).map(move |number| (pod, number)))
            .map(|(pod, number)| other_network(&lab, &node, pod, number))
            .collect();
        let every = |verb: &str, calls: &[(Value, Attachment)]| {
            at_once(&node, calls, |(config, key)| node.call(PORTMAP, verb, config, key));
        };
        for _ in 0..2 {
            every("ADD", &all);
            every("CHECK", &all);
            (0..3).for_each(|pod| assert_forwards(&lab, &node, pod));
            // One network goes, the others still forward.
            let (first, rest): (Vec<_>, Vec<_>) =
                all.iter().cloned().partition(|(_, key)| key.ifname == "eth1");
            every("DEL", &first);
            every("CHECK", &rest);
            (0..3).for_each(|pod| assert_forwards(&lab, &node, pod));
            every("DEL", &all);
            (0..3).for_each(|pod| assert_closed(&lab, &node, pod));
            node.assert_clean(&before);
        }
    }
    drop(servers);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn many_that_want_the_same_port_end_with_exactly_one() {
    let lab = lab(10);
    let servers = serve(&lab, 0..10);
    for variant in VARIANTS {
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let same = |pod: usize| {
            let mappings = json!([{"hostPort": FIRST_PORT, "containerPort": 80}]);
            node.config(mappings, prev_result(&lab, pod, &node.cni_version))
        };
        let pods: Vec<usize> = (0..10).collect();
        at_once(&node, &pods, |pod| node.call(PORTMAP, "ADD", &same(*pod), &key(&lab, *pod)));
        let target = lab.node_socket(Family::V4, FIRST_PORT);
        let mut left = pods;
        while !left.is_empty() {
            let reply = reach(&lab.client, Call::new(Transport::Tcp, target, TIMEOUT)).unwrap();
            // The winner goes, and the next takes over.
            let winner = left.iter().position(|pod| lab.pods[*pod].name == reply.server);
            let winner = left.remove(winner.expect("a container that is gone answers"));
            node.ok("DEL", &same(winner), &key(&lab, winner));
        }
        assert_closed(&lab, &node, 0);
        node.assert_clean(&before);
    }
    drop(servers);
}

/// What reloads of a firewall take away: less than all of it, too.
fn damages(variant: Variant) -> &'static [&'static str] {
    match variant {
        Variant::IptablesNft | Variant::IptablesLegacy => &[
            "iptables -t nat -F CNI-HOSTPORT-DNAT",
            "ip6tables -t nat -F; ip6tables -t nat -X",
            "iptables -t raw -F; iptables -t raw -X",
            "iptables -t nat -F PORTMAP-NEIGHBOURS",
            "for t in iptables ip6tables; do $t -t nat -F; $t -t nat -X; done",
        ],
        Variant::Nftables => &[
            "nft flush chain inet portmap hostports",
            "nft delete table inet portmap",
            "nft flush table inet portmap",
            "nft flush map inet portmap any4_addr",
        ],
        Variant::Ebpf => &["rm /sys/fs/bpf/portmap/m1/pm_flows", "rm -r /sys/fs/bpf/portmap"],
    }
}

/// While pods go, a firewall is reloaded again and again, and each time what is left comes back.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn dels_beside_restores_leave_nothing() {
    let lab = lab(PODS);
    for variant in VARIANTS {
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        every(&lab, &node, "ADD", 0..PODS);
        let done = AtomicBool::new(false);
        let rounds = std::thread::scope(|scope| {
            let ending = Ending(&done);
            let repairing = scope.spawn(|| {
                let damages = damages(variant).iter().cycle();
                let rounds = damages.take_while(|_| !done.load(Ordering::SeqCst));
                rounds.inspect(|damage| damage_and_restore(&node, damage)).count()
            });
            // Few at a time and with pauses: else DELs would always have waited for the lock before `restore`.
            at_once(&node, &[0, 1, 2], |lane| {
                let pods = (*lane..PODS).step_by(3);
                let dels = pods.map(|pod| {
                    std::thread::sleep(Duration::from_millis(100));
                    node.call(PORTMAP, "DEL", &config(&lab, &node, pod), &key(&lab, pod))
                });
                dels.reduce(|last, next| if last.success() { next } else { last }).unwrap()
            });
            drop(ending);
            repairing.join().unwrap()
        });
        assert!(rounds > 1, "{variant:?}: this test tests nothing");
        node.assert_clean(&before);
    }
}

fn damage_and_restore(node: &Node, damage: &str) {
    // Between calls: iptables-restore would refuse what has changed since a call has listed it.
    let file = std::fs::File::open(node.state_dir.join("lock")).unwrap();
    let lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
    // What has gone with the last pod cannot be damaged.
    node.shell(&format!("({damage}) 2>/dev/null || true"));
    drop(lock);
    node.restore(false);
}
