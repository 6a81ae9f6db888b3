//! The environment of one call (specification section 2, "Protocol parameters").

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// What the runtime wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub const ALL: [Verb; 6] =
        [Verb::Add, Verb::Del, Verb::Check, Verb::Gc, Verb::Status, Verb::Version];

    /// The value of `CNI_COMMAND`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
            Verb::Version => "VERSION",
        }
    }
}

/// The variables of a call, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    pub verb: Verb,
    /// Set and checked for ADD, DEL and CHECK, else whatever the environment has.
    pub container_id: String,
    /// Path of the pod's network namespace; empty where the runtime has none (allowed on DEL).
    pub netns: String,
    /// As `container_id`.
    pub ifname: String,
    /// Key and value pairs of `CNI_ARGS`, which is never a reason to fail.
    pub args: BTreeMap<String, String>,
    /// `CNI_NETNS_OVERRIDE`: the pod may share the plugin's namespace.
    pub netns_override: bool,
}

type Validator = fn(&str) -> Option<&'static str>;

/// Who needs which variable, and what it must look like.
const VARIABLES: [(&str, &[Verb], Validator); 3] = [
    ("CNI_CONTAINERID", &[Verb::Add, Verb::Del, Verb::Check], container_id),
    ("CNI_NETNS", &[Verb::Add, Verb::Check], |_| None),
    ("CNI_IFNAME", &[Verb::Add, Verb::Del, Verb::Check], ifname),
];

impl Invocation {
    /// Reads the variables through `get`, where unset and empty are the same. `Ok(None)` means that
    /// there is no `CNI_COMMAND`: a person runs the binary.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let get = |name: &str| get(name).unwrap_or_default();
        let command = get("CNI_COMMAND");
        if command.is_empty() {
            return Ok(None);
        }
        let verb = Verb::ALL.into_iter().find(|verb| verb.name() == command).ok_or_else(|| {
            Error::Environment(format!(
                "CNI_COMMAND is {command:?}: it must be ADD, DEL, CHECK, GC, STATUS or VERSION"
            ))
        })?;

        let values = VARIABLES.map(|(name, ..)| get(name));
        let missing: Vec<&str> = VARIABLES
            .iter()
            .zip(&values)
            .filter(|((_, needed_by, _), value)| needed_by.contains(&verb) && value.is_empty())
            .map(|((name, ..), _)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(Error::Environment(format!(
                "{command} needs {}: not set",
                missing.join(", ")
            )));
        }
        for ((name, needed_by, problem), value) in VARIABLES.iter().zip(&values) {
            if let Some(rule) = problem(value).filter(|_| needed_by.contains(&verb)) {
                return Err(Error::Environment(format!("{name} is {value:?}: {rule}")));
            }
        }
        let [container_id, netns, ifname] = values;
        Ok(Some(Invocation {
            verb,
            container_id,
            netns,
            ifname,
            args: get("CNI_ARGS")
                .split(';')
                .filter_map(|pair| pair.split_once('='))
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
            netns_override: matches!(
                get("CNI_NETNS_OVERRIDE").to_ascii_lowercase().as_str(),
                "1" | "true"
            ),
        }))
    }
}

/// `^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`, for container IDs and network names alike.
#[must_use]
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

fn container_id(value: &str) -> Option<&'static str> {
    (!is_identifier(value)).then_some(
        "it must start with a letter or digit and hold only letters, digits, '_', '.' and '-'",
    )
}

/// What the kernel accepts as an interface name (`dev_valid_name`, net/core/dev.c).
fn ifname(value: &str) -> Option<&'static str> {
    if value.is_empty() || value.len() > 15 {
        Some("it must have 1 to 15 bytes")
    } else if value == "." || value == ".." {
        Some("it must not be \".\" or \"..\"")
    } else if value.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        Some("it must not contain '/', ':', spaces or control characters")
    } else {
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Invocation>> {
        let pairs: BTreeMap<String, String> =
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Invocation::read(|name| pairs.get(name).cloned())
    }

    const ADD: [(&str, &str); 4] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/n"),
        ("CNI_IFNAME", "eth0"),
    ];

    #[test]
    fn no_command_means_a_person() {
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&[("CNI_COMMAND", "")]).unwrap(), None);
    }

    #[test]
    fn all_missing_variables_are_named_at_once() {
        let error = read(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", "")]).unwrap_err();
        assert_eq!(error.to_string(), "ADD needs CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME: not set");
        assert_eq!(error.code(), 4);
    }

    #[test]
    fn del_needs_no_netns_and_gc_needs_nothing() {
        let del =
            read(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")]);
        assert_eq!(del.unwrap().unwrap().netns, "");
        for verb in ["GC", "STATUS", "VERSION"] {
            read(&[("CNI_COMMAND", verb), ("CNI_IFNAME", "dummy/dummy")]).unwrap().unwrap();
        }
    }

    #[test]
    fn identifiers_and_interface_names_are_checked() {
        for (name, value) in [
            ("CNI_CONTAINERID", "c1\n"),
            ("CNI_CONTAINERID", "-c1"),
            ("CNI_CONTAINERID", "a b"),
            ("CNI_IFNAME", "0123456789abcdef"),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "a:b"),
            ("CNI_IFNAME", "a\u{a0}b"),
            ("CNI_COMMAND", "add"),
        ] {
            let mut pairs = ADD.to_vec();
            pairs.push((name, value));
            let error = read(&pairs).unwrap_err();
            assert_eq!(error.code(), 4, "{name}={value:?}");
            assert!(error.to_string().contains(name), "{error}");
        }
        let long = "a".repeat(255);
        let mut pairs = ADD.to_vec();
        pairs.push(("CNI_CONTAINERID", &long));
        assert_eq!(read(&pairs).unwrap().unwrap().container_id, long);
    }

    #[test]
    fn args_are_read_leniently() {
        let mut pairs = ADD.to_vec();
        pairs.push(("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=web;;broken"));
        let args = read(&pairs).unwrap().unwrap().args;
        assert_eq!(args.get("K8S_POD_NAME").map(String::as_str), Some("web"));
        assert_eq!(args.len(), 2);
    }
}
