//! What is wrong with a configuration, and where.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value};

use super::files::only_inlined;
use super::spans::{Json, Kind, Place, Position, Refusal};
use super::{DropIn, List, PLUGIN, Plugin, SHAPER};
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
    pub place: Option<Place>,
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
    /// Those of them that are drop-ins, by file.
    pub drop_ins: Vec<(PathBuf, String)>,
    pub cni_version: String,
    /// What our plugin is told, as far as it can be read.
    pub conf: Option<NetConf>,
    pub findings: Vec<Finding>,
    /// Plugins that eBPF keeps from making their ingress qdisc.
    shapers_behind: Vec<Place>,
}

/// Looks at a list with its drop-ins, or at the object of our plugin.
///
/// # Errors
///
/// What is neither.
pub fn analyse(text: &str, drop_ins: &[DropIn]) -> Result<Analysis, Refusal> {
    let json = Json::parse(text)?;
    let own = json.folded("type").and_then(|member| member.value.as_str()) == Some(PLUGIN);
    if own && json.exact("plugins").is_none() {
        let mut analysis = Analysis {
            name: string(&json, "name"),
            plugins: vec![PLUGIN.into()],
            cni_version: string(&json, "cniVersion"),
            ..Analysis::default()
        };
        let plugin = Plugin { name: PLUGIN.into(), json: json.clone(), text, file: None };
        let name = if analysis.name.is_empty() { PLUGIN } else { &analysis.name }.to_owned();
        let version = json.folded("cniVersion").map(|member| raw(text, &member.value));
        analysis.plugin(None, &plugin, &name, version);
        return Ok(analysis);
    }
    let list = List::parse(text, drop_ins)?;
    let dropped = |plugin: &Plugin| Some((plugin.file?.to_owned(), plugin.name.clone()));
    let mut analysis = Analysis {
        name: string(&list.json, "name"),
        plugins: list.plugins.iter().map(|plugin| plugin.name.clone()).collect(),
        drop_ins: list.plugins.iter().filter_map(dropped).collect(),
        cni_version: string(&list.json, "cniVersion"),
        ..Analysis::default()
    };
    analysis.list(&list);
    analysis.sort();
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
            refusal.place,
            refusal.reason,
            "a list is {\"cniVersion\": …, \"name\": …, \"plugins\": [ the main plugin, portmap, … ]}",
        );
        analysis
    }

    fn find(
        &mut self,
        severity: Severity,
        place: Place,
        problem: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let (problem, fix) = (problem.into(), fix.into());
        self.findings.push(Finding { severity, place: Some(place), problem, fix });
    }

    /// As they stand in the files, those of the list first.
    fn sort(&mut self) {
        self.findings.sort_by(|one, other| one.place.cmp(&other.place));
    }

    fn list(&mut self, list: &List) {
        let version = self.version(list);
        self.inlined(list);
        for plugin in &list.plugins {
            self.capabilities(plugin);
        }
        let (first, rest) = list.plugins.split_at(1);
        for plugin in first.iter().filter(|plugin| plugin.name == PLUGIN) {
            self.find(
                Severity::Broken,
                plugin.place(&plugin.json),
                "portmap stands first, so that it is never told the pod's address",
                "move it behind the plugin that makes the pod's interface",
            );
        }
        let mut own = list.plugins.iter().filter(|plugin| plugin.name == PLUGIN);
        let Some(plugin) = own.next() else {
            return self.find(
                Severity::Broken,
                list.place(&list.json),
                "portmap is not in this list, so that hostPorts do nothing",
                match list.own() {
                    [] => "a drop-in with {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}}",
                    _ => "portmap install --conflist FILE",
                },
            );
        };
        for second in own {
            self.find(
                Severity::Warning,
                second.place(&second.json),
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
            .map(|plugin| plugin.place(&plugin.json))
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
                list.place(&list.json),
                format!("cniVersion is absent{meaning}"),
                "say \"cniVersion\": \"1.0.0\", or the newest that every plugin of the list knows",
            );
        }
        let Some(several) = several else { return declared };
        let Ok(mut versions) = serde_json::from_value::<Vec<String>>(raw(list.text, several))
        else {
            self.find(
                Severity::Broken,
                list.place(several),
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

    /// Since 1.3 libcni refuses other values, and before it does not know the key.
    fn inlined(&mut self, list: &List) {
        if let Some(member) = list.json.exact("loadOnlyInlinedPlugins")
            && only_inlined(&list.json).is_none()
        {
            let said = raw(list.text, &member.value);
            self.find(
                Severity::Broken,
                list.place(&member.value),
                format!("loadOnlyInlinedPlugins is {said}: runtimes refuse the whole list"),
                "true or false",
            );
        }
    }

    /// What is wrong with the list if the plugin uses this backend.
    pub fn with_backend(&mut self, kind: BackendKind) {
        if kind != BackendKind::Ebpf {
            return;
        }
        for place in std::mem::take(&mut self.shapers_behind) {
            self.find(
                Severity::Broken,
                place,
                "bandwidth stands behind portmap with eBPF, which has the place of its qdisc by then: pods whose traffic is limited do not start",
                "move it before portmap",
            );
        }
        self.sort();
    }

    /// A list without a usable name is refused by runtimes as a whole.
    fn named(&mut self, list: &List, plugin: &Plugin, name: Option<Value>, version: Option<Value>) {
        match name {
            Some(Value::String(name)) => self.plugin(Some(list), plugin, &name, version),
            other => {
                let at = list.json.exact("name").map_or(&list.json, |member| &member.value);
                let found = other.map_or("absent".to_owned(), |value| value.to_string());
                self.find(
                    Severity::Broken,
                    list.place(at),
                    format!("name is {found}: a list needs a name that is a string"),
                    "give it a name that no other list of the node has",
                );
            }
        }
    }

    /// libcni reads `capabilities` as a map of booleans and refuses the list if it is anything else.
    fn capabilities(&mut self, plugin: &Plugin) {
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
                plugin.place(wrong),
                format!("the capabilities of {} must be an object of true and false: runtimes refuse the whole list", plugin.name),
                "for portmap: \"capabilities\": {\"portMappings\": true}",
            );
        }
    }

    /// Name and version are the list's, if it is in one.
    fn plugin(&mut self, list: Option<&List>, plugin: &Plugin, name: &str, version: Option<Value>) {
        if !plugin.gets_mappings() {
            let at =
                plugin.json.folded("capabilities").map_or(&plugin.json, |member| &member.value);
            self.find(
                Severity::Broken,
                plugin.place(at),
                "the capability portMappings is missing, so that the runtime never hands hostPorts to portmap",
                match plugin.file {
                    None => "\"capabilities\": {\"portMappings\": true}, or portmap install --conflist FILE",
                    Some(_) => "\"capabilities\": {\"portMappings\": true}",
                },
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
                    Place {
                        position: Position::of(plugin.text, member.key_span.start),
                        ..plugin.place(&plugin.json)
                    },
                    format!(
                        "portmap does not know the key {:?} and does not look at it",
                        member.key
                    ),
                    format!("remove it; known are {}", conf::option_keys().join(", ")),
                );
            }
        }
        let Value::Object(mut config) = raw(plugin.text, &plugin.json) else { return };
        config.retain(|key, _| {
            !["name", "cniVersion"].iter().any(|own| own.eq_ignore_ascii_case(key))
        });
        config.insert("name".into(), name.into());
        config.extend(version.map(|version| ("cniVersion".to_owned(), version)));
        match read(&config) {
            Ok(conf) => self.conf = Some(conf),
            Err(error) => {
                // Every message about a key begins with it.
                let of_list = ["name", "cniVersion"].into_iter().find(|key| error.starts_with(key));
                let of_list = list
                    .zip(of_list)
                    .and_then(|(list, key)| Some(list.place(&list.json.exact(key)?.value)));
                let own = plugin.json.members().into_iter().flatten().find(|member| {
                    error
                        .get(..member.key.len())
                        .is_some_and(|start| start.eq_ignore_ascii_case(&member.key))
                });
                let own = own.map_or(&plugin.json, |member| &member.value);
                let place = of_list.unwrap_or_else(|| plugin.place(own));
                self.find(Severity::Broken, place, error, "every ADD fails until this is mended");
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
        let all = analyse(&text.replace('^', ""), &[]).unwrap().findings;
        let found = all.iter().any(|finding| {
            let place = finding.place.as_ref().unwrap().position;
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
            let analysis = analyse(text, &[]).unwrap();
            assert_eq!(analysis.findings, [], "{text}");
            assert!(analysis.conf.unwrap().options.no_snat);
        }
        assert_eq!(analyse(&list, &[]).unwrap().plugins, ["ptp", "portmap"]);
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
        let mut auto = analyse(&auto, &[]).unwrap();
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
        let both = analyse(&of(&both), &[]).unwrap();
        assert_eq!((both.cni_version.as_str(), both.findings.as_slice()), ("1.0.0", &[][..]));
        finds(&of(r#""name":"n","cniVersion":"1.0.0","cniVersions":^"1.1.0","#), Broken, "refuse");
        finds(&of(r#""name":"n","cniVersion":^"9.9.9","#), Broken, "9.9.9");
        let inlined = r#""cniVersion":"1.0.0","name":"n","loadOnlyInlinedPlugins":^1,"#;
        finds(&of(inlined), Broken, "refuse");
    }

    #[test]
    fn drop_ins_count_and_have_places_of_their_own() {
        const LIST: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}"#;
        let check = |list: &str, text: &str| {
            let drop_ins = [DropIn { path: "/n/50.conf".into(), text: text.into() }];
            analyse(list, &drop_ins).unwrap()
        };
        const SOUND: &str =
            r#"{"type":"portmap","stateDir":"/a","capabilities":{"portMappings":true}}"#;
        let sound = check(LIST, SOUND);
        assert_eq!((sound.plugins.len(), sound.findings.as_slice()), (2, &[][..]));
        assert_eq!(sound.drop_ins, [("/n/50.conf".into(), "portmap".into())]);
        assert_eq!(sound.conf.unwrap().state_dir, Some("/a".into()));
        let [alone] =
            check(r#"{"cniVersion":"1.0.0","name":"n"}"#, SOUND).findings.try_into().unwrap();
        assert!(alone.problem.contains("stands first") && alone.place.unwrap().file.is_some());
        for (text, place) in [
            (r#"{"type":"portmap"}"#, "/n/50.conf, line 1, column 1"),
            (
                r#"{"type":"portmap","snat":1,"capabilities":{"portMappings":true}}"#,
                "/n/50.conf, line 1, column 26",
            ),
            (r#"{"type":"bridge"}"#, "line 1, column 1"),
        ] {
            let [finding] = check(LIST, text).findings.try_into().unwrap();
            assert_eq!(finding.place.unwrap().to_string(), place, "{text}");
        }
        let list = LIST.replace("1.0.0", "9.9.9");
        let [finding] = check(&list, SOUND).findings.try_into().unwrap();
        assert_eq!(finding.place.unwrap().to_string(), "line 1, column 15");
    }

    #[test]
    fn other_things_are_refused() {
        for text in ["{}", "[", r#"{"type":"ptp"}"#] {
            assert!(analyse(text, &[]).is_err(), "{text}");
        }
    }
}
