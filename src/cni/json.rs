//! JSON objects as Go reads them, and without loss.
//!
//! Every runtime and upstream plugin is written in Go, whose decoder matches keys without regard to
//! case and lets the last of several win (encoding/json). go-cni relies on it: it sends `HostPort`.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

/// An object whose members keep their order and their text.
#[derive(Debug, Clone, Default)]
pub struct RawObject(Vec<(String, Box<RawValue>)>);

impl RawObject {
    /// The last member whose key matches without regard to case; `null` counts as absent.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&RawValue> {
        self.get_or_null(key).filter(|value| value.get() != "null")
    }

    /// Like `get`, but `null` is told from absent.
    #[must_use]
    pub fn get_or_null(&self, key: &str) -> Option<&RawValue> {
        self.0
            .iter()
            .rev()
            .find(|(name, _)| name.eq_ignore_ascii_case(key))
            .map(|(_, value)| value.as_ref())
    }

    /// Puts `value` in place of every member that matches `key`, or in front.
    pub fn set_first(&mut self, key: &str, value: Box<RawValue>) {
        self.0.retain(|(name, _)| !name.eq_ignore_ascii_case(key));
        self.0.insert(0, (key.to_owned(), value));
    }
}

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = RawObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawObject, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(RawObject(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

impl Serialize for RawObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

/// Renames every key that matches one of `names` without regard to case to that name, at every
/// depth, so that plain serde structs can read the value. Of several matching keys one that is
/// spelt exactly wins; `null` members are dropped, as Go leaves a field alone on `null`.
pub fn fold_keys(value: &mut Value, names: &[&str]) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| fold_keys(item, names)),
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(|member| fold_keys(member, names));
            let other_case = |key: &String| {
                let name = names.iter().find(|name| name.eq_ignore_ascii_case(key))?;
                (name != key).then(|| (key.clone(), *name))
            };
            let misspelt: Vec<(String, &str)> = members.keys().filter_map(other_case).collect();
            for (key, name) in misspelt {
                if let Some(member) = members.remove(&key)
                    && !members.contains_key(name)
                {
                    members.insert(name.to_owned(), member);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn members_keep_order_text_and_unknown_keys() {
        let text = r#"{"zeta":1.50,"CNIVersion":"0.3.1","big":123456789012345678901234567890}"#;
        let mut object: RawObject = serde_json::from_str(text).unwrap();
        assert_eq!(object.get("cniVersion").unwrap().get(), "\"0.3.1\"");
        object.set_first("cniVersion", RawValue::from_string("\"1.0.0\"".into()).unwrap());
        assert_eq!(
            serde_json::to_string(&object).unwrap(),
            r#"{"cniVersion":"1.0.0","zeta":1.50,"big":123456789012345678901234567890}"#
        );
    }

    #[test]
    fn keys_fold_at_every_depth() {
        let mut value = json!({"RuntimeConfig": {"PORTMAPPINGS": [{"HostPort": 1, "hostport": 2, "Other": null}]}});
        fold_keys(&mut value, &["runtimeConfig", "portMappings", "hostPort"]);
        assert_eq!(value["runtimeConfig"]["portMappings"][0], json!({"hostPort": 1}));
        let mut value = json!([{"HOSTPORT": 1, "HostPort": 2}, {"HOSTPORT": 1, "hostPort": null}]);
        fold_keys(&mut value, &["hostPort"]);
        assert_eq!(value, json!([{"hostPort": 1}, {"hostPort": 1}]));
    }
}
