//! SIGKILL before system calls that change something: what comes between two of them is no other
//! state. Of calls of bpf(2), of which there are many, a run takes every eighth, beginning with a
//! random one; `PORTMAP_KILL_STEP=1` takes all of them, in some minutes.

use std::path::Path;
use std::process::Command;

use portmap::demo::plugin;
use portmap::demo::topology::{Lab, Options, Shape};

use super::support::{Node, PORTMAP, Variant, strace};
use super::{FIRST, LIVING, Random, Stage, Trial, VICTIM, seed};

/// Runs a command and kills it before its `number`th call; false if it made fewer.
pub fn killed_before(
    node: &Node,
    mut command: Command,
    input: &str,
    calls: &str,
    number: usize,
) -> bool {
    command.env("PATH", &node.path);
    let how = format!("signal=SIGKILL:when={number}");
    let (output, _) = strace::tampered(node.netns, &command, input, calls, &how);
    output.status.is_none()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// Nothing is loaded.
    Bare,
    /// Programs are there, and another pod has its mapping.
    Loaded,
}

/// One in how many calls is tried.
pub fn step(usual: usize) -> usize {
    std::env::var("PORTMAP_KILL_STEP").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Where a walk with such steps begins.
pub fn first_number(trial: &mut Trial, step: usize) -> usize {
    1 + usize::try_from(trial.random.below(64)).unwrap() % step
}

/// One stage from one start, killed before its first call of a kind, its second one, and so on.
fn walk(trial: &mut Trial, start: Start, stage: Stage, calls: &str) -> usize {
    let (first, second) = (trial.config(0, &FIRST, 80), trial.config(0, &[VICTIM + 2], 81));
    let neighbour = trial.config(1, &[LIVING], 80);
    let (key, other) = (trial.key(0), trial.key(1));
    let node = trial.node;
    if start == Start::Loaded {
        node.ok("ADD", &neighbour, &other);
        node.ok("ADD", &first, &key);
        node.ok("DEL", &first, &key);
    }
    let baseline = trial.state();
    let step = if calls == "bpf" { step(8) } else { 1 };
    for number in (first_number(trial, step)..).step_by(step) {
        if stage != Stage::Add {
            node.ok("ADD", &first, &key);
        }
        let (command, input) = match stage {
            Stage::Flush => (node.flush_command(), String::new()),
            Stage::Add => (plugin::command(Path::new(PORTMAP), "ADD", &key), first.to_string()),
            Stage::ReAdd => (plugin::command(Path::new(PORTMAP), "ADD", &key), second.to_string()),
            Stage::Del => (plugin::command(Path::new(PORTMAP), "DEL", &key), first.to_string()),
        };
        let killed = killed_before(node, command, &input, calls, number);
        if start == Start::Loaded && stage == Stage::Flush {
            node.ok("ADD", &neighbour, &other);
        }
        // The pod comes again, it goes, or others come and go.
        match number % 3 {
            0 => {
                node.ok("ADD", &first, &key);
                node.ok("CHECK", &first, &key);
                trial.assert_answers(0, VICTIM);
            }
            1 => {}
            _ => {
                node.ok("ADD", &neighbour, &other);
                node.ok("CHECK", &neighbour, &other);
                trial.assert_answers(1, LIVING);
            }
        }
        node.ok("DEL", &first, &key);
        trial.assert_closed(VICTIM);
        if start == Start::Bare {
            node.ok("DEL", &neighbour, &other);
            trial.flush();
        } else {
            trial.assert_answers(1, LIVING);
        }
        trial.assert_unchanged(&baseline);
        if !killed {
            if start == Start::Loaded {
                node.ok("DEL", &neighbour, &other);
                trial.flush();
            }
            return number;
        }
    }
    unreachable!("a command makes a finite number of calls")
}

/// Several walks, one after the other, on a node of their own.
fn walk_all(seed: u64, walks: &[(Start, Stage)]) {
    let lab = Lab::build(Options::new(Shape::Cilium)).unwrap();
    let node = Node::new(&lab.node, Variant::Ebpf);
    let _servers: Vec<_> = lab.pods.iter().map(|pod| pod.serve(&[80, 81], &[]).unwrap()).collect();
    let mut trial = Trial::new(&lab, &node, Random(seed));
    for (start, stage) in walks {
        let ends = strace::CHANGES.map(|calls| walk(&mut trial, *start, *stage, calls));
        assert!(ends.iter().sum::<usize>() > 50, "{start:?} {stage:?}: strace has not traced");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_kill_between_system_calls_of_a_first_add_flush_or_del_is_healed() {
    let seed = seed();
    println!("PORTMAP_KILL_SEED={seed}");
    walk_all(
        seed,
        &[(Start::Bare, Stage::Add), (Start::Loaded, Stage::Flush), (Start::Loaded, Stage::Del)],
    );
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_kill_between_system_calls_of_a_later_add_or_first_flush_is_healed() {
    let seed = seed();
    println!("PORTMAP_KILL_SEED={seed}");
    walk_all(
        seed,
        &[(Start::Bare, Stage::Flush), (Start::Loaded, Stage::Add), (Start::Loaded, Stage::ReAdd)],
    );
}
