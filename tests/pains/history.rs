//! What upstream has fixed in its history, and must not come back here. This file: input, and how calls
//! behave; `history_rules`: what rules do. Interrupted netlink dumps that are not repeated
//! (5f88af10, 1.7.0) cannot be provoked from outside; the tests beside `sys::netlink::socket` have them.

use std::net::IpAddr;

use nix::fcntl::{Flock, FlockArg};
use portmap::demo::plugin::Attachment;
use portmap::demo::topology::{BRIDGE, Options, Shape};
use portmap::demo::traffic::Transport;
use portmap::model::Family;
use serde_json::{Value, json};

use crate::executable::write_executable;
use crate::site::{Site, at, bridge, named, on_each, tcp, udp, v4_only, with};
use crate::support::{IPTABLES, RULES, VARIANTS, Variant};

/// Puts a script in front of the node's tools.
fn shadow(site: &mut Site, tool: &str, script: &str) {
    let dir = site.node.state_dir.with_file_name("shadow");
    std::fs::create_dir_all(&dir).unwrap();
    write_executable(&dir.join(tool), format!("#!/bin/sh\n{script}\n"));
    site.node.path = format!("{}:{}", dir.display(), site.node.path.display()).into();
}

/// Review of the first version (0.6.0): whether IPv6 works was asked of another table, and DEL failed
/// where `nat` was missing. fb5d195f (1.3.0, plugins#819): CHECK demanded ip6tables rules for a pod
/// without an IPv6 address.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn history_a_v4_only_pod_needs_no_ip6tables() {
    on_each(&IPTABLES, &v4_only(bridge()), |site| {
        let rounds = |site: &Site| {
            for verb in ["ADD", "CHECK", "DEL", "DEL"] {
                site.node.ok(verb, &site.config(0, &[tcp(8080), udp(8053)]), &site.of(0, "a"));
                if verb == "ADD" {
                    site.reaches(Transport::Tcp, 8080, "pod-a");
                }
            }
        };
        rounds(site);
        for tool in ["ip6tables", "ip6tables-save", "ip6tables-restore"] {
            shadow(site, tool, "echo \"can't initialize ip6tables table nat\" >&2; exit 3");
        }
        rounds(site);
        site.assert_clean();
    });
}

/// 83ec9bb7 (0.6.0): port 0 was accepted; above 65535 upstream still leaves it to the tool to complain.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_ports_are_from_1_to_65535() {
    on_each(&VARIANTS, &bridge(), |site| {
        for port in [0, 65536, 70000, -1] {
            let mapping = with(tcp(1), json!({ "hostPort": port }));
            let (code, message) =
                site.node.fails("ADD", &site.config(0, &[mapping]), &site.of(0, "a"));
            assert_eq!(code, 7, "{message}");
            assert!(message.contains(&port.to_string()), "{message}");
        }
        site.assert_clean();
        for port in [1, 65535] {
            site.add(0, "a", &[tcp(port)]);
            site.reaches(Transport::Tcp, port, "pod-a");
        }
    });
}

/// 0da67804 (0.6.0): an address without the index of an interface (Calico's results) led to a crash, and
/// the host's own interface was taken for the container's.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_addresses_without_an_interface_are_the_container_s() {
    on_each(&VARIANTS, &bridge(), |site| {
        let pod: Vec<Value> =
            site.pod(0).addresses.iter().map(|ip| json!({"address": ip.to_string()})).collect();
        let link = &site.pod(0).host_link;
        let without_index = json!({"interfaces": [{"name": link}], "ips": pod});
        let host = json!({"address": "10.0.3.254/24", "interface": 0});
        let both = [[host].as_slice(), &pod].concat();
        let with_hosts = json!({"interfaces": [{"name": link}], "ips": both});
        for result in [without_index, with_hosts] {
            let mut config = site.config(0, &[tcp(8080)]);
            config["prevResult"] = with(result, json!({"cniVersion": "1.0.0"}));
            site.node.ok("ADD", &config, &site.of(0, "a"));
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.node.ok("CHECK", &config, &site.of(0, "a"));
            site.node.ok("DEL", &config, &site.of(0, "a"));
            site.assert_clean();
        }
    });
}

