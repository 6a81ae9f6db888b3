//! What runtimes and main plugins really send: recordings in `testdata/samples`, read without root.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnetwork::IpNetwork;
use portmap::cni::envelope::Envelope;
use portmap::cni::result::PrevResult;
use portmap::cni::version::Version;
use portmap::conf::NetConf;
use portmap::model::{Mapping, Protocol};
use serde_json::value::RawValue;
use serde_json::{Value, json};

const CILIUM: [&str; 2] = ["10.0.1.7/32", "fd00:10::1:7/128"];

/// Addresses of the pod that each recorded result names.
fn expected_results() -> BTreeMap<&'static str, Vec<&'static str>> {
    let [v4, v6] = CILIUM;
    BTreeMap::from([
        ("cilium/prevresult-a-dual-0.3.1.json", vec![v4, v6]),
        ("cilium/prevresult-a-v4-0.3.1.json", vec![v4]),
        ("cilium/prevresult-a-v6-0.3.1.json", vec![v6]),
        ("cilium/prevresult-b-dual-0.3.1.json", vec![v4, v6]),
        ("cilium/prevresult-b-v4-0.3.1.json", vec![v4]),
        ("cilium/prevresult-b-v6-0.3.1.json", vec![v6]),
        ("cilium/prevresult-c-dual-0.3.1.json", vec![v4, v6]),
        ("cilium/prevresult-c-dual-1.0.0.json", vec![v4, v6]),
        ("cilium/prevresult-c-dual-1.1.0.json", vec![v4, v6]),
        ("cilium/prevresult-c-netkit-l3-dual-0.3.1.json", vec![v4, v6]),
        ("cilium/prevresult-c-netkit-l3-v4-0.3.1.json", vec![v4]),
        ("cilium/prevresult-c-netkit-l3-v6-0.3.1.json", vec![v6]),
        ("cilium/prevresult-c-v4-0.3.1.json", vec![v4]),
        ("cilium/prevresult-c-v6-0.3.1.json", vec![v6]),
        (
            "cilium/prevresult-generic-veth-dual-0.3.1.json",
            vec!["10.1.2.7/24", "fd00:10:1:2::7/64"],
        ),
        (
            "other/prevresult-calico-dual-0.3.1.json",
            vec!["10.244.196.152/32", "fd10:244::c497/128"],
        ),
        ("other/prevresult-flannel-0.3.1.json", vec!["10.244.0.6/24"]),
        ("other/prevresult-ptp-dual-1.0.0.json", vec!["10.91.0.2/24", "fd00:91::2/64"]),
    ])
}

/// All recordings, by path below `testdata/samples`.
pub fn recordings() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/samples");
    let mut files = BTreeMap::new();
    for directory in ["cilium", "other", "runtime"] {
        for entry in std::fs::read_dir(root.join(directory)).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            let name = format!("{directory}/{}", path.file_name().unwrap().display());
            files.insert(name, std::fs::read_to_string(path).unwrap());
        }
    }
    files
}

/// The recorded results.
pub fn results() -> BTreeMap<String, Value> {
    recordings()
        .into_iter()
        .filter(|(name, _)| name.contains("prevresult-"))
        .map(|(name, text)| (name, serde_json::from_str(&text).unwrap()))
        .collect()
}

/// The pod's addresses as the plugin reads them.
pub fn addresses(result: &Value) -> Vec<IpNetwork> {
    let version = Version::parse(result["cniVersion"].as_str().unwrap()).unwrap();
    let raw = RawValue::from_string(result.to_string()).unwrap();
    PrevResult::read(&raw, version).unwrap().pod_addresses("eth0").unwrap()
}

#[test]
fn pod_addresses_are_found_in_every_recorded_result() {
    let results = results();
    let expected = expected_results();
    let names: Vec<&str> = results.keys().map(String::as_str).collect();
    assert_eq!(names, expected.keys().copied().collect::<Vec<_>>(), "a row for each file");
    for (name, result) in &results {
        let found = addresses(result);
        let networks: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(networks, expected[name.as_str()], "{name}");
    }
}

/// As libcni passes it on: the list's name and version, the entry, and for a plugin that says it
/// can do so the runtime's mappings.
fn as_libcni_sends_it(list: &Value, entry: &Value, mappings: Value) -> Value {
    let mut config = entry.clone();
    config["name"] = list["name"].clone();
    config["cniVersion"] = list["cniVersion"].clone();
    assert_eq!(entry["capabilities"]["portMappings"], true);
    config["runtimeConfig"] = json!({"portMappings": mappings});
    config
}

fn parse(config: &Value) -> NetConf {
    let envelope = Envelope::parse(config.to_string().as_bytes()).unwrap();
    NetConf::parse(&envelope).unwrap()
}

#[test]
fn every_recorded_list_is_accepted() {
    let mut seen = 0;
    for (name, text) in recordings().into_iter().filter(|(name, _)| name.ends_with(".conflist")) {
        let list: Value = serde_json::from_str(&text).unwrap();
        let entries = list["plugins"].as_array().unwrap().iter();
        let ours: Vec<&Value> = entries.filter(|entry| entry["type"] == "portmap").collect();
        assert_eq!(ours.len(), 1, "{name}");
        let mappings = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
        let conf = parse(&as_libcni_sends_it(&list, ours[0], mappings));
        assert_eq!(conf.options, portmap::conf::Options::default(), "{name}");
        assert_eq!((conf.backend, conf.mappings.len()), (None, 1), "{name}");
        seen += 1;
    }
    assert_eq!(seen, 5);
}

fn mapping(protocol: Protocol, host_port: u16, container_port: u16, host_ip: &str) -> Mapping {
    let host_ip: Option<IpAddr> = (!host_ip.is_empty()).then(|| host_ip.parse().unwrap());
    Mapping { protocol, host_port, container_port, host_ip }
}

#[test]
fn every_recorded_runtime_s_mappings_are_read() {
    use Protocol::{Sctp, Tcp, Udp};
    let expected = BTreeMap::from([
        (
            "runtime/portmappings-containerd.json",
            vec![
                mapping(Tcp, 8080, 80, ""),
                mapping(Udp, 8083, 53, "198.51.100.11"),
                mapping(Sctp, 8085, 80, ""),
            ],
        ),
        ("runtime/portmappings-nerdctl.json", vec![mapping(Tcp, 8080, 80, "0.0.0.0")]),
        ("runtime/portmappings-ocicni.json", vec![mapping(Tcp, 8080, 80, "")]),
        (
            "runtime/portmappings-podman.json",
            vec![mapping(Udp, 8081, 53, ""), mapping(Tcp, 8082, 80, "198.51.100.11")],
        ),
    ]);
    let files = recordings();
    let recorded = files.iter().filter(|(name, _)| name.starts_with("runtime/"));
    let recorded: Vec<_> = recorded.collect();
    assert_eq!(recorded.len(), expected.len(), "a row for each file");
    for (name, text) in recorded {
        let mappings: Value = serde_json::from_str(text).unwrap();
        let list = json!({"name": "portmap", "cniVersion": "0.3.1"});
        let entry = json!({"type": "portmap", "capabilities": {"portMappings": true}});
        let conf = parse(&as_libcni_sends_it(&list, &entry, mappings));
        assert_eq!(conf.mappings, expected[name.as_str()], "{name}");
    }
}
