//! Which file of a configuration directory counts, and whose it is.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

use super::spans::{Json, Kind};
use super::{CILIUM, List, PLUGIN};
use crate::cni::invocation::is_identifier;

/// Where runtimes look for configurations.
pub const DEFAULT_DIR: &str = "/etc/cni/net.d";

/// Which list somebody means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// The one that runtimes take.
    Auto,
    File(PathBuf),
}

impl FromStr for Choice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "auto" { Choice::Auto } else { Choice::File(text.into()) })
    }
}

/// The plugin's own objects in a file. They also stand inside of another plugin's, which runs them in
/// the runtime's stead: Multus has `delegates`, which may be whole lists.
fn entries(json: &Json) -> Vec<&Json> {
    let values: Vec<&Json> = match &json.kind {
        Kind::Object(members) => members.iter().map(|member| &member.value).collect(),
        Kind::Array(items) => items.iter().collect(),
        _ => Vec::new(),
    };
    let own = json.folded("type").and_then(|kind| kind.value.as_str()) == Some(PLUGIN);
    own.then_some(json).into_iter().chain(values.into_iter().flat_map(entries)).collect()
}

/// Whether a runtime that reads this file runs the plugin. What is not JSON counts if it mentions the
/// name.
#[must_use]
pub fn names_plugin(text: &str) -> bool {
    match Json::parse(text) {
        Ok(json) => !entries(&json).is_empty(),
        Err(_) => text.contains(&format!("{PLUGIN:?}")),
    }
}

/// The type of the plugin whose object a file is, with nothing around it.
#[must_use]
pub fn plugin_alone(text: &str) -> Option<String> {
    let json = Json::parse(text).ok().filter(|json| json.exact("plugins").is_none())?;
    json.folded("type").and_then(|kind| kind.value.as_str()).map(ToOwned::to_owned)
}

/// Where the plugin keeps its records if it is run as this file says, besides the usual place.
#[must_use]
pub fn state_dirs(text: &str) -> Vec<PathBuf> {
    let Ok(json) = Json::parse(text) else { return Vec::new() };
    let configured = |entry: &Json| entry.folded("stateDir")?.value.as_str().map(PathBuf::from);
    entries(&json).into_iter().filter_map(configured).filter(|dir| dir.is_absolute()).collect()
}

/// Whether runtimes read a file of this name: containerd (go-cni) and CRI-O (ocicni) give libcni these
/// three endings.
#[must_use]
pub fn is_configuration(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, ending)| ["conf", "conflist", "json"].contains(&ending))
}

/// The directory, beside a list's file, of the list's drop-ins: libcni reads it since 1.3, unless the list
/// has `loadOnlyInlinedPlugins`. A single plugin's object has none.
#[must_use]
pub fn drop_in_directory(text: &str) -> Option<String> {
    let json = Json::parse(text).ok()?;
    let is_list = json.exact("plugins").is_some() || json.folded("type").is_none();
    if !is_list || only_inlined(&json) == Some(true) {
        return None;
    }
    // The plugin refuses calls with other names.
    let name = json.exact("name").and_then(|name| name.value.as_str())?;
    is_identifier(name).then(|| name.to_owned())
}

/// What `loadOnlyInlinedPlugins` says, in libcni's spelling; `None` if libcni refuses it.
pub(super) fn only_inlined(json: &Json) -> Option<bool> {
    match json.exact("loadOnlyInlinedPlugins").map(|member| &member.value.kind) {
        None => Some(false),
        Some(Kind::Bool(only)) => Some(*only),
        Some(Kind::String(text)) => text.to_ascii_lowercase().parse().ok(),
        Some(_) => None,
    }
}

#[must_use]
pub fn is_drop_in(name: &str) -> bool {
    name.ends_with(".conf")
}

/// The file that a runtime takes: the first by name, byte by byte.
#[must_use]
pub fn first<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names.into_iter().filter(|name| is_configuration(name)).min()
}

const BACKUP: &str = ".portmap-backup";

/// Where the text before an edit is kept, beside the file; runtimes do not read this name.
#[must_use]
pub fn backup_name(name: &str) -> String {
    format!("{name}{BACKUP}")
}

#[must_use]
pub fn is_backup(name: &str) -> bool {
    name.ends_with(BACKUP)
}

