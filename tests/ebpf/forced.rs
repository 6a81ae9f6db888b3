//! Kernels that can do less than this one, as the note of what the kernel can do says it.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;
use portmap::sys::bpf::cookie;

use super::group::Group;
use super::support::{PORTMAP, ebpf, strace};
use super::talks::Talks;
use super::{Scene, TIMEOUT, lab};

impl Scene<'_> {
    fn come(&self) {
        for pod in 0..2 {
            let note = self.ok("ADD", pod);
            assert!(note.is_empty(), "{note}");
        }
        (0..2).for_each(|pod| drop(self.ok("CHECK", pod)));
    }

    /// Everything is as it should be until it goes.
    fn go(&self, mut talks: Talks) {
        self.ok("ADD", 0);
        self.ok("ADD", 2);
        talks.go_on();
        self.ok("DEL", 1);
        talks.go_on();
        // The hostPort goes to another pod, and back when that goes.
        self.node.ok("ADD", &self.config_with(1, 8080), &self.key(1));
        for transport in [Transport::Tcp, Transport::Udp] {
            assert_eq!(self.answering(transport).as_deref(), Some("pod-b"));
        }
        self.node.ok("DEL", &self.config_with(1, 8080), &self.key(1));
        for transport in [Transport::Tcp, Transport::Udp] {
            assert_eq!(self.answering(transport).as_deref(), Some("pod-a"));
        }
        self.ok("DEL", 0);
        for transport in [Transport::Tcp, Transport::Udp] {
            assert_eq!(self.answering(transport), None);
        }
        self.ok("DEL", 2);
        let entries = ebpf::entries(&self.lab.node);
        let left = entries.iter().filter(|entry| !entry.starts_with("pm_addresses "));
        assert_eq!(left.count(), 0, "{entries:#?}");
    }

    fn answering(&self, transport: Transport) -> Option<String> {
        let target = self.lab.node_socket(Family::V4, 8080);
        let reply = reach(&self.lab.client, Call::new(transport, target, TIMEOUT));
        reply.ok().map(|reply| reply.server)
    }

    fn hooks(&self) -> Vec<String> {
        ebpf::hooks(&self.lab.node)
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_tcx() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    scene.node.pretend(|kernel| kernel.tcx = false);
    scene.come();
    let hooks = scene.hooks();
    assert!(hooks.iter().any(|hook| hook == "eth0 Ingress bpf pm_uplink_in"), "{hooks:#?}");
    assert!(!hooks.iter().any(|hook| hook.contains(" tcx ")), "{hooks:#?}");
    scene.go(Talks::open(&lab));
}

/// Before Linux 6.6 a pod whose traffic is shaped cannot be forwarded to; others can.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_tcx_beside_an_ingress_qdisc() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.node.pretend(|kernel| kernel.tcx = false);
    let device = &lab.pods[1].host_link;
    scene.node.shell(&format!("tc qdisc add dev {device} ingress"));
    let note = scene.ok("ADD", 0);
    assert!(note.contains(&format!("{device} has an ingress qdisc")), "{note}");
    scene.ok("CHECK", 0);
    let target = lab.node_socket(Family::V4, Scene::port(0));
    let reply = reach(&lab.client, Call::new(Transport::Tcp, target, TIMEOUT));
    assert_eq!(reply.unwrap().server, "pod-a");
    scene.node.shell(&format!("tc qdisc del dev {device} ingress"));
    let dir = scene.node.state_dir.display();
    let listed = scene.node.shell(&format!("{PORTMAP} list --state-dir {dir} || true"));
    assert!(listed.contains(&format!("{device}: program pm_pod_in")), "{listed}");
    assert_eq!(scene.ok("ADD", 0), "");
    scene.ok("CHECK", 0);
    scene.ok("DEL", 0);
    scene.node.flush();
}

