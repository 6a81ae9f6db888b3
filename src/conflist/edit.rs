//! Putting the plugin into a list and taking it out again: text to text, and every byte that is not
//! the plugin's stays.

use super::spans::{Json, Kind, Member, Refusal};
use super::{DropIn, List, PLUGIN, Plugin, SHAPER};

/// What became of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edited {
    pub text: String,
    pub change: Change,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It was as wanted before.
    None,
    /// The plugin now stands after this one.
    Inserted { after: String },
    /// The plugin was there, and runtimes did not hand port mappings to it.
    CapabilityAdded,
    /// The plugin is no longer there.
    Removed,
}

/// Main plugins whose list is not the place for port mappings, and what is.
const ELSEWHERE: [(&str, &str); 3] = [
    (
        "loopback",
        "this list makes a pod's loopback device, not its network: name the file of the pod network",
    ),
    ("multus", "Multus runs the plugins of another list: name that file (its `clusterNetwork`)"),
    (
        "multus-shim",
        "Multus runs the plugins of another list: name that file (its `clusterNetwork`)",
    ),
];

/// Puts the plugin into a list, after Cilium's plugin where that makes the pod's interface, otherwise
/// after the plugin that does. Where Cilium's is chained to another main plugin, Cilium documents the
/// place between the two. The bandwidth plugin goes before it: its ingress qdisc cannot be added beside
/// the clsact qdisc of eBPF, and to the other backends the order is all one. A drop-in that names the
/// plugin is as good as an entry.
///
/// # Errors
///
/// What is not a list, or one in which the plugin could not work.
pub fn insert(text: &str, drop_ins: &[DropIn]) -> Result<Edited, Refusal> {
    let list = List::parse(text, drop_ins)?;
    let Some((main, rest)) = list.plugins.split_first() else {
        return Err(list.refuse(&list.json, "there is no main plugin"));
    };
    if main.name == PLUGIN {
        return Err(main.refuse(
            &main.json,
            "portmap stands first: it must come after the plugin that makes the pod's interface",
        ));
    }
    if let Some((_, instead)) = ELSEWHERE.iter().find(|(name, _)| *name == main.name) {
        return Err(main.refuse(&main.json, *instead));
    }
    let mut present = rest.iter().filter(|plugin| plugin.name == PLUGIN);
    if present.clone().any(Plugin::gets_mappings) {
        return Ok(Edited { text: text.to_owned(), change: Change::None });
    }
    if let Some(plugin) = present.next() {
        return add_capability(plugin);
    }
    let Some((main, rest)) = list.own().split_first() else {
        return Err(list.refuse(
            &list.json,
            "there is no \"plugins\" to put portmap into: add a drop-in behind the others with \
             {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}}",
        ));
    };
    let shaper = rest.iter().rfind(|plugin| plugin.name == SHAPER);
    let predecessor = shaper.unwrap_or(main);
    let style = Style::of(text, &predecessor.json);
    let before = text.get(..predecessor.json.span.start).unwrap_or_default();
    let space = before.len() - before.trim_end().len();
    let object =
        style.object(&[("type", format!("{PLUGIN:?}")), ("capabilities", style.capabilities())]);
    let addition = format!(",{}{object}", before.get(before.len() - space..).unwrap_or_default());
    let end = predecessor.json.span.end;
    let edited = splice(text, end, end, &addition);
    Ok(Edited { text: edited, change: Change::Inserted { after: predecessor.name.clone() } })
}

