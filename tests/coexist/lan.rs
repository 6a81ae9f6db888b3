//! A bridge that has both pods' links and the way out of the node as ports: Azure CNI's bridge mode, or
//! the node's own bridge of a LAN that CNI's `bridge` plugin joins.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use portmap::demo::matrix::{Case, Place, Source};
use portmap::demo::netns::Netns;
use portmap::demo::topology::{BRIDGE, Lab, Options, Shape, UPLINK};
use portmap::demo::traffic::{Call, Session, Transport};
use portmap::model::Family;
use portmap::sys::bpf::features::Features;
use serde_json::json;

use crate::rig::{
    Container, INSIDE, PORT, Stage, TIMEOUT, TRANSPORTS, all, assert_calls, every_path, itself,
    mapped, reaches, shell,
};
use crate::support::{Node, Variant, ebpf};

/// The bridge's port that leads out, and the client's link to the same LAN.
const PORT_OUT: &str = "lan0";
/// Whoever is behind the LAN's router, which is the client.
const FAR: [&str; 2] = ["203.0.113.2", "2001:db8:113::2"];

/// Makes the pods' bridge a part of a LAN in which the client is, too.
struct Lan {
    bridge: [IpAddr; 2],
    client: [IpAddr; 2],
    far: Netns,
}

impl Lan {
    fn join(lab: &Lab) -> Self {
        let of_bridge = |family: &str| -> ipnetwork::IpNetwork {
            let script = format!("ip -o -{family} address show dev {BRIDGE} scope global");
            let text = shell(&lab.node, &script);
            text.split_whitespace().nth(3).unwrap().parse().unwrap()
        };
        let networks = [of_bridge("4"), of_bridge("6")];
        let client = networks.map(|network| match network.network() {
            IpAddr::V4(ip) => IpAddr::from((u32::from(ip) + 200).to_be_bytes()),
            IpAddr::V6(ip) => IpAddr::from((u128::from(ip) + 0x2000).to_be_bytes()),
        });
        let ends = [lab.node_address(Family::V4), lab.client_address(Family::V4)];
        let device = |[own, other]: [IpAddr; 2]| {
            format!(
                "ip link add {PORT_OUT} type vxlan id 7 local {own} remote {other} dstport 4789 dev {UPLINK}
                 ip link set {PORT_OUT} up"
            )
        };
        // A bridge has the lowest MAC address of its ports, until it is given one.
        shell(
            &lab.node,
            &format!(
                "{}; ip link set {PORT_OUT} master {BRIDGE}
                 ip link set {BRIDGE} address 02:00:00:00:00:30",
                device(ends)
            ),
        );
        let far = Netns::new("far").unwrap();
        lab.client.set_sysctl("ipv4/ip_forward", "1").unwrap();
        lab.client.set_sysctl("ipv6/conf/all/forwarding", "1").unwrap();
        let mut script = device([ends[1], ends[0]]);
        for (network, own) in networks.iter().zip(client) {
            let subnet = ipnetwork::IpNetwork::new(network.network(), network.prefix()).unwrap();
            let nodad = if own.is_ipv6() { "nodad" } else { "" };
            script += &format!(
                "\nip route del {subnet}
                 ip address add {own}/{} dev {PORT_OUT} {nodad}",
                network.prefix()
            );
        }
        shell(&lab.client, &script);
        shell(
            &lab.client,
            &format!(
                "ip link add far0 type veth peer name far1
                 ip link set far1 netns {}
                 ip link set far0 up
                 ip address add 203.0.113.1/24 dev far0
                 ip address add 2001:db8:113::1/64 dev far0 nodad",
                far.path().display()
            ),
        );
        shell(
            &far,
            "ip link set lo up; ip link set far1 up
             ip address add 203.0.113.2/24 dev far1
             ip address add 2001:db8:113::2/64 dev far1 nodad
             ip route add default via 203.0.113.1
             ip -6 route add default via 2001:db8:113::1",
        );
        let [v4, v6] = client;
        let route = format!(
            "ip route add 203.0.113.0/24 via {v4}; ip -6 route add 2001:db8:113::/64 via {v6}"
        );
        shell(&lab.node, &route);
        // One pod has the LAN's router for this, the others have the node.
        if lab.options.shape == Shape::Bridge {
            shell(&lab.pods[0].netns, &route);
        }
        Lan { bridge: networks.map(|network| network.ip()), client, far }
    }

