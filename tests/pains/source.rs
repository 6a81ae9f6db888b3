//! Which source address a pod sees: enough is rewritten for answers to come back, and no more.

use std::net::IpAddr;
use std::time::Duration;

use portmap::demo::matrix::{Capabilities, Place, Service, cases, run};
use portmap::demo::topology::{Options, Shape};
use portmap::demo::traffic::Transport;
use portmap::model::Family;
use serde_json::{Value, json};

use crate::site::{Site, bridge, named, on_each, tcp, udp, with};
use crate::support::{VARIANTS, Variant};

/// Makes every call there is to pod-a's ports, but those from a place that is left out, and fails
/// unless each arrives with the right source.
fn every_path_works(site: &Site, but: Option<Place>) {
    let services = [(Transport::Tcp, 8080), (Transport::Udp, 8053)]
        .map(|(transport, host_port)| Service { pod: 0, transport, host_port });
    let capabilities = Capabilities { localhost_v6: Some(site.node.variant == Variant::Ebpf) };
    let mut all = cases(site.lab, &services, capabilities);
    all.retain(|case| Some(case.from) != but);
    for outcome in run(site.lab, all, Duration::from_secs(3)) {
        assert!(outcome.ok, "{:?}: {:?}", outcome.case, outcome.result);
    }
}

/// plugins#68, plugins#469, cilium#9784, rkt#3751, and of upstream's nftables backend: a pod that calls
/// its own hostPort, or a neighbour's on the same node, waits for an answer that never passes the host.
/// However pods are wired, it comes back. (Bridges: see the next test.)
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_13_hairpin_and_neighbours_get_answers() {
    for (shape, bypass) in [(Shape::Ptp, false), (Shape::Cilium, false), (Shape::Cilium, true)] {
        let mut options = Options::new(shape);
        options.bypass = bypass;
        on_each(&VARIANTS, &options, |site| {
            site.add(0, "a", &[tcp(8080), udp(8053)]);
            every_path_works(site, None);
        });
    }
}

/// The same on a bridge whose frames pass through netfilter or do not (`br_netfilter`), and whose ports
/// send frames back where they came from or do not.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and ip"]
fn pain_13_whatever_the_bridge_does() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.add(0, "a", &[tcp(8080), udp(8053)]);
        for hairpin in ["on", "off"] {
            let link = &site.pod(0).host_link;
            site.node.shell(&format!("bridge link set dev {link} hairpin {hairpin}"));
            for filtered in ["0", "1"] {
                for key in ["bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"] {
                    // Without the module there is nothing to set.
                    if site.lab.node.sysctl(key).is_ok() {
                        site.lab.node.set_sysctl(key, filtered).unwrap();
                    }
                }
                println!("hairpin {hairpin}, bridge-nf-call {filtered}");
                // With this pair the bridge itself translates the frame, and then may not send it
                // back to its port: no rule can help (the bridge plugin has hairpinMode for it).
                // eBPF turns it round before the bridge has it.
                let rules = site.node.variant != Variant::Ebpf;
                let lost = rules && hairpin == "off" && filtered == "1";
                every_path_works(site, lost.then_some(Place::Pod(0)));
            }
        }
    });
}

/// The source that pod-a saw of a call to its hostPort.
fn seen(site: &Site, from: &portmap::demo::netns::Netns, family: Family) -> IpAddr {
    let node = site.lab.node_address(family);
    let reply = site.ask(from, Transport::Tcp, node, 8080);
    assert_eq!(named(&reply), Ok("pod-a"), "{} {family}", from.name());
    reply.unwrap().seen.ip()
}

/// kubernetes#29742, flannel#1528, plugins#771, plugins#1235: by default clients keep their address,
/// `snat: false` rewrites nothing at all, `masqAll` everything, in both families and every backend.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_14_the_client_s_address_is_kept_or_not_as_configured() {
    let modes: [(Value, bool, bool); 4] = [
        (json!({}), true, false),
        (json!({"snat": true, "masqAll": false}), true, false),
        (json!({"snat": false}), true, true),
        (json!({"masqAll": true}), false, false),
    ];
    on_each(&VARIANTS, &Options::new(Shape::Ptp), |site| {
        for (options, client_kept, neighbour_kept) in &modes {
            println!("{options}");
            let config = with(site.config(0, &[tcp(8080)]), options.clone());
            site.node.ok("ADD", &config, &site.of(0, "a"));
            for family in Family::ALL {
                let client = site.lab.client_address(family);
                let source = seen(site, &site.lab.client, family);
                assert_eq!(source == client, *client_kept, "{family}: {source}");
                assert!(*client_kept || site.lab.is_node_address(source), "{family}: {source}");
                let neighbour = site.pod(1).address(family).unwrap();
                let source = seen(site, &site.pod(1).netns, family);
                // By eBPF the answer finds its way without.
                let kept = match site.node.variant {
                    Variant::Ebpf => *client_kept,
                    _ => *neighbour_kept,
                };
                assert_eq!(source == neighbour, kept, "{family}: {source}");
            }
            site.node.ok("CHECK", &config, &site.of(0, "a"));
            site.node.ok("DEL", &config, &site.of(0, "a"));
            site.assert_clean();
        }
    });
}

/// cilium#5609: two pods with different modes on one node do not change each other's.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_14_modes_belong_to_their_pod() {
    on_each(&VARIANTS, &bridge(), |site| {
        site.add(0, "a", &[tcp(8080)]);
        let config = with(site.config(1, &[tcp(8081)]), json!({"masqAll": true}));
        site.node.ok("ADD", &config, &site.of(1, "b"));
        for family in Family::ALL {
            let client = site.lab.client_address(family);
            assert_eq!(seen(site, &site.lab.client, family), client);
            let node = site.lab.node_address(family);
            let reply = site.ask(&site.lab.client, Transport::Tcp, node, 8081).unwrap();
            assert_ne!(reply.seen.ip(), client);
        }
        site.node.ok("DEL", &config, &site.of(1, "b"));
        site.del(0, "a", &[]);
        site.assert_clean();
    });
}
