//! What doctor says of nodes that are values, byte for byte, in both forms.

use portmap::backend::iptables::listing::Listing;
use portmap::cilium::Settings;
use portmap::doctor::attachments::{Attachment, Orphan};
use portmap::doctor::backends::{Trial, Tried};
use portmap::doctor::localhost::Guard;
use portmap::doctor::rules::{Base, Insert, Packet, of_iptables};
use portmap::doctor::setup::Binary;
use portmap::doctor::state::{Directory, Look};
use portmap::doctor::{
    Facts, Finding, Severity, attachments, backends, bypass, cilium, examine, firewall, localhost,
    report, setup, state,
};
use portmap::model::{BackendKind, Family, Protocol};

use crate::support::golden;

const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "ptp"},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}"#;

fn tried(trials: [Trial; 3]) -> Vec<Tried> {
    let tools = ["iptables-nft, /usr/sbin/iptables", "/usr/sbin/nft", "no tool needed"];
    BackendKind::ALL
        .into_iter()
        .zip(tools)
        .zip(trials)
        .map(|((kind, tool), trial)| Tried { kind, tool: tool.into(), trial })
        .collect()
}

fn file(name: &str, text: &str) -> setup::File {
    setup::File { name: name.into(), text: Ok(text.into()), drop_ins: Vec::new() }
}

/// A node on which nothing is wrong, with one pod.
fn healthy() -> Facts {
    let attachment = Attachment {
        who: "default/web on pods (iptables): tcp 8080".into(),
        netns: "/run/netns/web".into(),
        alive: true,
        problems: Ok(Vec::new()),
    };
    let state = |path: &str| (path.into(), Ok(None));
    Facts {
        backends: backends::Facts {
            privileged: true,
            tried: tried([Trial::Works, Trial::Works, Trial::Works]),
            remembered: vec![(BackendKind::Iptables, "/run/cni/portmap/notes/backend".into())],
            sockets: Ok("the root of cgroup v2 (/sys/fs/cgroup)".into()),
            ebpf_in_use: false,
        },
        setup: setup::Facts {
            version: "portmap 1.0.0".into(),
            conf_dir: "/etc/cni/net.d".into(),
            files: Ok(vec![file("10-pods.conflist", LIST)]),
            dest: "/opt/cni/bin".into(),
            binary: Ok(Binary::Same),
            state_dir: "/run/cni/portmap".into(),
        },
        state: state::Facts {
            dir: "/run/cni/portmap".into(),
            directory: Ok(Some(Directory { writable: true, ..Directory::default() })),
            look: Ok(Look::Read(attachments::Facts {
                attachments: vec![attachment],
                ..attachments::Facts::default()
            })),
        },
        localhost: localhost::Facts {
            on: Ok(["veth1".to_owned()].into()),
            needed: ["veth1".to_owned()].into(),
            guard: Ok(Guard::Ours),
            make_guard: "iptables -t raw -I PREROUTING -d 127.0.0.0/8 ! -i lo -j DROP".into(),
        },
        firewall: firewall::Facts {
            legacy: Ok(0),
            nft: Ok(12),
            used: Some("iptables-nft"),
            chains: Vec::new(),
            unread: Vec::new(),
            uplinks: vec!["eth0".into()],
            samples: vec![(Family::V4, packet())],
            real: true,
        },
        bypass: bypass::Facts::default(),
        cilium: cilium::Facts {
            signs: Vec::new(),
            unread: Vec::new(),
            settings: Settings {
                node_config: state("/run/cilium/state/globals/node_config.h"),
                runtime_config: state("/run/cilium/state/agent-runtime-config.json"),
            },
            socket_programs: Ok(false),
            renamed: Vec::new(),
            by_rules: true,
        },
    }
}

fn packet() -> Packet {
    Packet {
        who: "tcp 8080 of default/web".into(),
        device: Some("veth1".into()),
        protocol: Protocol::Tcp,
        target: Some("10.88.0.2:80".parse().unwrap()),
        is_local: false,
        translated: true,
    }
}

/// One on which a person has flushed a chain, and Docker has come.
fn ill() -> Facts {
    let mut facts = healthy();
    let wrong = "IPv4: traffic from outside is not forwarded: chain PREROUTING of table nat has no rule `-m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT`";
    if let Ok(Look::Read(attachments)) = &mut facts.state.look {
        attachments.attachments[0].problems = Ok(vec![wrong.into()]);
    }
    facts.firewall.chains = vec![docker()];
    facts
}

/// One that has lost a record.
fn forgetful() -> Facts {
    let mut facts = healthy();
    if let Ok(Look::Read(attachments)) = &mut facts.state.look {
        attachments.orphans = vec![Orphan {
            what: "chain CNI-DN-0123456789abcdef01234 of container c on network n forwards tcp 81 to 10.88.0.9:80, in table nat of iptables-nft".into(),
            removal: "iptables -t nat -F CNI-DN-0123456789abcdef01234 && iptables -t nat -X CNI-DN-0123456789abcdef01234".into(),
        }];
    }
    facts
}

