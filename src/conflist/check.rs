//! What is wrong with a configuration, and where.

use serde::Serialize;
use serde_json::{Map, Value};

use super::spans::{Json, Kind, Position, Refusal};
use super::{List, PLUGIN, Plugin, SHAPER};
use crate::cni::envelope::Envelope;
use crate::cni::version::Version;
use crate::conf::{self, NetConf};
use crate::model::BackendKind;

/// Keys that runtimes and the specification give to every plugin.
const COMMON_KEYS: [&str; 9] = [
    "type",
    "name",
    "cniVersion",
    "capabilities",
    "runtimeConfig",
    "prevResult",
    "args",
    "ipam",
    "dns",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Works, and is probably not what was meant.
    Warning,
    /// hostPorts do not work.
    Broken,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    #[serde(flatten)]
    pub position: Option<Position>,
    pub problem: String,
    /// What to do about it.
    pub fix: String,
}

/// What a configuration says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Analysis {
    /// The list's name; empty for a plugin object without one.
    pub name: String,
    /// The types of all plugins, in order; of a plugin object its own.
    pub plugins: Vec<String>,
    pub cni_version: String,
    /// What our plugin is told, as far as it can be read.
    pub conf: Option<NetConf>,
    pub findings: Vec<Finding>,
    /// Plugins that eBPF keeps from making their ingress qdisc.
    shapers_behind: Vec<Position>,
}

/// Looks at a list, or at the object of our plugin.
///
/// # Errors
///
/// What is neither.
pub fn analyse(text: &str) -> Result<Analysis, Refusal> {
    let json = Json::parse(text)?;
    let own = json.folded("type").and_then(|member| member.value.as_str()) == Some(PLUGIN);
    if own && json.exact("plugins").is_none() {
        let mut analysis = Analysis {
            name: string(&json, "name"),
            plugins: vec![PLUGIN.into()],
            cni_version: string(&json, "cniVersion"),
            ..Analysis::default()
        };
        let plugin = Plugin { name: PLUGIN.into(), json: json.clone() };
        let name = if analysis.name.is_empty() { PLUGIN } else { &analysis.name }.to_owned();
        let version = json.folded("cniVersion").map(|member| raw(text, &member.value));
        analysis.plugin(text, &plugin, &name, version);
        return Ok(analysis);
    }
    let list = List::parse(text)?;
    let mut analysis = Analysis {
        name: string(&list.json, "name"),
        plugins: list.plugins.iter().map(|plugin| plugin.name.clone()).collect(),
        cni_version: string(&list.json, "cniVersion"),
        ..Analysis::default()
    };
    analysis.list(&list);
    analysis.findings.sort_by_key(|finding| finding.position);
    Ok(analysis)
}

fn string(json: &Json, key: &str) -> String {
    json.exact(key).and_then(|member| member.value.as_str()).unwrap_or_default().to_owned()
}

