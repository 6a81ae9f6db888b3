//! Puts other mappings on a node.

use std::fmt::Write as _;

use crate::Res;
use crate::contest::{Contestant, Side};
use crate::plugin::{Attachment, Verb};
use crate::rig::{self, Rig};

/// How other mappings get there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// One ADD each: rules, records and whatever else the plugin keeps are real.
    Real,
    /// One ADD, and the rules that it made repeated with other names, addresses and ports, in one
    /// transaction. Only for state that is nothing but rules.
    Copies,
}

/// Raises the number of other mappings on a node.
pub fn raise(contestant: &Contestant, rig: &Rig, how: How, from: u16, to: u16) -> Res<()> {
    rig.on(|| {
        let real = match how {
            How::Real => to,
            How::Copies => to.min(1),
        };
        for index in from..real {
            let other = Attachment::other(index);
            contestant.call(Verb::Add, &other)?.must()?;
        }
        let first = from.max(real);
        if first < to {
            copy(contestant, first, to)?;
        }
        Ok(())
    })
}

/// The peer's state is its rules, and thousands of its ADDs would take many minutes.
pub fn usual(contestant: &Contestant) -> How {
    match contestant.side {
        Side::Peer => How::Copies,
        Side::Ours => How::Real,
    }
}

fn copy(contestant: &Contestant, from: u16, to: u16) -> Res<()> {
    if contestant.variant.backend() == "nftables" {
        let model = nft_rules(&rig::shell("nft list table ip cni_hostport")?);
        let script = repeat(&model, "", from, to)?;
        rig::feed("nft", &["-f", "-"], &script)?;
        return Ok(());
    }
    let (chain, model) = iptables_rules(&rig::shell("iptables-save -t nat")?)?;
    let mut script = String::from("*nat\n");
    script.push_str(&repeat(&model, &chain, from, to)?);
    script.push_str("COMMIT\n");
    // Through the shell, so that the rig's variant of it is found.
    rig::feed("sh", &["-c", "iptables-restore --noflush"], &script)?;
    Ok(())
}

/// The chain and the rules of the first of the others.
fn iptables_rules(listing: &str) -> Res<(String, Vec<String>)> {
    let id = Attachment::other(0).id;
    let chain = listing
        .lines()
        .find(|line| line.starts_with("-A CNI-HOSTPORT-DNAT ") && line.contains(&id))
        .and_then(|line| line.split_whitespace().last())
        .ok_or("an ADD left no rule in CNI-HOSTPORT-DNAT to take as a model")?;
    let mut rules = vec![format!(":{chain} - [0:0]")];
    rules.extend(
        listing
            .lines()
            .filter(|line| line.starts_with("-A ") && line.contains(chain))
            .map(str::to_owned),
    );
    Ok((chain.to_owned(), rules))
}

/// The rules of the first of the others, as commands that add them.
fn nft_rules(listing: &str) -> Vec<String> {
    let id = Attachment::other(0).id;
    let mut chain = "";
    let mut rules = Vec::new();
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ") {
            chain = name.trim_end_matches(" {");
        } else if line.contains(&id) {
            rules.push(format!("add rule ip cni_hostport {chain} {line}"));
        }
    }
    rules
}

fn repeat(model: &[String], chain: &str, from: u16, to: u16) -> Res<String> {
    let first = Attachment::other(0);
    let [(first_port, _)] = first.ports[..] else {
        return Err("the model has more than one port".into());
    };
    let (old_address, old_port) = (first.address.to_string(), first_port.to_string());
    if model.is_empty() {
        return Err("an ADD left no rule that could serve as a model".into());
    }
    let mut script = String::new();
    for index in from..to {
        let other = Attachment::other(index);
        let port = other.ports.first().map_or(0, |p| p.0).to_string();
        // Of the length and alphabet of the real ones, which are hashes.
        let new_chain = format!("CNI-DN-{index:021x}");
        for line in model {
            let mut line = line.clone();
            if !chain.is_empty() {
                line = line.replace(chain, &new_chain);
            }
            let line = line
                .replace(&first.id, &other.id)
                .replace(&old_address, &other.address.to_string())
                .replace(&old_port, &port);
            writeln!(script, "{line}")?;
        }
    }
    Ok(script)
}
