//! Damage to maps, programs, their names and their places.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use portmap::backend::ebpf::layout::{Addr, ClaimKey, ClaimValue, Config, port_bit};
use portmap::demo::netns::Netns;
use portmap::demo::snapshot::pins;
use portmap::demo::topology::{Lab, Options, Shape, UPLINK};
use portmap::demo::traffic::{Call, Failure, Session, Transport, reach};
use portmap::model::{Family, Protocol};
use portmap::sys::bpf::features::Features;
use portmap::sys::bpf::program::{Program, SocketHook};
use portmap::sys::bpf::{Direction, tcx};
use serde_json::Value;
use zerocopy::IntoBytes;

use super::support::Variant;
use super::support::ebpf::{self, PINS};
use super::support::entries::{Entries, entries, maps};
use super::support::programs;
use super::{By, Scene, TIMEOUT};

/// TC_ACT_UNSPEC: whatever comes next decides.
const PASS: i32 = -1;

/// What a damage has to do with: pod-a's link, its address.
struct Place {
    link: String,
    pod: IpAddr,
}

/// After so long a change of a directory of pins is told from another one.
const SETTLED: Duration = Duration::from_millis(150);

struct Damage {
    name: &'static str,
    /// Done inside the node.
    act: fn(&Place),
    /// What CHECK's message must contain, with the words of [`Scene::filled`].
    named: &'static str,
    by: By,
    /// Takes away what is foreign, and not ours to remove.
    after: fn(&Place),
    /// A port that stays counted, without any claim, until the first pod comes: a DEL takes off the count
    /// what it takes off the claims.
    counted: Option<u16>,
}

const fn damage(by: By, name: &'static str, act: fn(&Place), named: &'static str) -> Damage {
    Damage { name, act, named, by, after: |_| {}, counted: None }
}