/// 5576f312 (0.7.0): xt_multiport takes 15 ports and xt_comment 255 bytes; longer ones failed.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_many_ports_and_long_names() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.node.network = "n".repeat(250);
        let id = "c".repeat(150);
        for count in [15, 16, 31] {
            let mappings: Vec<Value> = (0..count).map(|n| tcp(8000 + n)).collect();
            site.add(0, &id, &mappings);
            for port in [8000, 8014, 8000 + count - 1] {
                site.reaches(Transport::Tcp, port, "pod-a");
            }
            site.check(0, &id, &mappings);
            site.del(0, &id, &mappings);
            site.assert_clean();
        }
    });
}

/// 7d329215 (0.8.0): a listing without any line crashed the plugin. Nothing is there, and every verb has
/// an answer; 719f60bb (1.4.0): and none of those that remove makes a chain in order to empty it.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_calls_on_an_empty_node() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.node.cni_version = "1.1.0".into();
        site.del(0, "a", &[tcp(8080), udp(8053)]);
        site.assert_clean();
        let gc = site.node.config(json!(null), json!(null));
        let gc = with(gc, json!({"cni.dev/valid-attachments": []}));
        site.node.ok("GC", &gc, &site.of(0, ""));
        site.assert_clean();
        site.drift(0, "a", &[tcp(8080)]);
        site.assert_clean();
    });
    // The tools print nothing at all.
    on_each(&[Variant::IptablesNft], &bridge(), |site| {
        shadow(site, "iptables", "exit 0");
        shadow(site, "ip6tables", "exit 0");
        site.drift(0, "a", &[tcp(8080)]);
        site.del(0, "a", &[tcp(8080)]);
        site.add(0, "a", &[tcp(8080)]);
        site.reaches(Transport::Tcp, 8080, "pod-a");
    });
}

/// e8365e12 (0.8.3, plugins#378): a hostIP of one family was put into the other family's rules. 5cb3a5e8
/// (0.8.7, plugins#643): 0.0.0.0 and :: became the destinations 0.0.0.0/32 and ::/128, which no packet has.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_a_host_ip_belongs_to_its_family() {
    on_each(&VARIANTS, &bridge(), |site| {
        for (family, any) in [(Family::V4, "0.0.0.0"), (Family::V6, "::")] {
            for ip in [any.to_owned(), site.lab.node_address(family).to_string()] {
                let mappings = [at(&ip, tcp(8080)), at(&ip, udp(8053))];
                site.add(0, "a", &mappings);
                for other in Family::ALL {
                    let node = site.lab.node_address(other);
                    let reply = site.ask(&site.lab.client, Transport::Tcp, node, 8080);
                    let expected = (other == family).then_some("pod-a");
                    assert_eq!(named(&reply).ok(), expected, "{ip}, called {node}");
                }
                site.check(0, "a", &mappings);
                site.del(0, "a", &mappings);
                site.assert_clean();
            }
        }
    });
    on_each(&VARIANTS, &v4_only(bridge()), |site| {
        for ip in ["::", "fd00::1"] {
            site.add(0, "a", &[at(ip, tcp(8080)), tcp(8081)]);
            site.refuses(8080);
            site.reaches(Transport::Tcp, 8081, "pod-a");
            site.check(0, "a", &[at(ip, tcp(8080)), tcp(8081)]);
            site.del(0, "a", &[]);
        }
        site.assert_clean();
    });
}

/// 58dd90b9 (0.8.4): two plugins that found a chain missing both made it. 3603738c, bf8f1710 (0.8.4,
/// plugins#418): of two DELs at once one failed over what the other had removed.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_calls_at_once() {
    on_each(&VARIANTS, &bridge(), |site| {
        let site = &*site;
        let ids: Vec<String> = (0..8).map(|n| format!("c{n}")).collect();
        let at_once = |action: &(dyn Fn(u16, &str) + Sync)| {
            std::thread::scope(|scope| {
                for (n, id) in (0..).zip(&ids) {
                    scope.spawn(move || action(n, id));
                }
            });
        };
        let mappings = |n: u16| [tcp(8000 + n), udp(8000 + n)];
        at_once(&|n, id| drop(site.add(usize::from(n % 2), id, &mappings(n))));
        for n in 0..8 {
            site.reaches(Transport::Tcp, 8000 + n, if n % 2 == 0 { "pod-a" } else { "pod-b" });
        }
        // Each twice at once.
        at_once(&|n, _| site.del(usize::from(n % 2), &ids[usize::from(n / 2)], &mappings(n / 2)));
        at_once(&|n, id| site.del(usize::from(n % 2), id, &mappings(n)));
        site.assert_clean();
    });
}

