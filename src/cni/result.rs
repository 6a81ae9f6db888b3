//! The previous plugin's result: passed through as it came, and read for the pod's addresses.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::json::{RawObject, fold_keys};
use super::version::{ResultForm, Version};
use crate::error::{Error, Result};
use crate::model::Family;

#[derive(Deserialize, Default)]
struct ReadModel {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
    ip4: Option<OldIp>,
    ip6: Option<OldIp>,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
    /// Anything but text is nobody's MAC address, and no reason to refuse the pod.
    mac: Option<Value>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    interface: Option<i64>,
}

#[derive(Deserialize)]
struct OldIp {
    ip: String,
}

const NAMES: [&str; 10] =
    ["interfaces", "ips", "ip4", "ip6", "name", "sandbox", "mac", "address", "interface", "ip"];

/// `prevResult` in the configuration's `cniVersion`: every other member keeps its text. A result
/// that says a version of another form cannot be passed on (specification section 5).
pub fn pass_through(prev_result: &RawValue, version: Version) -> Result<RawObject> {
    let mut members: RawObject = serde_json::from_str(prev_result.get())
        .map_err(|error| Error::Config(format!("prevResult is not a result: {error}")))?;
    if let Some(raw) = members.get("cniVersion") {
        let text: String = serde_json::from_str(raw.get()).map_err(|_| {
            Error::Config(format!("prevResult.cniVersion is {}: it must be a string", raw.get()))
        })?;
        let own = if text.is_empty() { Ok(version) } else { Version::parse(&text) };
        let own = own.map_err(|error| Error::Config(format!("prevResult: {error}")))?;
        if own.form() != version.form() {
            return Err(Error::Config(format!(
                "prevResult has cniVersion {text}, whose form differs from the configuration's {}",
                version.as_str()
            )));
        }
    }
    let text = serde_json::value::to_raw_value(version.as_str())
        .map_err(|error| Error::Decode(error.to_string()))?;
    members.set_first("cniVersion", text);
    Ok(members)
}

/// What the previous plugin's result says about the pod.
pub struct PrevResult {
    model: ReadModel,
    form: ResultForm,
}

impl PrevResult {
    /// Reads a result in the form that `version` has.
    ///
    /// # Errors
    ///
    /// Which member is not what it must be (code 7).
    pub fn read(prev_result: &RawValue, version: Version) -> Result<Self> {
        let mut value: Value = serde_json::from_str(prev_result.get())
            .map_err(|error| Error::Config(format!("prevResult is not a result: {error}")))?;
        fold_keys(&mut value, &NAMES);
        let model = serde_path_to_error::deserialize(value).map_err(|error| {
            Error::Config(format!("prevResult.{}: {}", error.path(), error.inner()))
        })?;
        Ok(Self { model, form: version.form() })
    }

    /// Address and mask of the pod on its network, IPv4 first: per family the first of `ips` that belongs to the
    /// container. An entry belongs to it if its `interface` is absent or out of range (Calico, older Cilium), or
    /// names the interface `ifname` inside a sandbox. The sandbox is not compared with CNI_NETNS: Cilium writes
    /// it in a form of its own.
    ///
    /// # Errors
    ///
    /// Which address is none, or has no mask (code 7).
    pub fn pod_addresses(&self, ifname: &str) -> Result<Vec<IpNetwork>> {
        let model = &self.model;
        let candidates: Vec<&str> = if self.form == ResultForm::PerFamily {
            [&model.ip4, &model.ip6].into_iter().flatten().map(|ip| ip.ip.as_str()).collect()
        } else {
            let belongs = |ip: &&Ip| {
                let interface = ip
                    .interface
                    .and_then(|index| usize::try_from(index).ok())
                    .and_then(|index| model.interfaces.get(index));
                interface.is_none_or(|interface| {
                    interface.name == ifname && !interface.sandbox.is_empty()
                })
            };
            model.ips.iter().filter(belongs).map(|ip| ip.address.as_str()).collect()
        };

        let mut networks: Vec<IpNetwork> = Vec::new();
        for text in candidates {
            let network = parse_network(text)?;
            let family = Family::of(&network.ip());
            if !networks.iter().any(|known| Family::of(&known.ip()) == family) {
                networks.push(network);
            }
        }
        networks.sort_by_key(|network| Family::of(&network.ip()));
        Ok(networks)
    }

    /// Which links belong to the pod's interface `ifname`.
    #[must_use]
    pub fn pod_links(self, ifname: &str) -> PodLinks {
        let (inside, outside): (Vec<Interface>, Vec<Interface>) =
            self.model.interfaces.into_iter().partition(|interface| !interface.sandbox.is_empty());
        let own = inside.into_iter().find(|interface| interface.name == ifname);
        let mac = own.and_then(|interface| interface.mac);
        PodLinks {
            mac: mac.as_ref().and_then(Value::as_str).map(ToOwned::to_owned),
            host: outside.into_iter().map(|interface| interface.name).collect(),
        }
    }
}

