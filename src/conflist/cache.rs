//! What libcni keeps of an attachment from its ADD to its DEL, one file for each: the list that it was made
//! with among it. CRI-O (ocicni), podman and Multus call DEL with that list, whatever has become of the
//! file that it came from; containerd (go-cni) calls it with the list of now. Drop-ins are not kept. Pure.

use base64::prelude::{BASE64_STANDARD, Engine};
use serde::Deserialize;
use serde_json::Value;

/// Where libcni has its cache unless it is told otherwise.
pub const DEFAULT_DIR: &str = "/var/lib/cni";

/// Where such files are, below that.
pub const RESULTS: &str = "results";
/// Where those of Multus' delegates are: it gives libcni a cache of its own.
pub const MULTUS_RESULTS: &str = "multus/results";

/// An attachment, as it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// The configuration: a list, or the object of a single plugin.
    pub list: String,
    /// The path of the network namespace; `""` if nothing tells it.
    pub netns: String,
}

/// In libcni's words.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    kind: String,
    #[serde(default)]
    if_name: String,
    /// In base64, as Go writes bytes into JSON.
    config: String,
    /// Since libcni 1.2.
    #[serde(default)]
    netns: String,
    #[serde(default)]
    result: Value,
}

impl Cached {
    /// Reads a file of the cache; `None` if no DEL can be called with what is in it. Before 0.8 libcni kept
    /// nothing but the result.
    #[must_use]
    pub fn parse(file: &[u8]) -> Option<Self> {
        let entry: Entry = serde_json::from_slice(file).ok()?;
        if entry.kind != "cniCacheV1" {
            return None;
        }
        let list = String::from_utf8(BASE64_STANDARD.decode(&entry.config).ok()?).ok()?;
        let netns = match entry.netns.is_empty() {
            true => sandbox(&entry.result, &entry.if_name).unwrap_or_default().to_owned(),
            false => entry.netns,
        };
        Some(Cached { list, netns })
    }
}

/// The network namespace that an interface of a result is in.
fn sandbox<'a>(result: &'a Value, ifname: &str) -> Option<&'a str> {
    let interfaces = result.get("interfaces")?.as_array()?;
    let own = interfaces.iter().find(|one| one["name"] == ifname && one["sandbox"] != "")?;
    own["sandbox"].as_str()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_attachment_has_its_list_and_its_namespace() {
        let interfaces = json!([
            {"name": "cni0"}, {"name": "eth0", "sandbox": ""}, {"name": "eth0", "sandbox": "/n/a"},
        ]);
        let whole = json!({
            "kind": "cniCacheV1", "containerId": "c", "config": "eyJ0eXBlIjoieCJ9", "ifName": "eth0",
            "networkName": "n", "netns": "/n/b", "cniArgs": [["IgnoreUnknown", "1"]],
            "result": {"cniVersion": "1.0.0", "interfaces": interfaces},
        });
        let netns = |entry: &Value| {
            let cached = Cached::parse(entry.to_string().as_bytes()).unwrap();
            assert_eq!(cached.list, r#"{"type":"x"}"#);
            cached.netns
        };
        assert_eq!(netns(&whole), "/n/b");
        let without = |key: &str| {
            let mut entry = whole.clone();
            entry.as_object_mut().unwrap().remove(key);
            entry
        };
        let mut old = without("netns");
        assert_eq!(netns(&old), "/n/a");
        old["ifName"] = json!("net1");
        assert_eq!(netns(&old), "");
        old["result"] = json!({"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.2/24"}});
        assert_eq!(netns(&old), "");

        // What is no such entry, or of which DEL cannot take a list.
        for entry in [without("kind"), without("config"), whole["result"].clone(), json!([])] {
            assert_eq!(Cached::parse(entry.to_string().as_bytes()), None, "{entry}");
        }
        let mut other = whole.clone();
        for (key, value) in [("config", json!(null)), ("config", json!("?")), ("kind", json!("v2"))]
        {
            other[key] = value;
            assert_eq!(Cached::parse(other.to_string().as_bytes()), None, "{other}");
        }
        assert_eq!(Cached::parse(b"{\"kind\": \"cniCa"), None);
    }
}
