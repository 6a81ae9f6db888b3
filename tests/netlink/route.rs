use portmap::model::Family;
use portmap::sys::bpf::cookie;
use portmap::sys::netlink::route::{DefaultRoute, RouteReader};
use portmap::sys::sysctl;

use crate::{in_namespace, run};

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn links_addresses_and_routes() {
    in_namespace(|| {
        for command in [
            "link add br0 type bridge",
            "link add v0 type veth peer name v1",
            "link set v0 master br0 up",
            "link set v1 up",
            "link set br0 up",
            "addr add 192.0.2.1/24 dev br0",
            "addr add 198.51.100.1 peer 198.51.100.2/32 dev v1",
            "addr add 2001:db8::1/64 dev br0 nodad",
        ] {
            run(&format!("ip {command}"));
        }
        let mut reader = RouteReader::open().unwrap();
        let links = reader.links().unwrap();
        let named = |name: &str| links.iter().find(|link| link.name == name).unwrap();
        let (lo, bridge) = (named("lo"), named("br0").index);
        assert!(lo.loopback && lo.up && lo.kind.is_none() && lo.peer.is_none());
        assert_eq!((lo.hardware, lo.mac), (libc::ARPHRD_LOOPBACK, Some([0; 6])));
        let (v0, v1) = (named("v0"), named("v1"));
        assert_eq!((v0.kind.as_deref(), v0.master), (Some("veth"), Some(bridge)));
        assert_eq!((v0.peer, v1.peer), (Some(v1.index), Some(v0.index)));
        assert_eq!((v1.master, v1.up, v1.loopback), (None, true, false));
        assert!(links.iter().all(|link| link.has_frames()));
        let mac = v0.mac.unwrap().map(|byte| format!("{byte:02x}")).join(":");
        assert!(run("ip -o link show v0").contains(&format!("link/ether {mac} ")));
        assert_eq!(named("br0").kind.as_deref(), Some("bridge"));
        let indices = reader.indices(["br0", "v9", "v1"]).unwrap();
        assert_eq!(indices, [Some(bridge), None, Some(v1.index)]);
        let many =
            reader.indices(std::array::from_fn::<_, 40, _>(|n| ["lo", "v9"][n % 2])).unwrap();
        assert!(many.chunks(2).all(|pair| pair == [Some(lo.index), None]));
        assert_eq!(reader.netns_cookie().unwrap(), cookie::own().unwrap());
        let listed = run("ip -o link").lines().count();
        assert_eq!(links.len(), listed);

        let addresses = reader.addresses().unwrap();
        assert_eq!(addresses.len(), run("ip -o addr").lines().count());
        let with = |ip: &str| {
            let ip: std::net::IpAddr = ip.parse().unwrap();
            addresses.iter().find(|address| address.ip == ip)
        };
        let own = with("192.0.2.1").unwrap();
        assert_eq!((own.index, own.prefix, own.global), (bridge, 24, true));
        assert!(!with("127.0.0.1").unwrap().global);
        assert!(!with("::1").unwrap().global);
        assert!(with("2001:db8::1").unwrap().global);
        let own = with("198.51.100.1").unwrap();
        assert_eq!((own.index, own.prefix), (v1.index, 32));
        assert!(with("198.51.100.2").is_none());

        assert_eq!(reader.default_routes().unwrap(), []);
        let mut to = |ip: &str| reader.route_to(ip.parse().unwrap()).unwrap();
        assert_eq!(to("203.0.113.1").map(|route| route.device), None);
        assert_eq!(to("2001:db9::1").map(|route| route.device), None);
        assert_eq!(to("192.0.2.77").map(|route| route.device), Some(bridge));
        assert_eq!(to("2001:db8::77").map(|route| route.device), Some(bridge));
        assert_eq!(to("192.0.2.1").map(|route| route.device), Some(lo.index));
        for (ip, own) in [
            ("192.0.2.77", "192.0.2.1"),
            ("198.51.100.2", "198.51.100.1"),
            ("2001:db8::77", "2001:db8::1"),
            ("192.0.2.1", "192.0.2.1"),
        ] {
            assert_eq!(to(ip).unwrap().source, Some(own.parse().unwrap()), "{ip}");
        }
        for kind in ["unreachable", "blackhole", "prohibit", "throw"] {
            for net in ["10.9.0.0/16", "2001:db9::/32"] {
                run(&format!("ip route add {kind} {net}"));
                assert_eq!(to("10.9.0.1").map(|route| route.device), None, "{kind}");
                assert_eq!(to("2001:db9::1").map(|route| route.device), None, "{kind}");
                run(&format!("ip route del {kind} {net}"));
            }
        }

        run("ip route add default nexthop via 192.0.2.2 nexthop via 198.51.100.2");
        run("ip -6 route add default via 2001:db8::2");
        run("ip route add default via 192.0.2.2 table 100");
        run("ip route add unreachable default metric 4000");
        let (v4, v6) = (Family::V4, Family::V6);
        assert_eq!(
            reader.default_routes().unwrap(),
            [
                DefaultRoute { family: v4, index: bridge },
                DefaultRoute { family: v4, index: v1.index },
                DefaultRoute { family: v6, index: bridge },
            ]
        );
        run("ip -6 route del default");
        run("ip -6 route add default nexthop via 2001:db8::2 nexthop via fe80::2 dev v1");
        run("ip -4 route del default nexthop via 192.0.2.2 nexthop via 198.51.100.2");
        let routes = reader.default_routes().unwrap();
        let mut devices: Vec<_> = routes.iter().map(|route| route.index).collect();
        devices.sort_unstable();
        let mut expected = [bridge, v1.index];
        expected.sort_unstable();
        assert_eq!(devices, expected);
        assert!(routes.iter().all(|route| route.family == v6));
    });
}

#[test]
#[ignore = "privileged: needs root, network namespaces, nft and conntrack"]
fn sysctls_of_devices_with_dots() {
    in_namespace(|| {
        run("ip link add d.0 type veth");
        let key = ["net", "ipv4", "conf", "d.0", "route_localnet"];
        assert_eq!(sysctl::read(&key).unwrap(), "0");
        sysctl::write(&key, "1").unwrap();
        assert_eq!(sysctl::read(&key).unwrap(), "1");
        assert_eq!(run("sysctl -n net/ipv4/conf/d.0/route_localnet").trim(), "1");
        let refused = sysctl::write(&key, "nonsense").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
        let missing = sysctl::write(&["net", "ipv4", "conf", "gone", "route_localnet"], "1");
        assert_eq!(missing.unwrap_err().kind(), std::io::ErrorKind::NotFound);
    });
}