/// The links of a pod as the previous plugin tells them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PodLinks {
    /// MAC address of the pod's own interface.
    pub mac: Option<String>,
    /// Names of links on the host.
    pub host: Vec<String>,
}

/// An address with its mask in CIDR form. `ipnetwork` alone would also take a bare address.
fn parse_network(text: &str) -> Result<IpNetwork> {
    let wrong = || {
        Error::Config(format!(
            "prevResult has the address {text:?}: it must be in CIDR form, such as 10.1.2.3/24"
        ))
    };
    let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
    // Rust's integers may have a sign.
    let prefix = Some(prefix).filter(|prefix| prefix.bytes().all(|byte| byte.is_ascii_digit()));
    let mut prefix: u8 = prefix.ok_or_else(wrong)?.parse().map_err(|_| wrong())?;
    let canonical = ip.to_canonical();
    if canonical != ip {
        // An IPv4-mapped address is an IPv4 one to Go, too, which the kernel's routes are made by.
        prefix = prefix.checked_sub(96).ok_or_else(wrong)?;
    }
    IpNetwork::new(canonical, prefix).map_err(|_| wrong())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    fn addresses(text: &str, version: &str) -> Vec<String> {
        PrevResult::read(&raw(text), Version::parse(version).unwrap())
            .unwrap()
            .pod_addresses("eth0")
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn only_the_container_s_own_addresses_count() {
        let interfaces = r#""interfaces":[{"name":"veth0"},{"name":"eth0","sandbox":"/n"},{"name":"net1","sandbox":"/n"}]"#;
        for (ips, expected) in [
            (
                r#"[{"address":"10.0.0.1/24","interface":0},{"address":"10.0.0.2/24","interface":1}]"#,
                vec!["10.0.0.2/24"],
            ),
            (r#"[{"address":"10.0.0.9/24","interface":2}]"#, vec![]),
            (r#"[{"address":"::ffff:10.0.0.2/120"}]"#, vec!["10.0.0.2/24"]),
            (r#"[{"address":"10.0.0.2/24"}]"#, vec!["10.0.0.2/24"]),
            (r#"[{"address":"10.0.0.2/24","interface":7}]"#, vec!["10.0.0.2/24"]),
            (r#"[{"address":"10.0.0.2/24","interface":-1}]"#, vec!["10.0.0.2/24"]),
            (
                r#"[{"address":"fd00::2/64","interface":1},{"address":"10.0.0.2/24","interface":1},{"address":"10.0.0.3/24","interface":1}]"#,
                vec!["10.0.0.2/24", "fd00::2/64"],
            ),
        ] {
            assert_eq!(
                addresses(&format!(r#"{{{interfaces},"IPs":{ips}}}"#), "1.0.0"),
                expected,
                "{ips}"
            );
        }
    }

    #[test]
    fn the_oldest_form_has_one_object_per_family() {
        let text = r#"{"ip4":{"ip":"10.1.2.3/24"},"ip6":{"ip":"fd00::3/128"}}"#;
        assert_eq!(addresses(text, "0.2.0"), ["10.1.2.3/24", "fd00::3/128"]);
    }

    #[test]
    fn the_result_goes_out_as_it_came_in() {
        let text = r#"{"cniVersion":"0.4.0","x":{"deep":[1.0]},"ips":[],"dns":{}}"#;
        let out = pass_through(&raw(text), Version::parse("0.3.1").unwrap()).unwrap();
        assert_eq!(
            serde_json::to_string(&out).unwrap(),
            r#"{"cniVersion":"0.3.1","x":{"deep":[1.0]},"ips":[],"dns":{}}"#
        );
        let modern = Version::parse("1.0.0").unwrap();
        assert_eq!(pass_through(&raw(text), modern).unwrap_err().code(), 7);
        pass_through(&raw(r#"{"ips":[]}"#), modern).unwrap();
    }

    #[test]
    fn addresses_need_a_mask() {
        for wrong in [
            "10.0.0.2",
            "10.0.0.2/33",
            "x/24",
            "10.0.0.2/255.255.255.0",
            "10.0.0.2/+24",
            "::ffff:10.0.0.2/95",
        ] {
            let text = format!(r#"{{"ips":[{{"address":"{wrong}"}}]}}"#);
            let read = PrevResult::read(&raw(&text), Version::parse("1.0.0").unwrap()).unwrap();
            let error = read.pod_addresses("eth0").unwrap_err();
            assert_eq!(error.code(), 7);
            assert!(error.to_string().contains(wrong), "{error}");
        }
    }
}
