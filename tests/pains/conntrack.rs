//! UDP flows that go on as before after the rules have changed, and flows that are none of ours.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;

use portmap::demo::plugin;
use portmap::demo::traffic::{Call, Failure, Session, Transport, reach};
use portmap::model::Family;
use portmap::record::record_id;
use serde_json::{Value, json};

use crate::site::{Site, TIMEOUT, at, bridge, named, on_each, tcp, udp, v4_only, with};
use crate::support::{IPTABLES, PORTMAP, RULES, UPSTREAM, VARIANTS, Variant};

/// Tracks a UDP flow of the client, untranslated, as it is before any rule is there.
fn track(site: &Site, destination: &str, port: u16) {
    let client = site.lab.client_address(Family::of(&destination.parse().unwrap()));
    site.node.shell(&format!(
        "conntrack -I -p udp -s {client} -d {destination} --sport 4000 --dport {port} -t 600"
    ));
}

/// The destinations that flows from port 4000 are still tracked for.
fn tracked(site: &Site) -> Vec<String> {
    let text = ["ipv4", "ipv6"]
        .map(|family| site.node.shell(&format!("conntrack -L -f {family} -p udp 2>/dev/null")))
        .concat();
    let mut found: Vec<String> = text
        .lines()
        .filter(|line| line.contains("sport=4000"))
        .map(|line| {
            let field = |name: &str| {
                line.split(' ').find_map(|word| word.strip_prefix(name)).unwrap().to_owned()
            };
            format!("{} {}", field("dst="), field("dport="))
        })
        .collect();
    found.sort();
    found
}

/// plugins#123, plugins#1190, kubernetes#58336, #66651, #95258, #102559, felix#1880: a client that
/// keeps sending from one port keeps its flow, and so goes on talking to the node that refused it,
/// to the pod before, or to a dead one. The flow follows every change of the rules.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_06_a_udp_client_follows_every_change() {
    on_each(&VARIANTS, &bridge(), |site| {
        // The connection tracking of a namespace begins with the first rule that needs it.
        site.add(1, "other", &[tcp(9000)]);
        let mut session = site.udp_session(8053);
        let mut expect = |server: Result<&str, Failure>| {
            assert_eq!(session.ask().map(|reply| reply.server), server.map(str::to_owned));
        };
        expect(Err(Failure::Refused));
        site.add(0, "a", &[udp(8053)]);
        expect(Ok("pod-a"));
        site.add(1, "b", &[udp(8053)]);
        expect(Ok("pod-b"));
        site.del(1, "b", &[udp(8053)]);
        expect(Ok("pod-a"));
        site.del(0, "a", &[]);
        expect(Err(Failure::Refused));
        site.del(1, "other", &[]);
        site.assert_clean();
    });
}

/// felix#1880, plugins#123: entries of both families that are older than the pod go at its ADD, those
/// to the dead pod at its DEL (which upstream leaves).
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and conntrack"]
fn pain_06_entries_that_are_older_than_the_pod_go() {
    on_each(&RULES, &bridge(), |site| {
        for family in Family::ALL {
            track(site, &site.lab.node_address(family).to_string(), 8053);
            track(site, &site.lab.second_node_address(family).to_string(), 8053);
        }
        track(site, "127.0.0.1", 8053);
        assert_eq!(tracked(site).len(), 5);
        site.add(0, "a", &[udp(8053)]);
        assert_eq!(tracked(site), [""; 0]);
        let mut session = site.udp_session(8053);
        session.ask().unwrap();
        site.del(0, "a", &[]);
        let left = site.node.shell("conntrack -L -p udp 2>/dev/null");
        assert!(!left.contains("dport=8053"), "{left}");
    });
}

/// UDP sockets of the client that keep their ports, one for each family.
fn sessions(site: &Site, port: u16) -> Vec<Session> {
    let open = |family: &Family| {
        let target = site.lab.node_socket(*family, port);
        Session::open(&site.lab.client, Call::new(Transport::Udp, target, TIMEOUT)).unwrap()
    };
    site.lab.options.families.iter().map(open).collect()
}

/// Fails unless `server` answers all of them, or the node refuses them.
fn expect(sessions: &mut [Session], server: Result<&str, Failure>, what: &str) {
    for session in sessions {
        let answer = session.ask().map(|reply| reply.server);
        assert_eq!(answer, server.clone().map(str::to_owned), "{what}");
    }
}

