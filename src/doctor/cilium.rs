//! Cilium, as far as a node shows it without asking its agent.

use super::{Area, Finding, Told, some_of};
use crate::cilium::{Setting, Settings};

/// Who can tell what the node does not show.
const ASK: &str = "kubectl -n kube-system exec ds/cilium -- cilium-dbg status --verbose";

#[derive(Debug, Clone)]
pub struct Facts {
    /// What shows that it runs here, or did: directories, pins, devices, its list.
    pub signs: Vec<String>,
    /// What could not be looked at, and why.
    pub unread: Vec<(String, String)>,
    pub settings: Settings,
    /// Whether programs of the root cgroup translate the destinations of sockets.
    pub socket_programs: Told<bool>,
    /// Configurations that its agent has renamed.
    pub renamed: Vec<String>,
    /// Whether hostPorts are forwarded by rules of netfilter here.
    pub by_rules: bool,
}

const AREA: Area = Area::Cilium;

impl Facts {
    fn replaces_kube_proxy(&self) -> Setting {
        if let Some(setting) = self.settings.option("KubeProxyReplacement") {
            return Some(setting);
        }
        // Its BPF masquerading defines ENABLE_NODEPORT as well, and host routing comes with the
        // replacement alone.
        let defined = |name: &str| self.settings.defined(name).filter(|(on, _)| *on);
        let masquerades = ["ENABLE_MASQUERADE", "ENABLE_MASQUERADE_IPV4", "ENABLE_MASQUERADE_IPV6"];
        if let Some(setting) = defined("ENABLE_HOST_ROUTING") {
            return Some(setting);
        }
        match self.settings.defined("ENABLE_NODEPORT") {
            Some((true, _)) if masquerades.iter().any(|name| defined(name).is_some()) => {}
            None => {}
            setting => return setting,
        }
        matches!(self.socket_programs, Ok(true))
            .then(|| (true, "its programs at the root cgroup".into()))
    }

    fn forwards_hostports(&self) -> Setting {
        self.settings.option("EnableHostPort").or_else(|| self.replaces_kube_proxy())
    }
}

#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        facts.unread.iter().map(|(what, reason)| AREA.unread("cilium", what, reason)).collect();
    if facts.signs.is_empty() {
        if findings.is_empty() {
            findings.push(AREA.fine("cilium", "there is no trace of Cilium"));
        }
        return findings;
    }
    findings.push(AREA.fine("cilium", format!("Cilium is here: {}", facts.signs.join(", "))));
    for (path, text) in [&facts.settings.node_config, &facts.settings.runtime_config] {
        if let Err(reason) = text {
            findings.push(AREA.unread("cilium", &path.display().to_string(), reason));
        }
    }
    findings.extend([replacement(facts), hostports(facts), host_routing(facts), exclusive(facts)]);
    findings
}

fn untold(check: &'static str, what: &str) -> Finding {
    let finding = AREA.fine(check, format!("{what} cannot be told from the node"));
    Finding { fix: ASK.into(), ..finding }
}

fn replacement(facts: &Facts) -> Finding {
    const CHECK: &str = "kube-proxy-replacement";
    match facts.replaces_kube_proxy() {
        None => untold(CHECK, "whether Cilium replaces kube-proxy"),
        Some((true, by)) => AREA.fine(CHECK, format!("Cilium replaces kube-proxy, shown by {by}")),
        Some((false, by)) => {
            AREA.fine(CHECK, format!("Cilium does not replace kube-proxy, shown by {by}"))
        }
    }
}

fn hostports(facts: &Facts) -> Finding {
    const CHECK: &str = "native-hostport";
    match facts.forwards_hostports() {
        None => untold(CHECK, "whether Cilium forwards hostPorts itself"),
        Some((true, by)) => AREA.warning(
            CHECK,
            format!("Cilium forwards hostPorts itself, shown by {by}"),
            "two forward the same ports: Cilium's programs see packets of others first, and what this plugin says \
             of who answers does not hold for them",
            "portmap uninstall --conflist auto, if Cilium's are enough; otherwise kubeProxyReplacement=false in its \
             Helm values",
        ),
        Some((false, by)) => AREA.fine(CHECK, format!("Cilium leaves hostPorts alone, shown by {by}")),
    }
}

fn host_routing(facts: &Facts) -> Finding {
    const CHECK: &str = "host-routing";
    match facts.settings.routes_in_bpf() {
        None => untold(CHECK, "whether Cilium routes past netfilter (BPF host routing)"),
        Some((true, by)) if facts.by_rules => AREA.warning(
            CHECK,
            format!("Cilium routes past netfilter (BPF host routing), shown by {by}"),
            "answers of pods do not meet the rules that would put their addresses right: hostPorts that are forwarded \
             by iptables or nftables get none",
            "helm upgrade cilium cilium/cilium -n kube-system --reuse-values --set bpf.hostLegacyRouting=true",
        ),
        Some((true, by)) => {
            AREA.fine(CHECK, format!("Cilium routes past netfilter (BPF host routing), which eBPF does not need, shown by {by}"))
        }
        Some((false, by)) => {
            AREA.fine(CHECK, format!("Cilium routes through the stack (legacy host routing), shown by {by}"))
        }
    }
}

