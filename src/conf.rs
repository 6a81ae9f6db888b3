//! The plugin's own keys of the network configuration, 1:1 with the JSON. Validation of form only.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cni::envelope::Envelope;
use crate::error::{Error, Result};
use crate::model::{BackendKind, Family, Mapping, Protocol};

/// Every key this plugin reads, spelt as documented.
const KEYS: [&str; 14] = [
    "backend",
    "snat",
    "masqAll",
    "markMasqBit",
    "externalSetMarkChain",
    "conditionsV4",
    "conditionsV6",
    "conflictPolicy",
    "stateDir",
    "portMappings",
    "hostPort",
    "containerPort",
    "protocol",
    "hostIP",
];

/// The keys that a network configuration has for this plugin, spelt as documented; those of a port
/// mapping come from the runtime.
#[must_use]
pub fn option_keys() -> &'static [&'static str] {
    KEYS.split_at(9).0
}

/// The bit upstream uses unless told otherwise.
pub const DEFAULT_MARK_MASQ_BIT: u8 = 13;

/// What happens when a claim's present owner is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConflictPolicy {
    /// The newest claim wins.
    #[default]
    Takeover,
    /// The new claim is refused.
    Deny,
}

/// How an attachment's traffic is matched and masqueraded: what upstream's options say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Options {
    /// `snat: false`: the source is never rewritten.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_snat: bool,
    /// Every source is rewritten.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub masq_all: bool,
    /// Which bit (0 to 31) of the packet mark means "masquerade"; `None` if not configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark_masq_bit: Option<u8>,
    /// A chain of table nat, made by others, that marks packets for masquerading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub external_set_mark_chain: Option<String>,
    /// Further matches, in the syntax of the backend, of IPv4 and IPv6.
    #[serde(rename = "conditionsV4", skip_serializing_if = "Vec::is_empty")]
    pub conditions_v4: Vec<String>,
    #[serde(rename = "conditionsV6", skip_serializing_if = "Vec::is_empty")]
    pub conditions_v6: Vec<String>,
}

impl Options {
    #[must_use]
    pub fn conditions(&self, family: Family) -> &[String] {
        match family {
            Family::V4 => &self.conditions_v4,
            Family::V6 => &self.conditions_v6,
        }
    }

    /// The mark of packets to masquerade, as a number with one bit set.
    #[must_use]
    pub fn mark(&self) -> u32 {
        1 << self.mark_masq_bit.unwrap_or(DEFAULT_MARK_MASQ_BIT)
    }
}

/// The plugin's part of a network configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConf {
    /// `None` is `"auto"`.
    pub backend: Option<BackendKind>,
    pub options: Options,
    pub conflict_policy: ConflictPolicy,
    pub state_dir: Option<PathBuf>,
    pub mappings: Vec<Mapping>,
}

impl NetConf {
    /// Reads and validates every key. Errors name the key, its value and what is allowed.
    pub fn parse(envelope: &Envelope) -> Result<Self> {
        let backend = match text(envelope, "backend")?.as_deref() {
            None | Some("auto") => None,
            Some(name) => Some(
                BackendKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
                    wrong(
                        "backend",
                        &name,
                        "it must be \"auto\", \"iptables\", \"nftables\" or \"ebpf\"",
                    )
                })?,
            ),
        };
        let options = Options {
            no_snat: !boolean(envelope, "snat")?.unwrap_or(true),
            masq_all: boolean(envelope, "masqAll")?.unwrap_or(false),
            mark_masq_bit: mark_masq_bit(envelope)?,
            external_set_mark_chain: external_set_mark_chain(envelope)?,
            conditions_v4: conditions(envelope, "conditionsV4")?,
            conditions_v6: conditions(envelope, "conditionsV6")?,
        };
        if let (Some(bit), Some(chain)) = (options.mark_masq_bit, &options.external_set_mark_chain)
        {
            return Err(Error::Config(format!(
                "markMasqBit is {bit} and externalSetMarkChain is {chain:?}: only one of them can be given"
            )));
        }
        let backend = backend_for_options(backend, &options)?;
        let conflict_policy = match text(envelope, "conflictPolicy")?.as_deref() {
            None | Some("takeover") => ConflictPolicy::Takeover,
            Some("deny") => ConflictPolicy::Deny,
            Some(other) => {
                return Err(wrong("conflictPolicy", &other, "it must be \"takeover\" or \"deny\""));
            }
        };
        Ok(NetConf {
            backend,
            options,
            conflict_policy,
            state_dir: Self::state_dir(envelope)?,
            mappings: mappings(envelope)?,
        })
    }

    /// `stateDir` alone: for verbs that must not fail over the other keys.
    pub fn state_dir(envelope: &Envelope) -> Result<Option<PathBuf>> {
        match text(envelope, "stateDir")? {
            Some(path) if !path.starts_with('/') => {
                Err(wrong("stateDir", &path, "it must be an absolute path"))
            }
            path => Ok(path.map(PathBuf::from)),
        }
    }
}

