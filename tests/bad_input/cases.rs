//! The table: one line per mistake.

use std::path::Path;

use serde_json::{Value, json};

type Variables = Vec<(&'static str, &'static str)>;

/// One bad call.
pub struct Case {
    /// What is spoilt, and how.
    pub name: String,
    /// Variables that differ from those of a good ADD.
    pub env: Variables,
    pub stdin: Vec<u8>,
    pub code: u64,
    /// What the message must hold: field, value, what is allowed.
    pub words: Vec<&'static str>,
}

/// A configuration with which only the node can be wrong.
pub fn valid(state_dir: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "n",
        "type": "portmap",
        "stateDir": state_dir,
        "runtimeConfig": {"portMappings": [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]},
        "prevResult": {
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": "/n"}],
            "ips": [{"address": "10.201.0.2/32", "interface": 0}],
        },
    })
}

/// All of them; none may make `state_dir`.
pub fn cases(state_dir: &Path) -> Vec<Case> {
    let mut all = Vec::new();
    let case = |name: String,
                env: &[(&'static str, &'static str)],
                stdin: Vec<u8>,
                code,
                words: &[&'static str]| {
        Case { name, env: env.to_vec(), stdin, code, words: words.to_vec() }
    };
    let text = |config: &Value| config.to_string().into_bytes();
    for (key, value, words) in options() {
        let mut config = valid(state_dir);
        config[key] = value.clone();
        all.push(case(format!("{key}={value}"), &[], text(&config), 7, &words));
    }
    for (mapping, words) in mappings() {
        let mut config = valid(state_dir);
        let list = config["runtimeConfig"]["portMappings"].as_array_mut().unwrap();
        list.push(mapping.clone());
        let mut words = words;
        words.push("runtimeConfig.portMappings");
        all.push(case(format!("mapping {mapping}"), &[], text(&config), 7, &words));
    }
    for (pointer, value, code, words) in results() {
        let mut config = valid(state_dir);
        *config.pointer_mut(pointer).unwrap() = value.clone();
        all.push(case(format!("{pointer}={value}"), &[], text(&config), code, &words));
    }
    for (stdin, code, words) in envelopes() {
        all.push(case(String::from_utf8_lossy(stdin).into(), &[], stdin.to_vec(), code, &words));
    }
    for (env, words) in environments() {
        all.push(case(format!("{env:?}"), &env, text(&valid(state_dir)), 4, &words));
    }
    for (verb, changes, code, words) in verbs() {
        let mut config = valid(state_dir);
        for (key, value) in &changes {
            config[*key] = value.clone();
        }
        all.push(case(
            format!("{verb} {changes:?}"),
            &[("CNI_COMMAND", verb)],
            text(&config),
            code,
            &words,
        ));
    }
    all.push(case(
        "own namespace".into(),
        &[("CNI_NETNS", "/proc/self/ns/net")],
        text(&valid(state_dir)),
        8,
        &["CNI_NETNS", "/proc/self/ns/net", "CNI_NETNS_OVERRIDE"],
    ));
    all
}

