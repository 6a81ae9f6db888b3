//! Two owners of one port: the newest wins, and at every step somebody answers.
//!
//! Run as root: `cargo test --test takeover -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

mod support;

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use portmap::demo::plugin::Attachment;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::demo::traffic::{Call, Failure, Session, Transport, reach};
use portmap::model::Family;
use serde_json::{Value, json};
use support::bare::mapping;
use support::ending::Ending;
use support::{Node, VARIANTS, Variant, attachment, prev_result};

/// Less than a second, after which Linux sends a lost SYN again: a lost one is a failure.
const TIMEOUT: Duration = Duration::from_millis(900);
/// How many connections of each client must have succeeded after a step, before the next.
const CALLS: usize = 200;
/// hostPort of all pods.
const PORT: u16 = 8080;

/// What the callers have seen so far.
#[derive(Default)]
struct Seen {
    /// Names of the servers, in order.
    servers: Vec<String>,
    failures: Vec<Failure>,
}

/// Clients that connect in a loop, one thread for each target.
struct Callers<'a> {
    seen: Vec<&'a Mutex<Seen>>,
    /// How many calls of each client a step may cost: the one that is under way. eBPF keeps no way to a
    /// former pod, so that what has begun there ends when the port has a new owner.
    lost: usize,
}

impl Callers<'_> {
    /// Waits until every client has succeeded this many more times.
    fn wait_for(&self, calls: usize) {
        for seen in &self.seen {
            let goal = seen.lock().unwrap().servers.len() + calls;
            let deadline = Instant::now() + Duration::from_secs(20);
            while seen.lock().unwrap().servers.len() < goal {
                assert!(Instant::now() < deadline, "{:?}", seen.lock().unwrap().failures);
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// Does a step while all clients connect, after which `owner` alone must answer. No call failed but
    /// for `lost`, and none was answered by another pod than the owner before or after.
    fn step(&self, what: &str, owner: &str, step: impl FnOnce()) {
        self.wait_for(1);
        let before: Vec<(String, usize)> = self
            .seen
            .iter()
            .map(|seen| {
                let seen = seen.lock().unwrap();
                assert_eq!(seen.failures, [], "before {what}");
                (seen.servers.last().unwrap().clone(), seen.servers.len())
            })
            .collect();
        step();
        // Connections that were begun before are done now.
        self.wait_for(2);
        let after: Vec<usize> =
            self.seen.iter().map(|seen| seen.lock().unwrap().servers.len()).collect();
        self.wait_for(CALLS);
        for ((seen, (former, start)), end) in self.seen.iter().zip(before).zip(after) {
            let mut seen = seen.lock().unwrap();
            assert!(seen.failures.len() <= self.lost, "{what}: {:?}", seen.failures);
            seen.failures.clear();
            let strange =
                seen.servers[start..].iter().find(|name| **name != former && *name != owner);
            assert_eq!(strange, None, "{what}");
            let late = seen.servers[end..].iter().find(|name| *name != owner);
            assert_eq!(late, None, "{what}: {owner} should answer by now");
        }
    }
}

/// Runs `steps` while clients call the targets in a loop.
fn calling(lab: &Lab, targets: &[SocketAddr], lost: usize, steps: impl FnOnce(&Callers)) {
    let stop = AtomicBool::new(false);
    let seen: Vec<Mutex<Seen>> = targets.iter().map(|_| Mutex::default()).collect();
    std::thread::scope(|scope| {
        for (target, seen) in targets.iter().zip(&seen) {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let reply = reach(&lab.client, Call::new(Transport::Tcp, *target, TIMEOUT));
                    let mut seen = seen.lock().unwrap();
                    match reply {
                        Ok(reply) => seen.servers.push(reply.server),
                        Err(failure) => seen.failures.push(failure),
                    }
                }
            });
        }
        let callers = Callers { seen: seen.iter().collect(), lost };
        let _ending = Ending(&stop);
        steps(&callers);
    });
}

fn lab(pods: usize) -> Lab {
    let mut options = Options::new(Shape::Cilium);
    options.pods = pods;
    Lab::build(options).unwrap()
}

