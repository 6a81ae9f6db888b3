//! Network configuration lists as files that somebody else wrote. Pure.
//!
//! A runtime takes the first file of its configuration directory, in which `plugins` lists what it
//! runs for each pod. Since 1.3 libcni appends the plugins of drop-ins: `*.conf` in the directory beside
//! the file that has the name of the network. `spans` knows where each value stands in the text, `edit` puts the plugin in
//! and takes it out, `check` says what is wrong, `files` which file counts, and `cache` what is kept of it for DEL.

pub mod cache;
pub mod check;
pub mod edit;
pub mod files;
pub mod spans;

use std::path::{Path, PathBuf};

use spans::{Json, Kind, Place, Refusal};

/// The plugin's type, and the name of its file.
pub const PLUGIN: &str = "portmap";
/// Cilium's plugin.
pub const CILIUM: &str = "cilium-cni";

/// What a drop-in is nothing for.
pub const BEFORE_DROP_INS: &str = "runtimes with libcni before 1.3 do not read it";

/// The plugin that limits a pod's traffic.
const SHAPER: &str = "bandwidth";

/// The configuration of one plugin in a file of its own, which belongs to a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropIn {
    pub path: PathBuf,
    pub text: String,
}

/// A network configuration list.
#[derive(Debug, Clone)]
pub struct List<'a> {
    pub text: &'a str,
    pub json: Json,
    /// What runs for each pod, in this order.
    pub plugins: Vec<Plugin<'a>>,
}

/// One entry of `plugins`, or a drop-in.
#[derive(Debug, Clone)]
pub struct Plugin<'a> {
    /// Its `type`: the name of the file that the runtime runs.
    pub name: String,
    pub json: Json,
    /// What `json` was read from.
    pub text: &'a str,
    /// The drop-in's; `None` of an entry of the list's own.
    pub file: Option<&'a Path>,
}

impl<'a> List<'a> {
    /// Reads a list as libcni does: keys of the list must be spelt exactly, those of a plugin in any
    /// case. `drop_ins` are those of the directory that [`files::drop_in_directory`] names, in the order of
    /// their names.
    ///
    /// # Errors
    ///
    /// What is not JSON, not a list, or a list without plugins.
    pub fn parse(text: &'a str, drop_ins: &'a [DropIn]) -> Result<Self, Refusal> {
        let json = Json::parse(text)?;
        let refuse = |at: &Json, reason: &str| Err(at.refusal(text, reason));
        if json.members().is_none() {
            return refuse(&json, "a network configuration is an object, and this is none");
        }
        let mut plugins = Vec::new();
        match json.exact("plugins").map(|member| &member.value) {
            Some(Json { kind: Kind::Array(items), .. }) if !items.is_empty() => {
                for item in items {
                    plugins.push(Plugin::read(text, item.clone())?);
                }
            }
            Some(empty @ Json { kind: Kind::Array(_), .. }) => {
                return refuse(empty, "\"plugins\" is empty: there is no main plugin");
            }
            Some(other) => return refuse(other, "\"plugins\" must be a list of objects"),
            None if !drop_ins.is_empty() => {}
            None if json.folded("type").is_some() => {
                return refuse(
                    &json,
                    "this is the configuration of a single plugin: runtimes read a list only from a file \
                     NAME.conflist with {\"cniVersion\": …, \"name\": …, \"plugins\": [ this object ]}; \
                     make that file and remove this one",
                );
            }
            None => {
                return refuse(
                    &json,
                    "there is no \"plugins\": this is not a network configuration list",
                );
            }
        }
        for DropIn { path, text } in drop_ins {
            let read = || Plugin::read(text, Json::parse(text)?);
            let plugin = read().map_err(|refusal| refusal.in_file(path))?;
            plugins.push(Plugin { file: Some(path), ..plugin });
        }
        Ok(List { text, json, plugins })
    }

    /// Those in the list's own text.
    #[must_use]
    pub fn own(&self) -> &[Plugin<'a>] {
        let (own, _) =
            self.plugins.split_at(self.plugins.partition_point(|one| one.file.is_none()));
        own
    }

    /// The first plugin of a type.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Plugin<'a>> {
        self.plugins.iter().find(|plugin| plugin.name == name)
    }

    #[must_use]
    pub fn place(&self, json: &Json) -> Place {
        Place::of(self.text, json)
    }

    fn refuse(&self, json: &Json, reason: impl Into<String>) -> Refusal {
        json.refusal(self.text, reason)
    }
}

impl<'a> Plugin<'a> {
    fn read(text: &'a str, json: Json) -> Result<Self, Refusal> {
        if json.members().is_none() {
            return Err(json.refusal(text, "a plugin's configuration must be an object"));
        }
        let name = json.folded("type").and_then(|kind| kind.value.as_str()).map(ToOwned::to_owned);
        match name {
            Some(name) => Ok(Plugin { name, json, text, file: None }),
            None => Err(json.refusal(text, "this plugin has no \"type\" that is a string")),
        }
    }

    #[must_use]
    pub fn place(&self, json: &Json) -> Place {
        let file = self.file.map(Path::to_owned);
        Place { file, ..Place::of(self.text, json) }
    }

    fn refuse(&self, json: &Json, reason: impl Into<String>) -> Refusal {
        Refusal { place: self.place(json), reason: reason.into() }
    }

    /// Whether the runtime hands port mappings to it.
    #[must_use]
    pub fn gets_mappings(&self) -> bool {
        let declared =
            self.json.folded("capabilities").and_then(|caps| caps.value.exact("portMappings"));
        declared.is_some_and(|member| member.value.kind == Kind::Bool(true))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn drop_in(name: &str, text: &str) -> DropIn {
        DropIn { path: Path::new("/n").join(name), text: text.into() }
    }

    #[test]
    fn drop_ins_come_after_what_the_list_has_itself() {
        let drop_ins = [drop_in("a.conf", r#"{"Type":"b"}"#), drop_in("b.conf", r#"{"type":"c"}"#)];
        let names = |text| {
            let plugins = List::parse(text, &drop_ins).unwrap().plugins;
            plugins.into_iter().map(|plugin| (plugin.name, plugin.file)).collect::<Vec<_>>()
        };
        let [a, b] = ["/n/a.conf", "/n/b.conf"].map(|path| Some(Path::new(path)));
        assert_eq!(names(r#"{"name":"n"}"#), [("b".into(), a), ("c".into(), b)]);
        let all = [("a".into(), None), ("b".into(), a), ("c".into(), b)];
        assert_eq!(names(r#"{"name":"n","plugins":[{"type":"a"}]}"#), all);
    }

    #[test]
    fn what_is_wrong_with_a_drop_in_has_its_place_there() {
        for (text, place) in [
            ("{", "/n/a.conf, line 1, column 1: this is not JSON"),
            ("\n[]", "/n/a.conf, line 2, column 1: a plugin's configuration must be an object"),
            ("{}", "/n/a.conf, line 1, column 1: this plugin has no \"type\""),
        ] {
            let drop_ins = [drop_in("a.conf", text)];
            let refusal = List::parse(r#"{"name":"n"}"#, &drop_ins).unwrap_err().to_string();
            assert!(refusal.starts_with(place), "{refusal}");
        }
    }
}