/// Whether there is anything in `runtimeConfig.portMappings`, readable or not: DEL takes what it gets.
#[must_use]
pub fn has_mappings(envelope: &Envelope) -> bool {
    let value = envelope.member("runtimeConfig", &KEYS).ok().flatten();
    value.is_some_and(|value| match value.get("portMappings") {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    })
}

/// Options of one backend with the other are an error, and without an explicit backend they choose
/// theirs (as upstream).
fn backend_for_options(
    backend: Option<BackendKind>,
    options: &Options,
) -> Result<Option<BackendKind>> {
    let mut required: Vec<(String, BackendKind)> = Vec::new();
    if options.external_set_mark_chain.is_some() {
        required.push(("externalSetMarkChain".into(), BackendKind::Iptables));
    }
    for (key, conditions) in
        [("conditionsV4", &options.conditions_v4), ("conditionsV6", &options.conditions_v6)]
    {
        if let Some(first) = conditions.first() {
            // An iptables match is an option, possibly negated; nft's syntax has neither in front.
            let kind = if first.starts_with('-') || first == "!" || first.starts_with("! -") {
                BackendKind::Iptables
            } else {
                BackendKind::Nftables
            };
            required.push((format!("{key} (in the syntax of {kind})"), kind));
        }
    }
    let Some((first, kind)) = required.first() else {
        return Ok(backend);
    };
    if let Some((other, _)) = required.iter().find(|(_, other)| other != kind) {
        return Err(Error::Config(format!("{first} and {other} belong to different backends")));
    }
    if let Some(chosen) = backend.filter(|chosen| chosen != kind) {
        let keys: Vec<&str> = required.iter().map(|(key, _)| key.as_str()).collect();
        return Err(Error::Config(format!(
            "backend is {:?}, which has no {}",
            chosen.name(),
            keys.join(", ")
        )));
    }
    Ok(Some(*kind))
}

fn wrong(key: &str, value: &dyn std::fmt::Debug, allowed: &str) -> Error {
    Error::Config(format!("{key} is {value:?}: {allowed}"))
}

fn wrong_json(key: &str, value: &Value, allowed: &str) -> Error {
    Error::Config(format!("{key} is {value}: {allowed}"))
}

fn text(envelope: &Envelope, key: &str) -> Result<Option<String>> {
    match envelope.member(key, &[])? {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
        Some(other) => Err(wrong_json(key, &other, "it must be a string")),
    }
}

fn boolean(envelope: &Envelope, key: &str) -> Result<Option<bool>> {
    match envelope.member(key, &[])? {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(other) => Err(wrong_json(key, &other, "it must be true or false")),
    }
}

fn mark_masq_bit(envelope: &Envelope) -> Result<Option<u8>> {
    let Some(value) = envelope.member("markMasqBit", &[])? else {
        return Ok(None);
    };
    match value.as_u64().and_then(|bit| u8::try_from(bit).ok()) {
        Some(bit @ 0..=31) => Ok(Some(bit)),
        _ => Err(wrong_json("markMasqBit", &value, "it must be an integer from 0 to 31")),
    }
}

/// Chain names of iptables have at most 28 bytes (XT_EXTENSION_MAXNAMELEN less the terminator).
fn external_set_mark_chain(envelope: &Envelope) -> Result<Option<String>> {
    let chain = text(envelope, "externalSetMarkChain")?;
    if let Some(name) = &chain {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if !plain || name.len() > 28 || name.starts_with('-') {
            return Err(wrong(
                "externalSetMarkChain",
                name,
                "it must be a chain name: at most 28 letters, digits, '_', '.' and '-'",
            ));
        }
    }
    Ok(chain)
}

