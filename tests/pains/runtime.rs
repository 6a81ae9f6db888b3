//! GC and STATUS, which upstream answers without doing anything.

use portmap::demo::traffic::Transport;
use serde_json::{Value, json};

use crate::site::{Site, bridge, on_each, tcp, with};
use crate::support::{Scratch, VARIANTS, Variant};

fn gc(site: &Site, keys: Value) -> Value {
    with(site.node.config(json!(null), json!(null)), keys)
}

/// cni#974, cni#981, cri-o#8018, ocicni#197: pods that nobody remembers keep their rules for ever. GC
/// removes the attachments of its network that are not listed, and nothing else.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_20_gc_keeps_what_is_listed_and_other_networks() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.node.cni_version = "1.1.0".into();
        let nobody = site.of(0, "");
        let valid = json!([{"containerID": "kept", "ifname": "eth0"}]);
        site.add(0, "kept", &[tcp(8080)]);
        site.add(1, "gone", &[tcp(8081)]);
        site.node.network = "other".into();
        site.add(1, "gone", &[tcp(8082)]);
        site.node.network = "portmap".into();

        // Without a list nothing is known, and so nothing may be removed.
        let (code, _) = site.node.fails("GC", &gc(site, json!({})), &nobody);
        assert_eq!(code, 7);
        site.reaches(Transport::Tcp, 8081, "pod-b");
        site.node.ok("GC", &gc(site, json!({"cni.dev/valid-attachments": valid})), &nobody);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.refuses(8081);
        site.reaches(Transport::Tcp, 8082, "pod-b");
        site.check(0, "kept", &[tcp(8080)]);

        // Another interface of a listed container is another attachment.
        let valid = json!([{"containerID": "kept", "ifname": "net1"}]);
        site.node.ok("GC", &gc(site, json!({"cni.dev/attachments": valid})), &nobody);
        site.refuses(8080);
        // CRI-O without pods sends null, others an empty list: none is valid.
        for empty in ["[]", "null"] {
            site.add(0, "kept", &[tcp(8080)]);
            let mut config = gc(site, json!({}));
            config["cni.dev/valid-attachments"] = serde_json::from_str(empty).unwrap();
            site.node.ok("GC", &config, &nobody);
            site.refuses(8080);
        }
        site.reaches(Transport::Tcp, 8082, "pod-b");
        site.node.network = "other".into();
        site.del(1, "gone", &[]);
        site.assert_clean();
    });
}

/// cni#974: one attachment that cannot be removed does not keep GC from the others, and is reported.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_20_gc_goes_on_after_an_error_and_reports_it() {
    on_each(&[Variant::IptablesNft], &bridge(), |site| {
        site.node.cni_version = "1.1.0".into();
        let dir = Scratch::new();
        let (iptables, nft) = (site.node.path.clone(), Variant::Nftables.path(&dir.0));
        site.add(0, "stuck", &[tcp(8080)]);
        site.node.path = nft;
        let config = with(site.config(1, &[tcp(8081)]), json!({"backend": "nftables"}));
        site.node.ok("ADD", &config, &site.of(1, "gone"));
        site.reaches(Transport::Tcp, 8081, "pod-b");

        // The iptables tools are not to be found any more.
        let none = gc(site, json!({"cni.dev/valid-attachments": []}));
        let (_, message) = site.node.fails("GC", &none, &site.of(0, ""));
        assert!(message.contains("iptables-restore is not installed"), "{message}");
        site.refuses(8081);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.node.path = iptables;
        site.node.ok("GC", &none, &site.of(0, ""));
        site.refuses(8080);
        site.assert_clean();
    });
}

/// cni#981: STATUS says whether an ADD would work, and if not, why. A runtime makes the node "not ready"
/// of it, so nothing else may fail it.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_20_status_tells_whether_add_would_work() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.node.cni_version = "1.1.0".into();
        let config = site.node.config(json!(null), json!(null));
        let output = site.node.ok("STATUS", &config, &site.of(0, ""));
        assert_eq!(output.stdout, "");
        let empty = Scratch::new();
        let tools = std::mem::replace(&mut site.node.path, empty.0.clone());
        let ebpf = site.node.variant == Variant::Ebpf;
        if ebpf {
            site.forbid_ebpf(true);
        }
        let (code, reason) = site.node.fails("STATUS", &config, &site.of(0, ""));
        assert_eq!(code, 50, "{reason}");
        let missing = if ebpf { "/sys/fs/bpf/portmap has owner" } else { "is not installed" };
        assert!(reason.contains(missing), "{reason}");
        site.node.path = tools;
        if ebpf {
            site.forbid_ebpf(false);
        }
        // A state directory that cannot be made.
        let blocked = with(config, json!({"stateDir": "/proc/nowhere/portmap"}));
        let (code, reason) = site.node.fails("STATUS", &blocked, &site.of(0, ""));
        assert_eq!(code, 50, "{reason}");
        assert!(reason.contains("/proc/nowhere/portmap"), "{reason}");
        site.assert_clean();
    });
}
