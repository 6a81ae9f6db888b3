//! ADD and then DEL is the identity on the node: rules of others and ours, sysctls, records.
//!
//! Run as root: `cargo test --test identity -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

mod support;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use portmap::demo::netns::Netns;
use portmap::demo::snapshot::{Snapshot, pins};
use serde_json::{Value, json};
use support::bare::{LINK, NODE_V4, attachment, mapping, netns, prev_result};
use support::entries::{Entries, entries};
use support::foreign;
use support::{GONE_NETNS, IPTABLES, Node, PORTMAP, RULES, VARIANTS, Variant};

/// A node with rules of kube-proxy, Docker and an administrator.
fn node(netns: &Netns, variant: Variant) -> Node<'_> {
    let node = Node::new(netns, variant);
    foreign::install(&node);
    node
}

/// A dual-stack pod that needs every part: neighbours, loopback, hostIP.
fn rich(node: &Node, last: u8) -> Value {
    let port = 8000 + u16::from(last);
    let mut specific = mapping(port + 100, 81, "tcp");
    specific["hostIP"] = json!(NODE_V4);
    let mappings = json!([mapping(port, 80, "tcp"), specific]);
    let addresses = [format!("198.18.2.{last}/32"), format!("fd00:18::{last}/128")];
    node.config(mappings, prev_result(&[&addresses[0], &addresses[1]]))
}

/// Whatever a verb may change.
struct State {
    snapshot: Snapshot,
    entries: Entries,
}

fn state(node: &Node) -> State {
    State { snapshot: node.snapshot(), entries: entries(node.netns) }
}