/// Configuration and attachment of a pod that maps the common port, tcp and udp.
fn pod(node: &Node, lab: &Lab, number: usize) -> (Value, Attachment) {
    let mappings = json!([mapping(PORT, 80, "tcp"), mapping(PORT, 53, "udp")]);
    let config = node.config(mappings, prev_result(lab, number, "1.0.0"));
    (config, attachment(&lab.pods[number], &format!("container-{number}")))
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_newest_owner_wins_and_somebody_always_answers() {
    for variant in VARIANTS {
        let lab = lab(3);
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[53]).unwrap()).collect();
        let pods: Vec<_> = (0..3).map(|number| pod(&node, &lab, number)).collect();
        let verb = |verb: &'static str, number: usize| {
            let (config, attachment) = &pods[number];
            node.ok(verb, config, attachment);
        };
        verb("ADD", 0);
        let targets: Vec<SocketAddr> =
            lab.options.families.iter().map(|family| lab.node_socket(*family, PORT)).collect();
        let lost = usize::from(variant == Variant::Ebpf);
        calling(&lab, &targets, lost, |callers| {
            callers.step("ADD of a second", "pod-b", || verb("ADD", 1));
            verb("CHECK", 1);
            callers.step("late DEL of the first", "pod-b", || verb("DEL", 0));
            callers.step("a later one of the same", "pod-b", || verb("DEL", 0));
            verb("CHECK", 1);
            callers.step("ADD of the first again", "pod-a", || verb("ADD", 0));
            callers.step("ADD of a third", "pod-c", || verb("ADD", 2));
            callers.step("repeated ADD of the newest", "pod-c", || verb("ADD", 2));
            callers.step("DEL of the newest", "pod-a", || verb("DEL", 2));
            callers.step("DEL of the next newest", "pod-b", || verb("DEL", 0));
            callers.step("repeated ADD of the only one", "pod-b", || verb("ADD", 1));
            verb("CHECK", 1);
        });
        verb("DEL", 1);
        node.assert_clean(&before);
        drop(servers);
    }
}

/// Upstream's first rule goes on catching everything, and clients time out.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_pod_that_died_without_del_does_not_keep_its_port() {
    for variant in VARIANTS {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let servers = lab.pods[0].serve(&[80], &[53]).unwrap();
        let [old, new] = [0, 1].map(|number| pod(&node, &lab, number));
        node.ok("ADD", &old.0, &old.1);
        drop(servers);
        let _servers = lab.pods[1].serve(&[80], &[53]).unwrap();
        node.ok("ADD", &new.0, &new.1);
        for family in &lab.options.families {
            for transport in [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected] {
                let call = Call::new(transport, lab.node_socket(*family, PORT), TIMEOUT);
                let reply = reach(&lab.client, call).unwrap();
                assert_eq!(reply.server, "pod-b", "{variant:?} {family} {transport}");
            }
        }
    }
}