/// A list of words. Control characters, which would begin a new command in the tools' input, are
/// refused; `;`, `{` and the like are refused or quoted where the syntax is known.
fn conditions(envelope: &Envelope, key: &str) -> Result<Vec<String>> {
    let Some(value) = envelope.member(key, &[])? else {
        return Ok(Vec::new());
    };
    let words: Vec<String> = serde_json::from_value(value.clone())
        .map_err(|_| wrong_json(key, &value, "it must be a list of strings"))?;
    match words.iter().find(|word| word.is_empty() || word.chars().any(char::is_control)) {
        Some(word) => {
            Err(wrong(key, word, "its words must not be empty or hold control characters"))
        }
        None => Ok(words),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMapping {
    #[serde(deserialize_with = "port")]
    host_port: u16,
    #[serde(deserialize_with = "port")]
    container_port: u16,
    #[serde(default, deserialize_with = "protocol")]
    protocol: Option<Protocol>,
    #[serde(default, rename = "hostIP", deserialize_with = "host_ip")]
    host_ip: Option<IpAddr>,
}

fn mappings(envelope: &Envelope) -> Result<Vec<Mapping>> {
    let Some(config) = envelope.member("runtimeConfig", &KEYS)? else {
        return Ok(Vec::new());
    };
    let Value::Object(mut config) = config else {
        return Err(wrong_json("runtimeConfig", &config, "it must be an object"));
    };
    let Some(list) = config.remove("portMappings") else {
        return Ok(Vec::new());
    };
    let raw: Vec<RawMapping> = serde_path_to_error::deserialize(list).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { String::new() } else { path };
        let joint = if path.is_empty() || path.starts_with('[') { "" } else { "." };
        Error::Config(format!("runtimeConfig.portMappings{joint}{path}: {}", error.inner()))
    })?;
    let mappings: Vec<Mapping> = raw
        .into_iter()
        .map(|raw| Mapping {
            protocol: raw.protocol.unwrap_or(Protocol::Tcp),
            host_port: raw.host_port,
            container_port: raw.container_port,
            host_ip: raw.host_ip,
        })
        .collect();
    refuse_contradictions(&mappings)?;
    Ok(mappings)
}

/// One claim cannot have two targets. Repetition of the same mapping is harmless.
fn refuse_contradictions(mappings: &[Mapping]) -> Result<()> {
    let mut seen = std::collections::BTreeMap::new();
    for mapping in mappings {
        for claim in Family::ALL.into_iter().filter_map(|family| mapping.claim(family)) {
            let port = mapping.container_port;
            if let Some(other) = seen.insert(claim, port).filter(|other| *other != port) {
                return Err(Error::Config(format!(
                    "runtimeConfig.portMappings: {claim} is mapped to containerPort {other} and to {port}: only one is possible"
                )));
            }
        }
    }
    Ok(())
}

fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match value.as_u64().and_then(|port| u16::try_from(port).ok()) {
        Some(port @ 1..) => Ok(port),
        _ => Err(D::Error::custom(format!("it is {value} and must be an integer from 1 to 65535"))),
    }
}

fn protocol<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Protocol>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match value.as_str() {
        Some("") => Ok(None),
        Some(name) if Protocol::parse(name).is_some() => Ok(Protocol::parse(name)),
        _ => {
            Err(D::Error::custom(format!("it is {value} and must be \"tcp\", \"udp\" or \"sctp\"")))
        }
    }
}