/// Takes every entry of the plugin out of a list; drop-ins stay.
///
/// # Errors
///
/// What is not a list, or one whose `plugins` would be empty without the plugin.
pub fn remove(text: &str, drop_ins: &[DropIn]) -> Result<Edited, Refusal> {
    let list = List::parse(text, drop_ins)?;
    let plugins = list.own();
    if !plugins.is_empty() && plugins.iter().all(|plugin| plugin.name == PLUGIN) {
        return Err(list
            .refuse(&list.json, "portmap is the only plugin: without it the list would be empty"));
    }
    let mut edited = text.to_owned();
    // From behind, so that what is still to come keeps its place.
    for (i, plugin) in plugins.iter().enumerate().rev() {
        if plugin.name != PLUGIN {
            continue;
        }
        let span = &plugin.json.span;
        // With it goes the comma before; the first has one after it, if anything else is left.
        let others_before = plugins.iter().take(i).rev().find(|other| other.name != PLUGIN);
        let (from, to) = match (i.checked_sub(1).and_then(|i| plugins.get(i)), others_before) {
            (Some(before), Some(_)) => (before.json.span.end, span.end),
            _ => (span.start, plugins.get(i + 1).map_or(span.end, |next| next.json.span.start)),
        };
        edited = splice(&edited, from, to, "");
    }
    let change = if edited == text { Change::None } else { Change::Removed };
    Ok(Edited { text: edited, change })
}

fn add_capability(plugin: &Plugin) -> Result<Edited, Refusal> {
    if plugin.file.is_some() {
        return Err(plugin.refuse(
            &plugin.json,
            "portmap has no \"capabilities\": {\"portMappings\": true} here, and drop-ins are not edited: add it",
        ));
    }
    let text = plugin.text;
    let style = Style::of(text, &plugin.json);
    let edited = match plugin.json.folded("capabilities") {
        None => {
            // Also where it is `null`: the last of several counts.
            let last = plugin.json.members().and_then(<[Member]>::last);
            let Some(last) = last else {
                return Err(plugin.refuse(&plugin.json, "this plugin is empty"));
            };
            let member =
                format!("{}\"capabilities\"{}{}", style.comma, style.colon, style.capabilities());
            splice(text, last.value.span.end, last.value.span.end, &member)
        }
        Some(capabilities) => {
            match (&capabilities.value.kind, capabilities.value.exact("portMappings")) {
                (Kind::Object(_), Some(declared)) => {
                    splice(text, declared.value.span.start, declared.value.span.end, "true")
                }
                (Kind::Object(members), None) => {
                    let Some(last) = members.last() else {
                        let span = &capabilities.value.span;
                        let edited = splice(text, span.start, span.end, &style.capabilities());
                        return Ok(Edited { text: edited, change: Change::CapabilityAdded });
                    };
                    let inner = Style::of(text, &capabilities.value);
                    let member = format!("{}\"portMappings\"{}true", inner.comma, inner.colon);
                    splice(text, last.value.span.end, last.value.span.end, &member)
                }
                _ => {
                    return Err(
                        plugin.refuse(&capabilities.value, "\"capabilities\" must be an object")
                    );
                }
            }
        }
    };
    Ok(Edited { text: edited, change: Change::CapabilityAdded })
}

fn splice(text: &str, from: usize, to: usize, with: &str) -> String {
    format!("{}{with}{}", text.get(..from).unwrap_or_default(), text.get(to..).unwrap_or_default())
}

/// How an object is written: what stands between its parts.
struct Style<'a> {
    /// From the brace to the first key.
    open: &'a str,
    /// From a key to its value.
    colon: &'a str,
    /// From a value to the next key.
    comma: String,
    /// From the last value to the brace.
    close: &'a str,
}

impl<'a> Style<'a> {
    fn of(text: &'a str, object: &Json) -> Self {
        let between = |from: usize, to: usize| text.get(from..to).unwrap_or_default();
        let members = object.members().unwrap_or_default();
        let (Some(first), Some(last)) = (members.first(), members.last()) else {
            return Style { open: "", colon: ": ", comma: ", ".into(), close: "" };
        };
        let open = between(object.span.start + 1, first.key_span.start);
        let colon = between(first.key_span.end, first.value.span.start);
        let comma = match members.get(1) {
            Some(second) => between(first.value.span.end, second.key_span.start).to_owned(),
            None if open.contains('\n') => format!(",{open}"),
            None if colon.ends_with(' ') => ", ".to_owned(),
            None => ",".to_owned(),
        };
        Style { open, colon, comma, close: between(last.value.span.end, object.span.end - 1) }
    }