/// Neither by the claim of an address, which goes before one of any, nor when the port falls back to who had
/// it before.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_dead_get_no_port_from_the_living() {
    for variant in VARIANTS {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let _server = lab.pods[1].serve(&[80], &[]).unwrap();
        let [mut old, new] = [0, 1].map(|number| pod(&node, &lab, number));
        // The namespace of the first pod, as long as that is to live.
        let life = node.state_dir.with_file_name("life");
        let namespace = std::mem::replace(&mut old.1.netns, life.to_str().unwrap().into());
        for family in lab.options.families.clone() {
            let target = lab.node_socket(family, PORT);
            let answer = || {
                let reply = reach(&lab.client, Call::new(Transport::Tcp, target, TIMEOUT));
                reply.ok().map(|reply| reply.server)
            };
            let mut specific = mapping(PORT, 80, "tcp");
            specific["hostIP"] = json!(target.ip());
            old.0["runtimeConfig"]["portMappings"] = json!([specific]);
            std::os::unix::fs::symlink(&namespace, &life).unwrap();
            node.ok("ADD", &old.0, &old.1);
            std::fs::remove_file(&life).unwrap();
            node.ok("ADD", &new.0, &new.1);
            assert_eq!(answer().as_deref(), Some("pod-b"), "{variant:?} {family}");
            node.ok("CHECK", &new.0, &new.1);
            node.ok("DEL", &new.0, &new.1);
            node.assert_clean(&before);

            old.0["runtimeConfig"]["portMappings"] = json!([mapping(PORT, 80, "tcp")]);
            std::os::unix::fs::symlink(&namespace, &life).unwrap();
            node.ok("ADD", &old.0, &old.1);
            node.ok("ADD", &new.0, &new.1);
            std::fs::remove_file(&life).unwrap();
            assert_eq!(answer().as_deref(), Some("pod-b"), "{variant:?} {family}");
            node.ok("DEL", &new.0, &new.1);
            node.assert_clean(&before);
            node.ok("DEL", &old.0, &old.1);
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn deny_refuses_a_port_whose_owner_lives() {
    for variant in VARIANTS {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let [(first, mut owner), (second, guest)] = [0, 1].map(|number| pod(&node, &lab, number));
        // A name for the namespace that can go, unlike the descriptor's.
        let name = node.path.with_extension("netns");
        std::os::unix::fs::symlink(lab.pods[0].netns.path(), &name).unwrap();
        owner.netns.clone_from(&name);
        let deny = |config: &Value| {
            let mut config = config.clone();
            config["conflictPolicy"] = json!("deny");
            config
        };
        node.ok("ADD", &deny(&first), &owner);
        let before = node.snapshot();
        let (code, text) = node.fails("ADD", &deny(&second), &guest);
        assert_eq!(code, 103, "{text}");
        assert!(text.contains("container-0") && text.contains(&PORT.to_string()), "{text}");
        before.same_rules(&node.snapshot()).unwrap();
        assert_eq!(before.records, node.snapshot().records);
        // No conflict with itself: neither a repeated ADD nor the same container on another network.
        node.ok("ADD", &deny(&first), &owner);
        let mut elsewhere = deny(&first);
        elsewhere["name"] = json!("elsewhere");
        node.ok("ADD", &elsewhere, &owner);
        node.ok("DEL", &elsewhere, &owner);
        // Another port, and another address of the same port, are free.
        let mut free = deny(&second);
        free["runtimeConfig"]["portMappings"] = json!([mapping(PORT + 1, 80, "tcp")]);
        node.ok("ADD", &free, &guest);
        node.ok("DEL", &free, &guest);
        // Nobody can tell: this one looks from where the owner's path would not have led there.
        let record = node.state_dir.join("records");
        let record = std::fs::read_dir(record).unwrap().next().unwrap().unwrap().path();
        let known = std::fs::read_to_string(&record).unwrap();
        let mut elsewhere: Value = serde_json::from_str(&known).unwrap();
        elsewhere["view"]["mounts"] = json!(1);
        std::fs::write(&record, elsewhere.to_string()).unwrap();
        std::fs::remove_file(&name).unwrap();
        std::fs::write(&name, "").unwrap();
        assert_eq!(node.fails("ADD", &deny(&second), &guest).0, 103);
        std::fs::write(&record, known).unwrap();
        std::fs::remove_file(&name).unwrap();
        // Its namespace is gone, so it cannot object any more: nothing has the name, or another one has.
        if variant == VARIANTS[0] {
            std::os::unix::fs::symlink(lab.client.path(), &name).unwrap();
        }
        node.ok("ADD", &deny(&second), &guest);
        node.ok("CHECK", &deny(&second), &guest);
    }
}

/// A client that never stops sending from one port would stay with the old pod for ever.
#[test]
#[ignore = "privileged: makes network namespaces, needs conntrack"]
fn udp_follows_the_newest_owner_without_a_pause() {
    for variant in VARIANTS {
        let lab = lab(3);
        let node = Node::new(&lab.node, variant);
        let _servers: Vec<_> =
            lab.pods.iter().map(|pod| pod.serve(&[], &[53, PORT]).unwrap()).collect();
        let [first, second] = [0, 1].map(|number| pod(&node, &lab, number));
        node.ok("ADD", &first.0, &first.1);
        for family in lab.options.families.clone() {
            let from = |port| Some(SocketAddr::new(lab.client_address(family), port));
            let target = lab.node_socket(family, PORT);
            let mut call = Call::new(Transport::Udp, target, TIMEOUT);
            call.bind = from(40_000);
            let flow = Session::open(&lab.client, call).unwrap();
            // The same port number, to an address that is not the node's: passes through.
            let elsewhere = SocketAddr::new(lab.pods[2].address(family).unwrap(), PORT);
            let mut call = Call::new(Transport::Udp, elsewhere, TIMEOUT);
            call.bind = from(40_001);
            let mut foreign = Session::open(&lab.client, call).unwrap();
            assert_eq!(foreign.ask().unwrap().server, "pod-c");
            let entry = || {
                let name = if family == Family::V4 { "ipv4" } else { "ipv6" };
                let all = node.shell(&format!("conntrack -L -f {name} -p udp -o id 2>/dev/null"));
                let line = all.lines().find(|line| line.contains("sport=40001")).map(str::to_owned);
                let line = line.unwrap_or_else(|| panic!("{variant:?} {family}: no entry:\n{all}"));
                line.split_whitespace().find(|word| word.starts_with("id=")).unwrap().to_owned()
            };
            // By eBPF nothing is translated that the kernel would have to track.
            let id = (variant != Variant::Ebpf).then(entry);
            udp_steps(flow, |expect| {
                expect("pod-a");
                node.ok("ADD", &second.0, &second.1);
                expect("pod-b");
                node.ok("DEL", &second.0, &second.1);
                expect("pod-a");
            });
            assert_eq!(foreign.ask().unwrap().server, "pod-c");
            if let Some(id) = id {
                assert_eq!(entry(), id, "{variant:?} {family}: the foreign flow has a new entry");
            }
        }
    }
}

/// The claim of one address takes flows to it from a claim of any address, and gives them back.
#[test]
#[ignore = "privileged: makes network namespaces, needs conntrack"]
fn udp_follows_a_claim_of_its_address() {
    for variant in VARIANTS {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let before = node.snapshot();
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[], &[53]).unwrap()).collect();
        let [first, mut second] = [0, 1].map(|number| pod(&node, &lab, number));
        for family in lab.options.families.clone() {
            let mut specific = mapping(PORT, 53, "udp");
            specific["hostIP"] = json!(lab.node_address(family));
            second.0["runtimeConfig"]["portMappings"] = json!([specific]);
            node.ok("ADD", &first.0, &first.1);
            let open = |ip| {
                let call = Call::new(Transport::Udp, SocketAddr::new(ip, PORT), TIMEOUT);
                Session::open(&lab.client, call).unwrap()
            };
            let mut elsewhere = open(lab.second_node_address(family));
            assert_eq!(elsewhere.ask().unwrap().server, "pod-a");
            udp_steps(open(lab.node_address(family)), |expect| {
                expect("pod-a");
                node.ok("ADD", &second.0, &second.1);
                expect("pod-b");
                assert_eq!(elsewhere.ask().unwrap().server, "pod-a");
                node.ok("DEL", &second.0, &second.1);
                expect("pod-a");
            });
            assert_eq!(elsewhere.ask().unwrap().server, "pod-a");
            node.ok("DEL", &first.0, &first.1);
            node.assert_clean(&before);
        }
    }
}