/// The tracked flows of a port, each with what tells it from one that has begun anew.
fn identities(site: &Site, port: u16) -> Vec<String> {
    let list = |family| {
        site.node.shell(&format!(
            "conntrack -L -f {family} -p udp --orig-port-dst {port} -o id 2>/dev/null"
        ))
    };
    let text = ["ipv4", "ipv6"].map(list).concat();
    text.split_whitespace().filter(|word| word.starts_with("id=")).map(str::to_owned).collect()
}

/// A node is upgraded from upstream's plugin: what takes its pods' rules away, takes the flows to these
/// pods as well, and no others.
#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's portmap, iptables and conntrack"]
fn pain_06_flows_to_pods_of_upstream_go_with_their_rules() {
    on_each(&IPTABLES, &bridge(), |site| {
        // Without any rule nothing would be translated, whatever is tracked.
        site.add(1, "other", &[tcp(9000)]);
        let made = |pod, id: &str, mapping: &Value| {
            // The configuration of a node before its plugin was replaced.
            let config = site.config(pod, std::slice::from_ref(mapping));
            let config = with(config, json!({"backend": null}));
            let output = site.node.call(UPSTREAM, "ADD", &config, &site.of(pod, id));
            assert!(output.success(), "{}", output.reason());
        };
        made(1, "stays", &udp(8054));
        let mut others = sessions(site, 8054);
        expect(&mut others, Ok("pod-b"), "another pod of upstream's");
        let kept = identities(site, 8054);
        assert_eq!(kept.len(), 2);
        let valid = ["other", "stays"].map(|id| json!({"containerID": id, "ifname": "eth0"}));
        let gc = with(
            site.node.config(json!(null), json!(null)),
            json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": valid}),
        );
        for verb in ["DEL", "GC"] {
            made(0, "gone", &udp(8053));
            let mut clients = sessions(site, 8053);
            expect(&mut clients, Ok("pod-a"), verb);
            match verb {
                "DEL" => site.del(0, "gone", &[udp(8053)]),
                _ => drop(site.node.ok("GC", &gc, &site.of(0, ""))),
            }
            expect(&mut clients, Err(Failure::Refused), verb);
        }
        let second = site.lab.second_node_address(Family::V4);
        made(0, "gone", &at(second, udp(8053)));
        let call = Call::new(Transport::Udp, SocketAddr::new(second, 8053), TIMEOUT);
        let mut clients = [Session::open(&site.lab.client, call).unwrap()];
        expect(&mut clients, Ok("pod-a"), "of one address");
        site.del(0, "gone", &[udp(8053)]);
        expect(&mut clients, Err(Failure::Refused), "of one address");
        // A new owner keeps the flows that it has by now, although it has the former pod's address.
        made(0, "gone", &udp(8053));
        site.add(0, "new", &[udp(8053)]);
        let mut clients = sessions(site, 8053);
        expect(&mut clients, Ok("pod-a"), "the new owner");
        let present = identities(site, 8053);
        site.del(0, "gone", &[udp(8053)]);
        assert_eq!(identities(site, 8053), present);
        expect(&mut others, Ok("pod-b"), "another pod of upstream's");
        assert_eq!(identities(site, 8054), kept);
    });
}

/// UDP to a pod, as upstream's nftables backend (1.6.0 and later) has it.
fn upstream_rules(site: &Site, pod: usize, id: &str, port: u16) {
    let table = |family: &Family| {
        let name = if *family == Family::V4 { "ip" } else { "ip6" };
        let target = SocketAddr::new(site.pod(pod).address(*family).unwrap(), 53);
        format!(
            "table {name} cni_hostport {{
                 chain hostports {{ udp dport {port} dnat to {target} comment \"{id}\"; }}
                 chain prerouting {{ type nat hook prerouting priority -100; }}
             }}
             flush chain {name} cni_hostport prerouting
             add rule {name} cni_hostport prerouting fib daddr type local jump hostports\n"
        )
    };
    let text: String = site.lab.options.families.iter().map(table).collect();
    site.node.shell(&format!("nft -f - <<'END'\n{text}END\n"));
}

