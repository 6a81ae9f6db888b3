//! Firewalls: mixed variants, and chains that drop.

use std::time::Duration;

use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;

use crate::rig::{Rig, lab};
use crate::support::{RULES, VARIANTS, Variant};

#[test]
#[ignore = "privileged: makes network namespaces"]
fn both_variants_of_iptables_at_once() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::IptablesNft);
    rig.add(0);
    assert_eq!(rig.doctor().checks(), []);
    // An empty table of the other variant, as its mere listing makes it.
    rig.node.shell("iptables-legacy -t filter -S");
    assert!(rig.doctor().of("variants").is_empty());
    rig.node.shell("iptables-legacy -t filter -A INPUT -j RETURN");
    // It takes no tool to see that.
    let said = rig.doctor();
    let found = said.only("variants");
    assert!(found["found"].as_str().unwrap().contains("iptables-legacy has 1 entry"), "{found}");
    rig.node.shell("iptables-legacy -t filter -F INPUT");
    assert!(rig.doctor().of("variants").is_empty());
    rig.node.shell("ip6tables-legacy -t nat -N OTHERS");
    assert!(rig.doctor().only("variants")["found"].as_str().unwrap().contains("has 2 entries"));
}

/// A chain that drops, and what makes none of it wrong.
fn dropped_and_accepted(rig: &Rig, drop: &str) {
    let all = format!("{}:/usr/sbin", rig.node.path.display());
    let doctor = || rig.doctor_with(all.as_ref());
    let _servers = rig.lab.pods[0].serve(&[80], &[]).unwrap();
    // What is said is what happens to packets.
    let reached = || {
        let target = rig.lab.node_socket(Family::V4, 8080);
        reach(&rig.lab.client, Call::new(Transport::Tcp, target, Duration::from_secs(2))).is_ok()
    };
    assert!(doctor().of("forward").is_empty() && reached());
    rig.node.shell(drop);
    assert!(!reached(), "{drop}");
    let said = doctor();
    assert_eq!(
        (said.status, &said.only("forward")["severity"]),
        (Some(1), &"warning".into()),
        "{:#}",
        said.json
    );
    rig.follow(said.only("forward"));
    let left = doctor();
    assert!(left.of("forward").is_empty(), "{drop}: {:#}", left.json);
    assert!(reached(), "{drop}");
}

const IPTABLES: &str =
    "iptables -P FORWARD DROP; iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT";
const NATIVE: &str = "nft -f - <<'END'\ntable inet firewall {\n chain forward {\n\
    type filter hook forward priority 0; policy drop;\n ct state established,related accept\n oifname docker0 accept\n }\n}\nEND";

/// By a rule, as on the images of Oracle's cloud and with firewalld.
const IPTABLES_RULE: &str = "iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; \
    iptables -A FORWARD -j REJECT --reject-with icmp-host-prohibited";
const NATIVE_RULE: &str = "nft -f - <<'END'\ntable inet firewall {\n chain forward {\n\
    type filter hook forward priority 10; policy accept;\n ct state established,related accept\n\
    jump zones\n reject with icmpx admin-prohibited\n }\n\
    chain zones {\n ct state invalid drop\n oifname docker0 accept\n }\n}\nEND";

#[test]
#[ignore = "privileged: makes network namespaces"]
fn chains_that_drop_and_the_command_against_it() {
    for variant in RULES {
        for drop in [IPTABLES, IPTABLES_RULE, NATIVE, NATIVE_RULE] {
            // With nft alone there is no iptables of its own.
            if variant == Variant::Nftables && drop.starts_with("iptables") {
                continue;
            }
            let lab = lab(1);
            let rig = Rig::new(&lab, variant);
            rig.add(0);
            dropped_and_accepted(&rig, drop);
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_ebpf_translates_is_accepted_by_its_device() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Ebpf);
    rig.add(0);
    dropped_and_accepted(&rig, NATIVE);
    rig.node.shell("nft delete table inet firewall");
    dropped_and_accepted(&rig, NATIVE_RULE);
    // Without a tool the rules cannot be read, which is said.
    assert!(
        rig.doctor().only("forward")["found"].as_str().unwrap().contains("nft is not installed")
    );
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_node_whose_first_pod_is_yet_to_come() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::IptablesNft);
    rig.node.shell(IPTABLES);
    let said = rig.doctor();
    assert!(
        said.only("forward")["found"]
            .as_str()
            .unwrap()
            .ends_with("accepts packets to pods that come")
    );
    rig.node.shell(&format!("iptables -A FORWARD -o {} -j ACCEPT", lab.pods[0].host_link));
    let left = rig.doctor();
    assert_eq!(left.of("forward"), Vec::<&serde_json::Value>::new(), "{:#}", left.json);
}