/// A top-level key, a value that it cannot have, words.
fn options() -> Vec<(&'static str, Value, Vec<&'static str>)> {
    let bit = |value: &'static str| vec!["markMasqBit", value, "0 to 31"];
    let chain = |value: &'static str| vec!["externalSetMarkChain", value, "28"];
    vec![
        (
            "backend",
            json!("ebtables"),
            vec!["backend", "\"ebtables\"", "\"auto\"", "\"iptables\"", "\"nftables\"", "\"ebpf\""],
        ),
        ("backend", json!("IPTABLES"), vec!["backend", "IPTABLES", "\"iptables\""]),
        ("backend", json!(7), vec!["backend", "7", "a string"]),
        ("backend", json!(["nftables"]), vec!["backend", "[\"nftables\"]", "a string"]),
        ("snat", json!("no"), vec!["snat", "\"no\"", "true or false"]),
        ("snat", json!(0), vec!["snat", "0", "true or false"]),
        ("masqAll", json!("yes"), vec!["masqAll", "\"yes\"", "true or false"]),
        ("masqAll", json!({}), vec!["masqAll", "{}", "true or false"]),
        ("markMasqBit", json!(32), bit("32")),
        ("markMasqBit", json!(-1), bit("-1")),
        ("markMasqBit", json!(1.5), bit("1.5")),
        ("markMasqBit", json!("13"), bit("\"13\"")),
        ("markMasqBit", json!(true), bit("true")),
        ("markMasqBit", json!(u64::MAX), bit("18446744073709551615")),
        ("markMasqBit", json!(1e300), bit("1e+300")),
        ("externalSetMarkChain", json!("ABCDEFGHIJKLMNOPQRSTUVWXYZ012"), chain("XYZ012")),
        ("externalSetMarkChain", json!("KUBE MARK"), chain("KUBE MARK")),
        ("externalSetMarkChain", json!("-j"), chain("-j")),
        ("externalSetMarkChain", json!("A\nCOMMIT"), chain("A\\nCOMMIT")),
        ("externalSetMarkChain", json!(7), vec!["externalSetMarkChain", "7", "a string"]),
        (
            "conditionsV4",
            json!("ip saddr 10.0.0.0/8"),
            vec!["conditionsV4", "10.0.0.0/8", "list of strings"],
        ),
        ("conditionsV4", json!([1]), vec!["conditionsV4", "[1]", "list of strings"]),
        ("conditionsV6", json!([["-s"]]), vec!["conditionsV6", "-s", "list of strings"]),
        ("conditionsV6", json!({"a": 1}), vec!["conditionsV6", "list of strings"]),
        ("conditionsV4", json!([""]), vec!["conditionsV4", "\"\"", "empty"]),
        (
            "conditionsV4",
            json!(["-s", "10.0.0.1\n-A INPUT"]),
            vec!["conditionsV4", "\\n-A INPUT", "control"],
        ),
        ("conditionsV6", json!(["-s\u{0}"]), vec!["conditionsV6", "\\0", "control"]),
        (
            "conflictPolicy",
            json!("refuse"),
            vec!["conflictPolicy", "\"refuse\"", "\"takeover\"", "\"deny\""],
        ),
        ("conflictPolicy", json!(false), vec!["conflictPolicy", "false", "a string"]),
        ("stateDir", json!("run/portmap"), vec!["stateDir", "\"run/portmap\"", "absolute"]),
        ("stateDir", json!(3), vec!["stateDir", "3", "a string"]),
        ("runtimeConfig", json!([]), vec!["runtimeConfig", "[]", "an object"]),
        ("runtimeConfig", json!("8080:80"), vec!["runtimeConfig", "8080:80", "an object"]),
        (
            "runtimeConfig",
            json!({"portMappings": {}}),
            vec!["runtimeConfig.portMappings", "sequence"],
        ),
        (
            "runtimeConfig",
            json!({"portMappings": "8080:80"}),
            vec!["runtimeConfig.portMappings", "8080:80", "sequence"],
        ),
        (
            "runtimeConfig",
            json!({"portMappings": true}),
            vec!["runtimeConfig.portMappings", "true", "sequence"],
        ),
    ]
}

