//! A node, the programs of one object, and its maps.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;

use nix::net::if_::if_nametoindex;
use portmap::backend::ebpf::layout::{
    Addr, ClaimKey, ClaimValue, Config, FlowKey, REASONS, claim_flags,
};
use portmap::backend::ebpf::loaded::OWN;
use portmap::demo::topology::{Lab, Options, Shape, UPLINK};
use portmap::model::{Family, Protocol};
use portmap::sys::bpf::program::Trial;
use zerocopy::{FromBytes, IntoBytes};

use crate::object::Object;
use crate::packet::{Kind, Packet};

/// `TC_ACT_UNSPEC`: passed on.
pub const NEXT: u32 = u32::MAX;
/// `TC_ACT_SHOT`: dropped.
pub const SHOT: u32 = 2;
/// `TC_ACT_REDIRECT`: here, back to the link that it came from.
pub const REDIRECT: u32 = 7;

/// Bytes of the shortest frame that every kernel tries: newer ones want all of an IP header.
pub const LEAST: usize = 14 + 40;

/// Flags in `struct flow`.
pub const REMAPPED: u32 = 1;
pub const HAIRPIN: u32 = 2;
pub const NODE: u32 = 4;
pub const CLOSED: u32 = 8;
pub const ANY: u32 = 16;
pub const MASQUERADED: u32 = 32;
pub const GOES_ON: u32 = 64;
pub const PEER_CLOSED: u32 = 128;

/// Owner of all claims here.
pub const OWNER: u32 = 0x0bad_cafe;

/// A program at its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    UplinkIn,
    PodIn,
    /// For what came in by a pod's link.
    Out,
    /// For what the node has made itself.
    Own,
    /// At the pod's link, for what came in by it.
    Bounced,
    /// For what came in by the uplink, too.
    Through,
    UplinkInLayer3,
    OutLayer3,
}

impl At {
    fn program(self) -> &'static str {
        match self {
            At::UplinkIn => "pm_uplink_in",
            At::PodIn => "pm_pod_in",
            At::Out | At::Own | At::Bounced | At::Through => "pm_out",
            At::UplinkInLayer3 => "pm_uplink_in_l3",
            At::OutLayer3 => "pm_out_l3",
        }
    }
}

/// `struct flow`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    pub host: SocketAddr,
    pub peer: SocketAddr,
    pub flags: u32,
    pub owner: u32,
    pub last: Option<u32>,
}

/// A node with an object's programs, in one family.
pub struct Rig {
    object: Object,
    pub uplink: u32,
    pub pod_link: u32,
    family: Family,
    node: IpAddr,
    second: IpAddr,
    client: IpAddr,
    gateway: IpAddr,
    pods: Vec<IpAddr>,
}

impl Deref for Rig {
    type Target = Object;

    fn deref(&self) -> &Object {
        &self.object
    }
}

/// Loads the programs for devices with frames on a node with two pods, for each family, and for a node
/// that may have all kinds of claims or only the usual ones: `test` runs inside. Where they are usual,
/// most packets go a shorter way, on which the same must become of them.
pub fn on_node(test: impl Fn(&Rig) + Sync) {
    on_node_with(OWN.object, &[At::UplinkIn, At::PodIn, At::Out], test);
}

/// As [`on_node`], with another object or other programs.
pub fn on_node_with(object: &[u8], programs: &[At], test: impl Fn(&Rig) + Sync) {
    let lab = Lab::build(Options::new(Shape::Ptp)).expect("root is needed");
    lab.node
        .run(|| {
            for family in Family::ALL {
                test(&Rig::new(&lab, family, object, programs));
                test(&Rig::usual(&lab, family, object, programs));
            }
        })
        .unwrap();
}

/// As [`on_node`], with a node of either kind at once, the usual one behind the other.
pub fn on_both_nodes(test: impl Fn([&Rig; 2]) + Sync) {
    let lab = Lab::build(Options::new(Shape::Ptp)).expect("root is needed");
    let programs = [At::UplinkIn, At::PodIn, At::Out];
    lab.node
        .run(|| {
            for family in Family::ALL {
                let any = Rig::new(&lab, family, OWN.object, &programs);
                test([&any, &Rig::usual(&lab, family, OWN.object, &programs)]);
            }
        })
        .unwrap();
}

