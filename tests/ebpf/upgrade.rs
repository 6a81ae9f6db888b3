//! Programs of another version than the plugin's own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use portmap::backend::ebpf::loaded::{Build, OWN};
use portmap::demo::topology::Lab;
use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use portmap::sys::bpf::clsact::Clsact;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::pins::{Contents, Pins};
use portmap::sys::bpf::program::{Program, SocketHook};
use portmap::sys::bpf::{Direction, cgroup, tcx};
use portmap::sys::netlink::route::RouteReader;

use super::flows::Ends;
use super::support::ebpf::{self, PINS};
use super::support::{entries, programs, strace, versions};
use super::talks::Talks;
use super::{Scene, TIMEOUT, lab};

/// The plugin's own object as another revision: the same programs in a file with another digest.
fn other_revision(revision: u32) -> Build {
    let mut bytes = OWN.object.to_vec();
    // Sections are found by offsets from the beginning.
    bytes.extend([0; 8]);
    let words = bytes.len().div_ceil(8);
    let mut aligned: Vec<u64> = vec![0; words];
    for (word, chunk) in aligned.iter_mut().zip(bytes.chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_ne_bytes(bytes);
    }
    let words: &'static [u64] = Vec::leak(aligned);
    versions::build(zerocopy::IntoBytes::as_bytes(words), OWN.layout, revision)
}

impl Scene<'_> {
    fn loaded_by(&self, build: &Build) {
        versions::load(&self.node, build);
    }

    fn pinned(&self) -> Contents {
        versions::pinned(&self.lab.node)
    }

    /// Numbers of everything that is pinned, by name: maps and programs.
    fn ids(&self) -> (BTreeMap<String, u32>, BTreeMap<String, u32>) {
        let read = || {
            let (mut maps, mut programs) = (BTreeMap::new(), BTreeMap::new());
            for (name, path) in ebpf::pinned(Path::new(PINS)) {
                match path.parent().unwrap().file_name().unwrap().to_string_lossy().starts_with('m')
                {
                    true => maps.insert(name, Map::from_pin(&path).unwrap().unwrap().id()),
                    false => programs.insert(name, Program::from_pin(&path).unwrap().unwrap().id()),
                };
            }
            (maps, programs)
        };
        self.lab.node.run(read).unwrap()
    }
}

/// Somebody else's programs around this plugin's.
struct Foreign {
    sockets: Vec<Program>,
    _uplink: Program,
}

const HOOK: SocketHook = SocketHook::Connect4;

impl Foreign {
    /// Before this plugin has attached anything.
    fn new(scene: &Scene) -> Self {
        let attach = || {
            let uplink = programs::classifier("foreign_in", -1);
            let device = ebpf::index_of(portmap::demo::topology::UPLINK);
            tcx::attach_first(device, Direction::Ingress, &uplink).unwrap();
            uplink
        };
        let _uplink = scene.lab.node.run(attach).unwrap();
        let mut foreign = Foreign { sockets: Vec::new(), _uplink };
        foreign.attach_another();
        foreign
    }

    fn attach_another(&mut self) {
        let program = programs::socket_program("foreign_sock", HOOK);
        cgroup::root().unwrap().attach(HOOK, &program).unwrap();
        self.sockets.push(program);
    }

    /// Where this node's program is at the root cgroup: how many of the foreign ones run before it.
    fn before(&self, ours: u32) -> usize {
        let attached = cgroup::root().unwrap().query(HOOK).unwrap().programs;
        let end = attached.iter().position(|id| *id == ours).expect("it is not attached");
        let foreign = |id: &&u32| self.sockets.iter().any(|program| program.id() == **id);
        attached[..end].iter().filter(foreign).count()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        for program in &self.sockets {
            cgroup::root().unwrap().detach(HOOK, program).unwrap();
        }
    }
}

