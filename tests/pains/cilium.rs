//! Nodes on which Cilium's programs put packets past the stack.

use crate::site::{bridge, on_each, tcp, v4_only};
use crate::support::{VARIANTS, Variant};

/// cilium#20135, #44041, rke2#2325: with BPF host routing answers do not meet the rules that would put their
/// addresses right, and nobody said so.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_10_bpf_host_routing_is_named_where_rules_forward() {
    on_each(&VARIANTS, &v4_only(bridge()), |site| {
        let said = || site.add(0, "a", &[tcp(8080)]).stderr.contains("BPF host routing");
        assert!(!said());
        // Both mounts are the node's alone.
        let header = "/run/cilium/state/globals/node_config.h";
        site.node.shell(&format!(
            "mount -t tmpfs none /run
             mkdir -p /sys/fs/bpf/cilium /run/cilium/state/globals
             echo '#define ENABLE_IPV4 1' >{header}"
        ));
        assert!(!said(), "in chaining mode it routes through the stack");
        site.node.shell(&format!("echo '#define ENABLE_HOST_ROUTING 1' >>{header}"));
        assert_eq!(said(), site.node.variant != Variant::Ebpf);
        site.node.shell(&format!("echo '#define ENABLE_IPV4 1' >{header}"));
        let options = "/run/cilium/state/agent-runtime-config.json";
        site.node.shell(&format!("echo '{{\"EnableHostLegacyRouting\": false}}' >{options}"));
        assert_eq!(said(), site.node.variant != Variant::Ebpf);
        site.node.shell(&format!("echo '{{\"EnableHostLegacyRouting\": true}}' >{options}"));
        assert!(!said());
    });
}