const DAMAGES: [Damage; 33] = [
    damage(By::Any, "the map of claims unpinned", |_| unpin("pm_claims"), "pm_claims is missing"),
    damage(By::Any, "the ports unpinned", |_| unpin("pm_ports"), "pm_ports is missing"),
    damage(By::Any, "the uses unpinned", |_| unpin("pm_port_uses"), "pm_port_uses is missing"),
    damage(By::Any, "the traffic unpinned", |_| unpin("pm_traffic"), "pm_traffic is missing"),
    damage(By::Any, "the addresses unpinned", |_| unpin("pm_addresses"), "pm_addresses is missing"),
    damage(By::Any, "the configuration unpinned", |_| unpin("pm_config"), "pm_config is missing"),
    damage(By::Any, "the flows unpinned", |_| unpin("pm_flows"), "pm_flows is missing"),
    damage(
        By::Any,
        "the ports for others unpinned",
        |_| unpin("pm_remaps"),
        "pm_remaps is missing",
    ),
    damage(By::Any, "the fragments unpinned", |_| unpin("pm_fragments"), "pm_fragments is missing"),
    damage(By::Any, "the sockets unpinned", |_| unpin("pm_sockets"), "pm_sockets is missing"),
    damage(By::Any, "the streams unpinned", |_| unpin("pm_streams"), "pm_streams is missing"),
    damage(By::Any, "the reasons unpinned", |_| unpin("pm_reasons"), "pm_reasons is missing"),
    damage(By::Any, "a program unpinned", |_| unpin("pm_out"), "program pm_out is missing"),
    damage(
        By::Any,
        "a socket program unpinned",
        |_| unpin("pm_recvmsg4"),
        "pm_recvmsg4 is missing",
    ),
    damage(By::Any, "all maps unpinned", |_| remove("m"), "there are no eBPF maps"),
    damage(By::Any, "all programs unpinned", |_| remove("p-"), "program pm_out is missing"),
    damage(By::Any, "everything unpinned", |_| remove(""), "there are no eBPF maps"),
    Damage {
        counted: Some(8080),
        ..damage(
            By::Own,
            "a claim removed",
            |_| assert!(ebpf::map("pm_claims").remove(any_claim().as_bytes()).unwrap()),
            "tcp 0.0.0.0:8080 expected to lead to POD:80, found nothing",
        )
    },
    damage(
        By::Own,
        "a claim changed",
        |_| {
            let value = ClaimValue::new(SocketAddr::from((Ipv4Addr::new(10, 9, 9, 9), 80)), 7);
            ebpf::map("pm_claims").put(any_claim().as_bytes(), value.as_bytes()).unwrap();
        },
        "tcp 0.0.0.0:8080 expected to lead to POD:80, found 10.9.9.9:80",
    ),
    damage(
        By::Own,
        "a claim of another owner",
        |place| {
            let value = ClaimValue::new(SocketAddr::new(place.pod, 80), 7);
            ebpf::map("pm_claims").put(any_claim().as_bytes(), value.as_bytes()).unwrap();
        },
        "tcp 0.0.0.0:8080 has another owner",
    ),
    Damage {
        counted: Some(80),
        ..damage(
            By::Own,
            "the pod behind a claim removed",
            |place| {
                let key = ClaimKey::new(place.pod.into(), Protocol::Tcp, 80);
                assert!(ebpf::map("pm_claims").remove(key.as_bytes()).unwrap());
            },
            "tcp POD:80 expected to lead to POD:80, found nothing",
        )
    },
    damage(By::Own, "a port's bit cleared", |_| clear_bit(8080), "programs skip port 8080"),
    damage(
        By::Own,
        "a port's uses forgotten",
        |_| assert!(ebpf::map("pm_port_uses").remove(8080_u16.as_bytes()).unwrap()),
        "port 8080 is not counted as used",
    ),
    damage(
        By::Any,
        "an address of the node removed",
        |_| {
            let addr = Addr::from(node_address());
            assert!(ebpf::map("pm_addresses").remove(addr.as_bytes()).unwrap());
        },
        "NODE is not known as an address of the node",
    ),
    damage(
        By::Any,
        "an address that is not the node's added",
        |_| {
            let addr = Addr::from(IpAddr::from(Ipv4Addr::new(192, 0, 2, 99)));
            ebpf::map("pm_addresses").put(addr.as_bytes(), 1_u32.as_bytes()).unwrap();
        },
        "192.0.2.99 is known as an address of the node, and is none",
    ),
    damage(
        By::Any,
        "the configuration cleared",
        |_| ebpf::map("pm_config").put(&[0; 4], &[0; size_of::<Config>()]).unwrap(),
        "the programs at sockets act in no network namespace",
    ),
    damage(
        By::Any,
        "a filter deleted",
        |place| tc(&["filter", "del", "dev", &place.link, "ingress"]),
        "LINK: program pm_pod_in expected as the first filter of clsact ingress, found nothing",
    ),
    damage(
        By::Any,
        "a qdisc deleted",
        |place| tc(&["qdisc", "del", "dev", &place.link, "clsact"]),
        "LINK: program pm_out expected as the first filter of clsact egress, found nothing",
    ),
    damage(
        By::Any,
        "an uplink's program detached",
        |_| detach(UPLINK, Direction::Ingress),
        "eth0: program pm_uplink_in expected at the head of tcx ingress, found nothing",
    ),
    Damage {
        after: |_| detach(UPLINK, Direction::Egress),
        ..damage(
            By::Any,
            "a foreign program put before it",
            |_| {
                let device = ebpf::index_of(UPLINK);
                tcx::attach_first(device, Direction::Egress, &foreign("foreign")).unwrap();
            },
            "eth0: program pm_out expected at the head of tcx egress, found it behind",
        )
    },
    damage(
        By::Any,
        "another version's program in its place",
        |_| {
            let device = ebpf::index_of(UPLINK);
            detach(UPLINK, Direction::Ingress);
            tcx::attach_first(device, Direction::Ingress, &foreign("pm_uplink_in")).unwrap();
        },
        "eth0: program pm_uplink_in expected at the head of tcx ingress, found another version's",
    ),
    Damage {
        after: |_| detach(UPLINK, Direction::Ingress),
        ..damage(
            By::Any,
            "another version's program behind a foreign one",
            |_| {
                let device = ebpf::index_of(UPLINK);
                detach(UPLINK, Direction::Ingress);
                for name in ["pm_uplink_in", "foreign"] {
                    tcx::attach_first(device, Direction::Ingress, &foreign(name)).unwrap();
                }
            },
            "eth0: program pm_uplink_in expected at the head of tcx ingress, found another version's",
        )
    },
    damage(
        By::Any,
        "socket programs detached",
        |_| ebpf::detach_from_sockets(&[SocketHook::Connect4, SocketHook::Recvmsg6]),
        "cgroup /: program pm_connect4 expected, found",
    ),
];

fn unpin(name: &str) {
    std::fs::remove_file(&ebpf::pinned(Path::new(PINS))[name]).unwrap();
}

/// The directories whose names begin so; with "" the one that they are in.
fn remove(prefix: &str) {
    if prefix.is_empty() {
        return std::fs::remove_dir_all(PINS).unwrap();
    }
    let entries = std::fs::read_dir(PINS).unwrap().map(|entry| entry.unwrap());
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    let removed = named.map(|entry| std::fs::remove_dir_all(entry.path()).unwrap()).count();
    assert_eq!(removed, 1);
}