/// What acts on a hostPort before rules translate it, as preDNAT policies of Calico do, and how it goes.
const EARLY: [(&str, &str); 5] = [
    (
        "iptables-nft -t raw -A PREROUTING -p tcp --dport 8080 -j DROP",
        "iptables-nft -t raw -F PREROUTING",
    ),
    (
        "iptables-legacy -t mangle -N POLICY; iptables-legacy -t mangle -A POLICY -j DROP; \
         iptables-legacy -t mangle -A PREROUTING -i eth0 -p tcp --dport 8080 -g POLICY",
        "iptables-legacy -t mangle -F PREROUTING",
    ),
    (
        "nft -f - <<'END'\ntable inet drops {\n chain early {\n\
         type filter hook prerouting priority -150; policy accept;\n\
         fib daddr type local tcp dport 8080 drop\n }\n}\nEND",
        "nft delete table inet drops",
    ),
    (
        "nft -f - <<'END'\ntable ip drops {\n chain early {\n\
         type filter hook prerouting priority -300; policy drop;\n\
         ip daddr != NODE accept\n tcp dport != 8080 accept\n }\n}\nEND",
        "nft delete table ip drops",
    ),
    (
        "nft -f - <<'END'\ntable netdev drops {\n chain early {\n\
         type filter hook ingress device eth0 priority 0; policy accept;\n\
         tcp dport 8080 drop\n }\n}\nEND",
        "nft delete table netdev drops",
    ),
];

#[test]
#[ignore = "privileged: makes network namespaces"]
fn what_acts_before_rules_translate_is_passed_by_ebpf_alone() {
    for variant in VARIANTS {
        let lab = lab(1);
        let rig = Rig::new(&lab, variant);
        rig.add(0);
        let _servers = rig.lab.pods[0].serve(&[80], &[]).unwrap();
        let target = rig.lab.node_socket(Family::V4, 8080);
        let reached = || {
            reach(&rig.lab.client, Call::new(Transport::Tcp, target, Duration::from_secs(1)))
                .is_ok()
        };
        let all = format!("{}:/usr/sbin", rig.node.path.display());
        for (drop, end) in EARLY {
            let drop = drop.replace("NODE", &target.ip().to_string());
            assert!(reached(), "{variant:?}: before {drop}");
            rig.node.shell(&drop);
            let said = rig.doctor_with(all.as_ref());
            if variant == Variant::Ebpf {
                assert!(reached(), "{drop}");
                let found = said.only("bypass");
                assert_eq!((said.status, &found["severity"]), (Some(1), &"warning".into()));
                let text = found["found"].as_str().unwrap();
                assert!(text.contains("drops what is for tcp 8080 of"), "{text}");
            } else {
                assert!(!reached(), "{variant:?}: {drop}");
                assert!(said.of("bypass").is_empty(), "{variant:?}: {:#}", said.json);
            }
            rig.node.shell(end);
        }
        assert!(rig.doctor_with(all.as_ref()).of("bypass").is_empty(), "{variant:?}");
        // Rules where packets are forwarded see the pod's address and port on every backend.
        rig.node.shell(
            "nft -f - <<'END'\ntable inet drops {\n chain later {\n\
             type filter hook forward priority 0; policy accept;\n\
             ip daddr POD tcp dport 80 drop\n }\n}\nEND"
                .replace("POD", &lab.pods[0].address(Family::V4).unwrap().to_string())
                .as_str(),
        );
        assert!(!reached(), "{variant:?}");
    }
}
