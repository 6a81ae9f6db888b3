//! Which destinations are taken, and which are not.

use std::net::{IpAddr, SocketAddr};

use portmap::backend::ebpf::layout::Addr;
use zerocopy::IntoBytes;

use crate::packet::{Kind, Packet, SYN};
use crate::rig::{ANY, At, on_node};

#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_specific_address_goes_before_any() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.claim(rig.second(8080), rig.other_pod(80));
        for at in [At::UplinkIn, At::PodIn] {
            let peer = if at == At::UplinkIn { rig.client(40000) } else { rig.gateway(40000) };
            let call = Packet::new(Kind::Tcp(SYN), peer, rig.second(8080));
            rig.becomes(at, &call, &call.to(rig.other_pod(80)));
            assert_eq!(rig.flow(&call.to(rig.other_pod(80))).unwrap().flags & ANY, 0);
            let call = call.to(rig.node(8080));
            rig.becomes(at, &call, &call.to(rig.pod(80)));
            assert_eq!(rig.flow(&call.to(rig.pod(80))).unwrap().flags & ANY, ANY);
        }
        rig.unclaim(rig.second(8080));
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40001), rig.second(8080));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn other_ports_protocols_and_addresses_pass() {
    on_node(|rig| {
        rig.claim(rig.second(8080), rig.pod(80));
        rig.unclaim_protocol(rig.second(8080), portmap::model::Protocol::Udp);
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.second(8080));
        for other in [
            call.to(rig.second(8081)),
            call.to(rig.node(8080)),
            call.with(Kind::Udp),
            // Ports whose bits are set, where they mean nothing.
            call.between(rig.client(80), rig.node(80)),
            call.between(rig.client(8080), rig.node(1)),
        ] {
            for at in [At::UplinkIn, At::PodIn, At::Out] {
                rig.stays(at, &other);
            }
        }
        assert!(rig.counts().is_empty(), "{:?}", rig.counts());
        assert!(rig.entries("pm_flows").is_empty());
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
    });
}

/// The map of ports is what every other packet is spared by.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_claim_without_its_bit_is_not_seen() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.clear_ports();
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        rig.stays(At::UplinkIn, &call);
        for port in [1, 63, 64, 65535] {
            rig.claim_any(port, rig.pod(80));
            let call = call.to(rig.node(port));
            rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
            rig.clear("pm_flows");
        }
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn packets_to_others_pass() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Tcp(SYN), rig.other_pod(40000), rig.elsewhere(8080));
        rig.stays(At::PodIn, &call);
        let outside = call.from(rig.client(40000));
        rig.stays(At::UplinkIn, &outside);
        rig.stays(At::UplinkIn, &outside.to(rig.other_pod(8080)));
        assert_eq!(rig.count("notLocal"), 3);
        assert!(rig.entries("pm_flows").is_empty());
        // Nor do they when the address was the node's once and has moved away, or a claim names it.
        rig.list_address(rig.elsewhere(0).ip(), 1);
        rig.stays(At::PodIn, &call);
        rig.stays(At::UplinkIn, &outside);
        rig.claim(rig.elsewhere(8080), rig.pod(80));
        rig.stays(At::PodIn, &call);
        rig.stays(At::UplinkIn, &outside);
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn an_address_that_is_not_listed_is_taken_from_outside_alone() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.clear("pm_addresses");
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.stays(At::PodIn, &call.from(rig.other_pod(40000)));
        // Listed as a broadcast address, it is not.
        rig.list_address(rig.second(0).ip(), 0);
        rig.stays(At::UplinkIn, &call.to(rig.second(8080)));
        rig.stays(At::PodIn, &call.to(rig.second(8080)));
    });
}

/// Services' addresses may be bound to a device of the node (kube-proxy with IPVS): its routes call them
/// local.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn only_listed_addresses_are_taken_where_services_are_bound() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        rig.maps["pm_addresses"].remove(Addr::from(rig.second(0).ip()).as_bytes()).unwrap();
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.second(8080));
        rig.configure(|config| config.take_listed_only(true));
        rig.stays(At::UplinkIn, &call);
        let listed = call.to(rig.node(8080));
        rig.becomes(At::UplinkIn, &listed, &listed.to(rig.pod(80)));
        rig.clear("pm_flows");
        rig.configure(|config| config.take_listed_only(false));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
    });
}

/// Forwarding may be off for one device alone, and bpf_fib_lookup then says no more than that.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn a_device_that_does_not_forward_is_no_obstacle() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let family = if rig.is_v4() { "ipv4" } else { "ipv6" };
        let setting = format!("/proc/sys/net/{family}/conf/eth0/forwarding");
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        std::fs::write(&setting, "0").unwrap();
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.stays(At::UplinkIn, &call.to(rig.elsewhere(8080)));
        // Nor is what was the node's, or has come to it, since the plugin ran last.
        rig.list_address(rig.elsewhere(0).ip(), 1);
        rig.stays(At::UplinkIn, &call.to(rig.elsewhere(8080)));
        rig.maps["pm_addresses"].remove(Addr::from(rig.second(0).ip()).as_bytes()).unwrap();
        let new = call.from(rig.client(40001)).to(rig.second(8080));
        rig.becomes(At::UplinkIn, &new, &new.to(rig.pod(80)));
        std::fs::write(&setting, "1").unwrap();
    });
}

