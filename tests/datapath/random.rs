//! Random packets: nothing is dropped, and nothing changed, but what has a claim or a flow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

use portmap::backend::ebpf::layout::{Addr, ClaimKey, ClaimValue, Config, claim_flags};
use portmap::model::{Family, Protocol};
use zerocopy::{FromBytes, IntoBytes};

use crate::packet::{Kind, Packet, error, error_kinds};
use crate::rig::{
    At, LEAST, NEXT, REDIRECT, Rig, SHOT, hex, on_both_nodes, on_node,
    on_nodes_with_and_without_frames,
};
use crate::seen::Seen;

/// For each family.
const PACKETS: usize = 60_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

fn end(rig: &Rig, random: &mut Random) -> SocketAddr {
    let ports = [80, 443, 8080, 8081, 40000, 40001, 61000, 1];
    let port = random.one_of(&ports);
    match random.below(9) {
        0 => rig.node(port),
        1 => rig.second(port),
        2 => rig.gateway(port),
        3 | 4 => rig.client(port),
        5 => rig.pod(port),
        6 => rig.other_pod(port),
        7 => rig.dummy(port),
        _ => rig.elsewhere(port),
    }
}

fn valid(rig: &Rig, random: &mut Random) -> Vec<u8> {
    let kinds = [
        Kind::Tcp(random.byte()),
        Kind::Udp,
        Kind::UdpWithout,
        Kind::Sctp(random.byte() & 15),
        Kind::SctpWithout,
    ];
    let kind = random.one_of(&kinds);
    let (source, destination) = (end(rig, random), end(rig, random));
    let mut packet = Packet::new(kind, source, destination).sized(random.below(200));
    packet.id = u32::from(random.byte() & 7);
    if rig.is_v4() {
        packet.options = vec![1; random.below(11) * 4];
    } else {
        for _ in 0..random.below(4) {
            let number = random.one_of(&[0, 43, 51, 60]);
            let mut bytes = vec![0; if number == 51 { 8 } else { 16 }];
            bytes[1] = if number == 51 { 0 } else { 1 };
            packet.extensions.push((number, bytes));
        }
    }
    match random.below(8) {
        0 => {
            let mut frames = packet.fragments(8 * (1 + random.below(6)));
            frames.swap_remove(random.below(frames.len()))
        }
        1 => {
            let kind = random.one_of(error_kinds(rig.is_v4()));
            let length = random.below(packet.transport().len());
            let (from, to) = match random.below(3) {
                0 => (packet.destination, packet.source),
                1 => (end(rig, random), packet.source),
                _ => (end(rig, random), end(rig, random)),
            };
            error(from.ip(), to.ip(), kind, &packet.quoted(length))
        }
        _ => packet.frame(),
    }
}

fn packet(rig: &Rig, random: &mut Random) -> Vec<u8> {
    if random.below(8) == 0 {
        let mut frame: Vec<u8> = (0..LEAST + random.below(200)).map(|_| random.byte()).collect();
        if random.below(2) == 0 {
            frame[0] &= 0xfe;
            let (ether_type, first) =
                if rig.is_v4() { ([8, 0], 0x45) } else { ([0x86, 0xdd], 0x60) };
            frame[12..14].copy_from_slice(&ether_type);
            frame[14] = first;
        }
        return frame;
    }
    let mut frame = valid(rig, random);
    if random.below(2) == 0 {
        return frame;
    }
    for _ in 0..1 + random.below(4) {
        // Mostly in the headers.
        let limit = if random.below(4) == 0 { frame.len() } else { frame.len().min(100) };
        let at = 12 + random.below(limit - 12);
        frame[at] = match random.below(3) {
            0 => random.byte(),
            1 => frame[at] ^ 1 << random.below(8),
            _ => random.one_of(&[0, 1, 0x7f, 0x80, 0xff]),
        };
    }
    match random.below(6) {
        0 => frame.truncate(LEAST.max(random.below(frame.len()))),
        1 => frame.extend((0..random.below(30)).map(|_| 0)),
        _ => {}
    }
    frame
}

