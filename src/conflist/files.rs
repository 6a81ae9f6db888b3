//! Which file of a configuration directory counts, and whose it is.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

use super::spans::Json;
use super::{CILIUM, List, PLUGIN};

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

/// Whether a runtime that reads this file runs the plugin. What is neither a list nor a plugin's
/// object counts if it mentions the name.
#[must_use]
pub fn names_plugin(text: &str) -> bool {
    match (List::parse(text), Json::parse(text)) {
        (Ok(list), _) => list.find(PLUGIN).is_some(),
        (Err(_), Ok(json)) if json.folded("type").is_some() => {
            json.folded("type").and_then(|kind| kind.value.as_str()) == Some(PLUGIN)
        }
        _ => text.contains(&format!("{PLUGIN:?}")),
    }
}

/// Whether runtimes read a file of this name: containerd (go-cni) and CRI-O (ocicni) give libcni these
/// three endings.
#[must_use]
pub fn is_configuration(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, ending)| ["conf", "conflist", "json"].contains(&ending))
}

/// The file that a runtime takes: the first by name, byte by byte.
#[must_use]
pub fn first<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names.into_iter().filter(|name| is_configuration(name)).min()
}

/// Where the text before an edit is kept, beside the file; runtimes do not read this name.
#[must_use]
pub fn backup_name(name: &str) -> String {
    format!("{name}.portmap-backup")
}

/// What undoes an edit of a list, and what lasts: Cilium's agent writes its own file, and with
/// `cni.exclusive` it also renames what others put beside it. `names` are all names in the directory.
#[must_use]
pub fn owner(name: &str, list: &List, names: &[String]) -> Option<String> {
    const LASTING: &str = "What lasts: cni.chainingMode=portmap in Cilium's Helm values (its list then names \
                           portmap), or a list of your own with cni.customConf=true and cni.configMap; or \
                           cni.exclusive=false and `portmap install --watch`";
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
            (r#"{"plugins":[{"type":"portmap"},]}"#, true),
            ("", false),
        ] {
            assert_eq!(names_plugin(text), names, "{text}");
        }
    }

    #[test]
    fn ciliums_files_are_told_from_others() {
        let cilium = List::parse(r#"{"plugins":[{"type":"cilium-cni"}]}"#).unwrap();
        let ptp = List::parse(r#"{"plugins":[{"type":"ptp"}]}"#).unwrap();
        let bak = [String::from("10-x.conflist.cilium_bak")];
        assert!(
            owner("05-cilium.conflist", &cilium, &[]).unwrap().contains("cni.chainingMode=portmap")
        );
        assert!(owner("00-mine.conflist", &cilium, &[]).unwrap().contains("cilium-cni"));
        assert!(owner("00-ptp.conflist", &ptp, &bak).unwrap().contains("10-x.conflist.cilium_bak"));
        assert_eq!(owner("00-ptp.conflist", &ptp, &[]), None);
    }
}
