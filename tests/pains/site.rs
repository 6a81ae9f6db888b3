//! A laboratory whose pods serve, and the calls that tests make on it in one word each.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use portmap::demo::netns::Netns;
use portmap::demo::plugin::{Attachment, Output};
use portmap::demo::server::Servers;
use portmap::demo::snapshot::Snapshot;
use portmap::demo::topology::{Lab, Options, Pod, Shape};
use portmap::demo::traffic::{Call, Failure, Reply, Session, Transport, reach};
use portmap::model::Family;
use serde_json::{Value, json};

use crate::support::{Node, PORTMAP, Variant, attachment, ebpf, prev_result};

/// Long enough for a busy machine; only calls that must not arrive wait for all of it.
pub const TIMEOUT: Duration = Duration::from_millis(1500);

/// A laboratory whose pods serve tcp 80 and udp 53, and a node with one variant's tools.
pub struct Site<'a> {
    pub lab: &'a Lab,
    pub node: Node<'a>,
    /// The node before anything was called.
    pub before: Snapshot,
    _servers: Vec<Servers>,
}

/// Runs a test on every given variant, each on a laboratory of its own.
pub fn on_each(variants: &[Variant], options: &Options, test: impl Fn(&mut Site)) {
    for variant in variants {
        // Shown if the test fails.
        println!("{variant:?}, {:?}", options.shape);
        let lab = Lab::build(options.clone()).unwrap();
        let servers = lab.pods.iter().map(|pod| pod.serve(&[80], &[53]).unwrap()).collect();
        let node = Node::new(&lab.node, *variant);
        let before = node.snapshot();
        test(&mut Site { lab: &lab, node, before, _servers: servers });
    }
}

/// Two pods on a bridge: the most common wiring.
pub fn bridge() -> Options {
    Options::new(Shape::Bridge)
}

pub fn v4_only(mut options: Options) -> Options {
    options.families = vec![Family::V4];
    options
}

/// A mapping to the TCP server of a pod.
pub fn tcp(port: u16) -> Value {
    json!({"hostPort": port, "containerPort": 80, "protocol": "tcp"})
}

/// A mapping to the UDP server of a pod.
pub fn udp(port: u16) -> Value {
    json!({"hostPort": port, "containerPort": 53, "protocol": "udp"})
}

/// The mapping for one address of the node.
pub fn at(ip: impl ToString, mut mapping: Value) -> Value {
    mapping["hostIP"] = json!(ip.to_string());
    mapping
}

/// The configuration with these keys put in; `null` takes a key out.
pub fn with(mut config: Value, keys: Value) -> Value {
    for (key, value) in keys.as_object().unwrap() {
        if value.is_null() {
            config.as_object_mut().unwrap().remove(key);
        } else {
            config[key] = value.clone();
        }
    }
    config
}

