//! Rules that outlive their pod, DELs that say nothing, rules that others flush.

use portmap::demo::traffic::Transport;
use serde_json::{Value, json};

use crate::site::{bridge, on_each, tcp, udp, with};
use crate::support::{IPTABLES, UPSTREAM, VARIANTS, Variant};

/// projectcalico/calico#3412, plugins#683, cilium/cilium#18227, k8snetworkplumbingwg/multus-cni#1254:
/// a DEL is lost, and the dead pod's rule comes before the new one's. The newest claim wins, and the
/// DEL that comes late after all takes nothing from it.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_01_stale_rules_do_not_blackhole_the_next_pod() {
    on_each(&VARIANTS, &bridge(), |site| {
        let mappings = [tcp(8080), udp(8053)];
        site.add(0, "old", &mappings);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.add(1, "new", &mappings);
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.reaches(Transport::Udp, 8053, "pod-b");
        site.check(1, "new", &mappings);
        site.del(0, "old", &mappings);
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.reaches(Transport::Udp, 8053, "pod-b");
        site.check(1, "new", &mappings);
        site.del(1, "new", &mappings);
        site.refuses(8080);
        site.assert_clean();
    });
}

/// plugins#752: the network is renamed, so nothing that is derived from its name finds the old rules.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_01_a_renamed_network_does_not_blackhole_the_next_pod() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.add(0, "old", &[tcp(8080)]);
        site.node.network = "renamed".into();
        site.add(1, "new", &[tcp(8080)]);
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.node.network = "portmap".into();
        site.del(0, "old", &[]);
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.node.network = "renamed".into();
        site.del(1, "new", &[]);
        site.assert_clean();
    });
}

/// podman#5097, rancher-desktop#670: upstream's plugin made the dead pod's rules and is never called
/// for it again. Ours go before them, and stay there when upstream's DEL comes late.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and upstream's portmap"]
fn pain_01_a_stale_entry_of_upstream_is_shadowed() {
    on_each(&IPTABLES, &bridge(), |site| {
        let mappings = [tcp(8080), udp(8053)];
        // The configuration of a node before its plugin was replaced.
        let config = with(site.config(0, &mappings), json!({"backend": null}));
        let stale = site.of(0, "stale");
        let output = site.node.call(UPSTREAM, "ADD", &config, &stale);
        assert!(output.success(), "{}", output.reason());
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.add(1, "new", &mappings);
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.reaches(Transport::Udp, 8053, "pod-b");
        site.check(1, "new", &mappings);
        let output = site.node.call(UPSTREAM, "DEL", &config, &stale);
        assert!(output.success(), "{}", output.reason());
        site.reaches(Transport::Tcp, 8080, "pod-b");
        site.del(1, "new", &mappings);
        site.refuses(8080);
    });
}

/// nomad#6385, nomad#11901: rules of before the boot are restored by a boot script, or the records
/// survive on a disk while the rules do not. Neither brings the dead pods back.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_01_what_an_earlier_boot_left_is_not_revived() {
    for rules_survive in [true, false] {
        on_each(&VARIANTS, &bridge(), |site| {
            site.add(0, "dead", &[tcp(8080), tcp(8081)]);
            std::fs::write(site.node.state_dir.join("boot"), "an earlier boot").unwrap();
            if !rules_survive {
                site.flush_everything();
            }
            site.add(1, "new", &[tcp(8080)]);
            site.reaches(Transport::Tcp, 8080, "pod-b");
            site.check(1, "new", &[tcp(8080)]);
            if !rules_survive {
                site.refuses(8081);
            }
            site.del(1, "new", &[tcp(8080)]);
            // The runtime cleans up what it remembers of before the boot.
            site.del(0, "dead", &[tcp(8080), tcp(8081)]);
            site.refuses(8080);
            site.refuses(8081);
        });
    }
}

