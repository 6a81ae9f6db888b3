//! SIGKILL while another version's maps and programs give way to the plugin's own: connections go on all
//! the time, and the next call finishes what was begun. Each try loads three sets of programs: a run takes
//! every 64th call of bpf(2) and every eighth of the others, beginning with a random one;
//! `PORTMAP_KILL_STEP=1` takes all of them.

use std::path::Path;

use portmap::backend::ebpf::loaded::OWN;
use portmap::demo::plugin;
use portmap::demo::topology::{Lab, Options, Shape, UPLINK};
use portmap::demo::traffic::{Call, Session, Transport};
use portmap::sys::bpf::{Direction, tcx};

use super::boundaries::{first_number, killed_before, step};
use super::support::{Node, PORTMAP, Variant, ebpf, programs, strace, versions};
use super::{FIRST, LIVING, Random, Stage, TIMEOUT, Trial, VICTIM, seed};

/// Open connections to the neighbour's hostPort.
struct Talks(Vec<(String, Session)>);

impl Talks {
    /// From the client, from the node, from another pod, from the neighbour itself.
    fn open(lab: &Lab) -> Self {
        let mut talks = Talks(Vec::new());
        for family in &lab.options.families {
            let target = lab.node_socket(*family, LIVING);
            for transport in [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected] {
                for from in [&lab.client, &lab.node, &lab.pods[0].netns, &lab.pods[1].netns] {
                    let what = format!("{} {transport} {target}", from.name());
                    let session = Session::open(from, Call::new(transport, target, TIMEOUT));
                    let session = session.unwrap_or_else(|failure| panic!("{what}: {failure}"));
                    talks.0.push((what, session));
                }
            }
        }
        talks.go_on("before");
        talks
    }

    fn go_on(&mut self, when: &str) {
        for (what, session) in &mut self.0 {
            session.ask().unwrap_or_else(|failure| panic!("{when}: {what}: {failure}"));
        }
    }
}

/// The first call of the new version, killed before its first call of a kind, its second one, and so on.
fn walk(trial: &mut Trial, stage: Stage, calls: &str) -> usize {
    let first = trial.config(0, &FIRST, 80);
    let neighbour = trial.config(1, &[LIVING], 80);
    let (key, other) = (trial.key(0), trial.key(1));
    let (lab, node, older) = (trial.lab, trial.node, versions::older());
    let verb = if stage == Stage::Add { "ADD" } else { "DEL" };
    let baseline = trial.state();
    let step = step(if calls == "bpf" { 64 } else { 8 });
    for number in (first_number(trial, step)..).step_by(step) {
        let what = format!("{verb}, {calls} {number}");
        if stage == Stage::Del {
            node.ok("ADD", &first, &key);
        }
        versions::load(node, &older);
        let mut talks = Talks::open(lab);
        let command = plugin::command(Path::new(PORTMAP), verb, &key);
        let killed = killed_before(node, command, &first.to_string(), calls, number);
        talks.go_on(&what);
        // The pod comes again, it goes, or others come.
        match number % 3 {
            0 => {
                node.ok("ADD", &first, &key);
                node.ok("CHECK", &first, &key);
                trial.assert_answers(0, VICTIM);
            }
            1 => {}
            _ => drop(node.ok("ADD", &neighbour, &other)),
        }
        node.ok("DEL", &first, &key);
        trial.assert_closed(VICTIM);
        trial.assert_answers(1, LIVING);
        if versions::pinned(node.netns) == versions::only(&older) {
            // It had begun nothing, and there was nothing to take away.
            assert!(stage == Stage::Add && number % 3 == 1, "{what}: the upgrade is left undone");
            node.ok("ADD", &neighbour, &other);
        }
        assert_eq!(versions::pinned(node.netns), versions::only(&OWN), "{what}");
        node.ok("CHECK", &neighbour, &other);
        talks.go_on(&what);
        trial.assert_unchanged(&baseline);
        if !killed {
            return number;
        }
    }
    unreachable!("a command makes a finite number of calls")
}

fn walk_all(seed: u64, stage: Stage) {
    let lab = Lab::build(Options::new(Shape::Cilium)).unwrap();
    let node = Node::new(&lab.node, Variant::Ebpf);
    let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80], &[80]).unwrap()).collect();
    let mut trial = Trial::new(&lab, &node, Random(seed));
    let foreign = || {
        let program = programs::classifier("foreign_in", -1);
        tcx::attach_first(ebpf::index_of(UPLINK), Direction::Ingress, &program).unwrap();
    };
    lab.node.run(foreign).unwrap();
    let (first, neighbour) = (trial.config(0, &FIRST, 80), trial.config(1, &[LIVING], 80));
    node.ok("ADD", &neighbour, &trial.key(1));
    // With what the first pod's coming leaves behind.
    node.ok("ADD", &first, &trial.key(0));
    node.ok("DEL", &first, &trial.key(0));
    let ends = strace::CHANGES.map(|calls| walk(&mut trial, stage, calls));
    assert!(ends.iter().sum::<usize>() > 50, "{stage:?}: strace has not traced");
    node.ok("DEL", &neighbour, &trial.key(1));
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_kill_between_system_calls_of_an_upgrading_add_is_healed() {
    let seed = seed();
    println!("PORTMAP_KILL_SEED={seed}");
    walk_all(seed, Stage::Add);
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_kill_between_system_calls_of_an_upgrading_del_is_healed() {
    let seed = seed();
    println!("PORTMAP_KILL_SEED={seed}");
    walk_all(seed, Stage::Del);
}
