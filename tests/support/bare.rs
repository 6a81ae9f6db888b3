//! Nodes for tests that read rules and send no packets: links and routes, no pods.

use std::path::{Path, PathBuf};

use portmap::demo::netns::Netns;
use portmap::demo::plugin::{Attachment, Output};
use serde_json::{Value, json};

use super::{GONE_NETNS, Node, PORTMAP, UPSTREAM};

/// Address of the node itself, for mappings with a specific hostIP.
pub const NODE_V4: &str = "203.0.113.1";
pub const NODE_V6: &str = "fd00:99::1";
/// Pods' addresses, behind the link `pods`.
pub const POD_V4: &str = "198.18.2.27";
pub const POD_V6: &str = "fd00:18::27";
/// The link that all pods are behind.
pub const LINK: &str = "pods";

/// A namespace with a link towards pods that do not exist.
pub fn netns() -> Netns {
    let netns = Netns::with_private_bpffs("bare").unwrap();
    let script = format!(
        "ip -batch - <<'END'\n\
         link set lo up\n\
         link add {LINK} type veth peer name podspeer\n\
         link set {LINK} up\n\
         link set podspeer up\n\
         address add {NODE_V4}/32 dev lo\n\
         address add {NODE_V6}/128 dev lo\n\
         route add 198.18.0.0/16 dev {LINK}\n\
         route add fd00:18::/64 dev {LINK}\n\
         END\n"
    );
    let mut command = std::process::Command::new("sh");
    let output = portmap::demo::plugin::run(command.args(["-ec", &script]), b"", &netns).unwrap();
    assert!(output.success(), "{}", output.reason());
    netns
}

/// An attachment whose network namespace need not exist: nothing here enters it.
pub fn attachment(container_id: &str) -> Attachment {
    Attachment {
        container_id: container_id.to_owned(),
        netns: GONE_NETNS.into(),
        ifname: "eth0".to_owned(),
        args: String::new(),
    }
}

/// prevResult of a pod with these addresses.
pub fn prev_result(addresses: &[&str]) -> Value {
    let ips: Vec<Value> =
        addresses.iter().map(|address| json!({"address": address, "interface": 0})).collect();
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": GONE_NETNS}],
        "ips": ips,
    })
}

/// One mapping; the protocol's default port.
pub fn mapping(host_port: u16, container_port: u16, protocol: &str) -> Value {
    json!({"hostPort": host_port, "containerPort": container_port, "protocol": protocol})
}

/// Table nat of both families as text, without the chains that only this plugin has and without
/// the policies of base chains.
pub fn nat(node: &Node) -> String {
    let text = node.shell("iptables -t nat -S; ip6tables -t nat -S");
    let lines = text.lines().filter(|line| !line.contains("PORTMAP-") && !line.starts_with("-P "));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Calls upstream's plugin and fails the test unless it succeeds.
pub fn upstream(node: &Node, verb: &str, config: &Value, attachment: &Attachment) -> Output {
    let output = node.call(UPSTREAM, verb, config, attachment);
    assert!(output.success(), "upstream's {verb}: {}", output.reason());
    output
}

/// Upstream's CHECK, family by family, each with the tools of that family alone: 1.1.1 looks for the
/// rules of every address in the tables of every family that it has a tool for.
pub fn upstream_check(
    node: &Node,
    config: &Value,
    addresses: &[&str],
    attachment: &Attachment,
) -> Result<(), String> {
    for address in addresses {
        let tool = if address.contains(':') { "ip6tables" } else { "iptables" };
        let mut config = config.clone();
        config["prevResult"] = prev_result(&[address]);
        let mut restricted = Node::new(node.netns, node.variant);
        restricted.path = tools_of_family(&node.path, tool);
        let output = restricted.call(UPSTREAM, "CHECK", &config, attachment);
        if !output.success() {
            return Err(format!("{address}: {}", output.reason()));
        }
    }
    Ok(())
}

/// A PATH with the tools whose names begin with `tool`, next to the one that has all of them.
pub fn tools_of_family(all: &Path, tool: &str) -> PathBuf {
    let dir = all.with_extension(tool);
    std::fs::create_dir_all(&dir).unwrap();
    for suffix in ["", "-save", "-restore"] {
        let name = format!("{tool}{suffix}");
        match std::os::unix::fs::symlink(all.join(&name), dir.join(&name)) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.unwrap(),
        }
    }
    dir
}

/// Calls the plugin under test for an attachment, successfully.
pub fn ours(node: &Node, verb: &str, config: &Value, attachment: &Attachment) -> Output {
    let output = node.call(PORTMAP, verb, config, attachment);
    assert!(output.success(), "our {verb}: {}", output.reason());
    output
}

/// Fails the test with the lines that differ, if any.
pub fn assert_same(found: &str, expected: &str, what: &str) {
    let only = |these: &str, those: &str, sign: char| -> String {
        let lines = these.lines().filter(|line| !those.lines().any(|other| other == *line));
        lines.map(|line| format!("{sign} {line}\n")).collect()
    };
    let differences = only(expected, found, '-') + &only(found, expected, '+');
    assert!(found == expected, "{what}:\n{differences}(lines may be in another order or number)");
}
