//! What a call costs: processes that it starts, locks that it waits for, many ports.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use portmap::demo::traffic::Transport;
use serde_json::{Value, json};

use crate::executable::write_executable;
use crate::site::{Site, bridge, on_each, tcp, udp, with};
use crate::support::{Scratch, VARIANTS, Variant};

/// A PATH whose tools write their command lines to a file before they do their work.
struct Log {
    file: PathBuf,
    _dir: Scratch,
}

/// What somebody could think of starting for eBPF.
const OTHERS: [&str; 12] = [
    "tc",
    "ip",
    "bpftool",
    "mount",
    "umount",
    "modprobe",
    "sysctl",
    "conntrack",
    "ss",
    "nft",
    "iptables",
    "sh",
];

impl Log {
    fn new(site: &mut Site) -> Self {
        let dir = Scratch::new();
        let file = dir.0.join("log");
        let bin = dir.0.join("bin");
        std::fs::create_dir(&bin).unwrap();
        let tools = std::fs::read_dir(&site.node.path).unwrap().map(|tool| tool.unwrap().path());
        let mut tools: Vec<PathBuf> = tools.collect();
        if site.node.variant == Variant::Ebpf {
            tools.extend(OTHERS.map(|name| Path::new("/usr/bin").join(name)));
        }
        for tool in tools {
            let name = tool.file_name().unwrap().to_str().unwrap();
            let script = format!(
                "#!/bin/sh\necho \"{name} $*\" >>{}\nexec {} \"$@\"\n",
                file.display(),
                tool.display()
            );
            // By the file's name it is known, without a process, which variant of iptables it is.
            let program = tool.canonicalize().unwrap_or(tool.clone());
            let path = bin.join(format!("{name}-{}", program.file_name().unwrap().display()));
            write_executable(&path, script);
            symlink(path, bin.join(name)).unwrap();
        }
        site.node.path = bin;
        Log { file, _dir: dir }
    }

    /// The command lines since the last call.
    fn take(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        std::fs::write(&self.file, "").unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }
}

/// plugins#510, plugins#464, plugins#662, kubernetes#92811, antrea#1499, moby#53466: a process and a
/// lock for every rule. On a node that is set up, a call starts one process a family with iptables and
/// one in all with nft, however many ports there are; an attachment without mappings starts none, and eBPF
/// none ever.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_05_a_call_starts_one_process_however_many_ports() {
    on_each(&VARIANTS, &bridge(), |site| {
        let log = Log::new(site);
        let expected: &[&str] = match site.node.variant {
            Variant::Nftables => &["nft -j -f /proc/self/fd/0"],
            Variant::Ebpf => &[],
            // A bounded wait for the xtables lock: plugins' is endless.
            _ => &["ip6tables-restore --noflush -w 15", "iptables-restore --noflush -w 15"],
        };
        site.add(1, "first", &[tcp(9000)]);
        let first = log.take();
        assert_eq!(first.is_empty(), site.node.variant == Variant::Ebpf, "{first:?}");
        for count in [1, 10] {
            let mappings: Vec<Value> = (0..count).map(|n| tcp(8080 + n)).collect();
            for (verb, repeated) in [("ADD", false), ("ADD", true), ("DEL", false)] {
                site.node.ok(verb, &site.config(0, &mappings), &site.of(0, "a"));
                let mut started = log.take();
                if repeated {
                    // It is a repair: the rules are looked at first.
                    started.retain(|line| !line.contains(" -S"));
                }
                assert_eq!(started, expected, "{verb} of {count} ports");
            }
        }
        for verb in ["ADD", "CHECK", "DEL"] {
            for mappings in [json!(null), json!([])] {
                let config =
                    with(site.config(0, &[]), json!({"runtimeConfig": {"portMappings": mappings}}));
                site.node.ok(verb, &config, &site.of(0, "none"));
                assert_eq!(log.take(), [""; 0], "{verb} without mappings");
            }
        }
        site.del(1, "first", &[tcp(9000)]);
        site.assert_clean();
    });
}

/// The first call on a node reads what others may have made in table nat, and no other table.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn pain_05_the_first_call_reads_one_table() {
    on_each(&[Variant::IptablesNft], &bridge(), |site| {
        let log = Log::new(site);
        site.add(0, "a", &[tcp(8080)]);
        let expected = [
            "ip6tables -t nat -w 15 -S",
            "ip6tables-restore --noflush -w 15",
            "iptables -t nat -w 15 -S",
            "iptables-restore --noflush -w 15",
        ];
        assert_eq!(log.take(), expected);
    });
}

/// kubernetes#92811, plugins#464: somebody else holds the xtables lock. The call waits for it, and
/// does its work when it is free.
#[test]
#[ignore = "privileged: makes network and mount namespaces, needs iptables"]
fn pain_05_a_held_xtables_lock_is_waited_for() {
    on_each(&[Variant::IptablesLegacy], &bridge(), |site| {
        // The lock is one of the whole machine: here it lies in a /run of the laboratory's own.
        site.node.shell("mount -t tmpfs tmpfs /run");
        let open = || std::fs::File::create("/run/xtables.lock").unwrap();
        let file = site.lab.node.run(open).unwrap();
        let lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        std::thread::scope(|scope| {
            let site = &*site;
            let adding = scope.spawn(move || site.add(0, "a", &[tcp(8080)]));
            std::thread::sleep(Duration::from_millis(500));
            assert!(!adding.is_finished(), "rules were changed under somebody else's lock");
            lock.unlock().unwrap();
            adding.join().unwrap();
        });
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.del(0, "a", &[tcp(8080)]);
    });
}

/// kubernetes#23864, moby#14288: port ranges. All of them are forwarded by one call and removed by one.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_05_a_thousand_ports_in_one_call() {
    on_each(&VARIANTS, &bridge(), |site| {
        let mappings: Vec<Value> =
            (0..500).flat_map(|n| [tcp(10000 + n), udp(10000 + n)]).collect();
        site.add(0, "many", &mappings);
        for port in [10000, 10250, 10499] {
            site.reaches(Transport::Tcp, port, "pod-a");
            site.reaches(Transport::Udp, port, "pod-a");
        }
        site.check(0, "many", &mappings);
        site.del(0, "many", &mappings);
        site.refuses(10250);
        site.assert_clean();
    });
}