impl Site<'_> {
    pub fn pod(&self, pod: usize) -> &Pod {
        &self.lab.pods[pod]
    }

    /// The attachment of a pod under a container ID.
    pub fn of(&self, pod: usize, id: &str) -> Attachment {
        attachment(self.pod(pod), id)
    }

    /// The configuration of an ADD for a pod.
    pub fn config(&self, pod: usize, mappings: &[Value]) -> Value {
        self.node.config(json!(mappings), prev_result(self.lab, pod, &self.node.cni_version))
    }

    pub fn add(&self, pod: usize, id: &str, mappings: &[Value]) -> Output {
        self.node.ok("ADD", &self.config(pod, mappings), &self.of(pod, id))
    }

    pub fn check(&self, pod: usize, id: &str, mappings: &[Value]) {
        self.node.ok("CHECK", &self.config(pod, mappings), &self.of(pod, id));
    }

    /// What CHECK complains about.
    pub fn drift(&self, pod: usize, id: &str, mappings: &[Value]) -> String {
        self.node.fails("CHECK", &self.config(pod, mappings), &self.of(pod, id)).1
    }

    pub fn del(&self, pod: usize, id: &str, mappings: &[Value]) {
        self.node.ok("DEL", &self.config(pod, mappings), &self.of(pod, id));
    }

    /// Calls the plugin, whatever comes of it.
    pub fn call(&self, verb: &str, config: &Value, attachment: &Attachment) -> Output {
        self.node.call(PORTMAP, verb, config, attachment)
    }

    pub fn ask(
        &self,
        from: &Netns,
        transport: Transport,
        ip: IpAddr,
        port: u16,
    ) -> Result<Reply, Failure> {
        reach(from, Call::new(transport, SocketAddr::new(ip, port), TIMEOUT))
    }

    /// Fails unless `server` answers on the node's first address, for the client and in each
    /// family.
    pub fn reaches(&self, transport: Transport, port: u16, server: &str) {
        for family in &self.lab.options.families {
            let ip = self.lab.node_address(*family);
            let reply = self.ask(&self.lab.client, transport, ip, port);
            assert_eq!(named(&reply), Ok(server), "{transport} {ip} {port}");
        }
    }

    /// Fails unless TCP calls of the client are refused at once, which no dead pod does.
    pub fn refuses(&self, port: u16) {
        for family in &self.lab.options.families {
            let ip = self.lab.node_address(*family);
            let reply = self.ask(&self.lab.client, Transport::Tcp, ip, port);
            assert_eq!(reply, Err(Failure::Refused), "{ip} {port}");
        }
    }

    /// A UDP socket of the client that is connected with the node's port.
    pub fn udp_session(&self, port: u16) -> Session {
        let target = self.lab.node_socket(Family::V4, port);
        Session::open(&self.lab.client, Call::new(Transport::Udp, target, TIMEOUT)).unwrap()
    }

    /// Rules and sysctls are as at the beginning, and no record is left.
    pub fn assert_clean(&self) {
        self.node.assert_clean(&self.before);
    }

    /// Takes away what leads to the hostPorts, and leaves what is not the plugin's.
    pub fn drop_own_jumps(&self) {
        self.node.shell(match self.node.variant {
            Variant::Nftables => "nft delete table inet portmap",
            Variant::Ebpf => unreachable!("there are no jumps"),
            _ => {
                "for t in iptables ip6tables; do for chain in PREROUTING OUTPUT; do
                   $t -t nat -D $chain -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
                 done; done"
            }
        });
    }

    /// Empties the tables of the variant's tools, as `firewall-cmd --reload` and boot scripts do.
    pub fn flush_everything(&self) {
        let script = match self.node.variant {
            Variant::Nftables => "nft flush ruleset".to_owned(),
            // Programs have no tables: this is what a tool that takes devices over does to them.
            Variant::Ebpf => {
                self.lab.node.run(ebpf::detach_everywhere).unwrap();
                return;
            }
            _ => {
                // A kernel without IPv6 has no tables for it.
                let tools = self.lab.options.families.iter().map(|family| match family {
                    Family::V4 => "iptables",
                    Family::V6 => "ip6tables",
                });
                format!(
                    "for t in {}; do for table in nat raw; do
                       $t -t $table -F; $t -t $table -X
                     done; done",
                    tools.collect::<Vec<_>>().join(" ")
                )
            }
        };
        self.node.shell(&script);
    }

    /// Keeps eBPF from being used, and gives it back: maps decide where packets go, so that a directory
    /// which everybody may write to is refused.
    pub fn forbid_ebpf(&self, forbidden: bool) {
        self.node.shell(match forbidden {
            true => "mkdir -p /sys/fs/bpf/portmap; chmod 0777 /sys/fs/bpf/portmap",
            false => "chmod 0700 /sys/fs/bpf/portmap; rmdir /sys/fs/bpf/portmap || true",
        });
    }
}

/// Who answered.
pub fn named(reply: &Result<Reply, Failure>) -> Result<&str, &Failure> {
    reply.as_ref().map(|reply| reply.server.as_str())
}