/// Two nodes, the second of which has the programs for devices without frames, each with everything or
/// with the usual claims alone. A test run takes Ethernet frames: so all ends but the node's have addresses
/// of which a part, in a packet's bytes 12 and 13, is an EtherType.
pub fn on_nodes_with_and_without_frames(test: impl Fn([&Rig; 2]) + Sync) {
    let lab = Lab::build(Options::new(Shape::Ptp)).expect("root is needed");
    let programs = [[At::UplinkIn, At::Out], [At::UplinkInLayer3, At::OutLayer3]];
    lab.node
        .run(|| {
            for family in Family::ALL {
                let end = |number: u16| -> IpAddr {
                    match family {
                        Family::V4 => Ipv4Addr::new(8, 0, 1, number.to_be_bytes()[1]).into(),
                        Family::V6 => Ipv6Addr::new(0xfd00, 1, 0x86dd, 1, 0, 0, 0, number).into(),
                    }
                };
                for make in [Rig::new, Rig::usual] {
                    let rigs = programs.map(|programs| {
                        let mut rig = make(&lab, family, OWN.object, &programs);
                        rig.client = end(1);
                        rig.pods = vec![end(2), end(3)];
                        rig
                    });
                    test(rigs.each_ref());
                }
            }
        })
        .unwrap();
}

impl Rig {
    fn new(lab: &Lab, family: Family, object: &[u8], programs: &[At]) -> Self {
        let is_wanted = |name: &str| programs.iter().any(|at| at.program() == name);
        let rig = Rig {
            object: Object::load(object, |name, _| is_wanted(name)),
            uplink: if_nametoindex(UPLINK).unwrap(),
            pod_link: if_nametoindex(lab.pods[0].host_link.as_str()).unwrap(),
            family,
            node: lab.node_address(family),
            second: lab.second_node_address(family),
            client: lab.client_address(family),
            gateway: lab.gateway(family),
            pods: lab.pods.iter().map(|pod| pod.address(family).unwrap()).collect(),
        };
        for address in [rig.node, rig.second, rig.gateway] {
            rig.list_address(address, 1);
        }
        rig
    }

    fn usual(lab: &Lab, family: Family, object: &[u8], programs: &[At]) -> Self {
        let rig = Rig::new(lab, family, object, programs);
        rig.configure(Config::rule_out);
        rig
    }

    /// The configuration that the programs have now.
    pub fn config(&self) -> Config {
        let value = self.maps["pm_config"].get(0_u32.as_bytes()).unwrap().unwrap();
        Config::read_from_bytes(&value).unwrap()
    }

    pub fn is_v4(&self) -> bool {
        self.family == Family::V4
    }