    /// Everybody calls a pod by the bridge's address.
    fn calls(&self, lab: &Lab, pod: usize) -> Vec<Case> {
        let port = PORT + u16::try_from(pod).unwrap();
        let mut cases = Vec::new();
        for (family, ip) in Family::ALL.into_iter().zip(self.bridge) {
            let server = &lab.pods[pod].name;
            let seen = |place: &Place| match place {
                Place::Client => Source::Kept(self.client[family as usize]),
                Place::Pod(caller) if *caller == pod => Source::Kept(itself(family)),
                Place::Pod(caller) => Source::Kept(lab.pods[*caller].address(family).unwrap()),
                Place::Node => Source::Node,
            };
            for place in [Place::Client, Place::Pod(0), Place::Pod(1), Place::Node] {
                let source = seen(&place);
                cases.extend(reaches(place, ip, port, server, source));
            }
        }
        cases
    }

    /// The same from behind the router.
    fn assert_far(&self, lab: &Lab, pod: usize) {
        let port = PORT + u16::try_from(pod).unwrap();
        for (ip, own) in self.bridge.iter().zip(FAR) {
            let target = SocketAddr::new(*ip, port);
            let calls = TRANSPORTS.map(|by| (&self.far, Call::new(by, target, TIMEOUT)));
            for reply in all(&calls) {
                let reply = reply.unwrap_or_else(|failure| panic!("far to {target}: {failure}"));
                assert_eq!(reply.server, lab.pods[pod].name);
                assert_eq!(reply.seen.ip(), own.parse::<IpAddr>().unwrap());
            }
        }
    }
}

/// Devices that have a program at ingress.
fn hooked(lab: &Lab) -> Vec<String> {
    let hooks = ebpf::hooks(&lab.node);
    let at_ingress = |line: &String| {
        let (device, rest) = line.split_once(" Ingress ")?;
        Some(format!("{device} {}", rest.split_once(' ')?.1))
    };
    hooks.iter().filter_map(at_ingress).collect()
}

fn pretend_without_tcx(node: &Node) {
    let features = Features { tcx: false, ..Features::probe().unwrap() };
    let notes = node.state_dir.join("notes");
    std::fs::create_dir_all(&notes).unwrap();
    std::fs::write(notes.join("kernel"), json!({"features": features}).to_string()).unwrap();
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn pods_of_a_lan_are_reached_from_everywhere() {
    let stage = Stage::new(Shape::Bridge);
    let lab = &stage.lab;
    let lan = Lan::join(lab);
    let node = Node::new(&lab.node, Variant::Ebpf);
    let before = node.snapshot();
    let containers = [0, 1].map(|pod| {
        Container::new(&node, lab, pod, mapped(PORT + u16::try_from(pod).unwrap(), INSIDE))
    });
    containers.iter().for_each(Container::add);
    let links = lab.pods.iter().map(|pod| format!("{} pm_pod_in", pod.host_link));
    let expected: Vec<String> = links.collect();
    let hooks = hooked(lab);
    assert!(expected.iter().all(|hook| hooks.contains(hook)), "{hooks:?}");
    assert!(hooks.contains(&format!("{PORT_OUT} pm_uplink_in")), "{hooks:?}");
    assert!(!hooks.iter().any(|hook| hook.starts_with(BRIDGE)), "{hooks:?}");
    for pod in [0, 1] {
        assert_calls("in the LAN", lab, lan.calls(lab, pod));
        lan.assert_far(lab, pod);
    }
    // The other uplink, which is no port.
    assert_calls("past the LAN", lab, every_path(Variant::Ebpf, lab, 0, PORT));
    containers.iter().for_each(Container::check);
    containers.iter().for_each(Container::del);
    node.assert_clean(&before);
}

/// The node's address to the pods, as the pods of a LAN see it.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn pods_of_a_lan_may_see_the_node_alone() {
    let stage = Stage::new(Shape::Bridge);
    let lab = &stage.lab;
    let lan = Lan::join(lab);
    let node = Node::new(&lab.node, Variant::Ebpf);
    let container =
        Container::new(&node, lab, 0, mapped(PORT, INSIDE)).with("masqAll", json!(true));
    container.add();
    let seen = |family: Family| Source::Kept(lan.bridge[family as usize]);
    let cases = Family::ALL.into_iter().zip(lan.bridge).flat_map(|(family, ip)| {
        [Place::Client, Place::Pod(1), Place::Node]
            .map(|from| reaches(from, ip, PORT, "pod-a", seen(family)))
            .concat()
    });
    assert_calls("masqAll", lab, cases.collect());
    container.check();
}