/// What keeps all but Docker's own containers from being reached.
fn docker() -> Base {
    Base {
        place: "chain FORWARD of table filter (iptables-nft, IPv4)".into(),
        families: vec![Family::V4],
        entry: "FORWARD".into(),
        drops: true,
        rules: Ok(of_iptables("-P FORWARD DROP\n-A FORWARD -o docker0 -j ACCEPT\n")),
        insert: Insert::Iptables("iptables -I DOCKER-USER".into()),
    }
}

/// One on which nearly everything is wrong.
fn worst() -> Facts {
    let mut facts = healthy();
    let missing = |tool: &str| Trial::Broken(format!("{tool} is not installed (not in PATH)"));
    let objection = "Cilium replaces kube-proxy here and forwards hostPorts itself; set \"backend\": \"ebpf\" to use it all the same";
    facts.backends.tried =
        tried([missing("iptables-restore"), missing("nft"), Trial::Objection(objection.into())]);
    facts.backends.sockets = Err("this kernel has no cgroup v2".into());
    facts.setup.files = Ok(vec![
        file(
            "05-cilium.conflist",
            r#"{"cniVersion": "0.3.1", "name": "cilium", "plugins": [{"type": "cilium-cni"}]}"#,
        ),
        file("10-pods.conflist", LIST),
        file("20-other.conflist.cilium_bak", ""),
    ]);
    facts.setup.binary = Ok(Binary::Upstreams);
    facts.state.directory =
        Ok(Some(Directory { full: Some("space"), on_disk: true, writable: true, refused: None }));
    let attachment = |who: &str, alive, problems: &[&str]| Attachment {
        who: who.into(),
        netns: "/run/netns/gone".into(),
        alive,
        problems: Ok(problems.iter().map(|text| (*text).to_owned()).collect()),
    };
    facts.state.look = Ok(Look::Read(attachments::Facts {
        attachments: vec![
            attachment(
                "default/web on pods (iptables): tcp 8080",
                true,
                &[
                    "IPv4: traffic from outside is not forwarded: chain PREROUTING of table nat has no rule `-m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT`",
                ],
            ),
            attachment("default/dns on pods (iptables): udp 53", true, &[]),
            attachment("default/old on pods (iptables): tcp 9090", false, &[]),
        ],
        elsewhere: None,
        damaged: vec![
            "record 1234 is damaged: EOF while parsing a string at line 1 column 20".into(),
        ],
        pending: true,
        orphans: Vec::new(),
        unread: vec![("table inet portmap".into(), "nft is not installed (not in PATH)".into())],
    }));
    facts.localhost.guard = Ok(Guard::None);
    facts.firewall.legacy = Ok(7);
    facts.firewall.chains = vec![docker()];
    facts.cilium.signs = vec!["/run/cilium".into(), "device cilium_host".into()];
    facts.cilium.settings.node_config.1 =
        Ok(Some("#define ENABLE_HOST_ROUTING 1\n#define ENABLE_NODEPORT 1\n".into()));
    facts.cilium.renamed = vec!["20-other.conflist.cilium_bak".into()];
    facts
}

fn both(name: &str, findings: &[Finding]) {
    golden::holds(&format!("commands/{name}"), &report::as_text(findings, false));
    let json = format!("{}\n", report::as_json("portmap 1.0.0", findings));
    golden::holds(&format!("commands/{name}.json"), &json);
}

#[test]
fn what_is_said_of_a_healthy_node() {
    let findings = examine(&healthy());
    assert_eq!(report::verdict(&findings), Severity::Fine, "{findings:#?}");
    both("doctor", &findings);
}

#[test]
fn what_is_said_of_ill_ones() {
    for (name, facts, verdict) in [
        ("doctor-orphan", forgetful(), Severity::Warning),
        ("doctor-some", ill(), Severity::Broken),
        ("doctor-bad", worst(), Severity::Broken),
    ] {
        let findings = examine(&facts);
        assert_eq!(report::verdict(&findings), verdict, "{name}");
        for finding in &findings {
            let fine = finding.severity == Severity::Fine;
            assert!(fine || !finding.why.is_empty() && !finding.fix.is_empty(), "{finding:?}");
        }
        both(name, &findings);
    }
}

/// The command for an orphan is what a shell makes of the rule as listed.
#[test]
fn rules_are_quoted_as_a_shell_needs_it() {
    let rule = r#"-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"n\" id: \"c\"" -m multiport --dports 80 -j CNI-DN-1"#;
    let listing = Listing::parse(rule);
    let listed = listing.rules("CNI-HOSTPORT-DNAT")[0].clone();
    let output = std::process::Command::new("sh")
        .args(["-c", &format!("printf '%s|' {listed}")])
        .output()
        .unwrap();
    let words: Vec<String> =
        String::from_utf8(output.stdout).unwrap().split_terminator('|').map(Into::into).collect();
    assert_eq!(words, portmap::backend::iptables::listing::words(&listed));
}
