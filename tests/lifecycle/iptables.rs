//! The tables nat and raw of both families in memory, as `iptables-restore --noflush` changes them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use portmap::backend::iptables::listing::{Listing, canonical, option, target_of};
use portmap::backend::iptables::{check, rules, script};
use portmap::model::{BackendKind, Family};
use portmap::record::{Part, Record};

use super::{Change, Packet, Table, parts};

/// A source address that packets have or have not.
pub const CONDITION: &str = "10.9.0.0/16";

const TARGETS: [&str; 7] = ["ACCEPT", "DNAT", "DROP", "MARK", "MASQUERADE", "RETURN", "SNAT"];
const UPSTREAM: &str = "CNI-DN-ffffffffffffffffffffe";

type Tables = BTreeMap<(Family, &'static str), Listing>;

/// Both families' tables, and what was in them before.
pub struct Fake {
    tables: Tables,
    foreign: Tables,
    keep_base: bool,
}

impl Fake {
    /// With a service proxy's and the user's rules; with those of an attachment of upstream's plugin
    /// too, if asked for.
    pub fn new(upstream: bool) -> Self {
        let mut tables = Tables::new();
        for family in Family::ALL {
            let mut nat = String::from(
                "-P PREROUTING ACCEPT\n-P INPUT ACCEPT\n-P OUTPUT ACCEPT\n-P POSTROUTING ACCEPT\n-N KUBE-SERVICES\n\
                 -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n\
                 -A POSTROUTING -m comment --comment \"a user's\" -o eth0 -j MASQUERADE\n\
                 -A KUBE-SERVICES -p tcp -m tcp --dport 9999 -j ACCEPT\n",
            );
            if upstream {
                let more = format!(
                    "-N {dnat}\n-N {setmark}\n-N {masq}\n-N {UPSTREAM}\n-A PREROUTING {jump}\n-A OUTPUT {jump}\n\
                     -A {dnat} -p tcp -m comment --comment \"dnat name: \\\"n\\\" id: \\\"upstream\\\"\" -m multiport --dports 8888 -j {UPSTREAM}\n\
                     -A {UPSTREAM} -p tcp -m tcp --dport 8888 -j {setmark}\n-A {setmark} {mark}\n-A {masq} {masquerade}\n",
                    dnat = rules::DNAT,
                    setmark = rules::SETMARK,
                    masq = rules::MASQ,
                    jump = rules::DNAT_JUMP,
                    mark = rules::setmark_rule(13),
                    masquerade = rules::masq_rule(13),
                );
                nat = format!("{nat}{more}-A POSTROUTING {}\n", rules::MASQ_JUMP);
            }
            tables.insert((family, "nat"), Listing::parse(&nat));
            let raw = "-P PREROUTING ACCEPT\n-P OUTPUT ACCEPT\n-A PREROUTING -p udp -j ACCEPT\n";
            tables.insert((family, "raw"), Listing::parse(raw));
        }
        Fake { foreign: tables.clone(), tables, keep_base: upstream }
    }

    /// Applies lines as the tool does, each table by itself, or returns the line that fails.
    fn restore(&mut self, family: Family, text: &str) -> Result<(), String> {
        let mut table: Option<(&'static str, Listing)> = None;
        for line in text.lines() {
            match (line, &mut table) {
                ("*nat" | "*raw", None) => {
                    let name = if line == "*nat" { "nat" } else { "raw" };
                    table = Some((name, self.tables[&(family, name)].clone()));
                }
                ("COMMIT", Some((name, listing))) => {
                    complete(listing)?;
                    self.tables.insert((family, name), listing.clone());
                    table = None;
                }
                (_, Some((_, listing))) => {
                    execute(listing, line).map_err(|error| format!("{error}: {line}"))?;
                }
                _ => return Err(format!("outside of a table: {line}")),
            }
        }
        table.map_or(Ok(()), |_| Err("COMMIT is missing".into()))
    }

    fn slow(&mut self, live: &[Record], purge: &BTreeSet<String>) {
        let uplinks = ["eth0".to_owned()];
        for family in Family::ALL {
            let records: Vec<&Record> =
                live.iter().filter(|record| record.network(family).is_some()).collect();
            let desired = script::Desired {
                family,
                records,
                parts: &parts(live),
                purge,
                uplinks: &uplinks,
                keep_base: self.keep_base,
                stale_bits: if self.keep_base { BTreeSet::new() } else { (0..u32::BITS).collect() },
            };
            let mut text = script::restore_nat(&desired, &self.tables[&(family, "nat")]);
            if family == Family::V4 {
                let guard = desired.parts.contains(&Part::Guard);
                text += &script::restore_raw(guard, &self.tables[&(family, "raw")]);
            }
            self.restore(family, &text).unwrap();
        }
    }

    fn fast(&mut self, change: &Change) {
        let mut gone: BTreeSet<Part> = change.before.difference(&change.after).copied().collect();
        gone.retain(|part| !self.keep_base || !matches!(part, Part::Mark(..)));
        let pair = change.added.iter().chain(&change.removed);
        let families: BTreeSet<Family> = pair.flat_map(|record| record.families()).collect();
        let uplinks = BTreeSet::from(["eth0".to_owned()]);
        for family in families {
            let text = match (change.added, change.removed) {
                (Some(added), removed) => {
                    let shared = script::Shared::CheckedInside { uplinks: &uplinks };
                    script::add(added, removed, family, shared)
                }
                (None, Some(removed)) => {
                    script::remove(removed, family, &gone, &change.after, &uplinks)
                }
                (None, None) => continue,
            };
            self.restore(family, &text).unwrap();
        }
    }
}

fn execute(listing: &mut Listing, line: &str) -> Result<(), &'static str> {
    if let Some(chain) = line.strip_prefix(':') {
        let chain = chain.strip_suffix(" - [0:0]").ok_or("a policy")?;
        listing.chains.insert(chain.to_owned(), Vec::new());
        return Ok(());
    }
    let mut words = line.splitn(3, ' ');
    let mut word = || words.next().unwrap_or_default();
    let (command, name, rule) = (word(), word(), word());
    let position = listing.position(name, rule);
    if command == "-X" {
        let target = |rule: &String| target_of(rule).as_deref() == Some(name);
        if listing.chains.values().flatten().any(target) {
            return Err("the chain is in use");
        }
        return match listing.chains.remove(name) {
            Some(rules) if rules.is_empty() => Ok(()),
            Some(_) => Err("the chain is not empty"),
            None => Err("no such chain"),
        };
    }
    let chain = listing.chains.get_mut(name).ok_or("no such chain")?;
    match command {
        "-F" => chain.clear(),
        "-A" => chain.push(rule.to_owned()),
        "-I" => {
            let number = rule
                .split_once(' ')
                .and_then(|(number, rest)| Some((number.parse::<usize>().ok()?, rest)));
            let (number, rule) = number.unwrap_or((1, rule));
            if number == 0 || number > chain.len() + 1 {
                return Err("no such position");
            }
            chain.insert(number - 1, rule.to_owned());
        }
        "-C" => drop(position.ok_or("no such rule")?),
        "-D" => drop(chain.remove(position.ok_or("no such rule")?)),
        _ => return Err("an unknown command"),
    }
    Ok(())
}

/// No jump to a chain that is not there.
fn complete(listing: &Listing) -> Result<(), String> {
    for rule in listing.chains.values().flatten() {
        let target = target_of(rule).ok_or_else(|| format!("no target: {rule}"))?;
        if !listing.has_chain(&target) && !TARGETS.contains(&target.as_str()) {
            return Err(format!("no such target: {rule}"));
        }
    }
    Ok(())
}

/// In chains that attachments share, only precedence matters, which `resolve` looks at.
fn unordered(tables: &Tables) -> Tables {
    let mut tables = tables.clone();
    for listing in tables.values_mut() {
        for shared in [rules::DNAT, rules::SETMARK, rules::MASQ, rules::NEIGHBOURS] {
            if let Some(rules) = listing.chains.get_mut(shared) {
                rules.sort();
            }
        }
    }
    tables
}

/// As `iptables -S` prints it.
fn printed(listing: &Listing) -> String {
    let mut text = String::new();
    for (chain, rules) in &listing.chains {
        text += &format!("-N {chain}\n");
        for rule in rules {
            text += &format!("-A {chain} {rule}\n");
        }
    }
    text
}

fn takes(rule: &str, packet: &Packet, matching: bool) -> bool {
    let is = |name: &str, allowed: &dyn Fn(&str) -> bool| {
        option(rule, name).is_none_or(|value| allowed(&value))
    };
    let own = format!("{}/{}", packet.address, packet.family.max_prefix());
    let port = packet.port.to_string();
    is("-p", &|value| value == packet.protocol.name())
        && is("-d", &|value| value == own)
        && is("-s", &|value| value == CONDITION && matching)
        && is("--dport", &|value| value == port)
        && is("--dports", &|value| value.split(',').any(|one| one == port))
}

impl Table for Fake {
    const BACKEND: BackendKind = BackendKind::Iptables;

    fn change(&mut self, change: &Change) {
        let contested = change.added.iter().chain(&change.removed).any(|record| {
            Family::ALL.iter().any(|of| script::order_is_contested(record, &change.related, *of))
        });
        let other_parts = match (change.added, change.removed) {
            (Some(added), Some(removed)) => added.parts() != removed.parts(),
            _ => false,
        };
        let shared = |part: &&Part| self.keep_base && matches!(part, Part::Base(_));
        let base_goes = change.before.difference(&change.after).any(|part| shared(&part));
        if contested || other_parts || base_goes || !change.after.is_subset(&change.before) {
            let purge = change.removed.map(|removed| removed.chain.clone()).into_iter().collect();
            self.slow(change.live, &purge);
        } else {
            self.fast(change);
        }
    }

    fn verify(&self, live: &[Record]) {
        if live.is_empty() {
            assert_eq!(self.tables, self.foreign, "the end is not the beginning");
        }
        let mut fresh =
            Fake { tables: self.foreign.clone(), foreign: self.foreign.clone(), ..*self };
        fresh.slow(live, &BTreeSet::new());
        assert_eq!(
            unordered(&self.tables),
            unordered(&fresh.tables),
            "not what the records alone lead to"
        );
        let uplinks = BTreeSet::from(["eth0".to_owned()]);
        for family in Family::ALL {
            let nat = &self.tables[&(family, "nat")];
            assert_eq!(Listing::parse(&printed(nat)), *nat);
            for record in live.iter().filter(|record| record.network(family).is_some()) {
                let forwards: BTreeSet<_> = record.forwards(family).into_iter().collect();
                assert_eq!(nat.forwards(&record.chain, family), forwards);
                assert_eq!(
                    check::nat_problems(record, family, nat, Some(&uplinks)),
                    Vec::<String>::new()
                );
            }
        }
        if live.iter().any(|record| record.parts().contains(&Part::Guard)) {
            assert_eq!(
                check::raw_problems(&self.tables[&(Family::V4, "raw")]),
                Vec::<String>::new()
            );
        }
        // Services win.
        for chain in ["PREROUTING", "OUTPUT"] {
            let first = self.tables[&(Family::V4, "nat")].rules(chain).first().unwrap();
            assert_eq!(canonical(first), canonical("-j KUBE-SERVICES"));
        }
    }

    fn resolve(&self, packet: &Packet, matching: bool) -> Option<SocketAddr> {
        let nat = &self.tables[&(packet.family, "nat")];
        nat.rules(rules::DNAT).iter().filter(|entry| takes(entry, packet, matching)).find_map(
            |entry| {
                let mut rules = nat.rules(&target_of(entry)?).iter();
                rules.find_map(|rule| {
                    let target = option(rule, "--to-destination")
                        .filter(|_| takes(rule, packet, matching))?;
                    target.parse().ok()
                })
            },
        )
    }
}
