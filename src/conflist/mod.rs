//! Network configuration lists as files that somebody else wrote. Pure.
//!
//! A runtime takes the first file of its configuration directory, in which `plugins` lists what it
//! runs for each pod. `spans` knows where each value stands in the text, `edit` puts the plugin in
//! and takes it out, `check` says what is wrong, and `files` which file counts.

pub mod check;
pub mod edit;
pub mod files;
pub mod spans;

use spans::{Json, Kind, Position, Refusal};

/// The plugin's type, and the name of its file.
pub const PLUGIN: &str = "portmap";
/// Cilium's plugin.
pub const CILIUM: &str = "cilium-cni";

/// The plugin that limits a pod's traffic.
const SHAPER: &str = "bandwidth";

/// A network configuration list.
#[derive(Debug, Clone)]
pub struct List<'a> {
    pub text: &'a str,
    pub json: Json,
    pub plugins: Vec<Plugin>,
}

/// One entry of `plugins`.
#[derive(Debug, Clone)]
pub struct Plugin {
    /// Its `type`: the name of the file that the runtime runs.
    pub name: String,
    pub json: Json,
}

impl<'a> List<'a> {
    /// Reads a list as libcni does: keys of the list must be spelt exactly, those of a plugin in any
    /// case.
    ///
    /// # Errors
    ///
    /// What is not JSON, not a list, or a list without plugins.
    pub fn parse(text: &'a str) -> Result<Self, Refusal> {
        let json = Json::parse(text)?;
        let refuse = |at: usize, reason: &str| {
            Err(Refusal { position: Position::of(text, at), reason: reason.to_owned() })
        };
        let start = json.span.start;
        if json.members().is_none() {
            return refuse(start, "a network configuration is an object, and this is none");
        }
        let Some(member) = json.exact("plugins") else {
            return match json.folded("type") {
                Some(_) => refuse(
                    start,
                    "this is the configuration of a single plugin: runtimes read a list only from a file \
                     NAME.conflist with {\"cniVersion\": …, \"name\": …, \"plugins\": [ this object ]}; \
                     make that file and remove this one",
                ),
                None => refuse(
                    start,
                    "there is no \"plugins\": this is not a network configuration list",
                ),
            };
        };
        let Kind::Array(items) = &member.value.kind else {
            return refuse(member.value.span.start, "\"plugins\" must be a list of objects");
        };
        if items.is_empty() {
            return refuse(
                member.value.span.start,
                "\"plugins\" is empty: there is no main plugin",
            );
        }
        let mut plugins = Vec::new();
        for item in items {
            if item.members().is_none() {
                return refuse(item.span.start, "every one of \"plugins\" must be an object");
            }
            let Some(name) = item.folded("type").and_then(|kind| kind.value.as_str()) else {
                return refuse(item.span.start, "this plugin has no \"type\" that is a string");
            };
            plugins.push(Plugin { name: name.to_owned(), json: item.clone() });
        }
        Ok(List { text, json, plugins })
    }

    /// Where the first entry of a type stands.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        self.plugins.iter().position(|plugin| plugin.name == name)
    }

    #[must_use]
    pub fn position(&self, json: &Json) -> Position {
        Position::of(self.text, json.span.start)
    }

    fn refuse(&self, json: &Json, reason: impl Into<String>) -> Refusal {
        Refusal { position: self.position(json), reason: reason.into() }
    }
}

impl Plugin {
    /// Whether the runtime hands port mappings to it.
    #[must_use]
    pub fn gets_mappings(&self) -> bool {
        let declared =
            self.json.folded("capabilities").and_then(|caps| caps.value.exact("portMappings"));
        declared.is_some_and(|member| member.value.kind == Kind::Bool(true))
    }
}