/// Does something while a TCP connection is busy: what is lost is sent again, and nothing resets it.
fn while_busy(lan: &Lan, lab: &Lab, act: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for ip in lan.bridge {
            let call = Call::new(Transport::Tcp, SocketAddr::new(ip, PORT), TIMEOUT);
            let mut session = Session::open(&lab.client, call).unwrap();
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(session.ask().unwrap().server, "pod-a", "{ip}");
                }
                session.ask().unwrap();
            });
        }
        act();
        done.store(true, Ordering::Relaxed);
    });
}

/// Connections of another pod go on when the programs move from a bridge to its ports, and back.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_bridge_may_get_its_first_pod_and_lose_its_last() {
    for tcx in [true, false] {
        let stage = Stage::with(Options::new(Shape::Mixed));
        let lab = &stage.lab;
        let lan = Lan::join(lab);
        let node = Node::new(&lab.node, Variant::Ebpf);
        if !tcx {
            pretend_without_tcx(&node);
        }
        let link = &lab.pods[1].host_link;
        shell(&lab.node, &format!("ip link set {link} nomaster"));
        let containers = [0, 1].map(|pod| {
            Container::new(&node, lab, pod, mapped(PORT + u16::try_from(pod).unwrap(), INSIDE))
        });
        containers[0].add();
        let of = |device: &str| {
            let hooks = hooked(lab);
            hooks.into_iter().filter(|hook| hook.starts_with(device)).count()
        };
        assert_eq!((of(BRIDGE), of(PORT_OUT)), (1, 0), "tcx {tcx}");
        let mut sessions: Vec<Session> = lan
            .bridge
            .iter()
            .flat_map(|ip| TRANSPORTS.map(|by| (*ip, by)))
            .map(|(ip, by): (IpAddr, Transport)| {
                let call = Call::new(by, SocketAddr::new(ip, PORT), TIMEOUT);
                Session::open(&lab.client, call).unwrap()
            })
            .collect();
        let mut go_on = |what: &str| {
            for session in &mut sessions {
                session.ask().unwrap_or_else(|failure| panic!("{what}, tcx {tcx}: {failure}"));
            }
        };
        go_on("at the bridge");
        // A pod without hostPorts calls others'.
        shell(&lab.node, &format!("ip link set {link} master {BRIDGE}"));
        Container::new(&node, lab, 1, vec![]).add();
        assert_eq!((of(BRIDGE), of(PORT_OUT)), (0, 1), "tcx {tcx}");
        let from_guest = Family::ALL.into_iter().zip(lan.bridge).flat_map(|(family, ip)| {
            let own = lab.pods[1].address(family).unwrap();
            reaches(Place::Pod(1), ip, PORT, "pod-a", Source::Kept(own))
        });
        assert_calls("a guest", lab, from_guest.collect());
        go_on("with a guest");
        shell(&lab.node, &format!("ip link set {link} nomaster"));
        containers[0].add();
        assert_eq!((of(BRIDGE), of(PORT_OUT)), (1, 0), "tcx {tcx}");
        // The other pod's main plugin has been there, and portmap has not.
        shell(&lab.node, &format!("ip link set {link} master {BRIDGE}"));
        containers[0].check();
        go_on("with a port");
        while_busy(&lan, lab, || containers[1].add());
        assert_eq!((of(BRIDGE), of(PORT_OUT)), (0, 1), "tcx {tcx}");
        go_on("at the ports");
        containers.iter().for_each(Container::check);
        containers[1].del();
        shell(&lab.node, &format!("ip link set {link} nomaster"));
        containers[0].check();
        go_on("without the pod");
        while_busy(&lan, lab, || containers[0].add());
        assert_eq!((of(BRIDGE), of(PORT_OUT)), (1, 0), "tcx {tcx}");
        go_on("at the bridge again");
        containers[0].check();
        containers[0].del();
    }
}