/// d671d29a, e09a17fe (0.8.5, 1.0.0): the dots of a device's name became slashes in the sysctl's path.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and ip"]
fn history_devices_with_dots_in_their_names() {
    on_each(&VARIANTS, &v4_only(bridge()), |site| {
        site.node.shell(&format!(
            "ip link set {BRIDGE} down; ip link set {BRIDGE} name br.0; ip link set br.0 up"
        ));
        let localnet = || site.lab.node.sysctl("ipv4/conf/br.0/route_localnet").unwrap();
        site.add(0, "a", &[tcp(8080)]);
        assert_eq!(localnet(), if site.node.variant == Variant::Ebpf { "0" } else { "1" });
        let localhost: IpAddr = std::net::Ipv4Addr::LOCALHOST.into();
        let reply = site.ask(&site.lab.node, Transport::Tcp, localhost, 8080);
        assert_eq!(named(&reply), Ok("pod-a"));
        site.check(0, "a", &[tcp(8080)]);
        site.del(0, "a", &[]);
        assert_eq!(localnet(), "0");
    });
}

/// 877602d6 (0.8.7, plugins#464, #510): a DEL without mappings took the lock that all share. With nothing
/// recorded there is nothing to lock: it is done while somebody else holds the node's lock, as is ADD.
#[test]
#[ignore = "privileged: makes network namespaces, needs nft"]
fn history_calls_without_mappings_take_no_lock() {
    on_each(&[Variant::Nftables], &bridge(), |site| {
        site.add(1, "other", &[tcp(8081)]);
        let file = std::fs::File::open(site.node.state_dir.join("lock")).unwrap();
        let lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        for verb in ["ADD", "CHECK", "DEL"] {
            site.node.ok(verb, &site.config(0, &[]), &site.of(0, "none"));
        }
        drop(lock);
        site.del(1, "other", &[]);
        site.assert_clean();
    });
}

/// e3d563b0 (1.2.0): whatever failed, the error was "neither iptables nor ip6tables usable". The tool, its
/// status and its own words are in it, and the failed ADD leaves nothing.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_the_cause_is_in_the_error() {
    on_each(&RULES, &bridge(), |site| {
        let tool = match site.node.variant {
            Variant::Nftables => "nft",
            _ => "iptables-restore",
        };
        let tools = site.node.path.clone();
        shadow(site, tool, "echo 'no such luck today' >&2; exit 4");
        let (code, message) =
            site.node.fails("ADD", &site.config(0, &[tcp(8080)]), &site.of(0, "a"));
        assert_eq!(code, 100, "{message}");
        for part in [tool, "status 4", "no such luck today"] {
            assert!(message.contains(part), "{message}");
        }
        site.node.path = tools;
        site.del(0, "a", &[tcp(8080)]);
        site.assert_clean();
    });
}

/// 7f756b41 (1.6.1): conditions that start with a `!` were taken for nft's.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn history_negated_conditions_are_those_of_iptables() {
    on_each(&IPTABLES, &Options::new(Shape::Ptp), |site| {
        let client = site.lab.client_address(Family::V4).to_string();
        let config = with(
            site.config(0, &[tcp(8080)]),
            json!({"backend": null, "conditionsV4": ["!", "-s", client]}),
        );
        site.node.ok("ADD", &config, &site.of(0, "a"));
        let node = site.lab.node_address(Family::V4);
        let from_client = site.ask(&site.lab.client, Transport::Tcp, node, 8080);
        assert!(from_client.is_err(), "{from_client:?}");
        let from_pod = site.ask(&site.pod(1).netns, Transport::Tcp, node, 8080);
        assert_eq!(named(&from_pod), Ok("pod-a"));
        site.node.ok("CHECK", &config, &site.of(0, "a"));
        // Named as nft's, it is an error that says so.
        let wrong = with(config.clone(), json!({"backend": "nftables"}));
        let attachment: Attachment = site.of(1, "b");
        let (code, message) = site.node.fails("ADD", &wrong, &attachment);
        assert_eq!(code, 7, "{message}");
        assert!(message.contains("conditionsV4"), "{message}");
        site.node.ok("DEL", &config, &site.of(0, "a"));
        site.assert_clean();
    });
}