    /// The address that clients call.
    pub fn node(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.node, port)
    }

    /// Another address of the node.
    pub fn second(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.second, port)
    }

    /// Behind the uplink.
    pub fn client(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.client, port)
    }

    /// Where the pods' default routes lead.
    pub fn gateway(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.gateway, port)
    }

    /// Behind the default route.
    pub fn elsewhere(&self, port: u16) -> SocketAddr {
        let address = if self.is_v4() { "203.0.113.9" } else { "fd00:203::9" };
        SocketAddr::new(address.parse().unwrap(), port)
    }

    pub fn pod(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.pods[0], port)
    }

    pub fn other_pod(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.pods[1], port)
    }

    /// What stands for a pod that calls itself.
    pub fn dummy(&self, port: u16) -> SocketAddr {
        let address = if self.is_v4() { "192.0.0.8" } else { "100::8" };
        SocketAddr::new(address.parse().unwrap(), port)
    }

    /// As the plugin does for an address of the node (1) or a broadcast address (0).
    pub fn list_address(&self, address: IpAddr, kind: u32) {
        self.put("pm_addresses", Addr::from(address).as_bytes(), kind.as_bytes());
    }

    /// As the plugin does for what the node's own sockets get, and where Services are bound to a device.
    pub fn configure(&self, change: impl Fn(&mut Config)) {
        let mut config = self.config();
        change(&mut config);
        self.put("pm_config", 0_u32.as_bytes(), config.as_bytes());
    }

    /// hostPort `host` (with an unspecified address: any) to a pod, and the pod's own entry; for all
    /// protocols. `change` is for options of both.
    pub fn claim_with(&self, host: SocketAddr, pod: SocketAddr, change: impl Fn(&mut ClaimValue)) {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let mut value = ClaimValue::new(pod, OWNER);
            change(&mut value);
            let key = ClaimKey::new(self.addr(host), protocol, host.port());
            self.configure(|config| config.expect([(&key, &value)]));
            self.put("pm_claims", key.as_bytes(), value.as_bytes());
            let zero = vec![0; self.maps["pm_traffic"].value_bytes().unwrap()];
            self.put("pm_traffic", key.as_bytes(), &zero);
            value.flags |= claim_flags::SELF;
            let key = ClaimKey::new(pod.ip().into(), protocol, pod.port());
            self.put("pm_claims", key.as_bytes(), value.as_bytes());
        }
        self.mark_port(host.port());
        self.mark_port(pod.port());
    }

    pub fn claim(&self, host: SocketAddr, pod: SocketAddr) {
        self.claim_with(host, pod, |_| {});
    }

    /// hostPort of any address.
    pub fn claim_any(&self, port: u16, pod: SocketAddr) {
        self.claim(self.any(port), pod);
    }

    pub fn any(&self, port: u16) -> SocketAddr {
        let address = if self.is_v4() { "0.0.0.0" } else { "::" };
        SocketAddr::new(address.parse().unwrap(), port)
    }

    pub fn unclaim(&self, host: SocketAddr) {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let key = ClaimKey::new(self.addr(host), protocol, host.port());
            assert!(self.maps["pm_claims"].remove(key.as_bytes()).unwrap());
        }
    }

    pub fn unclaim_protocol(&self, host: SocketAddr, protocol: Protocol) {
        let key = ClaimKey::new(host.ip().into(), protocol, host.port());
        assert!(self.maps["pm_claims"].remove(key.as_bytes()).unwrap());
    }

    /// Clears the bits of all ports.
    pub fn clear_ports(&self) {
        for word in 0..1024_u32 {
            self.put("pm_ports", word.as_bytes(), 0_u64.as_bytes());
        }
    }

    /// What becomes of a frame.
    pub fn trial(&self, at: At, frame: &[u8]) -> Trial {
        self.repeated(at, frame, 1)
    }

    pub fn repeated(&self, at: At, frame: &[u8], times: u32) -> Trial {
        let (device, from) = match at {
            At::PodIn => (self.pod_link, 0),
            At::UplinkIn | At::UplinkInLayer3 | At::Own => (self.uplink, 0),
            At::Out | At::OutLayer3 => (self.uplink, self.pod_link),
            At::Bounced => (self.pod_link, self.pod_link),
            At::Through => (self.uplink, self.uplink),
        };
        self.programs[at.program()]
            .test_run(frame, device, from, times)
            .unwrap_or_else(|error| panic!("{error}: {}", hex(frame)))
    }

    #[track_caller]
    pub fn passes(&self, at: At, frame: &[u8]) {
        self.gives(at, frame, NEXT, frame);
    }

    #[track_caller]
    pub fn gives(&self, at: At, frame: &[u8], verdict: u32, expected: &[u8]) {
        let trial = self.trial(at, frame);
        assert_eq!(
            (trial.verdict, hex(&trial.packet)),
            (verdict, hex(expected)),
            "{at:?}, {:?}, of {}",
            self.family,
            hex(frame)
        );
    }

    /// The packet becomes another one, and is passed on.
    #[track_caller]
    pub fn becomes(&self, at: At, packet: &Packet, expected: &Packet) {
        self.gives(at, &packet.frame(), NEXT, &expected.frame());
    }

    /// The packet becomes another one, and goes back to where it came from.
    #[track_caller]
    pub fn bounces(&self, at: At, packet: &Packet, expected: &Packet) {
        self.gives(at, &packet.frame(), REDIRECT, &expected.bounced().frame());
    }

    #[track_caller]
    pub fn stays(&self, at: At, packet: &Packet) {
        self.passes(at, &packet.frame());
    }

    /// A packet whose source port is not known before: what it has become.
    #[track_caller]
    pub fn with_new_port(&self, at: At, packet: &Packet, expected: &Packet) -> u16 {
        let trial = self.trial(at, &packet.frame());
        let ip = expected.ip().len() - expected.transport().len();
        let port = u16::from_be_bytes([trial.packet[14 + ip], trial.packet[15 + ip]]);
        let source = SocketAddr::new(expected.source.ip(), port);
        assert_eq!(hex(&trial.packet), hex(&expected.from(source).frame()));
        assert_eq!(trial.verdict, NEXT);
        port
    }

    /// One port of the client calls two hostPorts of one port of a pod: the second packet
    /// as it was sent, and the port that it has got.
    #[track_caller]
    pub fn call_two_host_ports(&self) -> (Packet, u16) {
        self.claim_any(8080, self.pod(80));
        self.claim_any(8081, self.pod(80));
        let first = Packet::new(Kind::Udp, self.client(40000), self.node(8080));
        self.becomes(At::UplinkIn, &first, &first.to(self.pod(80)));
        let second = first.to(self.node(8081));
        let port = self.with_new_port(At::UplinkIn, &second, &second.to(self.pod(80)));
        (second, port)
    }

    pub fn flow(&self, packet: &Packet) -> Option<Flow> {
        self.flow_of(packet.kind.protocol(), packet.destination, packet.source)
    }

    /// The flow of answers from `pod` to `peer`.
    pub fn flow_of(&self, protocol: u8, pod: SocketAddr, peer: SocketAddr) -> Option<Flow> {
        let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .into_iter()
            .find(|known| known.number() == protocol)
            .unwrap();
        let key = FlowKey::new(pod, peer, protocol);
        let value = self.maps["pm_flows"].get(key.as_bytes()).unwrap()?;
        let number = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().unwrap());
        let end = |address: usize, port: usize| {
            let address = Addr(value[address..address + 16].try_into().unwrap()).ip();
            SocketAddr::new(address, u16::from_be_bytes([value[port], value[port + 1]]))
        };
        Some(Flow {
            host: end(0, 32),
            peer: end(16, 34),
            flags: number(36),
            owner: number(40),
            last: (value.len() > 44).then(|| number(44)),
        })
    }

    /// Lets a flow look as if its last packet had come `seconds` (of 2^30 ns) ago.
    pub fn age_flow(&self, protocol: Protocol, pod: SocketAddr, peer: SocketAddr, seconds: u32) {
        let flows = &self.maps["pm_flows"];
        let key = FlowKey::new(pod, peer, protocol);
        let mut value = flows.get(key.as_bytes()).unwrap().unwrap();
        let last = u32::from_ne_bytes(value[44..48].try_into().unwrap());
        value[44..48].copy_from_slice(&last.wrapping_sub(seconds).to_ne_bytes());
        flows.put(key.as_bytes(), &value).unwrap();
    }

    pub fn entries(&self, map: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.maps[map].entries().unwrap()
    }

    pub fn clear(&self, map: &str) {
        self.maps[map].remove_where(|_, _| true).unwrap();
    }

    /// All counters that are not 0.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let counted = REASONS.iter().map(|reason| (*reason, self.count(reason)));
        counted.filter(|(_, count)| *count != 0).collect()
    }

    pub fn traffic_of(&self, host: SocketAddr, protocol: Protocol) -> [u64; 5] {
        self.traffic(&ClaimKey::new(self.addr(host), protocol, host.port()))
    }

    fn addr(&self, host: SocketAddr) -> Addr {
        if host.ip().is_unspecified() { Addr::any(self.family) } else { host.ip().into() }
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