fn host_ip<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let wrong = || {
        D::Error::custom(format!(
            "it is {value} and must be an IPv4 or IPv6 address without mask or zone, or empty"
        ))
    };
    match value.as_str() {
        Some("") => Ok(None),
        // Go prints and parses IPv4-mapped addresses as IPv4 (net.ParseIP).
        Some(text) => Ok(Some(text.parse::<IpAddr>().map_err(|_| wrong())?.to_canonical())),
        None => Err(wrong()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(members: &str) -> Result<NetConf> {
        let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","type":"portmap"{members}}}"#);
        NetConf::parse(&Envelope::parse(text.as_bytes())?)
    }

    fn one(mapping: &str) -> Result<Mapping> {
        let conf = parse(&format!(r#","runtimeConfig":{{"portMappings":[{mapping}]}}"#))?;
        Ok(conf.mappings.into_iter().next().unwrap())
    }

    #[test]
    fn absent_null_and_empty_mappings_are_none() {
        for members in [
            "",
            r#","runtimeConfig":null"#,
            r#","runtimeConfig":{}"#,
            r#","runtimeConfig":{"portMappings":null}"#,
            r#","RuntimeConfig":{"PortMappings":[]}"#,
        ] {
            assert_eq!(parse(members).unwrap().mappings, [], "{members}");
        }
    }

    #[test]
    fn every_runtime_s_spelling_is_read() {
        let mapping =
            one(r#"{"HostPort":8080,"ContainerPort":80,"Protocol":"TCP","HostIP":""}"#).unwrap();
        assert_eq!((mapping.host_port, mapping.container_port), (8080, 80));
        assert_eq!((mapping.protocol, mapping.host_ip), (Protocol::Tcp, None));
        let mapping = one(
            r#"{"hostPort":53,"containerPort":53,"protocol":"Udp","hostIP":"::ffff:192.0.2.1"}"#,
        )
        .unwrap();
        assert_eq!(mapping.host_ip, Some("192.0.2.1".parse().unwrap()));
    }

    #[test]
    fn errors_name_the_field_its_value_and_what_is_allowed() {
        for (mapping, field, value) in [
            (r#"{"hostPort":0,"containerPort":80}"#, "[0].hostPort", "0"),
            (r#"{"hostPort":65536,"containerPort":80}"#, "[0].hostPort", "65536"),
            (r#"{"hostPort":-1,"containerPort":80}"#, "[0].hostPort", "-1"),
            (r#"{"hostPort":"80","containerPort":80}"#, "[0].hostPort", "\"80\""),
            (r#"{"hostPort":80.5,"containerPort":80}"#, "[0].hostPort", "80.5"),
            (r#"{"containerPort":80}"#, "[0]", "hostPort"),
            (r#"{"hostPort":1,"containerPort":70000}"#, "[0].containerPort", "70000"),
            (r#"{"hostPort":1,"containerPort":1,"protocol":"icmp"}"#, "[0].protocol", "icmp"),
            (r#"{"hostPort":1,"containerPort":1,"protocol":6}"#, "[0].protocol", "6"),
            (
                r#"{"hostPort":1,"containerPort":1,"hostIP":"10.0.0.0/8"}"#,
                "[0].hostIP",
                "10.0.0.0/8",
            ),
            (
                r#"{"hostPort":1,"containerPort":1,"hostIP":"fe80::1%eth0"}"#,
                "[0].hostIP",
                "fe80::1%eth0",
            ),
            (r#"{"hostPort":1,"containerPort":1,"hostIP":"garbage"}"#, "[0].hostIP", "garbage"),
            (r"7", "[0]", "7"),
        ] {
            let error = one(mapping).unwrap_err();
            assert_eq!(error.code(), 7, "{mapping}");
            let message = error.to_string();
            assert!(message.contains(&format!("runtimeConfig.portMappings{field}")), "{message}");
            assert!(message.contains(value), "{message}");
        }
    }

    #[test]
    fn options_of_the_other_backend_are_refused() {
        for (members, backend) in [
            (r#","externalSetMarkChain":"KUBE-MARK-MASQ""#, Some(BackendKind::Iptables)),
            (r#","conditionsV4":["!","-s","10.0.0.0/8"]"#, Some(BackendKind::Iptables)),
            (r#","conditionsV6":["ip6 saddr != fd00::/8"]"#, Some(BackendKind::Nftables)),
            (r#","backend":"auto","markMasqBit":5"#, None),
        ] {
            assert_eq!(parse(members).unwrap().backend, backend, "{members}");
        }
        for members in [
            r#","backend":"nftables","externalSetMarkChain":"X""#,
            r#","backend":"iptables","conditionsV4":["ip saddr 10.0.0.0/8"]"#,
            r#","conditionsV4":["ip saddr 10.0.0.0/8"],"conditionsV6":["-s","fd00::/8"]"#,
            r#","markMasqBit":5,"externalSetMarkChain":"X""#,
            r#","markMasqBit":32"#,
            r#","markMasqBit":"5""#,
            r#","snat":"yes""#,
            r#","backend":"ipfw""#,
            r#","backend":1"#,
            r#","conditionsV4":"-s""#,
            r#","conditionsV4":["-s","1.2.3.4\nCOMMIT"]"#,
            r#","externalSetMarkChain":"a b""#,
            r#","externalSetMarkChain":"--evil""#,
            r#","conflictPolicy":"maybe""#,
            r#","stateDir":"relative/path""#,
            r#","runtimeConfig":[]"#,
            r#","runtimeConfig":{"portMappings":{}}"#,
        ] {
            assert_eq!(parse(members).unwrap_err().code(), 7, "{members}");
        }
    }

    #[test]
    fn one_claim_has_one_target() {
        let list = |other: &str| {
            parse(&format!(
                r#","runtimeConfig":{{"portMappings":[{{"hostPort":80,"containerPort":1}},{other}]}}"#
            ))
        };
        assert_eq!(list(r#"{"hostPort":80,"containerPort":2}"#).unwrap_err().code(), 7);
        assert_eq!(
            list(r#"{"hostPort":80,"containerPort":2,"hostIP":"::"}"#).unwrap_err().code(),
            7
        );
        for fine in [
            r#"{"hostPort":80,"containerPort":1}"#,
            r#"{"hostPort":80,"containerPort":2,"protocol":"udp"}"#,
            r#"{"hostPort":80,"containerPort":2,"hostIP":"192.0.2.1"}"#,
        ] {
            assert_eq!(list(fine).unwrap().mappings.len(), 2, "{fine}");
        }
    }

    proptest! {
        #[test]
        fn ports_are_read_exactly(port in any::<i64>()) {
            let mapping = one(&format!(r#"{{"hostPort":{port},"containerPort":1}}"#));
            prop_assert_eq!(mapping.is_ok(), (1..=65535).contains(&port));
        }
    }
}
