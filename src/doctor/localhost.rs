//! `route_localnet`, without which 127.0.0.1 cannot be forwarded by rules, and the guard without
//! which neighbours on the network reach what listens on 127.0.0.1 only (CVE-2020-8558).

use std::collections::BTreeSet;

use super::{Area, Finding, Told};

/// What keeps packets for 127.0.0.0/8 from other hosts out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guard {
    Ours,
    /// Somebody else's rule.
    Foreign(String),
    None,
}

#[derive(Debug, Clone)]
pub struct Facts {
    /// Devices on which it is on; `all` stands for every device.
    pub on: Told<BTreeSet<String>>,
    /// Devices on which attachments that live need it.
    pub needed: BTreeSet<String>,
    pub guard: Told<Guard>,
    /// The command that makes a guard.
    pub make_guard: String,
}

const AREA: Area = Area::Localhost;

#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let on = match &facts.on {
        Ok(on) => on,
        Err(reason) => return vec![AREA.unread("route-localnet", "route_localnet", reason)],
    };
    let mut findings = Vec::new();
    let everywhere = on.contains("all");
    let off: Vec<&str> = facts
        .needed
        .iter()
        .filter(|device| !everywhere && !on.contains(*device))
        .map(String::as_str)
        .collect();
    if !off.is_empty() {
        findings.push(AREA.broken(
            "route-localnet",
            format!("net.ipv4.conf.{}.route_localnet is off", off.join(", ")),
            "hostPorts on 127.0.0.1 get no answer",
            "portmap restore",
        ));
    }
    if !on.is_empty() {
        findings.push(guard(facts, on));
    }
    if findings.is_empty() {
        findings.push(
            AREA.fine("route-localnet", "route_localnet is off everywhere, and nothing needs it"),
        );
    }
    findings
}

fn guard(facts: &Facts, on: &BTreeSet<String>) -> Finding {
    const CHECK: &str = "guard";
    const WHY: &str = "other hosts of the network, and pods, reach services of the node that listen on 127.0.0.1 only";
    let devices = on.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let strange: Vec<&str> =
        on.iter().filter(|device| !facts.needed.contains(*device)).map(String::as_str).collect();
    match &facts.guard {
        Ok(Guard::Ours) => AREA.fine(CHECK, format!("route_localnet is on ({devices}) and guarded")),
        Ok(Guard::Foreign(rule)) if strange.len() == on.len() => {
            AREA.fine(CHECK, format!("route_localnet is on ({devices}), by others, and a rule guards it: {rule}"))
        }
        Ok(Guard::Foreign(rule)) => AREA.broken(
            CHECK,
            format!("route_localnet is on ({devices}) and this plugin's guard is missing; there is another's: {rule}"),
            WHY,
            "portmap restore",
        ),
        Ok(Guard::None) if strange.len() < on.len() => AREA.broken(
            CHECK,
            format!("route_localnet is on ({devices}), and the guard of 127.0.0.0/8 is missing"),
            WHY,
            "portmap restore",
        ),
        Ok(Guard::None) => AREA.warning(
            CHECK,
            format!("route_localnet is on ({devices}), not by this plugin, and nothing guards 127.0.0.0/8"),
            WHY,
            facts.make_guard.clone(),
        ),
        Err(reason) => {
            AREA.unread(CHECK, &format!("whether 127.0.0.0/8 is guarded (route_localnet is on: {devices})"), reason)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn checks(on: &[&str], needed: &[&str], guard: Guard) -> Vec<(&'static str, Severity)> {
        let (on, needed, make_guard) = (Ok(set(on)), set(needed), "nft".into());
        let facts = Facts { on, needed, guard: Ok(guard), make_guard };
        findings(&facts).iter().map(|finding| (finding.check, finding.severity)).collect()
    }

    #[test]
    fn ours_others_and_nobodys() {
        use Severity::{Broken, Fine, Warning};
        let foreign = || Guard::Foreign("-d 127.0.0.0/8 -j DROP".into());
        assert_eq!(checks(&[], &[], Guard::None), [("route-localnet", Fine)]);
        assert_eq!(checks(&["cni0"], &["cni0"], Guard::Ours), [("guard", Fine)]);
        assert_eq!(checks(&["cni0"], &["cni0"], Guard::None), [("guard", Broken)]);
        assert_eq!(checks(&["cni0"], &["cni0"], foreign()), [("guard", Broken)]);
        assert_eq!(checks(&[], &["cni0"], Guard::Ours), [("route-localnet", Broken)]);
        assert_eq!(checks(&["all"], &["cni0"], Guard::Ours), [("guard", Fine)]);
        assert_eq!(checks(&["all"], &[], Guard::None), [("guard", Warning)]);
        assert_eq!(checks(&["all"], &[], foreign()), [("guard", Fine)]);
    }
}