fn any_claim() -> ClaimKey {
    ClaimKey::new(Addr::any(Family::V4), Protocol::Tcp, 8080)
}

/// Addresses of the laboratory's node are the same in each.
fn node_address() -> IpAddr {
    let uplink = ebpf::index_of(UPLINK);
    let mut reader = portmap::sys::netlink::route::RouteReader::open().unwrap();
    let addresses = reader.addresses().unwrap();
    addresses.iter().find(|one| one.index == uplink && one.ip.is_ipv4()).unwrap().ip
}

fn clear_bit(port: u16) {
    let (index, bit) = port_bit(port);
    let ports = ebpf::map("pm_ports");
    let word = ports.get(index.as_bytes()).unwrap().unwrap();
    let word = u64::from_ne_bytes(word.try_into().unwrap());
    assert_ne!(word & bit, 0);
    ports.put(index.as_bytes(), (word & !bit).as_bytes()).unwrap();
}

fn tc(arguments: &[&str]) {
    let done = std::process::Command::new("tc").args(arguments).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// The last program of the device.
fn detach(device: &str, direction: Direction) {
    let index = ebpf::index_of(device);
    let id = *tcx::query(index, direction).unwrap().programs.last().unwrap();
    let program = Program::from_id(id).unwrap().unwrap();
    assert!(tcx::detach(index, direction, &program).unwrap());
}

/// A program that passes everything on, and is forgotten by us.
fn foreign(name: &str) -> Program {
    programs::classifier(name, PASS)
}

impl Scene<'_> {
    /// Says of the kernel what is not so, before the first ADD would find it out.
    fn pretend(&self, change: impl FnOnce(&mut Features)) {
        let mut features = Features::probe().unwrap();
        change(&mut features);
        let notes = self.node.state_dir.join("notes");
        std::fs::create_dir_all(&notes).unwrap();
        let note = serde_json::json!({"features": features});
        std::fs::write(notes.join("kernel"), note.to_string()).unwrap();
    }

    fn place(&self) -> Place {
        let pod = &self.lab.pods[0];
        Place { link: pod.host_link.clone(), pod: pod.address(Family::V4).unwrap() }
    }

    fn inflict(&self, act: fn(&Place)) {
        self.lab.node.run(|| act(&self.place())).unwrap();
    }

    /// Lets an ADD note what has its name in the bpffs, so that later ones need not look for it by name:
    /// of a change just now it would not know whether another one follows.
    fn settle(&self) {
        std::thread::sleep(SETTLED);
        self.ok("ADD", 2);
        self.ok("DEL", 2);
        let note = std::fs::read(self.node.state_dir.join("notes/kernel")).unwrap();
        let note: Value = serde_json::from_slice(&note).unwrap();
        assert!(note["programs"]["seen"].is_object(), "{note}");
    }

    fn bear(&self, damage: &Damage, whole: &[String]) {
        let what = damage.name;
        self.settle();
        self.inflict(damage.act);
        let (config, attachment) = &self.pods[0];
        let (code, text) = self.node.fails("CHECK", config, attachment);
        let named = self.filled(damage.named);
        assert!(code == 102 && text.contains(&named), "{what}: no {named:?} in {code} {text}");
        match damage.by {
            By::Any => self.ok("ADD", 2),
            By::Own => self.ok("ADD", 0),
        }
        self.ok("CHECK", 0);
        self.ok("CHECK", 1);
        self.assert_reached(0, what);
        if damage.by == By::Any {
            self.ok("CHECK", 2);
            self.assert_reached(1, what);
            self.ok("DEL", 2);
        }
        self.inflict(damage.after);
        assert_eq!(ebpf::state(&self.lab.node), whole, "{what}");
        self.inflict(damage.act);
        self.restored(what);
        self.inflict(damage.after);
        assert_eq!(ebpf::state(&self.lab.node), whole, "{what}");
    }
}

