//! Packet marks, chains of others, and others that delete what they take for theirs.

use portmap::demo::topology::{Options, Shape};
use portmap::demo::traffic::Transport;
use portmap::model::Family;
use serde_json::json;

use crate::site::{Site, bridge, named, on_each, tcp, with};
use crate::support::{IPTABLES, RULES, Variant};

/// pod-a and pod-b reach pod-a's hostPort, and both are masqueraded.
fn neighbours_reach(site: &Site, port: u16) {
    for family in Family::ALL {
        let node = site.lab.node_address(family);
        for caller in &site.lab.pods {
            let reply = site.ask(&caller.netns, Transport::Tcp, node, port);
            assert_eq!(named(&reply), Ok("pod-a"), "{} {family}", caller.name);
            assert_ne!(Some(reply.unwrap().seen.ip()), caller.address(family), "{}", caller.name);
        }
    }
}

/// plugins#770, cri-o#6772: `externalSetMarkChain` names a chain that the kubelet does not make any
/// more. The error names it, and nothing is left half done.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn pain_22_a_missing_mark_chain_is_named() {
    on_each(&IPTABLES, &bridge(), |site| {
        let config = with(
            site.config(0, &[tcp(8080)]),
            json!({"externalSetMarkChain": "KUBE-MARK-MASQ", "backend": null}),
        );
        let (code, message) = site.node.fails("ADD", &config, &site.of(0, "a"));
        assert_eq!(code, 7, "{message}");
        assert!(message.contains("KUBE-MARK-MASQ"), "{message}");
        site.assert_clean();
        // On a node that is set up already, too.
        site.add(1, "b", &[tcp(8081)]);
        let before = site.node.snapshot();
        let (_, message) = site.node.fails("ADD", &config, &site.of(0, "a"));
        assert!(message.contains("KUBE-MARK-MASQ"), "{message}");
        site.node.snapshot().same_rules(&before).unwrap();
        site.reaches(Transport::Tcp, 8081, "pod-b");
        site.node.ok("DEL", &config, &site.of(0, "a"));
        site.del(1, "b", &[]);
        site.assert_clean();
    });
}

/// AKS, Terway and containerd's documentation configure it: with the kubelet's chains there it works, and
/// they are as they were afterwards.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn pain_22_the_kubelet_s_mark_chain_is_used() {
    on_each(&IPTABLES, &Options::new(Shape::Ptp), |site| {
        site.node.shell(
            "for t in iptables ip6tables; do
               $t -t nat -N KUBE-MARK-MASQ
               $t -t nat -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
               $t -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
             done",
        );
        let before = site.node.snapshot();
        let config =
            with(site.config(0, &[tcp(8080)]), json!({"externalSetMarkChain": "KUBE-MARK-MASQ"}));
        site.node.ok("ADD", &config, &site.of(0, "a"));
        neighbours_reach(site, 8080);
        site.node.ok("CHECK", &config, &site.of(0, "a"));
        site.node.ok("DEL", &config, &site.of(0, "a"));
        site.node.assert_clean(&before);
    });
}

/// netbird#6022, fwmark/registry: marks collide with others' bits. The bit can be chosen, each of two
/// attachments has its own, and the other bits of a packet's mark are left as they are.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_22_the_bit_can_be_chosen() {
    on_each(&RULES, &Options::new(Shape::Ptp), |site| {
        let of_bit =
            |bit: u8, port: u16| with(site.config(0, &[tcp(port)]), json!({ "markMasqBit": bit }));
        // Somebody else's mark of a packet, and how often it came out as it went in.
        site.node.shell(
            "nft add table inet other
             nft 'add chain inet other in { type filter hook prerouting priority -150; }'
             nft 'add chain inet other out { type filter hook postrouting priority 300; }'
             nft add rule inet other in tcp dport 8000-9000 meta mark set 0x40
             nft add rule inet other out tcp dport 80 meta mark and 0x40 == 0x40 counter",
        );
        let before = site.node.snapshot();
        for (bit, port) in [(0, 8080), (31, 8081), (5, 8082)] {
            site.node.ok("ADD", &of_bit(bit, port), &site.of(0, &format!("bit{bit}")));
        }
        for port in [8080, 8081, 8082] {
            neighbours_reach(site, port);
        }
        let kept = site.node.shell("nft list chain inet other out");
        assert!(!kept.contains("packets 0 "), "{kept}");
        for (bit, port) in [(31, 8081), (0, 8080), (5, 8082)] {
            let attachment = site.of(0, &format!("bit{bit}"));
            site.node.ok("CHECK", &of_bit(bit, port), &attachment);
            site.node.ok("DEL", &of_bit(bit, port), &attachment);
            if bit != 5 {
                neighbours_reach(site, 8082);
            }
        }
        site.node.assert_clean(&before);
    });
}

/// cilium#6499, kubernetes#62090, kubeadm#689: an agent deletes every rule that contains its name, and
/// the name of the network is in our comments. CHECK tells, and the next ADD brings the rules back.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_25_rules_that_others_delete_by_name_come_back() {
    on_each(&RULES, &bridge(), |site| {
        site.node.network = "cilium".into();
        site.add(0, "a", &[tcp(8080)]);
        site.check(0, "a", &[tcp(8080)]);
        for whose in ["its own", "another's"] {
            site.node.shell(match site.node.variant {
                // nft lists whole maps in one statement; an element of ours has the name in its comment.
                Variant::Nftables => {
                    "for map in $(nft -j list maps inet | grep -o '\"name\": \"[^\"]*\"' | cut -d'\"' -f4)
                     do nft list map inet portmap $map | grep -q cilium || continue
                       nft flush map inet portmap $map
                     done"
                }
                _ => {
                    "iptables-save | grep -v cilium | iptables-restore
                     ip6tables-save | grep -v cilium | ip6tables-restore"
                }
            });
            site.refuses(8080);
            let problem = site.drift(0, "a", &[tcp(8080)]);
            assert!(problem.contains("8080"), "{problem}");
            if whose == "its own" {
                site.add(0, "a", &[tcp(8080)]);
            } else {
                // The other attachment's rules do not need the ones that are missing, so it is its
                // removal by which the plugin notices.
                site.add(1, "b", &[tcp(8081)]);
                site.add(0, "a", &[tcp(8080)]);
                site.reaches(Transport::Tcp, 8081, "pod-b");
                site.del(1, "b", &[]);
            }
            site.check(0, "a", &[tcp(8080)]);
            site.reaches(Transport::Tcp, 8080, "pod-a");
        }
        site.del(0, "a", &[tcp(8080)]);
        site.refuses(8080);
        site.assert_clean();
    });
}