/// What a firewall's reload has taken away comes back, also for a client that has begun meanwhile and
/// never stops sending: each of its packets keeps an entry that is not translated.
#[test]
#[ignore = "privileged: makes network namespaces, needs conntrack"]
fn udp_that_began_without_rules_is_forwarded_once_they_are_back() {
    for variant in VARIANTS.into_iter().filter(|variant| *variant != Variant::Ebpf) {
        let lab = lab(2);
        let node = Node::new(&lab.node, variant);
        let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[], &[53]).unwrap()).collect();
        let first = pod(&node, &lab, 0);
        let mut second = pod(&node, &lab, 1);
        second.0["runtimeConfig"]["portMappings"] = json!([mapping(PORT + 1, 80, "tcp")]);
        node.ok("ADD", &first.0, &first.1);
        let restore = || {
            node.restore(false);
        };
        let add = || {
            node.ok("ADD", &second.0, &second.1);
        };
        let heals: [(u16, &dyn Fn()); 2] = [(41_000, &restore), (41_001, &add)];
        for family in lab.options.families.clone() {
            for (port, heal) in heals {
                node.damage();
                // The firewall that was loaded again tracks connections.
                node.shell(
                    "nft 'table inet fw { chain input { type filter hook input priority 0; ct state established accept; }; }'",
                );
                let target = lab.node_socket(family, PORT);
                let mut call = Call::new(Transport::Udp, target, TIMEOUT);
                call.bind = Some(SocketAddr::new(lab.client_address(family), port));
                let name = if family == Family::V4 { "ipv4" } else { "ipv6" };
                udp_steps(Session::open(&lab.client, call).unwrap(), |expect| {
                    let list = format!("conntrack -L -f {name} -p udp --sport {port} 2>/dev/null");
                    let deadline = Instant::now() + Duration::from_secs(5);
                    while !node.shell(&list).contains(&format!("dport={PORT}")) {
                        assert!(Instant::now() < deadline, "{variant:?}: nothing is tracked");
                    }
                    heal();
                    expect("pod-a");
                });
            }
            node.ok("DEL", &second.0, &second.1);
        }
    }
}