/// The last address of the uplink's subnet by IPv4, for broadcasts; by IPv6 the first, which is that of
/// every router in it (RFC 4291, section 2.6.1).
fn of_subnet(rig: &Rig) -> IpAddr {
    match rig.node(0).ip() {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() | 0xff).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
    }
}

/// Sources of IPv6 of which `bpf_fib_lookup` says "not forwarded", as of packets to the node, whatever
/// they call (`rt6_need_strict`). The stack drops them before they get to a pod.
fn is_bound_to_link(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_multicast() || ip.is_unicast_link_local() || ip.is_loopback(),
    }
}

/// Where the claim leads that has this destination. One of any address has those of the node alone.
fn claimed(
    rig: &Rig,
    at: At,
    [from, to]: [SocketAddr; 2],
    protocol: Protocol,
) -> Option<SocketAddr> {
    let is_own = [rig.node(0), rig.second(0), rig.gateway(0)].iter().any(|own| own.ip() == to.ip())
        || at == At::UplinkIn
            && (!rig.is_v4() && to.ip() == of_subnet(rig) || is_bound_to_link(from.ip()));
    let any = is_own.then(|| Addr::any(Family::of(&to.ip())));
    let value = [Some(Addr::from(to.ip())), any].into_iter().flatten().find_map(|addr| {
        let key = ClaimKey::new(addr, protocol, to.port());
        rig.maps["pm_claims"].get(key.as_bytes()).unwrap()
    })?;
    Some(ClaimValue::read_from_bytes(&value).unwrap().target())
}

/// Where the packet may be sent if it is touched; `None` if it must not be.
fn leads_to(rig: &Rig, at: At, seen: &Seen) -> Option<Vec<SocketAddr>> {
    let Some((source, destination)) = seen.ends else {
        let key = seen.fragment_key(at == At::Out);
        // Where the first fragment went, which was looked at.
        return rig.maps["pm_fragments"].get(&key).unwrap().map(|_| Vec::new());
    };
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = protocols.into_iter().find(|known| known.number() == seen.protocol).unwrap();
    let answered = rig.flow_of(seen.protocol, source, destination).map(|flow| flow.peer);
    let called = match at {
        At::UplinkIn | At::PodIn => claimed(rig, at, [source, destination], protocol),
        // What is masqueraded is on its way to the pod, and has a flow the other way round.
        _ => rig.flow_of(seen.protocol, destination, source).map(|_| destination),
    };
    let to: Vec<_> = match at {
        At::UplinkIn => called.into_iter().collect(),
        // From a pod, an answer may be one to an address that stands for the peer's.
        _ => answered.into_iter().chain(called).collect(),
    };
    (!to.is_empty()).then_some(to)
}

fn seed() -> u64 {
    let seed = match std::env::var("DATAPATH_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos(),
    };
    println!("DATAPATH_SEED={seed}");
    u64::from(seed)
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn only_what_has_a_claim_or_a_flow_is_touched() {
    let seed = seed();
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim(rig.second(8080), rig.other_pod(80));
        let source = rig.gateway(0).ip();
        rig.claim_with(rig.any(8081), rig.other_pod(443), |claim| {
            claim.flags |= claim_flags::MASQUERADE;
            claim.source = source.into();
        });
        rig.claim_any(40000, rig.pod(40001));
        if rig.is_v4() {
            rig.list_address(of_subnet(rig), 0);
        }
        let mut random = Random(seed);
        let (mut passed, mut changed, mut bounced) = (0, 0, 0);
        for number in 0..PACKETS {
            let frame = packet(rig, &mut random);
            let at = random.one_of(&[At::UplinkIn, At::PodIn, At::Out]);
            let seen = Seen::read(&frame);
            let leads_to = seen.as_ref().and_then(|seen| leads_to(rig, at, seen));
            let no_port = rig.count("dropNoPort");
            let trial = rig.trial(at, &frame);
            let context = || format!("packet {number} at {at:?}: {} of {seen:?}", hex(&frame));
            match trial.verdict {
                SHOT => assert!(rig.count("dropNoPort") > no_port, "{}", context()),
                REDIRECT => bounced += 1,
                verdict => assert_eq!(verdict, NEXT, "{}", context()),
            }
            if trial.verdict == NEXT && trial.packet == frame {
                passed += 1;
                continue;
            }
            let leads_to = leads_to.unwrap_or_else(|| panic!("touched: {}", context()));
            changed += 1;
            let Some(seen) = &seen else { continue };
            seen.check(&frame, &trial.packet);
            if trial.packet != frame && seen.ends.is_some() {
                let (_, to) = Seen::read(&trial.packet).unwrap().ends.unwrap();
                assert!(leads_to.contains(&to), "{to} of {leads_to:?}: {}", context());
            }
        }
        println!("{passed} passed, {changed} changed, {bounced} of them bounced");
        assert!(passed > PACKETS / 4 && changed > PACKETS / 50 && bounced > 30);
        let counts = rig.counts();
        println!("{counts:?}");
        assert_eq!(rig.count("dropRewrite"), 0);
        for reason in ["masqueraded", "remapped", "fragmentIn", "icmpIn", "icmpOut", "nodeFlow"] {
            assert!(counts.contains_key(reason), "{reason}");
        }
    });
}