/// Maps and programs are freed some time after the last reference is gone.
fn assert_gone(maps: &BTreeMap<String, u32>, programs: &BTreeMap<String, u32>) {
    for _ in 0..5000 {
        let maps = maps.values().filter(|id| Map::from_id(**id).unwrap().is_some());
        let programs = programs.values().filter(|id| Program::from_id(**id).unwrap().is_some());
        if maps.count() + programs.count() == 0 {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    panic!("former maps or programs are still there");
}

/// What is remembered of connections: original destination by the key of the pod's answers.
fn flows(scene: &Scene, layout: u32) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let read = || {
        let map = Pins::open().unwrap().map(layout, "pm_flows").unwrap().unwrap();
        map.entries().unwrap().into_iter().collect()
    };
    scene.lab.node.run(read).unwrap()
}

/// As long as an older layout's values are: up to the owner.
const COMMON: usize = 44;

#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_older_layout_is_upgraded_while_connections_go_on() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    let mut foreign = Foreign::new(&scene);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    foreign.attach_another();
    let older = versions::older();
    // A connection of the node from a hostPort's number is remembered, too.
    scene.node.ok("ADD", &scene.config_with(2, 40_000), &scene.key(2));
    scene.loaded_by(&older);
    let mut talks = Talks::open(&lab);
    let call = Call::new(Transport::Tcp, lab.node_socket(Family::V4, Scene::port(1)), TIMEOUT);
    reach(&lab.client, call).unwrap();
    let mut ends = Ends::open(&lab, 40_000);
    ends.node_speaks();
    let (maps, programs) = scene.ids();
    let places = ebpf::hooks(&lab.node);
    assert_eq!(foreign.before(programs["pm_connect4"]), 1);
    let mut remembered = flows(&scene, 0);
    // Each but those of the node's own sockets, which need none.
    assert!(remembered.len() >= 18, "{}", remembered.len());

    talks.during_a_change_of_maps(|| drop(scene.ok("ADD", 1)));

    assert_eq!(scene.pinned(), versions::only(&OWN));
    assert_gone(&maps, &programs);
    assert_eq!(ebpf::hooks(&lab.node), places);
    let (_, programs) = scene.ids();
    assert_eq!(foreign.before(programs["pm_connect4"]), 1);
    (0..2).for_each(|pod| drop(scene.ok("CHECK", pod)));
    let now = flows(&scene, OWN.layout);
    remembered
        .retain(|key, old| now.get(key).is_none_or(|new| new[..COMMON - 8] != old[..COMMON - 8]));
    assert!(remembered.is_empty(), "forgotten: {remembered:?}");
    assert!(scene.counted(1, |traffic| traffic.packets_in) > 0);
    talks.go_on();
    ends.client_speaks();
    scene.ok("DEL", 2);
    scene.ok("DEL", 0);
}

/// With what kernels before 5.6 have: entries are carried over one by one, and filters are replaced at all
/// devices.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_older_layout_is_upgraded_on_an_old_kernel() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    scene.node.pretend(|kernel| {
        (kernel.tcx, kernel.batches, kernel.getpeername) = (false, false, false);
        kernel.cgroup_replace = false;
    });
    (0..2).for_each(|pod| drop(scene.ok("ADD", pod)));
    scene.loaded_by(&versions::older());
    let mut talks = Talks::open(&lab);
    let (maps, programs) = scene.ids();
    let places = ebpf::hooks(&lab.node);
    assert!(!places.iter().any(|place| place.contains(" tcx ")), "{places:#?}");

    talks.during_a_change_of_maps(|| drop(scene.ok("ADD", 1)));

    assert_eq!(scene.pinned(), versions::only(&OWN));
    assert_gone(&maps, &programs);
    assert_eq!(ebpf::hooks(&lab.node), places);
    (0..2).for_each(|pod| drop(scene.ok("CHECK", pod)));
    talks.go_on();
    (0..2).for_each(|pod| drop(scene.ok("DEL", pod)));
}

/// Numbers of the programs at all devices: at ingress, and at egress.
fn at_devices(lab: &Lab) -> [BTreeSet<u32>; 2] {
    let read = || {
        let links = RouteReader::open().unwrap().links().unwrap();
        let mut clsact = Clsact::open().unwrap();
        Direction::ALL.map(|direction| {
            let mut ids = BTreeSet::new();
            for link in &links {
                ids.extend(tcx::query(link.index, direction).unwrap().programs);
                let filters = clsact.filters(link.index, direction).unwrap();
                ids.extend(filters.into_iter().filter_map(|filter| filter.program));
            }
            ids
        })
    };
    lab.node.run(read).unwrap()
}

/// While programs of two versions are at work, those at egress know what they do not know, and those at
/// ingress make no connections that these have never heard of.
#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn egress_goes_before_ingress_and_answers_are_held() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let mut mixed = [0; 2];
    for number in (1 + std::process::id() as usize % 2..).step_by(2) {
        scene.loaded_by(&versions::older());
        let [ingress, egress] = at_devices(&lab);
        let (command, input) = (scene.command(&[], "ADD", 1), scene.config(1).to_string());
        let how = format!("signal=SIGKILL:when={number}");
        let (output, _) = strace::tampered(&lab.node, &command, &input, "sendto,sendmsg", &how);
        if output.status.is_some() {
            break;
        }
        let [now_in, now_out] = at_devices(&lab);
        let changed = [now_in != ingress, now_out != egress];
        let done = [now_in.is_disjoint(&ingress), now_out.is_disjoint(&egress)];
        assert!(!changed[0] || done[1], "before netlink's call {number}: ingress has changed");
        if changed.contains(&true) && !done[0] {
            assert_ne!(scene.told().hold_until, 0, "before netlink's call {number}");
            mixed[usize::from(changed[0])] += 1;
        }
    }
    assert!(!mixed.contains(&0), "strace has not traced: {mixed:?}");
    scene.ok("ADD", 1);
    assert_eq!(scene.told().hold_until, 0);
    (0..2).for_each(|pod| drop(scene.ok("DEL", pod)));
}

