//! What `portmap who` says.

use std::path::Path;
use std::time::Duration;

use portmap::demo::server::Servers;
use portmap::demo::topology::Lab;
use portmap::demo::traffic::{self, Call, Transport};
use portmap::model::Family;
use portmap::sys::bpf::map::{Definition, Map};
use serde_json::{Value, json};

use super::support::{IPTABLES, Node, RULES, UPSTREAM, VARIANTS, Variant, attachment, prev_result};
use super::{add, add_dead, changes_nothing, lab, report, run};

/// The one answer to a question about IPv4, and the exit status.
#[track_caller]
fn answer(node: &Node, question: &[&str]) -> (Value, i32) {
    let (found, status) = changes_nothing(node, || report(node, &[&["who"], question].concat()));
    let answers: Vec<&Value> = found["answers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|answer| answer["family"] == "ipv4")
        .collect();
    let [answer] = answers.as_slice() else {
        panic!("{:?}: {found}", node.variant);
    };
    ((*answer).clone(), status)
}

fn target(lab: &Lab, pod: usize) -> String {
    format!("{}:80 of demo/{}", lab.pods[pod].address(Family::V4).unwrap(), lab.pods[pod].name)
}

/// Who really answers a client: the name of the server, or why there is none.
fn reached(lab: &Lab, port: u16) -> String {
    let target = lab.node_socket(Family::V4, port);
    let call = Call::new(Transport::Tcp, target, Duration::from_secs(2));
    traffic::reach(&lab.client, call)
        .map_or_else(|failure| failure.to_string(), |reply| reply.server)
}

/// Servers in all pods.
fn serve(lab: &Lab) -> Vec<Servers> {
    lab.pods.iter().map(|pod| pod.serve(&[80], &[]).unwrap()).collect()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_host_port_answers_with_everything_on_its_way() {
    for variant in VARIANTS {
        let lab = lab(3);
        let _servers = serve(&lab);
        let node = Node::new(&lab.node, variant);
        add(&node, &lab, 0, 8080);
        let newest = add(&node, &lab, 1, 8080);
        assert_eq!(reached(&lab, 8080), "pod-b", "{variant:?}");
        let (found, status) = answer(&node, &["8080"]);
        let goes = format!("goes to {}", target(&lab, 1));
        assert_eq!((found["fromOutside"].as_str(), status), (Some(goes.as_str()), 0), "{found}");
        assert_eq!(found["fromNode"], format!("{goes}; by 127.0.0.1 as well"), "{variant:?}");
        let states: Vec<&Value> =
            found["claims"].as_array().unwrap().iter().map(|claim| &claim["state"]).collect();
        assert_eq!(states, ["active", "shadowed"], "{variant:?}");
        let path = found["path"].as_array().unwrap();
        assert!(path.len() >= 3, "{variant:?} {found}");
        assert!(path.iter().all(|step| step["found"] == true), "{variant:?} {found}");

        let own = lab.node_address(Family::V4).to_string();
        let (found, status) = answer(&node, &["8080/tcp", "--ip", &own]);
        assert_eq!((&found["fromOutside"], status), (&json!(goes), 0));
        let (found, status) = answer(&node, &["8080/tcp", "--ip", "203.0.113.77"]);
        assert!(found["fromOutside"].as_str().unwrap().contains("not an address of this node"));
        assert_eq!(status, 1);

        // The older one is active again.
        node.ok("DEL", &newest.0, &newest.1);
        assert_eq!(reached(&lab, 8080), "pod-a", "{variant:?}");
        let (found, _) = answer(&node, &["8080/tcp"]);
        assert_eq!(found["fromOutside"], format!("goes to {}", target(&lab, 0)), "{variant:?}");

        node.damage();
        let (found, status) = answer(&node, &["8080/tcp"]);
        assert_eq!(status, 1, "{variant:?}");
        assert!(found["fromOutside"].as_str().unwrap().contains("portmap restore"), "{found}");
        let path = found["path"].as_array().unwrap();
        assert!(path.iter().any(|step| step["found"] == false), "{variant:?} {found}");
        assert!(
            run(&node, &["who", "8080"]).stdout.contains("(missing)") || variant == Variant::Ebpf
        );
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn nobody_and_a_dead_container_do_not_answer() {
    for variant in VARIANTS {
        let lab = lab(1);
        let node = Node::new(&lab.node, variant);
        let output = changes_nothing(&node, || run(&node, &["who", "8080/tcp"]));
        assert_eq!(output.status, Some(1));
        assert!(output.stdout.starts_with("nobody: "), "{}", output.stdout);
        add_dead(&node, &lab, 0, 8080);
        let (found, status) = answer(&node, &["8080"]);
        assert!(found["fromOutside"].as_str().unwrap().contains("portmap gc"), "{found}");
        assert_eq!(status, 1);
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_process_is_named() {
    for variant in VARIANTS {
        let lab = lab(1);
        let node = Node::new(&lab.node, variant);
        let _servers = serve(&lab);
        let _server = Servers::start(&lab.node, "node", &[8080], &[]).unwrap();
        assert_eq!(reached(&lab, 8080), "node");
        let pid = format!("(pid {})", std::process::id());
        let (found, status) = answer(&node, &["8080/tcp"]);
        assert!(found["fromOutside"].as_str().unwrap().starts_with("reaches "), "{found}");
        assert!(found["processes"][0].as_str().unwrap().contains(&pid), "{found}");
        assert_eq!(status, 1);
        // From now on the pod is reached, and the process is not.
        add(&node, &lab, 0, 8080);
        assert_eq!(reached(&lab, 8080), "pod-a", "{variant:?}");
        let (found, status) = answer(&node, &["8080/tcp"]);
        assert_eq!(found["fromOutside"], format!("goes to {}", target(&lab, 0)));
        assert!(found["processes"][0].as_str().unwrap().contains(&pid), "{found}");
        assert_eq!(status, 0, "{variant:?}");
    }
}

/// A NodePort of kube-proxy, in iptables and in nftables.
const IPTABLES_PROXY: &str = "iptables -t nat -N KUBE-SERVICES; iptables -t nat -N KUBE-NODEPORTS; \
    iptables -t nat -N KUBE-SVC-X; \
    iptables -t nat -A KUBE-SVC-X -p tcp -j DNAT --to-destination TARGET; \
    iptables -t nat -A KUBE-NODEPORTS -p tcp -m comment --comment default/web -m tcp --dport 30080 -j KUBE-SVC-X; \
    iptables -t nat -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS; \
    iptables -t nat -I PREROUTING -j KUBE-SERVICES; iptables -t nat -I OUTPUT -j KUBE-SERVICES";
const NFT_PROXY: &str = "nft -f - <<'END'
table ip kube-proxy {
    chain external-X-default/web/tcp/ { meta l4proto tcp dnat to TARGET; }
    set nodeport-ips { type ipv4_addr; }
    map service-nodeports { type inet_proto . inet_service : verdict; elements = { tcp . 30080 : goto external-X-default/web/tcp/ }; }
    chain nat-prerouting { type nat hook prerouting priority -100; meta l4proto . th dport vmap @service-nodeports; }
}
END";

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_node_port_is_met_before_rules_and_behind_programs() {
    for (variant, proxy) in [
        (Variant::IptablesNft, IPTABLES_PROXY),
        (Variant::IptablesLegacy, IPTABLES_PROXY),
        (Variant::Nftables, NFT_PROXY),
        (Variant::Ebpf, NFT_PROXY),
    ] {
        let lab = lab(3);
        let _servers = serve(&lab);
        let node = Node::new(&lab.node, variant);
        add(&node, &lab, 0, 30080);
        add(&node, &lab, 1, 30081);
        let service = lab.pods[2].address(Family::V4).unwrap();
        node.shell(&proxy.replace("TARGET", &format!("{service}:80")));
        let (found, status) = answer(&node, &["30080/tcp"]);
        let said = found["fromOutside"].as_str().unwrap();
        match RULES.contains(&variant) {
            true => {
                assert!(said.starts_with("goes to the NodePort of a Service ("), "{said}");
                assert_eq!(reached(&lab, 30080), "pod-c", "{variant:?}");
            }
            false => {
                assert_eq!(said, format!("goes to {}", target(&lab, 0)));
                assert_eq!(reached(&lab, 30080), "pod-a", "{variant:?}");
            }
        }
        assert_eq!(status, i32::from(RULES.contains(&variant)), "{variant:?}");
        let others = found["others"].to_string();
        assert!(others.contains("default/web"), "{others}");
        // A Service's port is its own alone.
        assert_eq!(reached(&lab, 30081), "pod-b", "{variant:?}");
        let (found, status) = answer(&node, &["30081/tcp"]);
        assert_eq!((&found["others"], status), (&json!([]), 0), "{variant:?}");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces, needs upstream's plugin"]
fn what_upstream_left_answers_and_stands_behind_a_newer_claim() {
    for variant in IPTABLES {
        let lab = lab(2);
        let _servers = serve(&lab);
        let node = Node::new(&lab.node, variant);
        let mappings = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
        let config = node.config(mappings, prev_result(&lab, 1, "1.0.0"));
        let output =
            node.call(UPSTREAM, "ADD", &config, &attachment(&lab.pods[1], "upstream-container"));
        assert!(output.success(), "{}", output.reason());
        let (found, status) = answer(&node, &["8080/tcp"]);
        let address = lab.pods[1].address(Family::V4).unwrap();
        let said = format!("goes to {address}:80 of container upstream-con, which has no record");
        assert_eq!((&found["fromOutside"], status), (&json!(said), 0), "{variant:?}");
        assert_eq!(reached(&lab, 8080), "pod-b", "{variant:?}");
        add(&node, &lab, 0, 8080);
        assert_eq!(reached(&lab, 8080), "pod-a", "{variant:?}");
        let (found, status) = answer(&node, &["8080/tcp"]);
        assert_eq!(found["fromOutside"], format!("goes to {}", target(&lab, 0)), "{variant:?}");
        assert_eq!((&found["others"][0]["fromOutside"], status), (&json!("behind"), 0));
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_published_port_of_docker_is_named() {
    for variant in IPTABLES {
        let lab = lab(1);
        let node = Node::new(&lab.node, variant);
        node.shell(
            "iptables -t nat -N DOCKER; iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER; \
             iptables -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 9000 -j DNAT --to-destination 172.17.0.2:80",
        );
        let (found, status) = answer(&node, &["9000/tcp"]);
        assert_eq!(found["fromOutside"], "goes to a published port of Docker, 172.17.0.2:80");
        assert_eq!(found["fromNode"], "is refused: nobody waits for it");
        assert_eq!(status, 1, "{variant:?}");
    }
}

/// Cilium's agent pins its map of Services; this node has only that of it.
#[test]
#[ignore = "privileged: makes network namespaces and an eBPF map"]
fn cilium_s_own_host_port_may_be_met_first() {
    for variant in RULES {
        let lab = lab(1);
        let node = Node::new(&lab.node, variant);
        let pin = || {
            let dir = Path::new("/sys/fs/bpf/tc/globals");
            std::fs::create_dir_all(dir).unwrap();
            let definition = Definition {
                name: "cilium_lb4_serv".into(),
                kind: BPF_MAP_TYPE_HASH,
                key_size: 12,
                value_size: 12,
                max_entries: 8,
                flags: 0,
            };
            let map = Map::create(&definition).unwrap();
            let [high, low] = 8080_u16.to_be_bytes();
            let key = [0, 0, 0, 0, high, low, 0, 0, 6, 0, 0, 0];
            map.put(&key, &[0, 0, 0, 0, 1, 0, 1, 0, 8, 0, 0, 0]).unwrap();
            map.pin(&dir.join("cilium_lb4_services_v2")).unwrap();
        };
        lab.node.run(pin).unwrap();
        let (found, status) = answer(&node, &["8080/tcp"]);
        let said = "goes to Cilium's own hostPort of 0.0.0.0";
        assert_eq!((&found["fromOutside"], status), (&json!(said), 0), "{variant:?}");
        add(&node, &lab, 0, 8080);
        let (found, status) = answer(&node, &["8080/tcp"]);
        let said = format!(
            "goes to {}, unless Cilium's own hostPort of 0.0.0.0 takes it before",
            target(&lab, 0)
        );
        assert_eq!((&found["fromOutside"], status), (&json!(said), 0), "{variant:?}");
        let output = run(&node, &["who", "8081/tcp"]);
        assert!(output.stdout.starts_with("nobody: "), "{}", output.stdout);
    }
}

/// `BPF_MAP_TYPE_HASH` (linux/bpf.h).
const BPF_MAP_TYPE_HASH: u32 = 1;