/// The same, of upstream's nftables backend.
#[test]
#[ignore = "privileged: makes network namespaces, needs nft and conntrack"]
fn pain_06_flows_to_pods_of_upstream_s_nftables_backend_go_with_their_rules() {
    on_each(&[Variant::Nftables], &bridge(), |site| {
        site.add(1, "other", &[tcp(9000)]);
        upstream_rules(site, 1, "stays", 8054);
        upstream_rules(site, 0, "gone", 8053);
        let (mut clients, mut others) = (sessions(site, 8053), sessions(site, 8054));
        expect(&mut clients, Ok("pod-a"), "before");
        expect(&mut others, Ok("pod-b"), "before");
        let kept = identities(site, 8054);
        site.del(0, "gone", &[udp(8053)]);
        expect(&mut clients, Err(Failure::Refused), "after");
        expect(&mut others, Ok("pod-b"), "after");
        assert_eq!((kept.len(), identities(site, 8054)), (2, kept));
    });
}

/// Its rules go before ours, and do not tell whether their container lives.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and conntrack"]
fn pain_01_a_new_pod_has_the_port_of_one_that_upstream_s_nftables_backend_has_left() {
    // Legacy tools are no sign of nf_tables, which asking would load.
    on_each(&[Variant::IptablesNft, Variant::Nftables], &bridge(), |site| {
        let nft = site.node.path.join("nft");
        if !nft.exists() {
            std::os::unix::fs::symlink("/usr/sbin/nft", nft).unwrap();
        }
        upstream_rules(site, 0, "left", 8053);
        upstream_rules(site, 0, "left", 8054);
        let (mut clients, mut others) = (sessions(site, 8053), sessions(site, 8054));
        expect(&mut clients, Ok("pod-a"), "before");
        expect(&mut others, Ok("pod-a"), "before");
        let said = site.add(1, "new", &[udp(8053)]).stderr;
        assert!(
            said.contains("of container left, which upstream's portmap has made, gives way to"),
            "{said}"
        );
        expect(&mut clients, Ok("pod-b"), "the new owner");
        expect(&mut others, Ok("pod-a"), "another port");
        expect(&mut sessions(site, 8053), Ok("pod-b"), "the new owner");
        // Repeated, there is nothing left to say.
        let said = site.add(1, "new", &[udp(8053)]).stderr;
        assert!(!said.contains("gives way"), "{said}");
        site.del(1, "new", &[udp(8053)]);
        expect(&mut clients, Err(Failure::Refused), "after");
        site.del(0, "left", &[udp(8053)]);
        expect(&mut others, Err(Failure::Refused), "after");
    });
}