/// What undoes an edit of a list, and what lasts: Cilium's agent writes its own file, and with
/// `cni.exclusive` it also renames what others put beside it. `names` are all names in the directory.
#[must_use]
pub fn owner(name: &str, list: &List, names: &[String]) -> Option<String> {
    const LASTING: &str = "What lasts: cni.chainingMode=portmap in Cilium's Helm values (its list then names \
                           portmap), or a list of your own with cni.customConf=true and cni.configMap; or \
                           cni.exclusive=false and `portmap install --watch --conflist auto`";
    if name.starts_with("05-cilium.conf") {
        return Some(format!(
            "{name} is written by Cilium's agent: with cni.exclusive=true (the default) it reverts an edit \
             within moments, otherwise when it restarts. {LASTING}"
        ));
    }
    if let Some(renamed) = names.iter().find(|name| name.ends_with(".cilium_bak")) {
        return Some(format!(
            "Cilium's agent has renamed another configuration here ({renamed}), so it will rename {name} as \
             well. {LASTING}"
        ));
    }
    list.find(CILIUM).map(|_| {
        format!(
            "{name} names {CILIUM}: if Cilium's agent writes this file, it reverts the edit. {LASTING}"
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_counts_and_backups_do_not() {
        let names = [
            "99-loopback.conf",
            "10-b.conflist",
            "10-B.conflist",
            "05-a.conflist.portmap-backup",
            "00-x",
        ];
        assert_eq!(first(names), Some("10-B.conflist"));
        assert_eq!(first(["05-cilium.conf", "05-cilium.conflist"]), Some("05-cilium.conf"));
        assert_eq!(first(["README", ".portmap.1-2", "x.cilium_bak"]), None);
        assert!(!is_configuration(&backup_name("a.conflist")));
    }

    #[test]
    fn a_list_names_its_plugins_and_nothing_else() {
        for (text, names) in [
            (r#"{"name":"portmap","plugins":[{"type":"cilium-cni"}]}"#, false),
            (r#"{"name":"n","plugins":[{"type":"ptp"},{"type":"portmap"}]}"#, true),
            (r#"{"name":"portmap","type":"ptp"}"#, false),
            (r#"{"type":"portmap"}"#, true),
            (r#"{"type":"multus","delegates":[{"plugins":[{"Type":"portmap"}]}]}"#, true),
            (r#"{"type":"multus","delegates":[{"type":"flannel","name":"portmap"}]}"#, false),
            (r#"{"plugins":[{"type":"portmap"},]}"#, true),
            ("", false),
        ] {
            assert_eq!(names_plugin(text), names, "{text}");
        }
    }

    #[test]
    fn records_are_where_every_entry_says() {
        let text = r#"{"type":"multus","stateDir":"/a","delegates":[{"plugins":[
            {"type":"portmap","statedir":"/run/b"},{"type":"portmap"},{"type":"portmap","stateDir":"c"}]}]}"#;
        assert_eq!(state_dirs(text), [PathBuf::from("/run/b")]);
        assert_eq!(state_dirs("{"), [""; 0].map(PathBuf::from));
    }

    #[test]
    fn a_list_has_drop_ins_unless_it_says_otherwise() {
        let plugins = r#""plugins":[{"type":"ptp"}]"#;
        for (text, name) in [
            (format!(r#"{{"name":"n",{plugins}}}"#), Some("n")),
            (r#"{"name":"n.1_a-b"}"#.into(), Some("n.1_a-b")),
            (format!(r#"{{"name":"n","loadOnlyInlinedPlugins":false,{plugins}}}"#), Some("n")),
            (format!(r#"{{"name":"n","LoadOnlyInlinedPlugins":true,{plugins}}}"#), Some("n")),
            (format!(r#"{{"name":"n","loadOnlyInlinedPlugins":true,{plugins}}}"#), None),
            (format!(r#"{{"name":"n","loadOnlyInlinedPlugins":"TRUE",{plugins}}}"#), None),
            (r#"{"name":"n","type":"bridge"}"#.into(), None),
            (format!(r#"{{{plugins}}}"#), None),
            (format!(r#"{{"name":"..",{plugins}}}"#), None),
            ("{".into(), None),
        ] {
            assert_eq!(drop_in_directory(&text).as_deref(), name, "{text}");
        }
    }

    #[test]
    fn ciliums_files_are_told_from_others() {
        let cilium = List::parse(r#"{"plugins":[{"type":"cilium-cni"}]}"#, &[]).unwrap();
        let ptp = List::parse(r#"{"plugins":[{"type":"ptp"}]}"#, &[]).unwrap();
        let bak = [String::from("10-x.conflist.cilium_bak")];
        assert!(
            owner("05-cilium.conflist", &cilium, &[]).unwrap().contains("cni.chainingMode=portmap")
        );
        assert!(owner("00-mine.conflist", &cilium, &[]).unwrap().contains("cilium-cni"));
        assert!(owner("00-ptp.conflist", &ptp, &bak).unwrap().contains("10-x.conflist.cilium_bak"));
        assert_eq!(owner("00-ptp.conflist", &ptp, &[]), None);
    }
}