/// Rules, map entries and records must be those of `before`.
fn assert_as_before(node: &Node, before: &State, what: &str) {
    let now = node.snapshot();
    let same = now.same_rules(&before.snapshot).and_then(|()| now.same_sysctls(&before.snapshot));
    same.unwrap_or_else(|lines| panic!("{:?}, {what}:\n{lines}", node.variant));
    assert_eq!(now.records, before.snapshot.records, "{:?}, {what}", node.variant);
    assert_eq!(entries(node.netns), before.entries, "{:?}, {what}", node.variant);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn add_and_del_leave_everything_as_it_was() {
    for variant in VARIANTS {
        let netns = netns();
        let node = node(&netns, variant);
        let configs = variations(&node);
        let before = state(&node);
        let pod = attachment("one");
        for config in configs {
            // Twice: what the first round leaves behind in the state directory must not matter.
            for round in [1, 2] {
                node.ok("ADD", &config, &pod);
                if round == 2 {
                    node.ok("ADD", &config, &pod);
                }
                node.ok("CHECK", &config, &pod);
                node.ok("DEL", &config, &pod);
                assert_as_before(&node, &before, &config.to_string());
            }
            node.ok("DEL", &config, &pod);
            assert_as_before(&node, &before, "after a repeated DEL");
        }
    }
}

/// The configurations whose rules differ in kind.
fn variations(node: &Node) -> Vec<Value> {
    let with = |key: &str, value: Value| {
        let mut config = rich(node, 10);
        config[key] = value;
        config
    };
    let mut wide = rich(node, 10);
    wide["prevResult"] = prev_result(&["198.18.2.10/24", "fd00:18::10/64"]);
    let condition = match node.variant {
        Variant::Nftables => json!(["ip", "saddr", "!=", "192.0.2.0/24"]),
        _ => json!(["!", "-s", "192.0.2.0/24"]),
    };
    let mut protocols = rich(node, 10);
    protocols["runtimeConfig"]["portMappings"] =
        json!([mapping(53, 53, "udp"), mapping(53, 54, "tcp"), mapping(53, 55, "sctp")]);
    let mut all = vec![
        protocols,
        wide,
        with("snat", json!(false)),
        with("masqAll", json!(true)),
        with("markMasqBit", json!(5)),
    ];
    if node.variant != Variant::Ebpf {
        all.push(with("conditionsV4", condition));
    }
    if IPTABLES.contains(&node.variant) {
        all.push(with("externalSetMarkChain", json!("EXTERNAL-MARK")));
        node.shell("iptables -t nat -N EXTERNAL-MARK; ip6tables -t nat -N EXTERNAL-MARK");
    }
    all
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn two_attachments_may_leave_in_either_order() {
    for variant in VARIANTS {
        let netns = netns();
        let node = node(&netns, variant);
        let before = state(&node);
        let mut marked = rich(&node, 11);
        marked["markMasqBit"] = json!(5);
        let mut plain = rich(&node, 11);
        plain["prevResult"] = prev_result(&["198.18.2.11/24"]);
        for second in [rich(&node, 11), marked, plain] {
            let pods = [(rich(&node, 10), attachment("one")), (second, attachment("two"))];
            for order in [[0, 1], [1, 0]] {
                for (config, pod) in &pods {
                    node.ok("ADD", config, pod);
                }
                for index in order {
                    let (config, pod) = &pods[index];
                    node.ok("DEL", config, pod);
                    let (config, pod) = &pods[1 - index];
                    if index == order[0] {
                        node.ok("CHECK", config, pod);
                    }
                }
                assert_as_before(&node, &before, &format!("order {order:?}"));
            }
            // The rules of the one that stays do not depend on who has come and gone.
            node.ok("ADD", &pods[0].0, &pods[0].1);
            let alone = state(&node);
            node.ok("ADD", &pods[1].0, &pods[1].1);
            node.ok("DEL", &pods[1].0, &pods[1].1);
            assert_as_before(&node, &alone, "a guest has come and gone");
            node.ok("DEL", &pods[0].0, &pods[0].1);
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn upstream_s_empty_scaffold_stays() {
    for variant in IPTABLES {
        let netns = netns();
        let node = node(&netns, variant);
        foreign::install_upstream_scaffold(&node);
        let before = state(&node);
        let mut marked = rich(&node, 10);
        marked["markMasqBit"] = json!(5);
        for config in [rich(&node, 10), marked] {
            for _ in 0..2 {
                node.ok("ADD", &config, &attachment("one"));
                node.ok("ADD", &rich(&node, 11), &attachment("two"));
                node.ok("DEL", &config, &attachment("one"));
                node.ok("DEL", &rich(&node, 11), &attachment("two"));
                assert_as_before(&node, &before, "with upstream's scaffold");
            }
        }
    }
}

/// DEL has to work with whatever a runtime still knows.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn del_needs_the_key_alone() {
    for variant in VARIANTS {
        let netns = netns();
        let node = node(&netns, variant);
        let before = state(&node);
        let key = json!({
            "cniVersion": "1.0.0", "name": "portmap", "type": "portmap", "stateDir": node.state_dir,
        });
        let with = |key_of: &str, value: Value| {
            let mut config = rich(&node, 10);
            config[key_of] = value;
            config
        };
        let mut no_prev_result = rich(&node, 10);
        no_prev_result.as_object_mut().unwrap().remove("prevResult");
        let garbage = json!({
            "cniVersion": "1.0.0", "name": "portmap", "type": "portmap", "stateDir": node.state_dir,
            "backend": "abacus", "snat": "maybe", "markMasqBit": 99, "conditionsV4": 7,
            "conflictPolicy": [], "runtimeConfig": {"portMappings": [{"hostPort": "x"}]},
            "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "nonsense"}]},
        });
        let configs = [
            key,
            no_prev_result,
            garbage,
            with("runtimeConfig", json!(null)),
            with("runtimeConfig", json!({"portMappings": [mapping(1, 1, "tcp")]})),
            with("prevResult", json!(7)),
        ];
        let paths = ["", "/var/run/netns/gone", GONE_NETNS];
        for (config, path) in configs.iter().zip(paths.iter().cycle()) {
            node.ok("ADD", &rich(&node, 10), &attachment("one"));
            let mut pod = attachment("one");
            pod.netns = path.into();
            for _ in 0..2 {
                node.ok("DEL", config, &pod);
            }
            assert_as_before(&node, &before, &format!("netns {path:?}, {config}"));
        }
    }
}

/// A copy of the node's PATH without one tool.
fn without_tool(node: &Node, tool: &str) -> PathBuf {
    let dir = node.path.with_extension(format!("without-{tool}"));
    std::fs::create_dir_all(&dir).unwrap();
    for entry in std::fs::read_dir(&node.path).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != tool {
            std::os::unix::fs::symlink(entry.path(), dir.join(entry.file_name())).unwrap();
        }
    }
    dir
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_failed_add_leaves_everything_as_it_was() {
    for variant in VARIANTS {
        for neighbour in [false, true] {
            let netns = netns();
            let mut node = node(&netns, variant);
            if IPTABLES.contains(&variant) {
                foreign::install_upstream_scaffold(&node);
            }
            if neighbour {
                node.ok("ADD", &rich(&node, 20), &attachment("neighbour"));
            }
            let before = state(&node);
            let whole = node.path.clone();
            let broken: &[&str] = match variant {
                Variant::Nftables => &["nft"],
                Variant::Ebpf => &[],
                // IPv4 is done by the time that IPv6 fails.
                _ if neighbour => &["ip6tables-restore", "iptables-restore"],
                // The first ADD also reads.
                _ => &["ip6tables-restore", "ip6tables", "iptables-restore", "iptables"],
            };
            for tool in broken {
                node.path = without_tool(&node, tool);
                let (code, text) = node.fails("ADD", &rich(&node, 10), &attachment("one"));
                node.path.clone_from(&whole);
                assert!(code >= 100 && text.contains(tool), "{code} {text}");
                assert_as_before(&node, &before, &format!("without {tool}"));
            }
            if variant == Variant::Ebpf {
                without_pins(&node, &before);
            }
            if IPTABLES.contains(&variant) {
                let mut config = rich(&node, 10);
                config["externalSetMarkChain"] = json!("NO-SUCH-CHAIN");
                let (code, text) = node.fails("ADD", &config, &attachment("one"));
                assert!(code == 7 && text.contains("NO-SUCH-CHAIN"), "{code} {text}");
                assert_as_before(&node, &before, "without externalSetMarkChain");
                // There for IPv4 only.
                node.shell("iptables -t nat -N NO-SUCH-CHAIN");
                let before = state(&node);
                node.fails("ADD", &config, &attachment("one"));
                assert_as_before(&node, &before, "externalSetMarkChain without IPv6");
            }
            // What failed works as soon as its cause is gone.
            node.ok("ADD", &rich(&node, 10), &attachment("one"));
            node.ok("CHECK", &rich(&node, 10), &attachment("one"));
            node.ok("DEL", &rich(&node, 10), &attachment("one"));
        }
    }
}

/// What everybody may write to is not used: maps decide where packets go.
fn without_pins(node: &Node, before: &State) {
    let before_pins = pins(node.netns).unwrap();
    node.shell("mkdir -p /sys/fs/bpf/portmap; chmod 0777 /sys/fs/bpf/portmap");
    let (code, text) = node.fails("ADD", &rich(node, 10), &attachment("one"));
    assert!(code == 5 && text.contains("/sys/fs/bpf/portmap"), "{code} {text}");
    node.shell("chmod 0700 /sys/fs/bpf/portmap");
    assert_as_before(node, before, "without pins");
    assert_eq!(pins(node.netns).unwrap(), before_pins);
}

/// Every file below a directory as the node's mount namespace shows it, with its content.
fn files(node: &Node, dir: &Path) -> String {
    node.shell(&format!("find {} -type f | sort | xargs md5sum", dir.join("records").display()))
        + &node.shell(&format!(
            "find {} ! -type d -printf '%p %l\\n' | sort",
            dir.join("index").display()
        ))
}

#[test]
#[ignore = "privileged: makes network and mount namespaces"]
fn a_full_state_directory_fails_add_and_leaves_everything_as_it_was() {
    for variant in VARIANTS {
        // Its mount namespace is private, so that the mount goes with it.
        let lab = portmap::demo::topology::Lab::build(portmap::demo::topology::Options::new(
            portmap::demo::topology::Shape::Cilium,
        ))
        .unwrap();
        let node = Node::new(&lab.node, variant);
        let dir = node.state_dir.clone();
        std::fs::create_dir_all(&dir).unwrap();
        node.shell(&format!("mount -t tmpfs -o mode=700,size=64k tmpfs {}", dir.display()));
        let config = |pod: usize, port: u16| {
            node.config(
                json!([mapping(port, 80, "tcp"), mapping(port, 53, "udp")]),
                support::prev_result(&lab, pod, "1.0.0"),
            )
        };
        let [first, second] =
            [0, 1].map(|pod| support::attachment(&lab.pods[pod], &format!("p{pod}")));
        node.ok("ADD", &config(0, 8080), &first);
        let (before, held) = (state(&node), files(&node, &dir));
        let fill = dir.join("filler");
        node.shell(&format!("dd if=/dev/zero of={} bs=1k 2>/dev/null || true", fill.display()));
        let (code, text) = node.fails("ADD", &config(1, 8081), &second);
        assert!(code == 5 && text.contains("No space left"), "{code} {text}");
        assert_as_before(&node, &before, "with a full state directory");
        assert_eq!(files(&node, &dir), held, "{variant:?}");
        // DEL has to work: it is what makes room. Also where the rules have to be made anew.
        node.ok("DEL", &config(1, 8081), &second);
        if variant == Variant::Nftables {
            node.shell("nft flush ruleset");
        }
        node.ok("DEL", &config(0, 8080), &first);
        assert!(files(&node, &dir).lines().count() <= 1);
        node.shell(&format!("rm {}", fill.display()));
        node.ok("ADD", &config(1, 8081), &second);
        node.ok("DEL", &config(1, 8081), &second);

        // One of two who share a port, where there is no room for another file.
        let shared = |pod: usize| {
            let mut of_address = mapping(8080, 80, "tcp");
            of_address["hostIP"] = json!(format!("127.0.0.{}", pod + 2));
            node.config(json!([of_address]), support::prev_result(&lab, pod, "1.0.0"))
        };
        let empty = state(&node);
        node.ok("ADD", &shared(0), &first);
        let before = state(&node);
        node.ok("ADD", &shared(1), &second);
        let many = dir.join("many");
        node.shell(&format!(
            "mkdir {0}; mount -o remount,nr_inodes=1000 {1}
             seq 1000 | (cd {0}; xargs -n 1 touch 2>/dev/null) || true",
            many.display(),
            dir.display()
        ));
        node.ok("DEL", &shared(1), &second);
        assert_as_before(&node, &before, "with a full state directory");
        node.ok("CHECK", &shared(0), &first);
        node.shell(&format!("rm -r {}", many.display()));
        node.ok("ADD", &shared(1), &second);
        node.ok("CHECK", &shared(1), &second);
        for (pod, attachment) in [&first, &second].into_iter().enumerate() {
            node.ok("DEL", &shared(pod), attachment);
        }
        assert_as_before(&node, &empty, "after all of them");
        assert_eq!(files(&node, &dir).lines().count(), 1, "{variant:?}");
    }
}

/// After a reboot runtimes end pods of which nothing is left.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_full_disk_without_records_does_not_keep_del_from_its_end() {
    for variant in VARIANTS {
        let netns = netns();
        let mut node = node(&netns, variant);
        let disk = node.state_dir.clone();
        std::fs::create_dir_all(&disk).unwrap();
        node.shell(&format!(
            "mount -t tmpfs -o mode=700,size=64k tmpfs {0}
             dd if=/dev/zero of={0}/filler bs=1k 2>/dev/null || true",
            disk.display()
        ));
        node.state_dir = disk.join("state");
        let before = node.snapshot();
        let output = node.ok("DEL", &rich(&node, 10), &attachment("one"));
        assert!(output.stderr.contains("No space left"), "{variant:?}: {}", output.stderr);
        node.assert_clean(&before);
        // A pod that is to come needs a record.
        let (code, text) = node.fails("ADD", &rich(&node, 10), &attachment("one"));
        assert!(code == 5 && text.contains("No space left"), "{variant:?}: {code} {text}");
        node.assert_clean(&before);
        node.shell(&format!("rm {}/filler", disk.display()));
        for verb in ["ADD", "DEL"] {
            node.ok(verb, &rich(&node, 10), &attachment("one"));
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_mappings_no_lock_is_taken_and_no_process_started() {
    for variant in VARIANTS {
        let netns = netns();
        let mut node = node(&netns, variant);
        let marker = node.path.with_extension("marker");
        let stubs = node.path.with_extension("stubs");
        std::fs::create_dir_all(&stubs).unwrap();
        for tool in [
            "iptables",
            "ip6tables",
            "iptables-save",
            "iptables-restore",
            "ip6tables-restore",
            "nft",
            "conntrack",
            "modprobe",
            "sysctl",
        ] {
            let path = stubs.join(tool);
            std::fs::write(&path, format!("#!/bin/sh\necho {tool} >> {}\n", marker.display()))
                .unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        let before = state(&node);
        node.path = stubs;
        std::fs::create_dir_all(&node.state_dir).unwrap();
        let lock = std::fs::File::create(node.state_dir.join("lock")).unwrap();
        let held = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
        let mut without = node.config(json!([]), prev_result(&["198.18.2.10/32"]));
        for runtime_config in [json!({"portMappings": []}), json!({}), json!(null)] {
            without["runtimeConfig"] = runtime_config;
            for verb in ["ADD", "CHECK", "DEL", "DEL"] {
                let output = node.ok(verb, &without, &attachment("one"));
                assert!(output.took < Duration::from_secs(5), "{verb} took {:?}", output.took);
            }
        }
        drop(held);
        assert!(!marker.exists(), "{}", std::fs::read_to_string(&marker).unwrap_or_default());
        assert_as_before(&node, &before, "without mappings");
    }
}

/// Where eBPF forwards, a pod's link is hooked also without mappings; a tool that hangs must not keep every
/// pod of the node waiting for that.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_pod_without_mappings_waits_for_the_lock_no_longer_than_it_is_worth() {
    let netns = netns();
    let node = node(&netns, Variant::Ebpf);
    let without = node.config(json!([]), prev_result(&["198.18.2.11/32"]));
    node.ok("ADD", &rich(&node, 10), &attachment("one"));
    assert_eq!(node.ok("ADD", &without, &attachment("two")).stderr, "");
    let lock = std::fs::File::open(node.state_dir.join("lock")).unwrap();
    let held = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let output = node.ok("ADD", &without, &attachment("three"));
    assert!(output.took < Duration::from_secs(20), "{:?}", output.took);
    assert!(output.stderr.contains("may not reach hostPorts"), "{}", output.stderr);
    drop(held);
    node.ok("DEL", &rich(&node, 10), &attachment("one"));
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn the_sysctl_of_a_link_goes_back_with_its_last_user() {
    for variant in RULES {
        for former in ["0", "1"] {
            let netns = netns();
            let node = node(&netns, variant);
            let key = format!("ipv4/conf/{LINK}/route_localnet");
            netns.set_sysctl(&key, former).unwrap();
            let before = state(&node);
            node.ok("ADD", &rich(&node, 10), &attachment("one"));
            node.ok("ADD", &rich(&node, 11), &attachment("two"));
            assert_eq!(netns.sysctl(&key).unwrap(), "1");
            node.ok("DEL", &rich(&node, 10), &attachment("one"));
            assert_eq!(netns.sysctl(&key).unwrap(), "1", "{variant:?}: one user is left");
            node.ok("DEL", &rich(&node, 11), &attachment("two"));
            assert_as_before(&node, &before, &format!("route_localnet was {former}"));
        }
    }
}

/// 127.0.0.1 is no destination of packets there.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn ebpf_leaves_the_sysctl_alone() {
    let netns = netns();
    let node = node(&netns, Variant::Ebpf);
    let before = state(&node);
    node.ok("ADD", &rich(&node, 10), &attachment("one"));
    node.snapshot().same_sysctls(&before.snapshot).unwrap();
    node.snapshot().same_rules(&before.snapshot).unwrap();
}

/// What one call has found out about its namespaces holds for the next one in the same, and for no other.
#[test]
#[ignore = "privileged: makes network namespaces, needs unshare"]
fn namespaces_are_looked_for_once() {
    let netns = netns();
    let node = Node::new(&netns, Variant::Nftables);
    let config = rich(&node, 2);
    let pod = attachment("one");
    node.ok("ADD", &config, &pod);
    let read = |path: &Path| -> Value {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let note = node.state_dir.join("notes/namespaces");
    let record = node.state_dir.join("records").join(&node.records()[0]);
    let found = read(&record)["view"].clone();
    if !note.exists() {
        // Mounts have had no numbers of their own before.
        assert!(portmap::sys::Host::new(None).kernel_version().unwrap() < (6, 8));
        return;
    }
    let known = read(&note);
    assert_eq!(
        [&known["own"]["network"], &known["own"]["mounts"]],
        [&found["node"], &found["mounts"]]
    );
    assert_eq!(found["node"], json!(std::fs::metadata(netns.path()).unwrap().ino()));
    let again = |change: &dyn Fn(&mut Value)| {
        let mut noted = known.clone();
        change(&mut noted);
        std::fs::write(&note, noted.to_string()).unwrap();
        node.ok("ADD", &config, &pod);
        read(&record)["view"].clone()
    };
    // Nobody looks again.
    assert_eq!(again(&|noted| noted["own"]["mounts"] = json!(7))["mounts"], json!(7));
    for sign in ["boot", "cookie", "root"] {
        let other = |noted: &mut Value| {
            noted["own"]["mounts"] = json!(7);
            noted["signs"][sign] = match noted["signs"][sign].as_u64() {
                Some(number) => json!(number + 1),
                None => json!("another"),
            };
        };
        assert_eq!(again(&other), found, "{sign}");
        assert_eq!(read(&note), known, "{sign}");
    }
    assert_eq!(again(&|noted| *noted = json!("damaged")), found);

    let input = node.state_dir.with_file_name("input");
    std::fs::write(&input, config.to_string()).unwrap();
    let script = format!(
        "CNI_COMMAND=ADD CNI_CONTAINERID={} CNI_NETNS={} CNI_IFNAME={} CNI_PATH=/x \
         unshare --mount sh -c 'readlink /proc/self/ns/mnt; exec {PORTMAP}' <{}",
        pod.container_id,
        pod.netns.display(),
        pod.ifname,
        input.display()
    );
    let printed = node.shell(&script);
    let view = &read(&record)["view"];
    assert!(printed.contains(&format!("mnt:[{}]", view["mounts"])), "{printed} {view}");
    assert_ne!(view["mounts"], found["mounts"]);
    node.ok("ADD", &config, &pod);
    assert_eq!(read(&record)["view"], found);
}