/// An entry that is added to `portMappings` as its second.
fn mappings() -> Vec<(Value, Vec<&'static str>)> {
    let port = |field: &'static str, value: &'static str| vec!["[1]", field, value, "1 to 65535"];
    let ip = |value: &'static str| vec!["[1]", "hostIP", value, "IPv4 or IPv6 address"];
    let protocol =
        |value: &'static str| vec!["[1]", "protocol", value, "\"tcp\", \"udp\" or \"sctp\""];
    vec![
        (json!("8080:80"), vec!["[1]", "8080:80"]),
        (json!(80), vec!["[1]", "80"]),
        (json!({}), vec!["[1]", "hostPort"]),
        (json!({"containerPort": 80}), vec!["[1]", "hostPort"]),
        (json!({"hostPort": null, "containerPort": 80}), vec!["[1]", "hostPort"]),
        (json!({"hostPort": 81}), vec!["[1]", "containerPort"]),
        (json!({"hostPort": 0, "containerPort": 80}), port("hostPort", "0")),
        (json!({"hostPort": 65536, "containerPort": 80}), port("hostPort", "65536")),
        (json!({"hostPort": -80, "containerPort": 80}), port("hostPort", "-80")),
        (json!({"hostPort": 80.5, "containerPort": 80}), port("hostPort", "80.5")),
        (json!({"hostPort": "81", "containerPort": 80}), port("hostPort", "\"81\"")),
        (json!({"hostPort": [81], "containerPort": 80}), port("hostPort", "[81]")),
        (json!({"hostPort": 81, "containerPort": 0}), port("containerPort", "0")),
        (json!({"hostPort": 81, "containerPort": 70000}), port("containerPort", "70000")),
        (json!({"HOSTPORT": 81, "CONTAINERPORT": "80"}), port("containerPort", "\"80\"")),
        (json!({"hostPort": 81, "containerPort": true}), port("containerPort", "true")),
        (json!({"hostPort": 81, "containerPort": 80, "protocol": "icmp"}), protocol("\"icmp\"")),
        (
            json!({"hostPort": 81, "containerPort": 80, "protocol": "tcp,udp"}),
            protocol("\"tcp,udp\""),
        ),
        (json!({"hostPort": 81, "containerPort": 80, "protocol": " tcp"}), protocol("\" tcp\"")),
        (json!({"hostPort": 81, "containerPort": 80, "protocol": 6}), protocol("6")),
        (json!({"hostPort": 81, "containerPort": 80, "hostIP": "300.1.1.1"}), ip("300.1.1.1")),
        (json!({"hostPort": 81, "containerPort": 80, "hostIP": "10.0.0.1/32"}), ip("10.0.0.1/32")),
        (
            json!({"hostPort": 81, "containerPort": 80, "hostIP": "fe80::1%eth0"}),
            ip("fe80::1%eth0"),
        ),
        (json!({"hostPort": 81, "containerPort": 80, "hostIP": "[::1]"}), ip("[::1]")),
        (json!({"hostPort": 81, "containerPort": 80, "hostIP": "localhost"}), ip("localhost")),
        (json!({"hostPort": 81, "containerPort": 80, "hostIP": 1}), ip("1")),
        (json!({"hostPort": 18080, "containerPort": 81}), vec!["18080", "containerPort 80", "81"]),
        (
            json!({"hostPort": 18080, "containerPort": 81, "hostIP": "::"}),
            vec!["18080", "containerPort 80", "81"],
        ),
        (
            json!({"hostPort": 18080, "containerPort": 81, "protocol": "TCP", "hostIP": "0.0.0.0"}),
            vec!["18080", "81"],
        ),
    ]
}

/// A place in the configuration, a value that it cannot have.
fn results() -> Vec<(&'static str, Value, u64, Vec<&'static str>)> {
    vec![
        ("/prevResult", json!(null), 7, vec!["prevResult", "absent"]),
        ("/prevResult", json!([]), 7, vec!["prevResult"]),
        ("/prevResult", json!("x"), 7, vec!["prevResult", "\"x\""]),
        ("/prevResult/ips", json!("x"), 7, vec!["prevResult.ips", "\"x\"", "sequence"]),
        ("/prevResult/ips/0", json!({}), 7, vec!["prevResult.ips[0]", "address"]),
        (
            "/prevResult/ips/0/address",
            json!(7),
            7,
            vec!["prevResult.ips[0].address", "7", "string"],
        ),
        (
            "/prevResult/ips/0/address",
            json!("10.0.0.2"),
            7,
            vec!["prevResult", "\"10.0.0.2\"", "CIDR"],
        ),
        (
            "/prevResult/ips/0/address",
            json!("10.0.0.2/33"),
            7,
            vec!["prevResult", "10.0.0.2/33", "CIDR"],
        ),
        ("/prevResult/ips/0/address", json!("pod/24"), 7, vec!["prevResult", "pod/24", "CIDR"]),
        (
            "/prevResult/ips/0/interface",
            json!("0"),
            7,
            vec!["prevResult.ips[0].interface", "\"0\""],
        ),
        (
            "/prevResult/interfaces",
            json!({"eth0": {}}),
            7,
            vec!["prevResult.interfaces", "sequence"],
        ),
        (
            "/prevResult/interfaces/0/sandbox",
            json!(1),
            7,
            vec!["prevResult.interfaces[0].sandbox", "1"],
        ),
        (
            "/prevResult/cniVersion",
            json!("0.4.0"),
            7,
            vec!["prevResult", "cniVersion", "0.4.0", "1.0.0"],
        ),
        ("/prevResult/cniVersion", json!(1.0), 7, vec!["prevResult.cniVersion", "1.0", "string"]),
        ("/prevResult/cniVersion", json!("9.9.9"), 7, vec!["prevResult", "9.9.9"]),
    ]
}

