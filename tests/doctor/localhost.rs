//! route_localnet and its guard.

use crate::rig::{Rig, lab};
use crate::support::{RULES, Variant};

#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_sysctl_or_a_guard_that_is_missing() {
    for variant in RULES {
        let lab = lab(1);
        let rig = Rig::new(&lab, variant);
        rig.add(0);
        assert_eq!(rig.doctor().checks(), [], "{variant:?}");
        let key = format!("ipv4/conf/{}/route_localnet", lab.pods[0].host_link);
        assert_eq!(lab.node.sysctl(&key).unwrap(), "1");
        lab.node.set_sysctl(&key, "0").unwrap();
        let said = rig.doctor();
        assert_eq!(said.only("route-localnet")["severity"], "broken", "{variant:?}");
        rig.follow(said.only("route-localnet"));
        assert_eq!(rig.doctor().checks(), [], "{variant:?}");

        rig.node.shell(match variant {
            Variant::Nftables => "nft flush chain inet portmap guard",
            _ => "iptables -t raw -F PREROUTING",
        });
        let said = rig.doctor();
        assert_eq!(said.only("guard")["severity"], "broken", "{variant:?}: {:#}", said.json);
        rig.follow(said.only("guard"));
        assert_eq!(rig.doctor().checks(), [], "{variant:?}");
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn others_devices_without_a_guard() {
    for variant in [Variant::IptablesNft, Variant::IptablesLegacy] {
        let lab = lab(1);
        let rig = Rig::new(&lab, variant);
        assert_eq!(rig.doctor().checks(), [], "{variant:?}");
        // As kube-proxy does it.
        lab.node.set_sysctl("ipv4/conf/all/route_localnet", "1").unwrap();
        let said = rig.doctor();
        assert_eq!(said.checks(), [("guard".into(), "warning".into())], "{variant:?}");
        rig.follow(said.only("guard"));
        assert_eq!(rig.doctor().checks(), [], "{variant:?}: a guard of others is one");
    }
}