/// Hooks of cgroups at which a command attaches or detaches programs, in its order.
fn in_turn(scene: &Scene, command: &Command, input: &str, action: &str) -> Vec<String> {
    let (output, log) = strace::traced(&scene.lab.node, command, input, "bpf");
    assert!(output.success(), "{}", output.reason());
    let done = log.lines().filter(|line| line.contains(action) && line.ends_with(" = 0"));
    let hook = |line: &str| {
        let (_, rest) = line.split_once("attach_type=BPF_CGROUP_")?;
        Some(rest.split([',', '}']).next()?.to_owned())
    };
    done.filter_map(hook).collect()
}

/// Nodes in containers share the root cgroup, and tell by the programs at some hooks whose the others are:
/// with each look they find one of these, with the same maps as any other of its node.
#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn programs_that_tell_whose_others_are_come_first_and_go_last() {
    const FIRST: &str = "INET4_CONNECT";
    const TELLING: [&str; 3] = ["INET6_CONNECT", "UDP4_SENDMSG", "UDP6_SENDMSG"];
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let add = |pod: usize| {
        let (command, input) = (scene.command(&[], "ADD", pod), scene.config(pod).to_string());
        in_turn(&scene, &command, &input, "BPF_PROG_ATTACH")
    };
    let hooks = add(0);
    assert_eq!((hooks.len(), hooks[0].as_str()), (SocketHook::ALL.len(), FIRST), "{hooks:?}");
    scene.loaded_by(&versions::older());
    // The former one stays until all others have changed.
    let hooks = add(1);
    assert_eq!((hooks.len(), hooks.last().unwrap().as_str()), (SocketHook::ALL.len(), FIRST));
    assert!(TELLING.iter().all(|hook| hooks[..3].iter().any(|one| one == hook)), "{hooks:?}");
    let hooks = in_turn(&scene, &scene.node.flush_command(), "", "BPF_PROG_DETACH");
    assert_eq!((hooks.len(), hooks.last().unwrap().as_str()), (SocketHook::ALL.len(), FIRST));
}

/// A pod that goes may be the first one that the new version is called for.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_older_layout_is_upgraded_by_del_as_well() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    scene.loaded_by(&versions::older());
    let (maps, programs) = scene.ids();
    let mut talks = Talks::open(&lab);
    talks.during_a_change_of_maps(|| drop(scene.ok("DEL", 1)));
    assert_eq!(scene.pinned(), versions::only(&OWN));
    assert_gone(&maps, &programs);
    scene.ok("CHECK", 0);
    // Its counters have not come along with the last connections.
    let traffic = entries::entries(&lab.node).traffic;
    assert!(traffic.iter().all(|key| key.port() != Scene::port(1)), "{traffic:?}");
    // The last one takes everything of another version with it.
    scene.loaded_by(&versions::older());
    let (maps, programs) = scene.ids();
    scene.ok("DEL", 0);
    assert_eq!(scene.pinned(), Contents::default());
    assert_eq!(ebpf::hooks(&lab.node), Vec::<String>::new());
    assert_gone(&maps, &programs);
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn another_object_of_the_same_layout_is_replaced_on_the_same_maps() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    let other = other_revision(OWN.revision);
    scene.loaded_by(&other);
    let mut talks = Talks::open(&lab);
    let (maps, programs) = scene.ids();
    let places = ebpf::hooks(&lab.node);
    talks.during(|| drop(scene.ok("ADD", 0)));
    assert_eq!(scene.pinned(), versions::only(&OWN));
    assert_eq!(scene.ids().0, maps);
    assert_eq!(ebpf::hooks(&lab.node), places);
    assert_gone(&BTreeMap::new(), &programs);
    scene.ok("CHECK", 0);
}