/// Nothing that comes in by such a device is forwarded, whichever pod's it is.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_tcx_beside_an_uplink_s_ingress_qdisc() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.node.pretend(|kernel| kernel.tcx = false);
    scene.node.shell("tc qdisc add dev eth0 ingress");
    let note = scene.ok("ADD", 0);
    let text = "eth0 leads out of the node and has an ingress qdisc, beside which Linux before 6.6 has no room for programs: no hostPort of the node is reached by it";
    assert_eq!(note.matches(text).count(), 1, "{note}");
    assert_eq!(scene.answering(Transport::Tcp), None);
    let (code, problem) = scene.fails("CHECK", 0);
    assert!(code == 102 && problem.contains(text), "{problem}");
    for verb in ["list", "restore"] {
        let dir = scene.node.state_dir.display();
        let said = scene.node.shell(&format!("{PORTMAP} {verb} --state-dir {dir} 2>&1 || true"));
        assert!(said.contains(text), "{verb}: {said}");
    }
    scene.node.shell("tc qdisc del dev eth0 ingress");
    assert_eq!(scene.ok("ADD", 0), "");
    scene.ok("CHECK", 0);
    assert_eq!(scene.answering(Transport::Tcp).as_deref(), Some("pod-a"));
    scene.ok("DEL", 0);
    scene.node.flush();
}

/// A bridge that leads nowhere any more has its filters until something is repaired: to look for such ones at
/// every ADD would be a question for each of the node's devices.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_tcx_a_repair_takes_off_what_is_needed_no_more() {
    let lab = lab(1);
    let scene = Scene::new(&lab);
    scene.node.pretend(|kernel| kernel.tcx = false);
    scene.node.shell(
        "ip link add lan type bridge && ip link add wire type vxlan id 7 dstport 4789
         ip link set wire master lan && ip link set lan up",
    );
    scene.ok("ADD", 0);
    let at = |device: &str| {
        let of_it = format!("{device} ");
        scene.hooks().into_iter().filter(|hook| hook.starts_with(&of_it)).collect::<Vec<_>>()
    };
    let expected = ["clsact", "Ingress bpf pm_uplink_in", "Egress bpf pm_out"];
    assert_eq!(at("lan"), expected.map(|hook| format!("lan {hook}")));
    let pod = lab.pods[0].host_link.as_str();
    let rest = ["eth0", pod].map(at);
    scene.node.shell(&format!("ip link del wire && tc qdisc del dev {pod} clsact"));
    scene.node.restore(false);
    assert_eq!(at("lan"), [""; 0]);
    assert_eq!(["eth0", pod].map(at), rest);
    scene.ok("CHECK", 0);
    scene.ok("DEL", 0);
    scene.node.flush();
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_so_netns_cookie() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    scene.node.pretend(|kernel| kernel.cookie_option = false);
    scene.come();
    let learnt = lab.node.run(|| ebpf::map("pm_config").get(&[0; 4]).unwrap().unwrap()).unwrap();
    let cookie = lab.node.run(|| cookie::own().unwrap().unwrap()).unwrap();
    assert_eq!(learnt[..8], cookie.to_ne_bytes());
    scene.go(Talks::open(&lab));
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_batches() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    // How many calls an ADD and a DEL of one more pod make, and how many of them are batches.
    let calls = || {
        let mut log = String::new();
        for verb in ["ADD", "DEL"] {
            let command = scene.command(&[], verb, 2);
            let input = scene.config(2).to_string();
            let (output, traced) = strace::traced(&lab.node, &command, &input, "bpf");
            assert!(output.success(), "{verb}: {}", output.reason());
            log.push_str(&traced);
        }
        (log.matches("bpf(BPF_MAP_").count(), log.matches("_BATCH,").count())
    };
    scene.ok("ADD", 0);
    let (all, batches) = calls();
    assert!(all > batches && batches > 0, "{batches} of {all}");
    scene.ok("DEL", 0);
    assert!(scene.node.flush().success());
    scene.node.pretend(|kernel| kernel.batches = false);
    scene.come();
    let (all, batches) = calls();
    assert!(all > 0 && batches == 0, "{batches} of {all}");
    scene.go(Talks::open(&lab));
}

/// Whom a socket of the node says that it is connected to.
fn peer(scene: &Scene, target: SocketAddr) -> SocketAddr {
    scene.lab.node.run(|| TcpStream::connect(target).unwrap().peer_addr().unwrap()).unwrap()
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn without_getpeername() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
    scene.come();
    assert_eq!(peer(&scene, target), target);
    assert!(scene.node.flush().success());
    scene.node.pretend(|kernel| kernel.getpeername = false);
    scene.come();
    let hooks = scene.hooks();
    assert!(!hooks.iter().any(|hook| hook.contains("Getpeername")), "{hooks:#?}");
    // As documented: the pod instead of what was called.
    let pod = lab.pods[0].address(Family::V4).unwrap();
    assert_eq!(peer(&scene, target), SocketAddr::new(pod, 80));
    scene.go(Talks::open(&lab));
}

