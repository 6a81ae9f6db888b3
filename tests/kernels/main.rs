//! What not every kernel has: SCTP sockets, VLAN, ipvlan and netkit devices; and what not every kernel lacks: IPv6. These
//! tests are run in guests by `tests/kernels/run.sh`.

#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a part of the rig is for others; a test says by a panic that it failed"
)]

#[path = "../pains/ipv6.rs"]
mod ipv6;
mod ipvlan;
mod netkit;
#[path = "../matrix/rig.rs"]
mod rig;
mod sctp;
#[path = "../pains/site.rs"]
mod site;
#[path = "../support/mod.rs"]
mod support;
mod vlan;

use portmap::demo::netns::Netns;
use portmap::demo::plugin::Attachment;
use portmap::demo::topology::Lab;
use serde_json::{Value, json};

use rig::{INSIDE, PORT, mapped};
use support::{Node, Variant};

/// A pod that is none of the laboratory's, after ADD and CHECK with the result of the plugin before.
fn come<'a>(lab: &'a Lab, pod: &Netns, result: Value) -> (Node<'a>, Value, Attachment) {
    let attachment = Attachment {
        container_id: "container-of-a-guest".into(),
        netns: pod.path(),
        ifname: "eth0".into(),
        args: String::new(),
    };
    let node = Node::new(&lab.node, Variant::Ebpf);
    let config = node.config(json!(mapped(PORT, INSIDE)), result);
    node.ok("ADD", &config, &attachment);
    node.ok("CHECK", &config, &attachment);
    (node, config, attachment)
}