/// Upstream's own example of a condition, of a pod that claims one port of an address and others of any,
/// while another pod wants that port too. Neither keeps the other from coming.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_condition_on_the_destination_goes_with_a_contested_address() {
    for variant in VARIANTS.into_iter().filter(|variant| *variant != Variant::Ebpf) {
        for newest_is_any in [true, false] {
            let lab = lab(2);
            let node = Node::new(&lab.node, variant);
            let before = node.snapshot();
            let _servers: Vec<_> =
                lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect();
            let (mut specific, mut any) = (pod(&node, &lab, 0), pod(&node, &lab, 1));
            let mut of_address = Vec::new();
            for family in lab.options.families.clone() {
                let mut mapping = mapping(PORT, 80, "tcp");
                mapping["hostIP"] = json!(lab.node_address(family));
                of_address.push(mapping);
            }
            of_address.push(mapping(PORT + 1, 80, "tcp"));
            specific.0["runtimeConfig"]["portMappings"] = json!(of_address);
            let condition = |family: &str, network: &str| match variant {
                Variant::Nftables => json!([family, "daddr", "!=", network]),
                _ => json!(["!", "-d", network]),
            };
            specific.0["conditionsV4"] = condition("ip", "203.0.113.0/24");
            specific.0["conditionsV6"] = condition("ip6", "fd00:203::/64");
            any.0["runtimeConfig"]["portMappings"] = json!([mapping(PORT, 80, "tcp")]);
            let mut order = [&specific, &any];
            if !newest_is_any {
                order.reverse();
            }
            for (config, pod) in order {
                node.ok("ADD", config, pod);
            }
            for (config, pod) in order {
                node.ok("CHECK", config, pod);
            }
            for family in lab.options.families.clone() {
                let (own, other) = (lab.node_address(family), lab.second_node_address(family));
                for (ip, port, owner) in
                    [(own, PORT, "pod-a"), (other, PORT, "pod-b"), (other, PORT + 1, "pod-a")]
                {
                    let target = SocketAddr::new(ip, port);
                    let reply = reach(&lab.client, Call::new(Transport::Tcp, target, TIMEOUT));
                    assert_eq!(reply.unwrap().server, owner, "{variant:?} {target}");
                }
            }
            node.restore(false);
            for (config, pod) in order {
                node.ok("DEL", config, pod);
            }
            node.assert_clean(&before);
        }
    }
}

/// Keeps a flow busy while `steps` run. They are given a function that fails unless the flow is
/// answered by that pod within a second.
fn udp_steps(mut flow: Session, steps: impl FnOnce(&dyn Fn(&str))) {
    let stop = AtomicBool::new(false);
    let last = Mutex::new(String::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // A datagram may be lost while the pod changes; the next one must not be.
                if let Ok(reply) = flow.ask() {
                    *last.lock().unwrap() = reply.server;
                }
            }
        });
        let expect = |pod: &str| {
            let deadline = Instant::now() + Duration::from_secs(2);
            while *last.lock().unwrap() != pod {
                assert!(Instant::now() < deadline, "{pod} expected, not {}", last.lock().unwrap());
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        let _ending = Ending(&stop);
        steps(&expect);
    });
}
