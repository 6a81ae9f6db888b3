//! Containers with hostPorts as a runtime handles them, and calls with what should come of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use portmap::demo::matrix::{self, Capabilities, Case, Expect, Place, Service, Source};
use portmap::demo::netns::Netns;
use portmap::demo::plugin::{self, Attachment};
use portmap::demo::server::Servers;
use portmap::demo::topology::{Lab, Options, Shape};
use portmap::demo::traffic::{Call, Failure, Reply, Transport, reach};
use portmap::model::Family;
use serde_json::{Value, json};

use crate::support::{Node, Variant, attachment, prev_result};

/// How long a call may take that should succeed, or be refused.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for nothing. Each such call is made successfully elsewhere in its test.
pub const SILENCE: Duration = Duration::from_millis(400);
/// The port that every pod serves, by TCP and UDP. It is the same in all pods, so that a call that
/// ends in the wrong one is answered, and noticed.
pub const INSIDE: u16 = 80;
/// The hostPort of a test that needs one.
pub const PORT: u16 = 8080;

pub const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected];

/// A laboratory of which every pod serves.
pub struct Stage {
    pub lab: Lab,
    _servers: Vec<Servers>,
}

impl Stage {
    pub fn new(shape: Shape) -> Self {
        Self::with(Options::new(shape))
    }

    /// Pods whose replies to each other never meet the host's connection tracking.
    pub fn bypassing() -> Self {
        let mut options = Options::new(Shape::Cilium);
        options.bypass = true;
        Self::with(options)
    }

    pub fn with(options: Options) -> Self {
        let lab = Lab::build(options).unwrap();
        let serve = |pod: &portmap::demo::topology::Pod| pod.serve(&[INSIDE], &[INSIDE]).unwrap();
        let servers = lab.pods.iter().map(serve).collect();
        Stage { lab, _servers: servers }
    }
}

/// One container on one network, between its ADD and its DEL.
pub struct Container<'a> {
    node: &'a Node<'a>,
    pub config: Value,
    pub attachment: Attachment,
}

impl<'a> Container<'a> {
    /// The container of a laboratory pod. `mappings` are `portMappings`.
    pub fn new(node: &'a Node<'a>, lab: &Lab, pod: usize, mappings: Vec<Value>) -> Self {
        let prev_result = prev_result(lab, pod, &node.cni_version);
        Container {
            node,
            config: node.config(json!(mappings), prev_result),
            attachment: attachment(&lab.pods[pod], &format!("container-of-{}", lab.pods[pod].name)),
        }
    }

    /// With another key of the configuration.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// ADD; it must hand the previous result on.
    pub fn add(&self) {
        let output = self.node.ok("ADD", &self.config, &self.attachment);
        let result: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(result, self.config["prevResult"], "ADD changed the result");
    }

    pub fn check(&self) {
        let output = self.node.ok("CHECK", &self.config, &self.attachment);
        assert_eq!(output.stdout, "", "CHECK prints nothing");
    }

    pub fn del(&self) {
        let output = self.node.ok("DEL", &self.config, &self.attachment);
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("", ""));
    }

    /// DEL as for lists before 0.4.0 in the worst case: no previous result, no mappings, and the
    /// namespace is gone.
    pub fn del_by_key_alone(&self) {
        let mut config = self.config.clone();
        let fields = config.as_object_mut().unwrap();
        fields.remove("prevResult");
        fields.remove("runtimeConfig");
        let attachment = Attachment { netns: PathBuf::new(), ..self.attachment.clone() };
        self.node.ok("DEL", &config, &attachment);
    }
}

/// A port by TCP and by UDP.
pub fn mapped(host_port: u16, container_port: u16) -> Vec<Value> {
    mapped_at("", host_port, container_port)
}

/// A port by TCP and by UDP, with a hostIP.
pub fn mapped_at(host_ip: &str, host_port: u16, container_port: u16) -> Vec<Value> {
    let one = |protocol: &str| {
        json!({
            "hostPort": host_port, "containerPort": container_port,
            "protocol": protocol, "hostIP": host_ip,
        })
    };
    vec![one("tcp"), one("udp")]
}

/// Every path to a pod's hostPort, by TCP and UDP. More is known than the demonstration asks for: who
/// the pod sees. What is left alone is asked for by connected sockets only; others are not told, and
/// would wait.
pub fn every_path(variant: Variant, lab: &Lab, pod: usize, host_port: u16) -> Vec<Case> {
    let services = TRANSPORTS.map(|transport| Service { pod, transport, host_port });
    let localhost_v6 = Some(variant == Variant::Ebpf);
    let mut cases = matrix::cases(lab, &services, Capabilities { localhost_v6 });
    for case in &mut cases {
        if let Place::Pod(caller) = case.from {
            let family = Family::of(&case.target.ip());
            case.expect = Expect::Reached(pod_seen(variant, lab, caller, pod, family));
        }
    }
    cases.retain(|case| {
        case.expect != Expect::LeftAlone || case.transport != Transport::UdpUnconnected
    });
    cases
}

