//! Reading `iptables -S`. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::rules::DNAT;
use crate::model::{Claim, Family, Forward, Protocol};

/// An attachment as an entry rule names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundAttachment {
    pub network: String,
    pub container_id: String,
    pub chain: String,
}

/// The chains of one table, and their rules as printed after `-A CHAIN `.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    pub chains: BTreeMap<String, Vec<String>>,
}

impl Listing {
    /// Reads the output of `iptables -S`; lines that are none of its kinds (warnings) are left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.splitn(3, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("-P" | "-N"), Some(chain), _) => {
                    chains.entry(chain.to_owned()).or_default();
                }
                (Some("-A"), Some(chain), rule) => {
                    chains
                        .entry(chain.to_owned())
                        .or_default()
                        .push(rule.unwrap_or_default().to_owned());
                }
                _ => {}
            }
        }
        Listing { chains }
    }

    /// The rules of a chain; none if there is no such chain.
    #[must_use]
    pub fn rules(&self, chain: &str) -> &[String] {
        self.chains.get(chain).map(Vec::as_slice).unwrap_or_default()
    }

    #[must_use]
    pub fn has_chain(&self, chain: &str) -> bool {
        self.chains.contains_key(chain)
    }

    /// Index of a rule in its chain, compared by meaning. Where it stands as it is spelt here, which it
    /// does unless the tool is another version, nothing is taken apart.
    #[must_use]
    pub fn position(&self, chain: &str, rule: &str) -> Option<usize> {
        let rules = self.rules(chain);
        let same = rules.iter().position(|present| present == rule);
        same.or_else(|| {
            let wanted = canonical(rule);
            rules.iter().position(|present| canonical(present) == wanted)
        })
    }

    /// The rules of a chain that lead to another.
    pub fn jumps<'a>(&'a self, chain: &str, target: &'a str) -> impl Iterator<Item = &'a String> {
        self.rules(chain).iter().filter(move |rule| target_of(rule).as_deref() == Some(target))
    }

    /// What an attachment's chain forwards, as far as its rules are of the known shape.
    #[must_use]
    pub fn forwards(&self, chain: &str, family: Family) -> BTreeSet<Forward> {
        self.rules(chain).iter().filter_map(|rule| forward(rule, family)).collect()
    }

    /// The attachments that `CNI-HOSTPORT-DNAT` leads to, as their comments name them.
    #[must_use]
    pub fn attachments(&self) -> Vec<FoundAttachment> {
        self.rules(DNAT)
            .iter()
            .filter_map(|rule| {
                let comment = option(rule, "--comment")?;
                let (network, id) =
                    comment.strip_prefix("dnat name: \"")?.split_once("\" id: \"")?;
                // A comment that was cut does not name anybody.
                let container_id = id.strip_suffix('"')?;
                let chain = target_of(rule).filter(|chain| chain.starts_with("CNI-DN-"))?;
                Some(FoundAttachment {
                    network: network.into(),
                    container_id: container_id.into(),
                    chain,
                })
            })
            .collect()
    }

    /// Chains that `CNI-HOSTPORT-DNAT` leads to.
    #[must_use]
    pub fn attachment_chains(&self) -> BTreeSet<String> {
        self.rules(DNAT)
            .iter()
            .filter_map(|rule| target_of(rule))
            .filter(|target| target.starts_with("CNI-DN-"))
            .collect()
    }
}

/// Splits a rule at spaces. A word in double quotes has backslashes; in any other one both stand for
/// themselves, as `iptables -S` prints names of devices.
#[must_use]
pub fn words(rule: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), None::<String>);
    let (mut quoted, mut chars) = (false, rule.chars());
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => word.get_or_insert_default().extend(chars.next()),
            '"' if quoted => quoted = false,
            '"' if word.is_none() => {
                quoted = true;
                word = Some(String::new());
            }
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The chain or target of `-j` or `-g`.
#[must_use]
pub fn target_of(rule: &str) -> Option<String> {
    let words = words(rule);
    let at =
        words.iter().position(|word| matches!(word.as_str(), "-j" | "-g" | "--jump" | "--goto"))?;
    words.get(at + 1).cloned()
}

/// A rule as a sorted list of options, so that spellings that differ between versions and variants
/// of iptables (order of matches, `-m tcp`, host masks) compare equal.
#[must_use]
pub fn canonical(rule: &str) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    let mut negated = false;
    for word in words(rule) {
        if word == "!" {
            negated = true;
        } else if word.starts_with('-') && word.parse::<f64>().is_err() {
            let name = match word.as_str() {
                "--destination-ports" => "--dports".to_owned(),
                "--destination-port" => "--dport".to_owned(),
                _ => word,
            };
            options.push(if std::mem::take(&mut negated) { format!("! {name}") } else { name });
        } else if let Some(option) = options.last_mut() {
            option.push(' ');
            option.push_str(&word);
        }
    }
    options.retain(|option| !option.starts_with("-m "));
    for option in &mut options {
        if let Some(address) = option.strip_prefix("-s ").or_else(|| option.strip_prefix("-d "))
            && let Ok(ip) = address.parse::<IpAddr>()
        {
            *option = format!("{option}/{}", Family::of(&ip).max_prefix());
        }
    }
    options.sort();
    options
}

/// The value of an option that is not negated.
#[must_use]
pub fn option(rule: &str, name: &str) -> Option<String> {
    canonical(rule)
        .iter()
        .find_map(|option| option.strip_prefix(name)?.strip_prefix(' ').map(ToOwned::to_owned))
}

fn forward(rule: &str, family: Family) -> Option<Forward> {
    let protocol = Protocol::parse(&option(rule, "-p")?)?;
    let port = option(rule, "--dport")?.parse().ok()?;
    let target: SocketAddr = option(rule, "--to-destination")?.parse().ok()?;
    let address = match option(rule, "-d") {
        Some(text) => Some(text.split_once('/')?.0.parse().ok()?),
        None => None,
    };
    Some(Forward { claim: Claim { family, protocol, address, port }, target })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_are_printed_as_they_are() {
        for (printed, written) in [
            (r#"-i a"b -j RETURN"#, r#"-i "a\"b" -j RETURN"#),
            (r"-i a\b -j RETURN", r#"-i "a\\b" -j RETURN"#),
        ] {
            assert_eq!(canonical(printed), canonical(written));
            assert_eq!(target_of(printed).as_deref(), Some("RETURN"));
        }
    }

    #[test]
    fn words_are_split_as_iptables_does() {
        assert_eq!(
            words(r#"-m comment --comment "dnat name: \"n\" id: \"i\"" -j X"#),
            ["-m", "comment", "--comment", r#"dnat name: "n" id: "i""#, "-j", "X"]
        );
        assert_eq!(words("  a  \"\" b"), ["a", "", "b"]);
    }

    #[test]
    fn spelling_does_not_matter_and_meaning_does() {
        let a = r#"-p tcp -m comment --comment "x y" -m multiport --dports 80,81 -j C"#;
        let b = r#"-p tcp -m multiport --destination-ports 80,81 -m comment --comment "x y" -j C"#;
        assert_eq!(canonical(a), canonical(b));
        assert_eq!(
            canonical("-s 10.0.0.1 -p tcp -m tcp --dport 1"),
            canonical("-p tcp -s 10.0.0.1/32 --dport 1")
        );
        assert_ne!(canonical("-s 10.0.0.1 -j C"), canonical("! -s 10.0.0.1 -j C"));
        assert_ne!(canonical(a), canonical(&a.replace("80,81", "80")));
    }
}