impl Scene<'_> {
    /// No entry and no record tells of pod-a, beside so many pods. Where the maps are gone, so are the
    /// programs that would go on with them out of everybody's reach.
    fn assert_gone(&self, beside: usize, damage: &Damage) {
        let (what, port) = (damage.name, 8080);
        let mut found = entries(&self.lab.node);
        if let Some(counted) = damage.counted {
            assert!(found.port_uses.remove(&counted).is_some(), "{what}: {counted} is not counted");
            found.ports.retain(|port| *port != counted);
        }
        let of_pod = |ip: IpAddr| self.lab.pods[0].addresses.iter().any(|own| own.ip() == ip);
        let tells = |(key, value): &(&ClaimKey, &ClaimValue)| {
            key.port() == port || of_pod(key.addr.ip()) || of_pod(value.target().ip())
        };
        let left: Vec<_> = found.claims.iter().filter(tells).collect();
        assert!(left.is_empty(), "{what}: {left:?}");
        assert_eq!(found.port_uses.get(&port), None, "{what}");
        assert!(!found.ports.contains(&port), "{what}");
        assert!(!found.traffic.iter().any(|key| key.port() == port), "{what}");
        if beside == 0 {
            assert_eq!(found, Entries::default(), "{what}");
        }
        assert_eq!(self.node.records().len(), beside, "{what}");
        if maps(&self.lab.node).is_none() {
            assert_eq!(ebpf::hooks(&self.lab.node), Vec::<String>::new(), "{what}");
        }
        let call = Call::new(Transport::Tcp, self.lab.node_socket(Family::V4, port), TIMEOUT);
        assert_eq!(reach(&self.lab.client, call), Err(Failure::Refused), "{what}");
    }
}

fn lab() -> Lab {
    let mut options = Options::new(Shape::Cilium);
    options.pods = 3;
    Lab::build(options).unwrap()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn check_names_and_add_repairs_damage_to_ebpf() {
    let lab = lab();
    let scene = Scene::new(&lab, Variant::Ebpf);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    let whole = ebpf::state(&lab.node);
    for damage in &DAMAGES {
        scene.bear(damage, &whole);
    }
    scene.ok("DEL", 1);
    scene.ok("DEL", 0);
}

/// What an earlier call has seen is looked at again, however long ago it has changed.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_add_puts_back_what_lost_its_name_a_while_ago() {
    let lab = lab();
    let scene = Scene::new(&lab, Variant::Ebpf);
    scene.ok("ADD", 0);
    let whole = ebpf::state(&lab.node);
    for damage in DAMAGES.iter().filter(|damage| damage.name.ends_with("unpinned")) {
        scene.settle();
        scene.inflict(damage.act);
        std::thread::sleep(SETTLED);
        scene.ok("ADD", 2);
        scene.ok("CHECK", 0);
        scene.ok("DEL", 2);
        assert_eq!(ebpf::state(&lab.node), whole, "{}", damage.name);
    }
    scene.ok("DEL", 0);
}

/// Whether the outside client is answered.
fn answers(lab: &Lab, port: u16) -> bool {
    let call = Call::new(Transport::Tcp, lab.node_socket(Family::V4, port), TIMEOUT);
    reach(&lab.client, call).is_ok()
}

/// A pod goes while things are broken: it is gone all the same, and the others are still there or
/// come back.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn del_works_on_every_damage_and_nothing_is_left() {
    let lab = lab();
    for damage in &DAMAGES {
        let scene = Scene::new(&lab, Variant::Ebpf);
        let what = damage.name;
        scene.ok("ADD", 0);
        scene.inflict(damage.act);
        scene.ok("DEL", 0);
        scene.assert_gone(0, damage);
        if damage.counted.is_some() {
            scene.ok("ADD", 1);
            scene.ok("DEL", 1);
            assert_eq!(entries(&lab.node), Entries::default(), "{what}");
        }
        scene.ok("ADD", 0);
        scene.ok("ADD", 1);
        scene.inflict(damage.after);
        scene.inflict(damage.act);
        scene.ok("DEL", 0);
        scene.assert_gone(1, damage);
        scene.ok("ADD", 1);
        scene.ok("CHECK", 1);
        assert!(answers(&lab, 8081), "{what}");
        scene.ok("DEL", 1);
        scene.inflict(damage.after);
        let flushed = scene.node.flush();
        assert!(flushed.success(), "{what}: {}", flushed.stderr);
        assert_eq!(ebpf::hooks(&lab.node), Vec::<String>::new(), "{what}");
        assert_eq!(pins(&lab.node).unwrap(), Vec::<PathBuf>::new(), "{what}");
    }
}