fn envelopes() -> Vec<(&'static [u8], u64, Vec<&'static str>)> {
    vec![
        (b"", 6, vec!["stdin", "EOF"]),
        (b"null", 6, vec!["stdin", "null"]),
        (b"[]", 6, vec!["stdin", "object"]),
        (b"{\"name\":\"n\"", 6, vec!["stdin", "EOF"]),
        (b"{\"name\":\"n\"}}", 6, vec!["stdin", "trailing"]),
        (b"{'name':'n'}", 6, vec!["stdin", "line 1 column 2"]),
        (b"{\"name\":\"\xff\"}", 6, vec!["stdin"]),
        (b"{\"name\":3}", 6, vec!["name", "3", "string"]),
        (b"{}", 7, vec!["name", "letter or digit"]),
        (b"{\"name\":\"-x\"}", 7, vec!["name", "\"-x\"", "letter or digit"]),
        (b"{\"name\":\"a b\"}", 7, vec!["name", "\"a b\""]),
        (b"{\"name\":\"caf\xc3\xa9\"}", 7, vec!["name"]),
        (b"{\"name\":\"n\",\"cniVersion\":1.0}", 6, vec!["cniVersion", "1.0", "string"]),
        (b"{\"name\":\"n\",\"cniVersion\":\"1.0\"}", 1, vec!["cniVersion", "\"1.0\"", "1.1.0"]),
        (b"{\"name\":\"n\",\"cniVersion\":\"2.0.0\"}", 1, vec!["cniVersion", "\"2.0.0\"", "0.3.1"]),
    ]
}

/// Variables that differ from a good ADD's.
fn environments() -> Vec<(Variables, Vec<&'static str>)> {
    vec![
        (
            vec![("CNI_COMMAND", "add")],
            vec!["CNI_COMMAND", "\"add\"", "ADD, DEL, CHECK, GC, STATUS or VERSION"],
        ),
        (vec![("CNI_COMMAND", "UPDATE")], vec!["CNI_COMMAND", "\"UPDATE\"", "ADD"]),
        (vec![("CNI_CONTAINERID", "")], vec!["CNI_CONTAINERID", "not set"]),
        (vec![("CNI_NETNS", "")], vec!["CNI_NETNS", "not set"]),
        (vec![("CNI_IFNAME", "")], vec!["CNI_IFNAME", "not set"]),
        (
            vec![("CNI_CONTAINERID", "c1\n")],
            vec!["CNI_CONTAINERID", "\"c1\\n\"", "letters, digits"],
        ),
        (
            vec![("CNI_CONTAINERID", "../../etc")],
            vec!["CNI_CONTAINERID", "../../etc", "letters, digits"],
        ),
        (vec![("CNI_CONTAINERID", "_c")], vec!["CNI_CONTAINERID", "\"_c\"", "letter or digit"]),
        (
            vec![("CNI_IFNAME", "0123456789abcdef")],
            vec!["CNI_IFNAME", "0123456789abcdef", "15 bytes"],
        ),
        (vec![("CNI_IFNAME", ".")], vec!["CNI_IFNAME", "\".\""]),
        (vec![("CNI_IFNAME", "a/b")], vec!["CNI_IFNAME", "\"a/b\"", "'/'"]),
        (vec![("CNI_IFNAME", "a b")], vec!["CNI_IFNAME", "\"a b\"", "spaces"]),
        (vec![("CNI_COMMAND", "DEL"), ("CNI_IFNAME", "a:b")], vec!["CNI_IFNAME", "\"a:b\"", "':'"]),
    ]
}