/// What is remembered, without the time, and what is counted.
fn remembered(rig: &Rig) -> impl PartialEq + std::fmt::Debug {
    let mut flows = rig.entries("pm_flows");
    flows.iter_mut().for_each(|(_, value)| value.truncate(44));
    flows.sort();
    let claims = [8080, 8081, 40000, 443].map(|port| {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .map(|protocol| rig.traffic_of(rig.any(port), protocol))
    });
    (flows, claims, rig.counts())
}

/// Without anything special, of few connections.
fn usual(rig: &Rig, random: &mut Random) -> Vec<u8> {
    usual_with(Vec::new(), rig, random)
}

fn usual_with(options: Vec<u8>, rig: &Rig, random: &mut Random) -> Vec<u8> {
    let flags = random.byte();
    let kind = random.one_of(&[Kind::Tcp(flags), Kind::Udp, Kind::UdpWithout]);
    let peer = rig.client(random.one_of(&[40000, 61000]));
    let called = match random.below(5) {
        0 => rig.other_pod(80),
        1 => rig.other_pod(8081),
        2 => rig.node(443),
        3 => rig.node(8081),
        _ => rig.node(8080),
    };
    let answered = rig.other_pod(random.one_of(&[80, 443, 8081]));
    let mut call = Packet::new(kind, peer, called).sized(random.below(200));
    call.options = options;
    let answer = call.between(answered, peer);
    random.one_of(&[&call, &answer]).frame()
}

/// Usual packets of a node with usual claims go a shorter way than they would elsewhere.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn the_short_way_leads_where_the_long_one_does() {
    let seed = seed();
    on_both_nodes(|rigs| {
        for rig in rigs {
            rig.claim_any(8080, rig.other_pod(80));
            rig.claim_any(8081, rig.other_pod(8081));
            rig.claim_any(40000, rig.other_pod(40001));
            rig.claim_with(rig.any(443), rig.other_pod(443), |claim| {
                claim.flags |= claim_flags::MAC;
                claim.mac = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
            });
        }
        let [long, short] = rigs;
        let mut random = Random(seed);
        for number in 0..PACKETS {
            let make = if random.below(2) == 0 { usual } else { packet };
            let frame = make(long, &mut random);
            let at = random.one_of(&[At::UplinkIn, At::PodIn, At::Out, At::Own, At::Through]);
            let of_pod = |seen: Seen| {
                seen.ends.is_some_and(|(source, _)| source == long.other_pod(source.port()))
            };
            if at == At::PodIn && Seen::read(&frame).is_some_and(of_pod) {
                // A pod's calls of itself, for which ports are chosen at random.
                continue;
            }
            let [one, other] = rigs.map(|rig| rig.trial(at, &frame));
            let context = || format!("packet {number} at {at:?}: {}", hex(&frame));
            assert_eq!(one.verdict, other.verdict, "{}", context());
            assert_eq!(hex(&one.packet), hex(&other.packet), "{}", context());
        }
        assert_eq!(remembered(long), remembered(short));
        assert_eq!((long.config(), short.config()), (Config::default(), Config::usual()));
        let of = |reason| short.count(reason);
        println!("{:?}", short.counts());
        assert!(of("forwarded") > 2 * of("newFlow") && of("answered") > 100);
    });
}