/// An older plugin works on a newer one's maps, and leaves the newer programs in place.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn newer_programs_of_the_same_layout_are_left_in_place() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    assert_eq!(scene.told().revision, OWN.revision);
    let newer = other_revision(OWN.revision + 1);
    scene.loaded_by(&newer);
    let ids = scene.ids();
    let mut talks = Talks::open(&lab);
    talks.during(|| drop(scene.ok("ADD", 1)));
    (0..2).for_each(|pod| drop(scene.ok("CHECK", pod)));
    assert_eq!((scene.pinned(), scene.ids()), (versions::only(&newer), ids.clone()));
    scene.ok("DEL", 0);
    scene.ok("ADD", 0);
    // What the newer one has not loaded comes from the own object, and nothing of it is renamed.
    lab.node
        .run(|| std::fs::remove_file(&ebpf::pinned(Path::new(PINS))["pm_out"]).unwrap())
        .unwrap();
    scene.fails("CHECK", 0);
    scene.ok("ADD", 1);
    (0..2).for_each(|pod| drop(scene.ok("CHECK", pod)));
    let mut digests = vec![newer.digest.to_owned(), OWN.digest.to_owned()];
    digests.sort();
    assert_eq!(scene.pinned().revisions, digests);
    let (maps, mut programs) = scene.ids();
    assert_ne!(programs.insert("pm_out".into(), ids.1["pm_out"]), Some(ids.1["pm_out"]));
    assert_eq!((maps, programs), ids);
    Talks::open(&lab);
    // The newer plugin takes it back.
    scene.loaded_by(&newer);
    scene.ok("CHECK", 0);
}

/// A newer plugin was killed before it took the former maps' names away, which are as they were seen last.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_newer_layout_is_noticed_beside_maps_that_are_known() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let settle = || std::thread::sleep(Duration::from_millis(150));
    scene.ok("ADD", 0);
    settle();
    scene.ok("ADD", 1);
    let newer = Path::new(PINS).join("m2");
    lab.node.run(|| std::fs::create_dir(&newer).unwrap()).unwrap();
    for _ in 0..2 {
        let (code, text) = scene.fails("ADD", 1);
        assert!(code == 104 && text.contains("layout 2 of a newer portmap"), "{code} {text}");
        settle();
    }
    lab.node.run(|| std::fs::remove_dir(&newer).unwrap()).unwrap();
    (0..2).for_each(|pod| drop(scene.ok("DEL", pod)));
}

/// Maps of a newer layout cannot be understood: an older plugin says so and keeps its hands off.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_newer_layout_is_not_touched() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    scene.ok("ADD", 0);
    scene.ok("ADD", 1);
    scene.loaded_by(&versions::newer());
    let mut talks = Talks::open(&lab);
    let state = || {
        let records = super::support::files_of(&scene.node.state_dir);
        (scene.ids(), ebpf::state(&lab.node), records)
    };
    let before = state();
    let expected = "the eBPF maps have layout 2 of a newer portmap, this one knows layouts up to 1";
    for (verb, pod, code) in
        [("ADD", 0, 104), ("ADD", 2, 104), ("CHECK", 0, 104), ("STATUS", 0, 50)]
    {
        let (found, text) = scene.fails(verb, pod);
        assert!(found == code && text.contains(expected), "{verb}: {found} {text}");
        assert_eq!(state(), before, "{verb}");
    }
    // A runtime repeats a DEL that fails for ever.
    let note = scene.ok("DEL", 0);
    assert!(note.contains("is left alone") && note.contains(expected), "{note}");
    assert_eq!(state(), before, "DEL");
    let mut gc = scene.config(0);
    gc["cni.dev/valid-attachments"] = serde_json::json!([]);
    let note = scene.node.ok("GC", &gc, &scene.key(0)).stderr;
    assert!(note.contains("is left alone") && note.contains(expected), "{note}");
    assert_eq!(state(), before, "GC");
    let mut plain = scene.config(2);
    plain["runtimeConfig"]["portMappings"] = serde_json::json!([]);
    let note = scene.node.ok("ADD", &plain, &scene.key(2)).stderr;
    assert!(note.contains(expected), "{note}");
    assert_eq!(state(), before, "ADD without mappings");
    let flushed = scene.node.flush();
    assert_eq!(flushed.status, Some(1));
    assert!(flushed.stderr.contains(expected), "{}", flushed.stderr);
    assert_eq!(state(), before, "flush");
    // Other networks and backends are not concerned.
    talks.go_on();
    // An upgrade that was killed has left the former maps where they were.
    lab.node.run(|| std::fs::create_dir(Path::new(PINS).join("m1")).unwrap()).unwrap();
    let before = state();
    let (code, text) = scene.fails("ADD", 2);
    assert!(code == 104 && text.contains(expected), "{code} {text}");
    assert_eq!(state(), before, "ADD beside former maps");
    // For the flush at the end.
    lab.node.run(|| std::fs::remove_dir_all(PINS).unwrap()).unwrap();
}
