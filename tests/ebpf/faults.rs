//! System calls that fail, one at a time: an ADD that fails leaves nothing of its own, and whatever
//! fails can be repeated. Of calls of bpf(2), of which there are many, a run takes every eighth;
//! `PORTMAP_FAULT_STEP=1` takes all of them.

use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;

use super::support::{ebpf, strace};
use super::{Scene, TIMEOUT, lab};

/// How a call fails; writing and syncing a file as on a full disk.
fn error(calls: &str) -> &'static str {
    match calls {
        "bpf" => "ENOMEM",
        "sendto" | "sendmsg" => "ENOBUFS",
        _ => "ENOSPC",
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Of the first pod.
    Add,
    /// Of the first pod while another has its mapping.
    AddBeside,
    /// With other mappings than before.
    Again,
    Del,
    DelBeside,
    Flush,
}

impl Scene<'_> {
    fn reaches(&self, port: u16) -> Option<String> {
        let call = Call::new(Transport::Tcp, self.lab.node_socket(Family::V4, port), TIMEOUT);
        reach(&self.lab.client, call).ok().map(|reply| reply.server)
    }

    /// One stage with its `number`th call of a kind failing; false if there are fewer.
    fn fault(&self, stage: Stage, calls: &str, number: usize) -> bool {
        let what = format!("{stage:?}, {calls} {number}");
        let beside = matches!(stage, Stage::AddBeside | Stage::DelBeside);
        if beside {
            self.ok("ADD", 1);
        }
        if stage == Stage::Again {
            self.node.ok("ADD", &self.config_with(0, 9090), &self.key(0));
        }
        if matches!(stage, Stage::Del | Stage::DelBeside | Stage::Flush) {
            self.ok("ADD", 0);
        }
        let before = (ebpf::state(&self.lab.node), self.node.records());
        let (command, input) = match stage {
            Stage::Flush => (self.node.flush_command(), String::new()),
            Stage::Del | Stage::DelBeside => {
                (self.command(&[], "DEL", 0), self.config(0).to_string())
            }
            _ => (self.command(&[], "ADD", 0), self.config(0).to_string()),
        };
        let how = format!("error={}:when={number}", error(calls));
        let (output, met) = strace::tampered(&self.lab.node, &command, &input, calls, &how);
        match stage {
            Stage::Add | Stage::AddBeside | Stage::Again if output.success() => {
                self.ok("CHECK", 0);
                assert_eq!(self.reaches(8080).as_deref(), Some("pod-a"), "{what}");
            }
            Stage::Add | Stage::AddBeside | Stage::Again => {
                let now = (ebpf::state(&self.lab.node), self.node.records());
                assert_eq!(now, before, "{what}: {}", output.reason());
            }
            Stage::Del | Stage::DelBeside | Stage::Flush => {}
        }
        if beside {
            self.ok("CHECK", 1);
            assert_eq!(self.reaches(8081).as_deref(), Some("pod-b"), "{what}");
        }
        self.ok("DEL", 0);
        assert_eq!(self.reaches(8080), None, "{what}");
        if beside {
            self.ok("DEL", 1);
        }
        assert_eq!(self.node.records(), Vec::<String>::new(), "{what}");
        let flushed = self.node.flush();
        assert!(flushed.success(), "{what}: {}", flushed.stderr);
        assert_eq!(ebpf::state(&self.lab.node), Vec::<String>::new(), "{what}");
        met
    }
}

fn step() -> usize {
    std::env::var("PORTMAP_FAULT_STEP").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

fn walk(stages: &[Stage]) {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    for stage in stages {
        // What is written to standard output may be lost, and is no change.
        let changes = strace::CHANGES.into_iter().filter(|calls| *calls != "write");
        let ends = changes.map(|calls| {
            let step = if calls == "bpf" { step() } else { 1 };
            let mut numbers = (1 + std::process::id() as usize % step..).step_by(step);
            numbers.find(|number| !scene.fault(*stage, calls, *number)).unwrap()
        });
        assert!(ends.sum::<usize>() > 50, "{stage:?}: strace has not traced");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn an_add_of_which_a_call_fails_leaves_nothing() {
    walk(&[Stage::Add, Stage::AddBeside, Stage::Again]);
}

#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_del_of_which_a_call_fails_can_be_repeated() {
    walk(&[Stage::Del, Stage::DelBeside, Stage::Flush]);
}
