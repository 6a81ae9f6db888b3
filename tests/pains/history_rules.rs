//! What upstream has fixed in its history about the rules themselves. Tests elsewhere hold for these rows
//! too: self-hairpin and neighbours (5576f312, 5e0fbd83: `pain_13`), all UDP entries deleted (dca23ad4:
//! `pain_07`), non-local traffic (9b3772e1: `pain_08`), masqAll in every backend (3d27709f: `pain_14`).

use std::sync::atomic::{AtomicBool, Ordering};

use portmap::demo::traffic::Transport;
use portmap::model::Family;
use portmap::record::{chain_name, old_snat_chain};
use serde_json::{Value, json};

use crate::site::{at, bridge, on_each, tcp, udp, with};
use crate::support::ending::Ending;
use crate::support::{IPTABLES, RULES, UPSTREAM, VARIANTS, Variant};

/// The rules of a chain of table nat, in order.
fn rules(site: &crate::site::Site, tool: &str, chain: &str) -> Vec<String> {
    let listing = site.node.shell(&format!("{tool} -t nat -S {chain}"));
    listing.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
}

/// 9fab520c (0.8.0, CVE-2019-9946): entry rules were put before everything. They come last, so that Services
/// are first; only the jump for masquerading is first, because the main plugin's own would take the packet.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn history_entry_rules_come_last_and_masquerading_first() {
    on_each(&IPTABLES, &bridge(), |site| {
        for tool in ["iptables", "ip6tables"] {
            for chain in ["PREROUTING", "OUTPUT", "POSTROUTING"] {
                site.node.shell(&format!("{tool} -t nat -A {chain} -p tcp --dport 1 -j RETURN"));
            }
        }
        let before = site.node.snapshot();
        site.add(0, "a", &[tcp(8080)]);
        for tool in ["iptables", "ip6tables"] {
            for chain in ["PREROUTING", "OUTPUT"] {
                let rules = rules(site, tool, chain);
                assert!(rules[0].ends_with("RETURN"), "{rules:?}");
                assert!(rules.last().unwrap().contains("CNI-HOSTPORT-DNAT"), "{rules:?}");
            }
            let rules = rules(site, tool, "POSTROUTING");
            assert!(rules[0].contains("CNI-HOSTPORT-MASQ"), "{rules:?}");
        }
        site.del(0, "a", &[]);
        site.node.assert_clean(&before);
    });
}

/// 5576f312 (0.7.0): chains `CNI-SN-*` of still older versions are removed with their attachment.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn history_chains_of_old_versions_go() {
    on_each(&IPTABLES, &bridge(), |site| {
        let (dnat, snat) = {
            let chain = chain_name(&site.node.network, "old");
            let snat = old_snat_chain(&chain);
            (chain, snat)
        };
        site.node.shell(&format!(
            "for t in iptables ip6tables; do
               $t -t nat -N {dnat}; $t -t nat -N {snat}
               $t -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j {dnat}
               $t -t nat -A {dnat} -p tcp --dport 8080 -j DNAT --to-destination :80
               $t -t nat -A POSTROUTING -p tcp --dport 80 -j {snat}
               $t -t nat -A {snat} -j MASQUERADE
             done"
        ));
        site.del(0, "old", &[tcp(8080)]);
        site.assert_clean();
    });
}

/// 719f60bb, 3eb775c5 (1.4.0): DEL with thousands of chains searched all of them; and what refers to the
/// attachment's chain from places that nobody expects must go too. It finds its own among 2,000 others.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn history_del_among_thousands_of_chains() {
    on_each(&IPTABLES, &bridge(), |site| {
        site.node.shell(
            "{ echo '*nat'; echo ':CNI-HOSTPORT-DNAT - [0:0]'
               for n in $(seq 2000); do echo \":CNI-DN-foreign$n - [0:0]\"; done
               for n in $(seq 2000); do
                 echo \"-A CNI-DN-foreign$n -p tcp --dport $((20000 + n)) -j DNAT --to-destination 10.0.3.99:80\"
                 echo \"-A CNI-HOSTPORT-DNAT -p tcp --dport $((20000 + n)) -j CNI-DN-foreign$n\"
               done; echo COMMIT
             } | iptables-restore --noflush",
        );
        let foreign = rules(site, "iptables", "CNI-HOSTPORT-DNAT");
        // Recorded, unrecorded, and with a reference from elsewhere.
        site.add(0, "a", &[tcp(8080)]);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.check(0, "a", &[tcp(8080)]);
        let chain = chain_name(&site.node.network, "a");
        site.node.shell(&format!("iptables -t nat -A OUTPUT -p tcp --dport 9 -j {chain}"));
        site.del(0, "a", &[tcp(8080)]);
        site.del(0, "a", &[tcp(8080)]);
        assert_eq!(rules(site, "iptables", "CNI-HOSTPORT-DNAT"), foreign);

        let config = with(site.config(0, &[tcp(8080)]), json!({"backend": null}));
        let output = site.node.call(UPSTREAM, "ADD", &config, &site.of(0, "upstream"));
        assert!(output.success(), "{}", output.reason());
        let chain = chain_name(&site.node.network, "upstream");
        site.node.shell(&format!("iptables -t nat -A OUTPUT -p tcp --dport 9 -j {chain}"));
        site.del(0, "upstream", &[tcp(8080)]);
        assert_eq!(rules(site, "iptables", "CNI-HOSTPORT-DNAT"), foreign);
        assert!(!site.node.shell("iptables -t nat -S").contains(&chain));
    });
}

