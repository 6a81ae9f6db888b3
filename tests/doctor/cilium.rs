//! What a node shows of Cilium.

use crate::rig::{LIST, Rig, lab};
use crate::support::Variant;

#[test]
#[ignore = "privileged: makes network namespaces and mounts in one"]
fn what_its_agent_has_written_is_read() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Nftables);
    rig.add(0);
    assert_eq!(rig.doctor().checks(), []);
    // The mount is the node's alone.
    rig.node.shell("mount -t tmpfs none /run; mkdir -p /run/cilium/state/globals");
    assert_eq!(rig.doctor().checks(), [], "it is there and says nothing");
    let header = "/run/cilium/state/globals/node_config.h";
    rig.node.shell(&format!("echo '#define ENABLE_IPV4 1' > {header}"));
    assert_eq!(rig.doctor().checks(), [], "it leaves hostPorts alone");
    rig.node.shell(&format!("echo '#define ENABLE_HOST_ROUTING 1' >> {header}"));
    let said = rig.doctor();
    assert_eq!(said.only("native-hostport")["severity"], "warning");
    assert_eq!(said.only("host-routing")["severity"], "warning");
    assert!(said.only("host-routing")["found"].as_str().unwrap().ends_with(header));
    rig.node.shell(&format!("rm {header}"));
    assert_eq!(rig.doctor().checks(), []);
    let options = "/run/cilium/state/agent-runtime-config.json";
    rig.node.shell(&format!("echo '{{\"KubeProxyReplacement\":\"true\"}}' > {options}"));
    assert!(rig.doctor().only("native-hostport")["found"].as_str().unwrap().ends_with(options));
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn its_pins_its_list_and_what_it_has_renamed() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Nftables);
    assert!(rig.doctor_text().contains("there is no trace of Cilium"));
    rig.node.shell("mkdir -p /sys/fs/bpf/tc/globals/cilium_lxc");
    assert!(
        rig.doctor_text().contains("Cilium is here: /sys/fs/bpf/tc/globals\n"),
        "{}",
        rig.doctor_text()
    );
    rig.node.shell("rm -r /sys/fs/bpf/tc; mkdir /sys/fs/bpf/cilium");
    std::fs::write(
        rig.conf_dir.join("05-cilium.conflist"),
        LIST.replace("ptp", "cilium-cni").replace("STATE", rig.node.state_dir.to_str().unwrap()),
    )
    .unwrap();
    std::fs::rename(
        rig.conf_dir.join("10-pods.conflist"),
        rig.conf_dir.join("10-pods.conflist.cilium_bak"),
    )
    .unwrap();
    let said = rig.doctor();
    let found = |check: &str| {
        let all = said.json["findings"].as_array().unwrap();
        let one = all.iter().find(|finding| finding["check"] == check).unwrap();
        one["found"].as_str().unwrap().to_owned()
    };
    let signs = found("cilium");
    assert!(
        signs.contains("/sys/fs/bpf/cilium, ") && signs.contains("05-cilium.conflist"),
        "{signs}"
    );
    assert!(found("exclusive").contains("has renamed 10-pods.conflist.cilium_bak"));
    assert_eq!(rig.doctor().checks(), []);
    // Without portmap in it, the command is named, and what would undo it.
    let list = rig.conf_dir.join("05-cilium.conflist");
    std::fs::write(
        &list,
        r#"{"cniVersion": "1.0.0", "name": "c", "plugins": [{"type": "cilium-cni"}]}"#,
    )
    .unwrap();
    let said = rig.doctor();
    assert!(said.only("list")["why"].as_str().unwrap().contains("cni.chainingMode=portmap"));
    assert_eq!(
        said.only("list")["fix"],
        format!("portmap install --dest {} --conflist {}", rig.dest.display(), list.display())
    );
}