/// Calls that end in a server, by TCP and UDP.
pub fn reaches(from: Place, ip: IpAddr, port: u16, server: &str, source: Source) -> Vec<Case> {
    TRANSPORTS
        .map(|transport| case(from, transport, (ip, port), server, Expect::Reached(source)))
        .into()
}

/// The address that the node's own packets to `to` have as their source, by its routes.
pub fn own_address_towards(node: &Node, to: IpAddr) -> Source {
    let route = node.shell(&format!("ip route get {to}"));
    let source = route.split_whitespace().skip_while(|word| *word != "src").nth(1);
    Source::Kept(source.unwrap().parse().unwrap())
}

/// Calls that nothing answers and nothing swallows. Only connected sockets are told so.
pub fn refused(from: Place, ip: IpAddr, port: u16) -> Vec<Case> {
    [Transport::Tcp, Transport::Udp]
        .map(|transport| case(from, transport, (ip, port), "none", Expect::LeftAlone))
        .into()
}

fn case(
    from: Place,
    transport: Transport,
    target: (IpAddr, u16),
    server: &str,
    expect: Expect,
) -> Case {
    Case {
        path: format!("{from:?}"),
        from,
        transport,
        target: target.into(),
        server: server.to_owned(),
        expect,
    }
}

/// A caller in a pod as the called one sees it. Rules have to masquerade those of its subnet, or the
/// answer would go past the node's connection tracking. eBPF translates answers at the pods' links, whichever way they
/// take; but for the pod itself, which would not send its own address an answer.
pub fn pod_seen(
    variant: Variant,
    lab: &Lab,
    caller: usize,
    called: usize,
    family: Family,
) -> Source {
    let [caller, called] = [caller, called].map(|pod| &lab.pods[pod]);
    match variant {
        Variant::Ebpf if caller.name == called.name => Source::Kept(itself(family)),
        _ if variant != Variant::Ebpf && caller.shape == called.shape => Source::Node,
        _ => Source::Kept(caller.address(family).unwrap()),
    }
}

/// Who a pod that calls itself sees by eBPF: the dummy address of RFC 7600, or one of the prefix that
/// is to be discarded (RFC 6666).
pub fn itself(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 0, 8).into(),
        Family::V6 => Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8).into(),
    }
}

/// The outside client, of which a pod sees its own address.
pub fn client(lab: &Lab, family: Family) -> Source {
    Source::Kept(lab.client_address(family))
}

/// [`TIMEOUT`], or the seconds that a slow machine is given by `TESTS_TIMEOUT` for many calls at once.
fn patience() -> Duration {
    let seconds = std::env::var("TESTS_TIMEOUT").ok().map(|seconds| seconds.parse().unwrap());
    seconds.map_or(TIMEOUT, Duration::from_secs)
}

/// Makes all calls at once and fails the test over those that came to something else.
pub fn assert_calls(what: &str, lab: &Lab, cases: Vec<Case>) {
    assert!(!cases.is_empty());
    let outcomes = matrix::run(lab, cases, patience());
    let wrong: Vec<String> = outcomes
        .iter()
        .filter(|outcome| !outcome.ok)
        .map(|outcome| {
            let case = &outcome.case;
            format!(
                "{} by {} to {} of {}: {:?} expected, was {:?}",
                case.path, case.transport, case.target, case.server, case.expect, outcome.result
            )
        })
        .collect();
    let shape = lab.options.shape;
    assert!(wrong.is_empty(), "{what} ({shape:?}):\n{}", wrong.join("\n"));
}

/// The same calls find nothing any more. Unconnected sockets would not be told, and are left out.
pub fn assert_unmapped(what: &str, lab: &Lab, cases: &[Case]) {
    let mut cases = matrix::unmapped(cases);
    cases.retain(|case| case.transport != Transport::UdpUnconnected);
    assert_calls(what, lab, cases);
}

/// Calls from addresses of the caller's choice, all at once.
pub fn all(calls: &[(&Netns, Call)]) -> Vec<Result<Reply, Failure>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            calls.iter().map(|(from, call)| scope.spawn(|| reach(from, *call))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A call from one of the caller's addresses.
pub fn bound(transport: Transport, source: IpAddr, target: SocketAddr, timeout: Duration) -> Call {
    Call { bind: Some(SocketAddr::new(source, 0)), ..Call::new(transport, target, timeout) }
}

/// Runs a command line by the shell inside any namespace of the laboratory.
pub fn shell(inside: &Netns, script: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-ec", script]).env("PATH", plugin::search_path());
    let output = plugin::run(&mut command, b"", inside).unwrap();
    assert!(output.success(), "{script}: {} {}", output.stdout, output.stderr);
    output.stdout
}
