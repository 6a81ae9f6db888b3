//! What programs are told of the claims that there are.

use std::collections::BTreeMap;

use portmap::backend::ebpf::layout::{ClaimKey, ClaimValue, Config, config_flags};
use portmap::model::Family;
use serde_json::{Value, json};
use zerocopy::{FromBytes, IntoBytes};

use super::support::bare::mapping;
use super::support::{ebpf, prev_result, strace};
use super::{Scene, lab};

/// No peer gets a port that a socket may get by itself. Which these are may change between calls.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn programs_are_told_which_ports_sockets_get() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    for (pod, ports) in [20_000..=30_000, 40_000..=50_000].into_iter().enumerate() {
        let text = format!("{} {}", ports.start(), ports.end());
        lab.node.set_sysctl("ipv4/ip_local_port_range", &text).unwrap();
        scene.ok("ADD", pod);
        let mut right = scene.told();
        right.keep_free(&ports);
        assert_eq!(scene.told(), right, "{text}");
    }
    (0..2).for_each(|pod| drop(scene.ok("DEL", pod)));
}

/// Programs ask less for each packet while nobody has masqAll or a hostIP.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn programs_are_told_what_kinds_of_claims_there_are() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let ruled_out = || {
        let flags = scene.told().flags;
        [config_flags::NO_MASQUERADE, config_flags::NO_HOST_ADDRESS].map(|bit| flags & bit != 0)
    };
    scene.ok("ADD", 0);
    assert_eq!(ruled_out(), [true, true]);

    let mut specific = mapping(9000, 80, "tcp");
    specific["hostIP"] = json!(lab.node_address(Family::V4));
    let with = |pod: usize, mapping: &Value| {
        scene.node.config(json!([mapping]), prev_result(&lab, pod, "1.1.0"))
    };
    scene.node.ok("ADD", &with(1, &specific), &scene.key(1));
    assert_eq!(ruled_out(), [true, false]);
    let mut wrong = scene.told();
    wrong.rule_out();
    let put = || ebpf::map("pm_config").put(&[0; 4], wrong.as_bytes()).unwrap();
    lab.node.run(put).unwrap();
    let (_, failure) = scene.node.fails("CHECK", &with(1, &specific), &scene.key(1));
    assert!(failure.contains("take it for granted"), "{failure}");
    scene.node.ok("ADD", &with(1, &specific), &scene.key(1));
    scene.node.ok("CHECK", &with(1, &specific), &scene.key(1));
    assert_eq!(ruled_out(), [true, false]);

    let mut masqueraded = with(1, &mapping(9000, 80, "tcp"));
    masqueraded["masqAll"] = json!(true);
    scene.node.ok("ADD", &masqueraded, &scene.key(1));
    assert_eq!(ruled_out(), [false, true]);
    // What one pod gives up another still has.
    scene.node.ok("ADD", &with(0, &specific), &scene.key(0));
    scene.node.ok("DEL", &masqueraded, &scene.key(1));
    assert_eq!(ruled_out(), [true, false]);
    // A cleared configuration rules out nothing, until somebody looks at all claims.
    let cleared = || ebpf::map("pm_config").put(&[0; 4], &[0; size_of::<Config>()]).unwrap();
    lab.node.run(cleared).unwrap();
    scene.ok("ADD", 1);
    assert_eq!(ruled_out(), [false, false]);
    scene.node.ok("DEL", &with(0, &specific), &scene.key(0));
    assert_eq!(ruled_out(), [true, true]);
    scene.ok("DEL", 1);
}

/// Whenever a call ends, no claim is there whose kind is ruled out.
#[test]
#[ignore = "privileged: makes network namespaces, needs strace"]
fn a_kill_leaves_no_claim_that_is_ruled_out() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    let state = || {
        let value = ebpf::map("pm_config").get(&[0; 4]).unwrap().unwrap();
        let of = |(key, value): (Vec<u8>, Vec<u8>)| {
            (ClaimKey::read_from_bytes(&key).unwrap(), ClaimValue::read_from_bytes(&value).unwrap())
        };
        let claims = ebpf::map("pm_claims").entries().unwrap().into_iter().map(of);
        (Config::read_from_bytes(&value).unwrap(), claims.collect::<BTreeMap<_, _>>())
    };
    let mut specific = mapping(9000, 80, "tcp");
    specific["hostIP"] = json!(lab.node_address(Family::V4));
    let mut config = scene.node.config(json!([specific]), prev_result(&lab, 1, "1.1.0"));
    config["masqAll"] = json!(true);
    scene.ok("ADD", 0);
    let before = lab.node.run(state).unwrap();
    assert_eq!(before.0.flags & Config::usual().flags, Config::usual().flags);
    for verb in ["ADD", "DEL"] {
        let command = scene.command(&[], verb, 1);
        let mut number = 1;
        loop {
            if verb == "DEL" {
                scene.node.ok("ADD", &config, &scene.key(1));
            }
            let how = format!("signal=SIGKILL:when={number}");
            let input = config.to_string();
            let (output, _) = strace::tampered(&lab.node, &command, &input, "bpf", &how);
            let (told, claims) = lab.node.run(state).unwrap();
            assert!(told.expects(&claims), "{verb}, bpf {number}: {told:?}, {claims:?}");
            scene.node.ok("DEL", &config, &scene.key(1));
            if output.success() {
                break;
            }
            number += 1;
        }
        assert!(number > 10, "{verb}: strace has not traced");
    }
    assert_eq!(lab.node.run(state).unwrap(), before);
    scene.ok("DEL", 0);
}