/// As before Linux 5.14, where the node's network namespace is known from the maps alone.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn nothing_is_left_where_only_lost_maps_know_the_node() {
    let lab = lab();
    let other = Lab::build(lab.options.clone()).unwrap();
    let beside = Scene::new(&other, Variant::Ebpf);
    beside.ok("ADD", 0);
    let of_other = ebpf::at_sockets(&other.node);
    for what in ["everything unpinned", "all maps unpinned", "the configuration unpinned"] {
        let damage = DAMAGES.iter().find(|damage| damage.name == what).unwrap();
        for by_flush in [false, true] {
            let scene = Scene::new(&lab, Variant::Ebpf);
            scene.pretend(|kernel| kernel.cookie_option = false);
            scene.ok("ADD", 0);
            let answered = |address: IpAddr| {
                let call = Call::new(Transport::Tcp, SocketAddr::new(address, 8080), TIMEOUT);
                reach(&lab.node, call).is_ok()
            };
            let own = [lab.node_address(Family::V4), Ipv4Addr::LOCALHOST.into()];
            assert_eq!(own.map(answered), [true; 2]);
            scene.inflict(damage.act);
            if by_flush {
                let flushed = scene.node.flush();
                assert!(flushed.success(), "{what}: {}", flushed.stderr);
            } else {
                scene.ok("DEL", 0);
            }
            assert_eq!(own.map(answered), [false; 2], "{what}, by flush: {by_flush}");
            if by_flush || what == "everything unpinned" {
                assert_eq!(ebpf::at_sockets(&lab.node), Vec::<String>::new(), "{what}");
            }
            assert_eq!(ebpf::at_sockets(&other.node), of_other, "{what}");
        }
    }
    beside.ok("DEL", 0);
}

/// Pins vanish under a mount and come back when it goes, with programs and entries of long ago.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_bpffs_may_be_mounted_over_and_unmounted() {
    let lab = lab();
    let scene = Scene::new(&lab, Variant::Ebpf);
    (0..3).for_each(|pod| scene.ok("ADD", pod));
    let missing = |pod: usize| {
        let (code, text) = scene.node.fails("CHECK", &scene.pods[pod].0, &scene.pods[pod].1);
        assert!(code == 102 && text.contains("there are no eBPF maps"), "{code} {text}");
    };
    let in_node = |act: fn()| lab.node.run(act).unwrap();
    in_node(|| {
        let none = None::<&str>;
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).unwrap();
    });
    missing(0);
    scene.ok("ADD", 1);
    (0..3).for_each(|pod| scene.ok("CHECK", pod));
    scene.assert_reached(0, "mounted over");
    scene.ok("DEL", 2);
    // The first one's claims still have pod-c, and its programs are attached nowhere.
    in_node(|| umount("/sys/fs/bpf").unwrap());
    scene.node.fails("CHECK", &scene.pods[0].0, &scene.pods[0].1);
    scene.ok("ADD", 1);
    (0..2).for_each(|pod| scene.ok("CHECK", pod));
    scene.assert_reached(0, "unmounted");
    assert!(!answers(&lab, 8082));
    // The machine's own may lie underneath.
    in_node(|| while umount("/sys/fs/bpf").is_ok() {});
    missing(0);
    scene.ok("ADD", 1);
    (0..2).for_each(|pod| scene.ok("CHECK", pod));
    scene.assert_reached(0, "without any");
    in_node(|| while umount("/sys/fs/bpf").is_ok() {});
    scene.ok("DEL", 0);
    assert!(!answers(&lab, 8080));
    scene.ok("CHECK", 1);
    scene.ok("DEL", 1);
}

/// Connections are remembered in maps that are made anew.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn open_connections_survive_repairs() {
    let lab = lab();
    let scene = Scene::new(&lab, Variant::Ebpf);
    scene.ok("ADD", 0);
    let open = |from: &Netns, target: SocketAddr, transport| {
        let mut session = Session::open(from, Call::new(transport, target, TIMEOUT)).unwrap();
        session.ask().unwrap();
        session
    };
    let mut sessions: Vec<(String, Session)> = Vec::new();
    for family in &lab.options.families {
        let target = lab.node_socket(*family, 8080);
        for transport in [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected] {
            for from in [&lab.client, &lab.node, &lab.pods[1].netns, &lab.pods[0].netns] {
                let what = format!("{} {transport} {target}", from.name());
                sessions.push((what, open(from, target, transport)));
            }
        }
    }
    let flows = || {
        let entries = || ebpf::map("pm_flows").entries().unwrap();
        let keys = lab.node.run(entries).unwrap().into_iter().map(|(key, _)| key);
        keys.collect::<BTreeSet<_>>()
    };
    for act in [
        (|_| unpin("pm_port_uses")) as fn(&Place),
        |_| unpin("pm_claims"),
        |_| unpin("pm_out"),
        |_| remove("p-"),
    ] {
        let before = flows();
        scene.inflict(act);
        scene.ok("ADD", 1);
        // A pod may be the first to say something.
        assert!(before.is_subset(&flows()));
        for (what, session) in &mut sessions {
            session.ask().unwrap_or_else(|failure| panic!("{what}: {failure}"));
        }
    }
}