type Verb = (&'static str, Vec<(&'static str, Value)>, u64, Vec<&'static str>);

/// Other verbs, and what is wrong for them; the options that contradict each other come with ADD.
fn verbs() -> Vec<Verb> {
    let new = || ("cniVersion", json!("1.1.0"));
    let gc = "cni.dev/valid-attachments";
    let (external, mark) = (("externalSetMarkChain", json!("X")), ("markMasqBit", json!(3)));
    let (ipt, nft) = (json!(["-s", "10.0.0.1"]), json!(["ip6", "saddr", "fd00::1"]));
    vec![
        ("CHECK", vec![("cniVersion", json!("0.3.1"))], 1, vec!["CHECK", "0.4.0", "0.3.1"]),
        ("CHECK", vec![("prevResult", json!(null))], 7, vec!["prevResult"]),
        ("CHECK", vec![("snat", json!("x"))], 7, vec!["snat", "\"x\""]),
        ("GC", vec![(gc, json!([]))], 1, vec!["GC", "1.1.0", "1.0.0"]),
        ("GC", vec![new()], 7, vec![gc, "absent"]),
        ("GC", vec![new(), (gc, json!("x"))], 7, vec![gc, "\"x\""]),
        ("GC", vec![new(), (gc, json!([{"containerID": "c"}]))], 7, vec![gc, "ifname"]),
        (
            "GC",
            vec![new(), (gc, json!([])), ("stateDir", json!("x"))],
            7,
            vec!["stateDir", "\"x\""],
        ),
        ("STATUS", vec![], 1, vec!["STATUS", "1.1.0", "1.0.0"]),
        ("STATUS", vec![new(), ("backend", json!("x"))], 7, vec!["backend", "\"x\""]),
        ("DEL", vec![("name", json!("a/b"))], 7, vec!["name", "\"a/b\""]),
        ("DEL", vec![("cniVersion", json!("3.0.0"))], 1, vec!["\"3.0.0\""]),
        (
            "ADD",
            vec![external.clone(), mark],
            7,
            vec!["externalSetMarkChain", "markMasqBit", "3", "only one"],
        ),
        (
            "ADD",
            vec![external.clone(), ("backend", json!("nftables"))],
            7,
            vec!["backend", "nftables", "externalSetMarkChain"],
        ),
        (
            "ADD",
            vec![external, ("backend", json!("ebpf"))],
            7,
            vec!["backend", "ebpf", "externalSetMarkChain"],
        ),
        (
            "ADD",
            vec![("conditionsV4", ipt.clone()), ("backend", json!("ebpf"))],
            7,
            vec!["backend", "ebpf", "conditionsV4"],
        ),
        (
            "ADD",
            vec![("conditionsV6", nft.clone()), ("backend", json!("ebpf"))],
            7,
            vec!["backend", "ebpf", "conditionsV6"],
        ),
        (
            "ADD",
            vec![("conditionsV4", ipt.clone()), ("backend", json!("nftables"))],
            7,
            vec!["backend", "nftables", "conditionsV4"],
        ),
        (
            "ADD",
            vec![("conditionsV6", nft.clone()), ("backend", json!("iptables"))],
            7,
            vec!["backend", "iptables", "conditionsV6"],
        ),
        (
            "ADD",
            vec![("conditionsV4", ipt), ("conditionsV6", nft)],
            7,
            vec!["conditionsV4", "conditionsV6", "different"],
        ),
    ]
}
