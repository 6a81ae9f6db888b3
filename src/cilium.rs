//! What Cilium's agent writes down of its settings on the node. Pure.
//!
//! The C header of its programs is /run/cilium/state/globals/node_config.h, and its options are in
//! /run/cilium/state/agent-runtime-config.json. Versions move settings between them and out of both, so
//! that one which is in neither says nothing.

use std::path::PathBuf;

use serde_json::Value;

/// A file, and its text if there is one, or why it cannot be read.
pub type File = (PathBuf, Result<Option<String>, String>);

/// Both files.
#[derive(Debug, Clone)]
pub struct Settings {
    pub node_config: File,
    pub runtime_config: File,
}

/// A setting, and what shows it.
pub type Setting = Option<(bool, String)>;

impl Settings {
    /// Whether the header defines a macro.
    #[must_use]
    pub fn defined(&self, name: &str) -> Setting {
        let (path, text) = &self.node_config;
        let text = text.as_ref().ok()?.as_ref()?;
        let on = text.lines().any(|line| {
            let mut words = line.split_whitespace();
            words.next() == Some("#define") && words.next() == Some(name)
        });
        Some((on, path.display().to_string()))
    }

    /// An option that is on or off.
    #[must_use]
    pub fn option(&self, name: &str) -> Setting {
        let (path, text) = &self.runtime_config;
        let config: Value = serde_json::from_str(text.as_ref().ok()?.as_ref()?).ok()?;
        let value =
            config.get(name).or_else(|| config.get("UnsafeDaemonConfigOption")?.get(name))?;
        let on = match value {
            Value::Bool(on) => *on,
            Value::String(word) => match word.as_str() {
                "true" | "strict" => true,
                "false" | "disabled" => false,
                _ => return None,
            },
            _ => return None,
        };
        Some((on, path.display().to_string()))
    }

    /// Whether its programs put packets past the node's IP layer and netfilter (BPF host routing). That the
    /// header lacks the macro says nothing: newer versions (cilium/cilium#46791) tell their programs otherwise.
    #[must_use]
    pub fn routes_in_bpf(&self) -> Setting {
        let legacy = || self.option("EnableHostLegacyRouting").map(|(on, path)| (!on, path));
        self.defined("ENABLE_HOST_ROUTING").filter(|(on, _)| *on).or_else(legacy)
    }
}
