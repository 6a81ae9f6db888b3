//! `route_localnet`: 127.0.0.1 of the node becomes reachable for others unless somebody guards it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use portmap::demo::netns::Netns;
use portmap::demo::server::Servers;
use portmap::demo::topology::{BRIDGE, Options, Shape};
use portmap::demo::traffic::Transport;
use portmap::model::Family;

use crate::site::{Site, bridge, named, on_each, tcp};
use crate::support::{IPTABLES, VARIANTS, Variant};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A service of the node that only the node is to reach.
fn private_service(site: &Site) -> Servers {
    let mut servers = Servers::default();
    let address = SocketAddr::new(LOCALHOST, 10250);
    servers.add(&site.lab.node, "private", Transport::Tcp, address).unwrap();
    servers
}

/// Has a namespace send packets for 127.0.0.1 to the node, as a pod with CAP_NET_ADMIN or a host on
/// the node's link can.
fn turn_into_attacker(netns: &Netns, gateway: IpAddr) {
    let script = format!(
        "ip address del 127.0.0.1/8 dev lo
         ip route add 127.0.0.1/32 via {gateway} dev eth0
         echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet"
    );
    let mut command = std::process::Command::new("sh");
    command.args(["-ec", &script]).env("PATH", portmap::demo::plugin::search_path());
    let output = portmap::demo::plugin::run(&mut command, b"", netns).unwrap();
    assert!(output.success(), "{}: {}", netns.name(), output.stderr);
}

fn localnet(site: &Site, link: &str) -> String {
    site.lab.node.sysctl(&format!("ipv4/conf/{link}/route_localnet")).unwrap()
}

/// The sysctl while 127.0.0.1 leads to a pod: eBPF does without.
fn needed(site: &Site) -> &'static str {
    if site.node.variant == Variant::Ebpf { "0" } else { "1" }
}

/// plugins#729, CVE-2020-8558 (kubernetes#92315), kubernetes#107684: with `route_localnet` on and no
/// guard, a pod reads what the node serves on 127.0.0.1. While the hostPort works on 127.0.0.1, no pod
/// and no other host gets there.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_11_services_on_localhost_stay_private() {
    // One link for all pods, and one for each.
    for shape in [Shape::Bridge, Shape::Cilium] {
        on_each(&VARIANTS, &Options::new(shape), |site| {
            let service = private_service(site);
            // The pod with the mapping too: its own link has the sysctl in every shape.
            let attackers = [&site.pod(0).netns, &site.pod(1).netns, &site.lab.client];
            let [gateway, node] = [site.lab.gateway(Family::V4), site.lab.node_address(Family::V4)];
            for (attacker, via) in attackers.iter().zip([gateway, gateway, node]) {
                turn_into_attacker(attacker, via);
            }
            let attack = &|from| site.ask(from, Transport::Tcp, LOCALHOST, 10250);
            // Proof that the attack is one: it succeeds where the sysctl is on and no guard is there.
            let link = if shape == Shape::Bridge { BRIDGE } else { &site.pod(0).host_link };
            let sysctl = format!("ipv4/conf/{link}/route_localnet");
            site.lab.node.set_sysctl(&sysctl, "1").unwrap();
            assert_eq!(named(&attack(attackers[0])), Ok("private"));
            site.lab.node.set_sysctl(&sysctl, "0").unwrap();

            site.add(0, "a", &[tcp(8080)]);
            assert_eq!(localnet(site, link), needed(site));
            // At once, because each waits for its timeout.
            std::thread::scope(|scope| {
                for attacker in attackers {
                    scope.spawn(move || {
                        let reply = attack(attacker);
                        assert!(reply.is_err(), "{} got {reply:?}", attacker.name());
                    });
                }
            });
            for (port, server) in [(8080, "pod-a"), (10250, "private")] {
                let reply = site.ask(&site.lab.node, Transport::Tcp, LOCALHOST, port);
                assert_eq!(named(&reply), Ok(server));
            }
            site.del(0, "a", &[tcp(8080)]);
            site.assert_clean();
            drop(service);
        });
    }
}

/// plugins#729: the sysctl stayed on for ever. It goes back with the last attachment that needs it.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_11_the_sysctl_goes_back_with_its_last_user() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.add(0, "a", &[tcp(8080)]);
        site.add(1, "b", &[tcp(8081)]);
        assert_eq!(localnet(site, BRIDGE), needed(site));
        site.del(0, "a", &[]);
        assert_eq!(localnet(site, BRIDGE), needed(site));
        let reply = site.ask(&site.lab.node, Transport::Tcp, LOCALHOST, 8081);
        assert_eq!(named(&reply), Ok("pod-b"));
        site.del(1, "b", &[]);
        assert_eq!(localnet(site, BRIDGE), "0");
        site.assert_clean();
    });
}

/// What an administrator or another program has turned on before is left on.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_11_a_sysctl_that_was_on_stays_on() {
    on_each(&VARIANTS, &bridge(), |site| {
        let key = format!("ipv4/conf/{BRIDGE}/route_localnet");
        site.lab.node.set_sysctl(&key, "1").unwrap();
        site.add(0, "a", &[tcp(8080)]);
        site.add(1, "b", &[tcp(8081)]);
        site.del(0, "a", &[]);
        site.del(1, "b", &[]);
        assert_eq!(localnet(site, BRIDGE), "1");
    });
}

/// State that was lost (another `stateDir`, a cleaned /run) leaves the guard without a record. The
/// first attachment after that finds it, whatever has become of it, and has it once.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn pain_11_a_guard_without_a_record_is_taken_over() {
    let damages =
        ["true", "iptables -t raw -F PREROUTING", "iptables -t raw -I PORTMAP-GUARD -j RETURN"];
    for damage in damages {
        on_each(&IPTABLES, &bridge(), |site| {
            site.add(0, "a", &[tcp(8080)]);
            let guard = site.node.shell("iptables -t raw -S");
            assert!(guard.contains("-A PORTMAP-GUARD -j DROP"), "{guard}");
            std::fs::remove_dir_all(&site.node.state_dir).unwrap();
            site.node.shell(damage);
            site.add(0, "a", &[tcp(8080)]);
            assert_eq!(site.node.shell("iptables -t raw -S"), guard, "{damage}");
            site.check(0, "a", &[tcp(8080)]);
        });
    }
}