fn raw(text: &str, json: &Json) -> Value {
    text.get(json.span.clone()).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

impl Analysis {
    /// Of what cannot be analysed.
    #[must_use]
    pub fn refused(refusal: Refusal) -> Self {
        let mut analysis = Analysis::default();
        analysis.find(
            Severity::Broken,
            refusal.position,
            refusal.reason,
            "a list is {\"cniVersion\": …, \"name\": …, \"plugins\": [ the main plugin, portmap, … ]}",
        );
        analysis
    }

    fn find(
        &mut self,
        severity: Severity,
        position: Position,
        problem: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let (problem, fix) = (problem.into(), fix.into());
        self.findings.push(Finding { severity, position: Some(position), problem, fix });
    }

    fn list(&mut self, list: &List) {
        let top = list.position(&list.json);
        let version = self.version(list);
        for plugin in &list.plugins {
            self.capabilities(list, plugin);
        }
        let (first, rest) = list.plugins.split_at(1);
        for plugin in first.iter().filter(|plugin| plugin.name == PLUGIN) {
            self.find(
                Severity::Broken,
                list.position(&plugin.json),
                "portmap stands first, so that it is never told the pod's address",
                "move it behind the plugin that makes the pod's interface",
            );
        }
        let mut own = list.plugins.iter().filter(|plugin| plugin.name == PLUGIN);
        let Some(plugin) = own.next() else {
            return self.find(
                Severity::Broken,
                top,
                "portmap is not in this list, so that hostPorts do nothing",
                "portmap install --conflist FILE",
            );
        };
        for second in own {
            self.find(
                Severity::Warning,
                list.position(&second.json),
                "portmap is in this list more than once, and each call does everything",
                "keep one of them",
            );
        }
        if !rest.is_empty() || first.iter().all(|plugin| plugin.name != PLUGIN) {
            let name = list.json.exact("name").map(|member| raw(list.text, &member.value));
            self.named(list, plugin, name, version);
        }
        let after = list.plugins.iter().skip_while(|plugin| plugin.name != PLUGIN);
        self.shapers_behind = after
            .filter(|plugin| plugin.name == SHAPER)
            .map(|plugin| list.position(&plugin.json))
            .collect();
        if let Some(kind) = self.conf.as_ref().and_then(|conf| conf.backend) {
            self.with_backend(kind);
        }
    }

    /// The version of calls: since 1.2 libcni takes the newest that it knows of `cniVersions` and
    /// `cniVersion`.
    fn version(&mut self, list: &List) -> Option<Value> {
        let declared = list.json.exact("cniVersion").map(|member| raw(list.text, &member.value));
        let several = list.json.exact("cniVersions").map(|member| &member.value);
        if declared.is_none() {
            let meaning = match several {
                Some(_) => {
                    ", and libcni before 1.2 does not know cniVersions: there it means 0.1.0"
                }
                None => ", which means 0.1.0",
            };
            self.find(
                Severity::Warning,
                list.position(&list.json),
                format!("cniVersion is absent{meaning}"),
                "say \"cniVersion\": \"1.0.0\", or the newest that every plugin of the list knows",
            );
        }
        let Some(several) = several else { return declared };
        let Ok(mut versions) = serde_json::from_value::<Vec<String>>(raw(list.text, several))
        else {
            self.find(
                Severity::Broken,
                list.position(several),
                "cniVersions must be a list of strings: runtimes refuse the whole list",
                "\"cniVersions\": [\"1.0.0\", \"1.1.0\"], or no such key",
            );
            return declared;
        };
        versions.extend(declared.as_ref().and_then(Value::as_str).map(str::to_owned));
        match versions.iter().filter_map(|version| Version::parse(version).ok()).max() {
            Some(newest) => {
                newest.as_str().clone_into(&mut self.cni_version);
                Some(newest.as_str().into())
            }
            None => declared,
        }
    }

    /// What is wrong with the list if the plugin uses this backend.
    pub fn with_backend(&mut self, kind: BackendKind) {
        if kind != BackendKind::Ebpf {
            return;
        }
        for position in std::mem::take(&mut self.shapers_behind) {
            self.find(
                Severity::Broken,
                position,
                "bandwidth stands behind portmap with eBPF, which has the place of its qdisc by then: pods whose traffic is limited do not start",
                "move it before portmap",
            );
        }
        self.findings.sort_by_key(|finding| finding.position);
    }

    /// A list without a usable name is refused by runtimes as a whole.
    fn named(&mut self, list: &List, plugin: &Plugin, name: Option<Value>, version: Option<Value>) {
        match name {
            Some(Value::String(name)) => self.plugin(list.text, plugin, &name, version),
            other => {
                let at = list.json.exact("name").map_or(&list.json, |member| &member.value);
                let found = other.map_or("absent".to_owned(), |value| value.to_string());
                self.find(
                    Severity::Broken,
                    list.position(at),
                    format!("name is {found}: a list needs a name that is a string"),
                    "give it a name that no other list of the node has",
                );
            }
        }
    }

    /// libcni reads `capabilities` as a map of booleans and refuses the list if it is anything else.
    fn capabilities(&mut self, list: &List, plugin: &Plugin) {
        let Some(member) = plugin.json.folded("capabilities") else { return };
        let wrong = match member.value.members() {
            None => Some(&member.value),
            Some(members) => members
                .iter()
                .map(|member| &member.value)
                .find(|value| !matches!(value.kind, Kind::Bool(_) | Kind::Null)),
        };
        if let Some(wrong) = wrong {
            self.find(
                Severity::Broken,
                list.position(wrong),
                format!("the capabilities of {} must be an object of true and false: runtimes refuse the whole list", plugin.name),
                "for portmap: \"capabilities\": {\"portMappings\": true}",
            );
        }
    }

    fn plugin(&mut self, text: &str, plugin: &Plugin, name: &str, version: Option<Value>) {
        let position = |json: &Json| Position::of(text, json.span.start);
        if !plugin.gets_mappings() {
            let at =
                plugin.json.folded("capabilities").map_or(&plugin.json, |member| &member.value);
            self.find(
                Severity::Broken,
                position(at),
                "the capability portMappings is missing, so that the runtime never hands hostPorts to portmap",
                "\"capabilities\": {\"portMappings\": true}, or portmap install --conflist FILE",
            );
        }
        let known = |key: &str| {
            COMMON_KEYS
                .iter()
                .chain(conf::option_keys())
                .find(|known| known.eq_ignore_ascii_case(key))
        };
        for member in plugin.json.members().unwrap_or_default() {
            if known(&member.key).is_none() {
                self.find(
                    Severity::Warning,
                    Position::of(text, member.key_span.start),
                    format!(
                        "portmap does not know the key {:?} and does not look at it",
                        member.key
                    ),
                    format!("remove it; known are {}", conf::option_keys().join(", ")),
                );
            }
        }
        let Value::Object(mut config) = raw(text, &plugin.json) else { return };
        config.retain(|key, _| {
            !["name", "cniVersion"].iter().any(|own| own.eq_ignore_ascii_case(key))
        });
        config.insert("name".into(), name.into());
        config.extend(version.map(|version| ("cniVersion".to_owned(), version)));
        match read(&config) {
            Ok(conf) => self.conf = Some(conf),
            Err(error) => {
                // Every message about a key begins with it.
                let culprit = plugin.json.members().into_iter().flatten().find(|member| {
                    error
                        .get(..member.key.len())
                        .is_some_and(|start| start.eq_ignore_ascii_case(&member.key))
                });
                let top = Json::parse(text).ok();
                let of_list =
                    ["name", "cniVersion"].into_iter().filter(|key| error.starts_with(key));
                let of_list = top
                    .iter()
                    .flat_map(|json| of_list.clone().filter_map(|key| json.exact(key)))
                    .next();
                let at = culprit.or(of_list).map_or(&plugin.json, |member| &member.value);
                self.find(
                    Severity::Broken,
                    position(at),
                    error,
                    "every ADD fails until this is mended",
                );
            }
        }
    }
}

fn read(config: &Map<String, Value>) -> Result<NetConf, String> {
    let text = Value::from(config.clone()).to_string();
    Envelope::parse(text.as_bytes())
        .and_then(|envelope| NetConf::parse(&envelope))
        .map_err(|error| error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// A finding of this severity and wording stands where the caret of `text` is.
    #[track_caller]
    fn finds(text: &str, severity: Severity, words: &str) {
        let column = text.find('^').unwrap() + 1;
        let all = analyse(&text.replace('^', "")).unwrap().findings;
        let found = all.iter().any(|finding| {
            let place = finding.position.unwrap();
            (finding.severity, place.line, place.column) == (severity, 1, column)
                && finding.problem.contains(words)
        });
        assert!(found, "{text}: {all:#?}");
    }

    #[test]
    fn a_sound_list_and_a_sound_object_have_no_findings() {
        let plugin = r#"{"type":"portmap","SNAT":false,"capabilities":{"portMappings":true}}"#;
        let list =
            format!(r#"{{"cniVersion":"0.3.1","name":"n","plugins":[{{"type":"ptp"}},{plugin}]}}"#);
        for text in [plugin, &list] {
            let analysis = analyse(text).unwrap();
            assert_eq!(analysis.findings, [], "{text}");
            assert!(analysis.conf.unwrap().options.no_snat);
        }
        assert_eq!(analyse(&list).unwrap().plugins, ["ptp", "portmap"]);
    }

    #[test]
    fn every_problem_has_its_place() {
        use Severity::{Broken, Warning};
        const CAPS: &str = r#""type":"portmap","capabilities":{"portMappings":true}"#;
        const PTP: &str = r#"{"type":"ptp"}"#;
        let list =
            |plugins: &str| format!(r#"{{"cniVersion":"1.0.0","name":"n","plugins":[{plugins}]}}"#);
        let after = |plugin: &str| list(&format!("{PTP},{plugin}"));
        finds(&format!("^{}", list(PTP)), Broken, "not in this list");
        finds(&list(&format!("^{{{CAPS}}},{PTP}")), Broken, "stands first");
        finds(&after(r#"^{"type":"portmap"}"#), Broken, "capability portMappings is missing");
        finds(
            &after(r#"{"type":"portmap","capabilities":^{"a":true}}"#),
            Broken,
            "capability portMappings is missing",
        );
        finds(&after(&format!(r#"{{{CAPS},^"snatt":1}}"#)), Warning, r#"the key "snatt""#);
        finds(&after(&format!(r#"{{{CAPS},"Snat":^"yes"}}"#)), Broken, r#"snat is "yes""#);
        finds(&after(&format!(r#"{{{CAPS},"markMasqBit":^32}}"#)), Broken, "from 0 to 31");
        finds(&after(&format!(r#"{{{CAPS}}},^{{{CAPS}}}"#)), Warning, "more than once");
        const EBPF: &str =
            r#"{"type":"portmap","capabilities":{"portMappings":true},"backend":"ebpf"}"#;
        let shaped = after(&format!(r#"{EBPF},^{{"type":"bandwidth"}}"#));
        finds(&shaped, Broken, "bandwidth stands behind portmap");
        let auto = shaped.replace('^', "").replace(r#","backend":"ebpf""#, "");
        let mut auto = analyse(&auto).unwrap();
        auto.with_backend(BackendKind::Nftables);
        assert_eq!(auto.findings, []);
        auto.with_backend(BackendKind::Ebpf);
        assert!(auto.findings[0].problem.contains("bandwidth stands behind"), "{auto:?}");
        finds(&list(r#"{"type":"ptp","capabilities":{"a":^1}}"#), Broken, "refuse the whole list");
        let of = |head: &str| format!(r#"{{{head}"plugins":[{PTP},{{{CAPS}}}]}}"#);
        finds(&format!("^{}", of(r#""cniVersion":"1.0.0","#)), Broken, "name is absent");
        finds(&of(r#""cniVersion":"1.0.0","name":^3,"#), Broken, "name is 3");
        finds(&of(r#""cniVersion":"1.0.0","name":^"-a","#), Broken, r#"name is "-a""#);
        finds(&format!("^{}", of(r#""name":"n","#)), Warning, "absent, which means 0.1.0");
        let several = r#""name":"n","cniVersions":["0.3.1","1.0.0","9.0.0"],"#;
        finds(&format!("^{}", of(several)), Warning, "libcni before 1.2");
        let both = format!("{several}\"cniVersion\":\"0.4.0\",");
        let both = analyse(&of(&both)).unwrap();
        assert_eq!((both.cni_version.as_str(), both.findings.as_slice()), ("1.0.0", &[][..]));
        finds(&of(r#""name":"n","cniVersion":"1.0.0","cniVersions":^"1.1.0","#), Broken, "refuse");
        finds(&of(r#""name":"n","cniVersion":^"9.9.9","#), Broken, "9.9.9");
    }

    #[test]
    fn other_things_are_refused() {
        for text in ["{}", "[", r#"{"type":"ptp"}"#] {
            assert!(analyse(text).is_err(), "{text}");
        }
    }
}