/// rancher/rke#2999, rke#2993, rke#3440, plugins#509: since 0.8.7 upstream does nothing at a DEL
/// without `portMappings`, which is how some runtimes call it, and leaks every rule.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_02_del_without_mappings_removes_the_rules() {
    let forms: [Value; 4] = [
        json!({"runtimeConfig": {"portMappings": null}}),
        json!({"runtimeConfig": {"portMappings": []}}),
        json!({"runtimeConfig": {}}),
        json!({"runtimeConfig": null, "prevResult": null}),
    ];
    on_each(&VARIANTS, &bridge(), |site| {
        for form in &forms {
            site.add(0, "gone", &[tcp(8080), udp(8053)]);
            let config = with(site.config(0, &[]), form.clone());
            let mut attachment = site.of(0, "gone");
            // The namespace has gone with the pod.
            attachment.netns = "".into();
            site.node.ok("DEL", &config, &attachment);
            site.refuses(8080);
            site.assert_clean();
        }
    });
}

/// plugins#512, cni#778, rancher/rke2#10469, k3s#7586, firewalld#779: `firewall-cmd --reload` or an
/// installer flushes the rules, and hostPorts stay dead until their pods are restarted. CHECK tells
/// the truth; the next ADD, whosever it is, brings everything back; a DEL removes its own only.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_03_any_call_heals_what_others_flushed() {
    on_each(&VARIANTS, &bridge(), |site| {
        let (a, b) = ([tcp(8080), udp(8053)], [tcp(8081)]);
        let both_work = || {
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.reaches(Transport::Tcp, 8081, "pod-b");
            site.check(0, "a", &a);
            site.check(1, "b", &b);
        };
        site.add(0, "a", &a);
        site.flush_everything();
        site.refuses(8080);
        let problem = site.drift(0, "a", &a);
        assert!(!problem.is_empty());

        site.add(1, "b", &b);
        both_work();
        site.flush_everything();
        site.add(0, "a", &a);
        both_work();
        site.flush_everything();
        site.del(0, "a", &a);
        if site.node.variant == Variant::Ebpf {
            // Nothing of a DEL is done by the programs: the next ADD attaches them.
            site.refuses(8081);
            site.add(1, "b", &b);
        }
        site.reaches(Transport::Tcp, 8081, "pod-b");
        site.refuses(8080);
        site.del(1, "b", &b);
        site.assert_clean();
    });
}

/// The same, where others flushed only a part: the jumps to our chains, the chains or the rules of
/// our table. Upstream's CHECK found nothing wrong with the first.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_03_partial_flushes_are_seen_and_healed() {
    on_each(&VARIANTS, &bridge(), |site| {
        let damages: &[&str] = match site.node.variant {
            Variant::Nftables => &[
                "nft flush table inet portmap",
                "nft delete table inet portmap",
                "nft flush chain inet portmap prerouting",
                "nft flush chain inet portmap hostports",
            ],
            Variant::Ebpf => &[
                "tc qdisc del dev veth28230000 clsact",
                "rm -r /sys/fs/bpf/portmap/m1",
                "rm -r /sys/fs/bpf/portmap",
                "umount /sys/fs/bpf; mount -t bpf bpf /sys/fs/bpf",
            ],
            _ => &[
                "iptables -t nat -F PREROUTING",
                "iptables -t nat -F OUTPUT",
                "iptables -t nat -F POSTROUTING",
                "iptables -t nat -F CNI-HOSTPORT-DNAT",
                "ip6tables -t nat -F PREROUTING",
                "iptables -t raw -F",
            ],
        };
        for damage in damages {
            println!("{damage}");
            site.add(0, "a", &[tcp(8080)]);
            site.check(0, "a", &[tcp(8080)]);
            site.node.shell(damage);
            site.drift(0, "a", &[tcp(8080)]);
            site.add(0, "a", &[tcp(8080)]);
            site.check(0, "a", &[tcp(8080)]);
            site.reaches(Transport::Tcp, 8080, "pod-a");
            let localhost = std::net::Ipv4Addr::LOCALHOST.into();
            let reply = site.ask(&site.lab.node, Transport::Tcp, localhost, 8080);
            assert!(reply.is_ok(), "{reply:?}");
            site.del(0, "a", &[tcp(8080)]);
            site.assert_clean();
        }
    });
}