    fn object(&self, members: &[(&str, String)]) -> String {
        let members: Vec<String> =
            members.iter().map(|(key, value)| format!("\"{key}\"{}{value}", self.colon)).collect();
        format!("{{{}{}{}}}", self.open, members.join(&self.comma), self.close)
    }

    /// `{"portMappings": true}` as the value of a member: one level deeper where levels have lines.
    fn capabilities(&self) -> String {
        let colon = self.colon;
        if !self.open.contains('\n') {
            return format!("{{{}\"portMappings\"{colon}true{}}}", self.open, self.close);
        }
        let indentation =
            |space: &'a str| space.rsplit_once('\n').map(|(_, indentation)| indentation);
        let unit = match (indentation(self.open), indentation(self.close)) {
            (Some(inner), Some(outer)) => inner.strip_prefix(outer).unwrap_or("  "),
            _ => "  ",
        };
        format!("{{{open}{unit}\"portMappings\"{colon}true{open}}}", open = self.open)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn inserted(text: &str) -> String {
        let edited = insert(text, &[]).unwrap();
        assert!(matches!(edited.change, Change::Inserted { .. }), "{edited:?}");
        edited.text
    }

    #[test]
    fn the_entry_looks_like_its_neighbours() {
        for (before, after) in [
            (
                r#"{"plugins":[{"type":"ptp"}]}"#,
                r#"{"plugins":[{"type":"ptp"},{"type":"portmap","capabilities":{"portMappings":true}}]}"#,
            ),
            (
                "{ \"plugins\": [ { \"type\": \"ptp\" } ] }",
                "{ \"plugins\": [ { \"type\": \"ptp\" }, { \"type\": \"portmap\", \"capabilities\": { \"portMappings\": true } } ] }",
            ),
            (
                "{\"plugins\": [\n  {\"type\": \"cilium-cni\"}\n]}\n",
                "{\"plugins\": [\n  {\"type\": \"cilium-cni\"},\n  {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}}\n]}\n",
            ),
            (
                "{\n\t\"plugins\": [{\r\n\t\t\"type\": \"bridge\",\r\n\t\t\"mtu\": 1e3\r\n\t}, {\"type\": \"firewall\"}]\n}",
                "{\n\t\"plugins\": [{\r\n\t\t\"type\": \"bridge\",\r\n\t\t\"mtu\": 1e3\r\n\t},{\r\n\t\t\"type\": \"portmap\",\r\n\t\t\"capabilities\": {\r\n\t\t\t\"portMappings\": true\r\n\t\t}\r\n\t}, {\"type\": \"firewall\"}]\n}",
            ),
            (
                r#"{"plugins":[{"type":"ptp"}, {"type": "bandwidth"},{"type":"cilium-cni"}]}"#,
                r#"{"plugins":[{"type":"ptp"}, {"type": "bandwidth"}, {"type": "portmap", "capabilities": {"portMappings": true}},{"type":"cilium-cni"}]}"#,
            ),
            (
                r#"{"plugins":[{"type":"ptp"},{"type":"tuning"},{"type":"bandwidth"}]}"#,
                r#"{"plugins":[{"type":"ptp"},{"type":"tuning"},{"type":"bandwidth"},{"type":"portmap","capabilities":{"portMappings":true}}]}"#,
            ),
        ] {
            assert_eq!(inserted(before), after);
        }
    }

    #[test]
    fn a_missing_capability_is_mended() {
        let list = |entry: &str| format!(r#"{{"plugins": [{{"type": "ptp"}}, {entry}]}}"#);
        for (before, after) in [
            (
                r#"{"type": "portmap"}"#,
                r#"{"type": "portmap", "capabilities": {"portMappings": true}}"#,
            ),
            (
                r#"{"snat":true, "Type":"portmap", "capabilities":{"portMappings":false}}"#,
                r#"{"snat":true, "Type":"portmap", "capabilities":{"portMappings":true}}"#,
            ),
            (
                r#"{"type": "portmap", "capabilities": {"bandwidth": true}, "snat": false}"#,
                r#"{"type": "portmap", "capabilities": {"bandwidth": true, "portMappings": true}, "snat": false}"#,
            ),
            (
                r#"{"type":"portmap","capabilities":{}}"#,
                r#"{"type":"portmap","capabilities":{"portMappings":true}}"#,
            ),
            (
                r#"{"type":"portmap","capabilities":null}"#,
                r#"{"type":"portmap","capabilities":null,"capabilities":{"portMappings":true}}"#,
            ),
        ] {
            let edited = insert(&list(before), &[]).unwrap();
            assert_eq!(edited, Edited { text: list(after), change: Change::CapabilityAdded });
            assert_eq!(insert(&edited.text, &[]).unwrap().change, Change::None);
        }
        let text = list(r#"{"type":"portmap","capabilities":[]}"#);
        let refusal = insert(&text, &[]).unwrap_err();
        assert_eq!(refusal.place.position.column, text.find("[]").unwrap() + 1, "{refusal}");
    }

    #[test]
    fn what_cannot_work_is_refused_with_its_place() {
        for (text, column, words) in [
            ("[]", 1, "is an object"),
            ("{}", 1, "no \"plugins\""),
            (r#"{"type":"ptp","name":"n"}"#, 1, "single plugin"),
            (r#"{"Plugins":[{"type":"ptp"}]}"#, 1, "no \"plugins\""),
            (r#"{"plugins":{}}"#, 12, "must be a list"),
            (r#"{"plugins":[]}"#, 12, "empty"),
            (r#"{"plugins":[1]}"#, 13, "must be an object"),
            (r#"{"plugins":[{"type":"ptp"}, {"name":"x"}]}"#, 29, "no \"type\""),
            (r#"{"plugins":[{"type":"portmap"}]}"#, 13, "stands first"),
            (r#"{"plugins":[{"type":"multus"}]}"#, 13, "clusterNetwork"),
            (r#"{"plugins":[{"type":"loopback"}]}"#, 13, "pod network"),
            (r#"{"plugins":[{"type":"ptp"},]}"#, 28, "not JSON"),
        ] {
            let refusal = insert(text, &[]).unwrap_err();
            assert_eq!(
                (refusal.place.position.line, refusal.place.position.column),
                (1, column),
                "{refusal}"
            );
            assert!(refusal.reason.contains(words), "{refusal}");
        }
        let only = remove(r#"{"plugins":[{"type":"portmap"}]}"#, &[]).unwrap_err();
        assert!(only.reason.contains("only plugin"), "{only}");
    }

    #[test]
    fn a_drop_in_is_as_good_as_an_entry() {
        const OWN: &str = r#"{"name":"n","plugins":[{"type":"ptp"}]}"#;
        let drop_in = |text: &str| [DropIn { path: "/n/50.conf".into(), text: text.into() }];
        let named = drop_in(r#"{"type":"portmap","capabilities":{"portMappings":true}}"#);
        let unchanged = |text: &str| Edited { text: text.to_owned(), change: Change::None };
        assert_eq!(insert(OWN, &named).unwrap(), unchanged(OWN));
        let without = drop_in(r#"{"type":"portmap"}"#);
        let refusal = insert(OWN, &without).unwrap_err();
        assert!(refusal.to_string().starts_with("/n/50.conf, line 1, column 1: "), "{refusal}");
        // Others do not matter, but there must be something to put it behind.
        let other = drop_in(r#"{"type":"tuning"}"#);
        assert_eq!(insert(OWN, &other).unwrap(), insert(OWN, &[]).unwrap());
        let refusal = insert(r#"{"name":"n"}"#, &other).unwrap_err();
        assert!(refusal.reason.contains("add a drop-in"), "{refusal}");

        for text in [OWN, r#"{"name":"n"}"#] {
            assert_eq!(remove(text, &named).unwrap(), unchanged(text));
        }
        let only = r#"{"name":"n","plugins":[{"type":"portmap"}]}"#;
        assert!(remove(only, &other).unwrap_err().reason.contains("only plugin"));
    }

    #[test]
    fn every_entry_is_removed_wherever_it_stands() {
        let portmap = r#"{"type":"portmap"}"#;
        for (before, after) in [
            (format!(r#"[{portmap}, {{"type":"a"}}]"#), r#"[{"type":"a"}]"#),
            (format!(r#"[{portmap} ,{portmap},{{"type":"a"}}]"#), r#"[{"type":"a"}]"#),
            (format!(r#"[ {{"type":"a"}} , {portmap}, {portmap} ]"#), r#"[ {"type":"a"} ]"#),
            (
                format!(r#"[{portmap},{{"type":"a"}},{portmap}, {{"type":"b"}}]"#),
                r#"[{"type":"a"}, {"type":"b"}]"#,
            ),
        ] {
            let edited = remove(&format!(r#"{{"plugins":{before}}}"#), &[]).unwrap();
            assert_eq!(edited.text, format!(r#"{{"plugins":{after}}}"#));
            assert_eq!(remove(&edited.text, &[]).unwrap().change, Change::None);
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~äß\n\"\\\\]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z{}\\[\\],:\"]{0,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn plugin() -> impl Strategy<Value = Value> {
        let members = prop::collection::btree_map("[a-z{}\\[\\],:\"]{5,8}", json_value(), 0..3);
        (members, "[a-o][a-z-]{0,6}").prop_map(|(members, name)| {
            let mut object: serde_json::Map<_, _> = members.into_iter().collect();
            object.insert("type".into(), name.into());
            Value::Object(object)
        })
    }

    /// Writes a value with the given bits of whitespace between its parts, one after the other.
    fn write(value: &Value, space: &mut dyn FnMut() -> &'static str, out: &mut String) {
        let list = |open: char,
                    close: char,
                    parts: Vec<(Option<&String>, &Value)>,
                    out: &mut String,
                    space: &mut dyn FnMut() -> &'static str| {
            out.push(open);
            out.push_str(space());
            for (i, (key, value)) in parts.into_iter().enumerate() {
                if i > 0 {
                    out.push_str(space());
                    out.push(',');
                    out.push_str(space());
                }
                if let Some(key) = key {
                    out.push_str(&Value::from(key.as_str()).to_string());
                    out.push_str(space());
                    out.push(':');
                    out.push_str(space());
                }
                write(value, space, out);
            }
            out.push_str(space());
            out.push(close);
        };
        match value {
            Value::Array(items) => {
                list('[', ']', items.iter().map(|item| (None, item)).collect(), out, space);
            }
            Value::Object(members) => {
                list('{', '}', members.iter().map(|(k, v)| (Some(k), v)).collect(), out, space);
            }
            other => out.push_str(&other.to_string()),
        }
    }

    proptest! {
        #[test]
        fn any_list_in_any_formatting_gains_the_plugin_and_nothing_else(
            plugins in prop::collection::vec(plugin(), 1..4),
            extra in prop::collection::btree_map("[a-o]{1,6}", json_value(), 0..3),
            spaces in prop::collection::vec(
                prop::sample::select(vec!["", "", " ", "\n  ", "\t", "\r\n    ", "\n"]), 1..40),
        ) {
            prop_assume!(!ELSEWHERE.iter().any(|(name, _)| plugins[0]["type"] == *name));
            let mut list: serde_json::Map<String, Value> = extra.into_iter().collect();
            list.insert("plugins".into(), plugins.clone().into());
            let mut next = spaces.iter().cycle();
            let mut text = String::new();
            write(&Value::Object(list.clone()), &mut || next.next().unwrap(), &mut text);

            let edited = inserted(&text);
            let mut expected = plugins;
            expected.insert(1, json!({"type": "portmap", "capabilities": {"portMappings": true}}));
            list.insert("plugins".into(), expected.into());
            prop_assert_eq!(serde_json::from_str::<Value>(&edited).unwrap(), Value::Object(list));

            let again = insert(&edited, &[]).unwrap();
            prop_assert_eq!(again, Edited { text: edited.clone(), change: Change::None });
            prop_assert_eq!(remove(&edited, &[]).unwrap().text, text);
        }

        #[test]
        fn no_text_makes_it_panic(text in "[\\[\\]{}\",:a-e0-9 \\\\\n\u{e4}-]{0,60}") {
            drop(insert(&text, &[]));
            drop(remove(&text, &[]));
        }
    }
}