/// 108c2aeb (0.9.0, plugins#123): stale UDP entries have to be flushed after the rules are in; a client that
/// never stops sending gets a new entry in between otherwise.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_udp_entries_are_flushed_after_the_rules_are_in() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.add(1, "other", &[tcp(9000)]);
        for round in 0..3 {
            let mut session = site.udp_session(8053);
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let asking = scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        drop(session.ask());
                    }
                    session.ask()
                });
                let ending = Ending(&stop);
                site.add(0, "a", &[udp(8053)]);
                drop(ending);
                let last = asking.join().unwrap();
                assert_eq!(last.map(|reply| reply.server), Ok("pod-a".into()), "round {round}");
            });
            site.del(0, "a", &[]);
        }
    });
}

/// 08d0f334 (1.1.0): CHECK succeeded while the attachment's chain was missing.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_check_misses_what_is_missing() {
    on_each(&RULES, &bridge(), |site| {
        let chain = chain_name(&site.node.network, "a");
        let damages = match site.node.variant {
            Variant::Nftables => vec![
                "nft delete element inet portmap any4_addr '{ tcp . 8080 }'".to_owned(),
                "nft delete element inet portmap any6_port '{ tcp . 8080 }'".to_owned(),
            ],
            _ => ["iptables", "ip6tables"]
                .iter()
                .flat_map(|tool| {
                    [
                        format!("{tool} -t nat -F {chain}"),
                        format!(
                            "{tool} -t nat -F CNI-HOSTPORT-DNAT
                             {tool} -t nat -F {chain}; {tool} -t nat -X {chain}"
                        ),
                    ]
                })
                .collect(),
        };
        for damage in damages {
            println!("{damage}");
            site.add(0, "a", &[tcp(8080)]);
            site.check(0, "a", &[tcp(8080)]);
            site.node.shell(&damage);
            let problem = site.drift(0, "a", &[tcp(8080)]);
            assert!(problem.contains("8080"), "{problem}");
            site.del(0, "a", &[]);
            site.assert_clean();
        }
    });
}

/// 8ee59c6f (1.9.0): CHECK of upstream's nftables backend counted rules, and did so wrongly with a hostIP,
/// IPv6 or masquerading. 0463fd19 (1.2.0, plugins#771, #772): masqAll for IPv6 took 0.0.0.0/0.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_check_accepts_what_add_made() {
    on_each(&VARIANTS, &bridge(), |site| {
        let (v4, v6) =
            (site.lab.second_node_address(Family::V4), site.lab.second_node_address(Family::V6));
        let mappings: [Vec<Value>; 5] = [
            vec![tcp(8080)],
            vec![tcp(8080), udp(8080), at(v4, tcp(8081))],
            vec![at(v6, tcp(8080)), at(v4, tcp(8080)), tcp(8080)],
            vec![at("::", tcp(8080)), at("0.0.0.0", udp(8080))],
            vec![at("127.0.0.1", tcp(8080))],
        ];
        let options = [
            json!({}),
            json!({"snat": false}),
            json!({"masqAll": true}),
            json!({"markMasqBit": 3}),
            json!({"snat": false, "masqAll": true}),
        ];
        // Every option with the mappings that have most in them, and the other way round.
        let pairs = options.iter().map(|option| (&mappings[2], option));
        let pairs = pairs.chain(mappings.iter().map(|mappings| (mappings, &options[2])));
        for (mappings, option) in pairs.chain(mappings.iter().map(|list| (list, &options[0]))) {
            println!("{mappings:?} {option}");
            let config = with(site.config(0, mappings), option.clone());
            for verb in ["ADD", "CHECK", "DEL"] {
                site.node.ok(verb, &config, &site.of(0, "a"));
            }
        }
        site.assert_clean();
    });
}

/// 9296c5f8 (1.6.1, plugins#1115): destinations were also translated in the input hook, which kernels refuse,
/// and `ip6 protocol` is no match. What is made holds neither, and loads in one table of family inet.
#[test]
#[ignore = "privileged: makes network namespaces, needs nft"]
fn history_no_translation_in_the_input_hook() {
    on_each(&[Variant::Nftables], &bridge(), |site| {
        let config = with(site.config(0, &[tcp(8080), udp(8053)]), json!({"markMasqBit": 13}));
        site.node.ok("ADD", &config, &site.of(0, "a"));
        site.add(1, "b", &[tcp(8081)]);
        assert_eq!(site.node.shell("nft list tables | grep portmap"), "table inet portmap\n");
        let table = site.node.shell("nft list table inet portmap");
        for wrong in ["hook input", "ip6 protocol"] {
            assert!(!table.contains(wrong), "{table}");
        }
        // It can be read back as it is listed, as nftables.service does it at boot.
        site.node.shell("nft list ruleset | nft -c -f -");
    });
}
