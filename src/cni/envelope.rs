//! The network configuration as every CNI plugin receives it on stdin: name, version, the previous
//! plugin's result and, for GC, the attachments that are still valid.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::invocation::is_identifier;
use super::json::{RawObject, fold_keys};
use super::version::Version;
use crate::error::{Error, Result};

/// A network configuration, its plugin-specific part not read yet.
#[derive(Debug, Clone)]
pub struct Envelope {
    pub version: Version,
    pub name: String,
    members: RawObject,
}

/// An attachment as GC lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

impl Envelope {
    /// Reads stdin's bytes. Order and codes of the checks are those of libcni's skel package:
    /// JSON (6), `name` (6, 7), `cniVersion` (6, 1).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let members: RawObject = serde_json::from_slice(bytes).map_err(|error| {
            Error::Decode(format!("stdin is not a network configuration: {error}"))
        })?;
        let name = string(&members, "name")?.unwrap_or_default();
        if !is_identifier(&name) {
            return Err(Error::Config(format!(
                "name is {name:?}: it must start with a letter or digit and hold only letters, digits, '_', '.' and '-'"
            )));
        }
        let version = Version::parse(&string(&members, "cniVersion")?.unwrap_or_default())?;
        Ok(Envelope { version, name, members })
    }

    /// `cniVersion` as text, if stdin holds one: for replies to input that is otherwise unusable.
    #[must_use]
    pub fn peek_version(bytes: &[u8]) -> Option<String> {
        let members: RawObject = serde_json::from_slice(bytes).ok()?;
        string(&members, "cniVersion").ok()?.filter(|text| !text.is_empty())
    }

    /// The previous plugin's result, as text.
    #[must_use]
    pub fn prev_result(&self) -> Option<&RawValue> {
        self.members.get("prevResult")
    }

    /// A member as a value whose keys match `names` in spelling; `None` if absent or `null`.
    pub fn member(&self, key: &str, names: &[&str]) -> Result<Option<Value>> {
        let Some(raw) = self.members.get(key) else {
            return Ok(None);
        };
        let mut value: Value = serde_json::from_str(raw.get())
            .map_err(|error| Error::Decode(format!("{key} cannot be read: {error}")))?;
        fold_keys(&mut value, names);
        Ok(Some(value))
    }

    /// The attachments GC must keep. libcni sends the list under two keys, of which
    /// `cni.dev/valid-attachments` is the specification's newer one; what either names is kept. CRI-O
    /// without pods sends `null` (a nil slice of Go), which means "none valid"; without either key
    /// nothing may be removed.
    pub fn valid_attachments(&self) -> Result<Vec<ValidAttachment>> {
        const KEYS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        let lists: Vec<(&str, &RawValue)> = KEYS
            .into_iter()
            .filter_map(|key| Some((key, self.members.get_or_null(key)?)))
            .collect();
        if lists.is_empty() {
            return Err(Error::Config(format!(
                "{} is absent: GC needs the list of valid attachments ([] if there is none)",
                KEYS[0]
            )));
        }
        let mut valid = Vec::new();
        for (key, raw) in lists {
            valid.extend(attachments(key, raw)?);
        }
        Ok(valid)
    }
}

/// What one key lists.
fn attachments(key: &str, raw: &RawValue) -> Result<Vec<ValidAttachment>> {
    let mut value: Value = serde_json::from_str(raw.get())
        .map_err(|error| Error::Decode(format!("{key} cannot be read: {error}")))?;
    if value.is_null() {
        return Ok(Vec::new());
    }
    fold_keys(&mut value, &["containerID", "ifname"]);
    serde_path_to_error::deserialize(value).map_err(|error| {
        Error::Config(format!(
            "{key}{}: {}, it must be a list of {{\"containerID\", \"ifname\"}}",
            error.path(),
            error.inner()
        ))
    })
}

fn string(members: &RawObject, key: &str) -> Result<Option<String>> {
    members
        .get(key)
        .map(|raw| {
            serde_json::from_str(raw.get())
                .map_err(|_| Error::Decode(format!("{key} is {}: it must be a string", raw.get())))
        })
        .transpose()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn gc(list: &str) -> Result<Vec<ValidAttachment>> {
        Envelope::parse(format!(r#"{{"cniVersion":"1.1.0","name":"n"{list}}}"#).as_bytes())?
            .valid_attachments()
    }

    #[test]
    fn checks_come_in_the_order_of_skel() {
        for (input, code, word) in [
            ("", 6, "EOF"),
            ("[]", 6, "object"),
            ("{", 6, "EOF"),
            (r#"{"name":3}"#, 6, "name"),
            ("{}", 7, "name"),
            (r#"{"name":"-x","cniVersion":7}"#, 7, "name"),
            (r#"{"name":"a b"}"#, 7, "name"),
            (r#"{"name":"x","cniVersion":7}"#, 6, "cniVersion"),
            (r#"{"name":"x","cniVersion":"9.9.9"}"#, 1, "9.9.9"),
            (r#"{"name":"x"} trailing"#, 6, "trailing"),
        ] {
            let error = Envelope::parse(input.as_bytes()).unwrap_err();
            assert_eq!(error.code(), code, "{input}: {error}");
            assert!(error.to_string().contains(word), "{input}: {error}");
        }
    }

    #[test]
    fn null_is_an_empty_list_and_absence_an_error() {
        assert_eq!(gc(r#","cni.dev/valid-attachments":null"#).unwrap(), []);
        assert_eq!(gc(r#","cni.dev/attachments":[]"#).unwrap(), []);
        assert_eq!(gc("").unwrap_err().code(), 7);
        let one =
            gc(r#","cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]"#).unwrap();
        assert_eq!(one.first().unwrap().ifname, "eth0");
        let error = gc(r#","cni.dev/valid-attachments":[{"containerID":"c"}]"#).unwrap_err();
        assert!(error.to_string().contains("ifname"), "{error}");
    }

    #[test]
    fn what_either_key_names_is_valid() {
        let valid = r#"[{"containerID":"c","ifname":"eth0"}]"#;
        for (newer, older, count) in [("null", valid, 1), (valid, "null", 1), (valid, valid, 2)] {
            let text =
                format!(r#","cni.dev/valid-attachments":{newer},"cni.dev/attachments":{older}"#);
            assert_eq!(gc(&text).unwrap().len(), count, "{text}");
        }
        let broken = format!(r#","cni.dev/valid-attachments":{valid},"cni.dev/attachments":7"#);
        assert!(gc(&broken).unwrap_err().to_string().contains("cni.dev/attachments"));
    }
}