/// Devices without frames, such as tunnels, have programs of their own: of every IP packet the same becomes.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn without_frames_packets_fare_as_with_them() {
    let seed = seed();
    on_nodes_with_and_without_frames(|rigs| {
        for rig in rigs {
            rig.claim_any(8080, rig.other_pod(80));
            rig.claim(rig.second(8080), rig.pod(80));
            rig.claim_any(8081, rig.other_pod(8081));
            rig.claim_any(40000, rig.other_pod(40001));
            rig.claim_any(443, rig.other_pod(443));
        }
        let [framed, bare] = rigs;
        let mut random = Random(seed);
        let (mut tried, mut changed, mut number) = (0, 0, 0);
        while tried < PACKETS / 2 {
            number += 1;
            let ways = [(At::UplinkIn, At::UplinkInLayer3), (At::Out, At::OutLayer3)];
            let (with, without) = random.one_of(&ways);
            let frame = match random.below(2) {
                0 if without == At::UplinkInLayer3 => usual_with(vec![1; 4], framed, &mut random),
                0 => usual(framed, &mut random),
                _ => packet(framed, &mut random),
            };
            let (_, ip) = frame.split_at(14);
            // With an odd first byte a frame would be for a group, for which nothing is done on its way in.
            let is_for_group =
                without == At::UplinkInLayer3 && ip.first().is_some_and(|one| one & 1 != 0);
            if ip.len() < LEAST || is_for_group || ip[12..14] != frame[12..14] {
                continue;
            }
            let context = || format!("packet {number} at {without:?}: {}", hex(ip));
            let (one, other) = (framed.trial(with, &frame), bare.trial(without, ip));
            assert_eq!(one.verdict, other.verdict, "{}", context());
            assert_eq!(hex(&one.packet[14..]), hex(&other.packet), "{}", context());
            tried += 1;
            changed += usize::from(other.packet != ip);
        }
        assert_eq!(remembered(framed), remembered(bare));
        println!("{changed} of {tried} changed, {:?}", bare.counts());
        assert!(changed > PACKETS / 20);
        assert_eq!(bare.count("dropRewrite"), 0);
        for reason in ["forwarded", "answered", "newFlow", "remapped", "notLocal", "sctpChecksum"] {
            assert!(bare.count(reason) > 0, "{reason}");
        }
        // What is rare among these.
        let mut call = Packet::new(Kind::Udp, bare.client(50000), bare.node(8081)).sized(1000);
        call.options = vec![1; 4];
        for (frame, expected) in
            call.fragments(400).iter().zip(call.to(bare.other_pod(8081)).fragments(400))
        {
            bare.gives(At::UplinkInLayer3, &frame[14..], NEXT, &expected[14..]);
        }
        let called = call.to(bare.other_pod(8081));
        for kind in error_kinds(bare.is_v4()) {
            let error = |from: IpAddr, quoted: &[u8]| {
                error(from, call.source.ip(), *kind, quoted)[14..].to_vec()
            };
            let (sent, expected) = (
                error(called.destination.ip(), &called.quoted(8)),
                error(call.destination.ip(), &called.quoted_as(&call, 8)),
            );
            bare.gives(At::OutLayer3, &sent, NEXT, &expected);
        }
        let whole = call.sized(90).ip();
        for length in LEAST..whole.len() {
            bare.gives(At::UplinkInLayer3, &whole[..length], NEXT, &whole[..length]);
        }
        bare.gives(At::UplinkInLayer3, &whole, NEXT, &called.sized(90).ip());
    });
}