/// A record that cannot be read does not say what the pod had: its index entries do.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and conntrack"]
fn pain_06_flows_to_a_pod_with_a_damaged_record_go_with_it() {
    on_each(&RULES, &bridge(), |site| {
        site.add(1, "other", &[tcp(9000), udp(8054)]);
        let mut others = sessions(site, 8054);
        expect(&mut others, Ok("pod-b"), "before");
        let kept = identities(site, 8054);
        site.add(0, "a", &[udp(8053)]);
        let mut clients = sessions(site, 8053);
        expect(&mut clients, Ok("pod-a"), "before");
        let id = record_id(&portmap::model::Attachment {
            network: "portmap".into(),
            container_id: "a".into(),
            ifname: "eth0".into(),
        });
        let file = site.node.state_dir.join("records").join(format!("{id}.json"));
        assert!(file.exists());
        std::fs::write(file, r#"{"format":1,"netw"#).unwrap();
        site.del(0, "a", &[]);
        expect(&mut clients, Err(Failure::Refused), "after");
        expect(&mut others, Ok("pod-b"), "after");
        assert_eq!((kept.len(), identities(site, 8054)), (2, kept));
        site.del(1, "other", &[]);
        site.assert_clean();
    });
}

/// eBPF translates before anything is tracked, so that such entries do no harm: the client's next datagram
/// from the same port arrives.
#[test]
#[ignore = "privileged: makes network namespaces, needs conntrack"]
fn pain_06_entries_that_are_older_than_the_pod_are_not_met() {
    on_each(&[Variant::Ebpf], &bridge(), |site| {
        for family in Family::ALL {
            track(site, &site.lab.node_address(family).to_string(), 8053);
        }
        site.add(0, "a", &[udp(8053)]);
        for family in Family::ALL {
            let source = SocketAddr::new(site.lab.client_address(family), 4000);
            let target = site.lab.node_socket(family, 8053);
            let call = Call { bind: Some(source), ..Call::new(Transport::Udp, target, TIMEOUT) };
            assert_eq!(named(&reach(&site.lab.client, call)), Ok("pod-a"), "{family}");
        }
        site.del(0, "a", &[]);
        site.assert_clean();
    });
}

/// plugins#705, calico#7517, moby#46276: every UDP flow of the node was deleted, or every one that
/// happens to have the port. Flows through the node keep their entries, and so do other ports.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and conntrack"]
fn pain_07_the_flush_takes_nothing_else() {
    on_each(&VARIANTS, &bridge(), |site| {
        let node = site.lab.node_address(Family::V4).to_string();
        let foreign = [("10.96.0.10", 53), ("192.0.2.77", 53), ("2001:db8::35", 53)];
        let mut kept: Vec<String> =
            foreign.iter().map(|(ip, port)| format!("{ip} {port}")).collect();
        kept.push(format!("{node} 54"));
        if site.node.variant == Variant::Ebpf {
            kept.push(format!("{node} 53"));
        }
        kept.sort();
        for (ip, port) in foreign {
            track(site, ip, port);
        }
        track(site, &node, 54);
        track(site, &node, 53);
        site.add(0, "a", &[udp(53), tcp(54)]);
        assert_eq!(tracked(site), kept);
        site.add(1, "b", &[udp(53)]);
        site.del(1, "b", &[udp(53)]);
        site.del(0, "a", &[udp(53), tcp(54)]);
        assert_eq!(tracked(site), kept);
    });
}

/// plugins#705, moby#53384: a mapping for one address of the node leaves the flows to its others.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and conntrack"]
fn pain_07_a_host_ip_has_its_own_flows_only() {
    on_each(&VARIANTS, &bridge(), |site| {
        let (first, second) =
            (site.lab.node_address(Family::V4), site.lab.second_node_address(Family::V4));
        for ip in [&first.to_string(), &second.to_string(), "10.96.0.10", "192.0.2.77"] {
            track(site, ip, 53);
        }
        site.add(0, "a", &[at(second, udp(53))]);
        let mut kept = vec!["10.96.0.10 53".to_owned(), "192.0.2.77 53".into()];
        kept.push(format!("{first} 53"));
        if site.node.variant == Variant::Ebpf {
            kept.insert(1, format!("{second} 53"));
        }
        assert_eq!(tracked(site), kept);
        site.del(0, "a", &[]);
        assert_eq!(tracked(site), kept);
    });
}

/// plugins#705: the pod is forwarded to even if conntrack cannot be spoken to; a warning says so.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn pain_07_a_failing_flush_is_only_a_warning() {
    // iptables-legacy alone does its work without netlink sockets of the kind that is refused here.
    on_each(&[Variant::IptablesLegacy], &v4_only(bridge()), |site| {
        for verb in ["ADD", "DEL"] {
            let mut command = plugin::command(PORTMAP.as_ref(), verb, &site.of(0, "a"));
            refuse_netfilter_sockets(command.env("PATH", &site.node.path));
            let input = site.config(0, &[udp(8053)]).to_string();
            let output = plugin::run(&mut command, input.as_bytes(), &site.lab.node).unwrap();
            assert!(output.success(), "{verb}: {}", output.reason());
            assert!(output.stderr.contains("conntrack"), "{verb}: {}", output.stderr);
            if verb == "ADD" {
                site.reaches(Transport::Udp, 8053, "pod-a");
            }
        }
        site.assert_clean();
    });
}

/// Has socket(2) fail with EPERM for NETLINK_NETFILTER in the process and its children.
fn refuse_netfilter_sockets(command: &mut std::process::Command) {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    // Offsets into struct seccomp_data of little-endian machines: nr is at 0, args[n] at 16 + 8 n.
    let mut program = [
        op(LOAD, 0, 0, 0),
        op(EQUAL, libc::SYS_socket as u32, 0, 5),
        op(LOAD, 16, 0, 0),
        op(EQUAL, libc::AF_NETLINK as u32, 0, 3),
        op(LOAD, 32, 0, 0),
        op(EQUAL, libc::NETLINK_NETFILTER as u32, 0, 1),
        op(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0, 0),
        op(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    #[allow(unsafe_code, reason = "only system calls are made between fork and exec")]
    // SAFETY: prctl(2) is async-signal-safe, and the program lives in the closure.
    unsafe {
        command.pre_exec(move || {
            let filter = libc::sock_fprog { len: 8, filter: program.as_mut_ptr() };
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