/// Called by [`called_from`] in a process of its own.
const CALL: &str = "PORTMAP_TEST_CALL";

#[test]
#[ignore = "privileged: a part of another test"]
fn caller() {
    let Ok(target) = std::env::var(CALL) else {
        return;
    };
    let target: SocketAddr = target.parse().unwrap();
    // This process is in the namespaces that it was started in.
    for answer in [by_tcp(target), by_udp(target, true), by_udp(target, false)] {
        println!("reached {answer:?}");
    }
}

fn by_tcp(target: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&target, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"who am I?\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line)
}

fn by_udp(target: SocketAddr, connected: bool) -> io::Result<String> {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(700)))?;
    let mut buffer = [0; 512];
    let length = if connected {
        socket.connect(target)?;
        socket.send(b"who am I?")?;
        socket.recv(&mut buffer)?
    } else {
        socket.send_to(b"who am I?", target)?;
        let (length, from) = socket.recv_from(&mut buffer)?;
        assert_eq!(from, target);
        length
    };
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Calls TCP and UDP on the node by a process in a cgroup; says how many calls were answered.
fn called_from(scene: &Scene, group: &Group, target: SocketAddr) -> usize {
    let this = std::env::current_exe().unwrap();
    let script = format!("echo $$ >{}/cgroup.procs && exec \"$0\" \"$@\"", group.path().display());
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(this);
    command.args(["--ignored", "--exact", "--nocapture", "forced::caller"]);
    command.env(CALL, target.to_string()).stdout(Stdio::piped());
    let output = scene.lab.node.spawn(&mut command).unwrap().wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    text.matches("reached Ok(\"pod-a ").count()
}

/// As before Linux 5.7: programs cannot tell whose a socket is, and are attached only where systemd
/// keeps the node's own processes.
#[test]
#[ignore = "privileged: makes network namespaces and cgroups"]
fn without_cookies_at_all() {
    let lab = lab(3);
    let scene = Scene::new(&lab);
    if !std::path::Path::new("/run/systemd/system").exists() {
        // Without a cgroup for services only the node's own processes are left out.
        scene.node.pretend(|kernel| (kernel.cookie_helper, kernel.cookie_option) = (false, false));
        let note = scene.ok("ADD", 0);
        assert!(note.contains("no cgroup is known to hold the node's own processes"), "{note}");
        Talks::open_from(&lab, &["client", "pod-a", "pod-b"]).go_on();
        assert!(scene.node.flush().success());
    }
    let services = Group::new("system.slice");
    let pods = Group::new(&format!("portmap-test-pods-{}", std::process::id()));
    scene.node.pretend(|kernel| {
        (kernel.cookie_helper, kernel.cookie_option) = (false, false);
        (kernel.batches, kernel.tcx, kernel.getpeername) = (false, false, false);
    });
    scene.come();
    let targets = [
        SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, 8080)),
        lab.node_socket(Family::V4, 8080),
        lab.node_socket(Family::V6, 8080),
    ];
    for target in targets {
        assert_eq!(called_from(&scene, &services, target), 3, "{target}");
        assert_eq!(called_from(&scene, &pods, target), 0, "{target}");
    }
    scene.go(Talks::open_from(&lab, &["client", "pod-a", "pod-b"]));
    assert!(scene.node.flush().success());
    let left = attached_to(&services);
    assert_eq!(left, Vec::<String>::new());
}

/// Names of this plugin's programs at a cgroup.
fn attached_to(group: &Group) -> Vec<String> {
    use portmap::sys::bpf::cgroup::Cgroup;
    use portmap::sys::bpf::program::SocketHook;
    let cgroup = Cgroup::open(group.path()).unwrap();
    let ids = SocketHook::ALL.into_iter().flat_map(|hook| cgroup.query(hook).unwrap().programs);
    ids.map(ebpf::name).filter(|name| name.starts_with("pm_")).collect()
}
