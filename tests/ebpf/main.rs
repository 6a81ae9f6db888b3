//! The eBPF backend on its own: other versions of it, missing rights, kernels that can do less, what
//! programs remember, and taking it all away.
//!
//! Run as root: `cargo test --test ebpf -- --ignored`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "../support/mod.rs"]
mod support;

mod choice;
mod ended;
mod faults;
mod flows;
mod flush;
mod forced;
mod full;
mod group;
mod kinds;
mod links;
mod rights;
mod talks;
mod upgrade;

use std::time::Duration;

use portmap::backend::ebpf::layout::Config;
use portmap::backend::ebpf::loaded::OWN;
use portmap::demo::plugin::Attachment;
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::sys::bpf::object::Object;
use portmap::sys::bpf::pins::Pins;
use serde_json::{Value, json};
use support::{Node, Variant, attachment, ebpf, prev_result};
use zerocopy::FromBytes;

/// Long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(3);

fn lab(pods: usize) -> Lab {
    Lab::build(Options { pods, ..Options::new(Shape::Cilium) }).unwrap()
}

/// A node without tools, whose pods all serve TCP at 80 and UDP at 53.
struct Scene<'a> {
    lab: &'a Lab,
    node: Node<'a>,
    _servers: Vec<Servers>,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab) -> Self {
        let mut node = Node::new(&lab.node, Variant::Ebpf);
        node.cni_version = "1.1.0".into();
        let servers = lab.pods.iter().map(|pod| pod.serve(&[80], &[53]).unwrap()).collect();
        Scene { lab, node, _servers: servers }
    }

    /// hostPort 8080 of pod-a, 8081 of pod-b and so on, of both protocols.
    fn port(pod: usize) -> u16 {
        8080 + u16::try_from(pod).unwrap()
    }

    fn config(&self, pod: usize) -> Value {
        self.config_with(pod, Self::port(pod))
    }

    fn config_with(&self, pod: usize, port: u16) -> Value {
        let mappings = json!([
            {"hostPort": port, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": port, "containerPort": 53, "protocol": "udp"},
        ]);
        self.node.config(mappings, prev_result(self.lab, pod, &self.node.cni_version))
    }

    fn key(&self, pod: usize) -> Attachment {
        attachment(&self.lab.pods[pod], &format!("container-{pod}"))
    }

    /// Makes maps before the first ADD does, one of them with room for few entries.
    fn with_room(&self, map: &str, entries: u32) {
        let make = || {
            let mut definitions = Object::parse(OWN.object).unwrap().maps();
            definitions.get_mut(map).unwrap().max_entries = entries;
            let pins = Pins::open().unwrap();
            pins.create_maps(OWN.layout, definitions.values(), |_| Ok(())).unwrap();
        };
        self.lab.node.run(make).unwrap();
    }

    /// What programs are told.
    fn told(&self) -> Config {
        let read = || ebpf::map("pm_config").get(&[0; 4]).unwrap().unwrap();
        Config::read_from_bytes(&self.lab.node.run(read).unwrap()).unwrap()
    }

    fn ok(&self, verb: &str, pod: usize) -> String {
        self.node.ok(verb, &self.config(pod), &self.key(pod)).stderr
    }

    fn fails(&self, verb: &str, pod: usize) -> (u64, String) {
        self.node.fails(verb, &self.config(pod), &self.key(pod))
    }
}