/// Whether edits of lists last.
fn exclusive(facts: &Facts) -> Finding {
    const CHECK: &str = "exclusive";
    match facts.renamed.is_empty() {
        true => untold(CHECK, "whether Cilium keeps the lists to itself (cni-exclusive)"),
        false => AREA.fine(
            CHECK,
            format!(
                "Cilium keeps the lists to itself (cni-exclusive), and has renamed {}: edits of its own do not last",
                some_of(&facts.renamed)
            ),
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::super::Severity;
    use super::*;

    fn facts(header: Option<&str>, options: Option<&str>, socket_programs: bool) -> Facts {
        let file = |name: &str, text: Option<&str>| (name.into(), Ok(text.map(ToOwned::to_owned)));
        Facts {
            signs: vec!["/run/cilium".into()],
            unread: Vec::new(),
            settings: Settings {
                node_config: file("H", header),
                runtime_config: file("J", options),
            },
            socket_programs: Ok(socket_programs),
            renamed: Vec::new(),
            by_rules: true,
        }
    }

    #[track_caller]
    fn found(facts: &Facts, check: &str) -> Finding {
        findings(facts).into_iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn no_trace_and_nothing_to_tell_by() {
        let none = Facts { signs: Vec::new(), ..facts(None, None, false) };
        assert_eq!(findings(&none).len(), 1);
        let all = findings(&facts(None, None, false));
        assert!(all.iter().all(|finding| finding.severity == Severity::Fine));
        assert_eq!(all.iter().filter(|finding| finding.fix == ASK).count(), 4);
        let denied = Facts { unread: vec![("/sys/fs/bpf".into(), "no".into())], ..none };
        assert_eq!(found(&denied, "cilium").severity, Severity::Warning);
    }

    #[test]
    fn the_header_tells_and_masquerading_alone_does_not() {
        let routed =
            facts(Some("#define ENABLE_NODEPORT 1\n#define ENABLE_HOST_ROUTING 1\n"), None, false);
        assert_eq!(found(&routed, "host-routing").severity, Severity::Warning);
        assert_eq!(found(&routed, "native-hostport").severity, Severity::Warning);
        let by_ebpf = Facts { by_rules: false, ..routed };
        assert_eq!(found(&by_ebpf, "host-routing").severity, Severity::Fine);
        let chained = |options| {
            facts(Some("#define ENABLE_IPV4 1\n#define ENABLE_NODEPORTS 1\n"), options, false)
        };
        assert!(found(&chained(None), "kube-proxy-replacement").found.contains("does not replace"));
        assert_eq!(found(&chained(None), "host-routing").fix, ASK);
        let through_the_stack = chained(Some(r#"{"EnableHostLegacyRouting": true}"#));
        assert!(found(&through_the_stack, "host-routing").found.contains("legacy"));
        let past_it = chained(Some(r#"{"EnableHostLegacyRouting": false}"#));
        assert_eq!(found(&past_it, "host-routing").severity, Severity::Warning);
        let masquerading = "#define ENABLE_NODEPORT 1\n#define ENABLE_MASQUERADE_IPV4 1\n";
        assert_eq!(found(&facts(Some(masquerading), None, false), "native-hostport").fix, ASK);
        assert_eq!(
            found(&facts(Some(masquerading), None, true), "native-hostport").severity,
            Severity::Warning
        );
    }

    #[test]
    fn the_options_go_before_all_else() {
        let header = "#define ENABLE_NODEPORT 1\n";
        let off = r#"{"KubeProxyReplacement":"false","EnableHostPort":false}"#;
        assert_eq!(
            found(&facts(Some(header), Some(off), true), "native-hostport").severity,
            Severity::Fine
        );
        let on = r#"{"KubeProxyReplacement":"true","UnsafeDaemonConfigOption":{"EnableHostLegacyRouting":false}}"#;
        let facts = facts(None, Some(on), false);
        assert_eq!(found(&facts, "native-hostport").severity, Severity::Warning);
        assert_eq!(found(&facts, "host-routing").severity, Severity::Warning);
        let probing = super::tests::facts(None, Some(r#"{"KubeProxyReplacement":"probe"}"#), false);
        assert_eq!(found(&probing, "kube-proxy-replacement").fix, ASK);
    }

    #[test]
    fn what_it_has_renamed_shows_that_it_is_exclusive() {
        let facts =
            Facts { renamed: vec!["10-x.conflist.cilium_bak".into()], ..facts(None, None, false) };
        assert!(found(&facts, "exclusive").found.contains("10-x.conflist.cilium_bak"));
    }
}