/// Where forwarding is on for pods' links alone, no route can be asked for: the plugin's list is what there is.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn listed_addresses_are_taken_where_routes_are_not_told() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let family = if rig.is_v4() { "ipv4" } else { "ipv6" };
        let set = |value: &str| {
            for device in ["eth0", "lo"] {
                let setting = format!("/proc/sys/net/{family}/conf/{device}/forwarding");
                std::fs::write(&setting, value).unwrap();
            }
        };
        set("0");
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        rig.stays(At::UplinkIn, &call.to(rig.elsewhere(8080)));
        rig.maps["pm_addresses"].remove(Addr::from(rig.second(0).ip()).as_bytes()).unwrap();
        rig.stays(At::UplinkIn, &call.to(rig.second(8080)));
        set("1");
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn reserved_addresses_are_never_taken_even_if_claimed() {
    on_node(|rig| {
        let reserved: &[&str] = if rig.is_v4() {
            &[
                "127.0.0.1",
                "127.255.255.254",
                "0.0.0.0",
                "0.1.2.3",
                "169.254.1.1",
                "224.0.0.1",
                "239.1.2.3",
                "240.0.0.1",
                "255.255.255.255",
            ]
        } else {
            &[
                "::1",
                "::",
                "fe80::1",
                "febf::1",
                "ff02::1",
                "ff0e::1",
                "::ffff:198.51.100.1",
                "::198.51.100.1",
            ]
        };
        rig.claim_any(8080, rig.pod(80));
        for address in reserved {
            let host = SocketAddr::new(address.parse::<IpAddr>().unwrap(), 8080);
            rig.list_address(host.ip(), 1);
            if !host.ip().is_unspecified() {
                rig.claim(host, rig.pod(80));
            }
            let call = Packet::new(Kind::Udp, rig.client(40000), host);
            rig.stays(At::UplinkIn, &call);
            rig.stays(At::PodIn, &call.from(rig.other_pod(40000)));
            rig.stays(At::PodIn, &call.from(rig.pod(40000)));
        }
        assert!(rig.entries("pm_flows").is_empty());
        // Their neighbours are.
        let near: &[&str] = if rig.is_v4() {
            &["126.255.255.255", "128.0.0.0", "169.253.255.255", "223.255.255.255"]
        } else {
            &["fe7f::1", "fec0::1", "feff::1"]
        };
        for address in near {
            rig.claim(SocketAddr::new(address.parse().unwrap(), 8080), rig.pod(80));
            let call = Packet::new(
                Kind::Udp,
                rig.client(40000),
                SocketAddr::new(address.parse().unwrap(), 8080),
            );
            rig.stays(At::UplinkIn, &call);
        }
        assert_eq!(rig.count("notLocal"), u64::try_from(near.len()).unwrap());
    });
}

/// An IPv6 packet must not be taken for the IPv4 packet that its addresses could stand for.
#[test]
#[ignore = "privileged: loads BPF programs"]
fn mapped_addresses_on_the_wire_are_not_ipv4() {
    on_node(|rig| {
        if !rig.is_v4() {
            return;
        }
        rig.claim_any(8080, rig.pod(80));
        let mapped = |address: SocketAddr| match address.ip() {
            IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
            IpAddr::V6(_) => address,
        };
        let call = Packet::new(Kind::Tcp(SYN), rig.client(40000), rig.node(8080));
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
        let odd = call.between(mapped(call.source), mapped(call.destination));
        rig.stays(At::UplinkIn, &odd);
        rig.stays(At::Out, &odd.to(mapped(rig.pod(80))).turned());
        let real: SocketAddr = "[fd00:51::2]:40000".parse().unwrap();
        rig.stays(At::UplinkIn, &odd.from(real));
        rig.stays(At::UplinkIn, &odd.to("[fd00:51::1]:8080".parse().unwrap()));
    });
}

#[test]
#[ignore = "privileged: loads BPF programs"]
fn broadcast_and_multicast_frames_pass() {
    on_node(|rig| {
        rig.claim_any(8080, rig.pod(80));
        let call = Packet::new(Kind::Udp, rig.client(40000), rig.node(8080));
        for address in [[0xff; 6], [0x01, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]] {
            let mut call = call.clone();
            call.macs[..6].copy_from_slice(&address);
            rig.stays(At::UplinkIn, &call);
            rig.stays(At::PodIn, &call);
        }
        rig.becomes(At::UplinkIn, &call, &call.to(rig.pod(80)));
    });
}
