//! Rules as `iptables -S` lists them.

use ipnetwork::IpNetwork;

use super::{Chains, Condition, End, Of, Rule};
use crate::backend::iptables::listing::words;

/// Whether the policy of a chain is to drop, by the output of `iptables -S`.
#[must_use]
pub fn drops(text: &str, chain: &str) -> bool {
    text.lines().any(|line| {
        let policy = line.strip_prefix("-P ").and_then(|rest| rest.strip_prefix(chain));
        policy.is_some_and(|policy| policy.trim() == "DROP")
    })
}

/// Reads the chains in the output of `iptables -S`.
#[must_use]
pub fn of_iptables(text: &str) -> Chains {
    let mut chains = Chains::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ' ');
        match (parts.next(), parts.next(), parts.next()) {
            (Some("-N"), Some(chain), _) => drop(chains.entry(chain.to_owned()).or_default()),
            (Some("-A"), Some(chain), rule) => {
                let rule = of_words(rule.unwrap_or_default());
                chains.entry(chain.to_owned()).or_default().push(rule);
            }
            _ => {}
        }
    }
    let own: Vec<String> = chains.keys().cloned().collect();
    let marks = chains.values().flatten().any(|rule| sets_mark(&rule.end));
    for rule in chains.values_mut().flatten() {
        // Who marks packets here goes by the mark later (Calico's profiles).
        let by_mark = rule.conditions.iter_mut().filter(|condition| condition.of == Of::Mark);
        by_mark.filter(|_| marks).for_each(|condition| condition.of = Of::Unknown);
        // Targets that are no chains change the packet, count or log, and let it go on.
        if let End::Jump(target) | End::Goto(target) = &rule.end
            && !own.contains(target)
        {
            rule.end = End::Next;
        }
    }
    chains
}

fn sets_mark(end: &End) -> bool {
    matches!(end, End::Jump(target) if ["MARK", "CONNMARK"].contains(&target.as_str()))
}

fn of_words(text: &str) -> Rule {
    let mut rule = Rule { conditions: Vec::new(), end: End::Next, text: text.to_owned() };
    let mut words = words(text).into_iter().peekable();
    let mut negated = false;
    while let Some(word) = words.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        let mut value = || match words.peek() {
            Some(next) if !next.starts_with('-') && next != "!" => words.next().unwrap_or_default(),
            _ => String::new(),
        };
        let of = match word.as_str() {
            "-m" | "--comment" => {
                value();
                continue;
            }
            "-j" | "-g" => {
                rule.end = match (word.as_str(), value()) {
                    (_, target) if target == "ACCEPT" => End::Accept,
                    (_, target) if target == "DROP" || target == "REJECT" => End::Drop,
                    (_, target) if target == "RETURN" => End::Return,
                    (_, target) if target == "NFQUEUE" => {
                        // A program decides.
                        rule.conditions.push(Condition { negated: false, of: Of::Unknown });
                        End::Accept
                    }
                    ("-g", target) => End::Goto(target),
                    (_, target) => End::Jump(target),
                };
                // What follows are the target's own options.
                break;
            }
            "-i" => Of::In(vec![value()]),
            "-o" => Of::Out(vec![value()]),
            "-s" => networks(&value()).map_or(Of::Unknown, Of::Source),
            "-d" => networks(&value()).map_or(Of::Unknown, Of::Destination),
            "-p" => Of::Protocol(vec![value()]),
            "--dport" | "--dports" => ports(&value()).map_or(Of::Unknown, Of::Port),
            "--ctstate" | "--state" => {
                Of::State(value().split(',').map(str::to_ascii_lowercase).collect())
            }
            "--dst-type" => match value().as_str() {
                "LOCAL" => Of::Local,
                _ => Of::Unknown,
            },
            "--mark" => {
                let wanted = value();
                match wanted.split('/').next().map(number) {
                    Some(Some(0)) | Some(None) | None => Of::Unknown,
                    Some(Some(_)) => Of::Mark,
                }
            }
            _ => {
                value();
                Of::Unknown
            }
        };
        rule.conditions.push(Condition { negated: std::mem::take(&mut negated), of });
    }
    rule
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn networks(text: &str) -> Option<Vec<IpNetwork>> {
    text.split(',').map(|network| network.parse().ok()).collect()
}

/// `80`, `80:90`, or several with commas.
fn ports(text: &str) -> Option<Vec<(u16, u16)>> {
    text.split(',')
        .map(|range| match range.split_once(':') {
            Some((first, last)) => Some((first.parse().ok()?, last.parse().ok()?)),
            None => range.parse().ok().map(|port| (port, port)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::samples::{ETH0, packet};
    use super::super::{Fate, fate};
    use super::*;

    fn iptables(rules: &[&str]) -> Fate {
        let mut text = String::from("-N SUB\n-N BACK\n");
        for rule in rules {
            text.push_str(rule);
            text.push('\n');
        }
        fate(&of_iptables(&text), "FORWARD", true, &ETH0, &packet())
    }

    #[test]
    fn a_policy_of_accept_is_told_from_one_of_drop() {
        assert!(!drops("-P FORWARD ACCEPT\n-P OUTPUT DROP\n", "FORWARD"));
        assert!(drops("-P FORWARD DROP\n", "FORWARD"));
    }

    #[test]
    fn rules_of_iptables_as_they_act_on_a_new_connection() {
        for rule in [
            "-A FORWARD -j ACCEPT",
            "-A FORWARD -o cni0 -j ACCEPT",
            "-A FORWARD -o cni+ -j ACCEPT",
            "-A FORWARD ! -o docker0 -j ACCEPT",
            "-A FORWARD ! -i cni0 -j ACCEPT",
            "-A FORWARD -d 10.88.0.0/16 -j ACCEPT",
            "-A FORWARD -s 0.0.0.0/0 -j ACCEPT",
            "-A FORWARD -p tcp -m tcp --dport 80 -j ACCEPT",
            "-A FORWARD -p tcp -m multiport --dports 22,70:90 -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate NEW -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate DNAT -m comment --comment \"a -j DROP\" -j ACCEPT",
        ] {
            assert_eq!(iptables(&[rule]), Fate::Accepted, "{rule}");
        }
        for rule in [
            "-A FORWARD -o docker0 -j ACCEPT",
            "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
            "-A FORWARD -d 10.88.0.3/32 -j ACCEPT",
            "-A FORWARD -s 10.88.0.2/32 -j ACCEPT",
            "-A FORWARD -p udp -j ACCEPT",
            "-A FORWARD -p tcp -m tcp --dport 8080 -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
            "-A FORWARD -j LOG --log-prefix \"-j ACCEPT\"",
            "-A INPUT -j ACCEPT",
        ] {
            assert_eq!(iptables(&[rule]), Fate::Dropped(None), "{rule}");
        }
        let unknown = "-m set --match-set pods dst -j ACCEPT";
        assert_eq!(iptables(&[&format!("-A FORWARD {unknown}")]), Fate::Unknown(unknown.into()));
    }

    #[test]
    fn chains_are_followed_and_left() {
        let sub = ["-A FORWARD -j SUB", "-A SUB -o cni0 -j ACCEPT"];
        assert_eq!(iptables(&sub), Fate::Accepted);
        let back = [
            "-A FORWARD -j SUB",
            "-A SUB -j RETURN",
            "-A SUB -j ACCEPT",
            "-A FORWARD -o cni0 -j DROP",
            "-A FORWARD -j ACCEPT",
        ];
        assert_eq!(iptables(&back), Fate::Dropped(Some("-o cni0 -j DROP".into())));
        let gone = ["-A FORWARD -g SUB", "-A FORWARD -j ACCEPT"];
        assert_eq!(iptables(&gone), Fate::Dropped(None));
        let loop_ = ["-A FORWARD -j SUB", "-A SUB -j BACK", "-A BACK -j SUB"];
        assert_eq!(iptables(&loop_), Fate::Dropped(None));
        let unsure = ["-A FORWARD -m set --match-set a dst -j SUB", "-A SUB -j ACCEPT"];
        assert!(matches!(iptables(&unsure), Fate::Unknown(_)));
    }

    #[test]
    fn rules_that_drop_where_the_policy_is_to_accept() {
        let accepting = |text: &str| fate(&of_iptables(text), "FORWARD", false, &ETH0, &packet());
        // The images of Oracle's cloud.
        let reject = "-j REJECT --reject-with icmp-host-prohibited";
        for (before, fate) in [
            ("", Fate::Dropped(Some(reject.into()))),
            ("-A FORWARD -o docker0 -j ACCEPT\n", Fate::Dropped(Some(reject.into()))),
            ("-A FORWARD -o cni0 -j ACCEPT\n", Fate::Accepted),
            (
                "-A FORWARD -j NFQUEUE --queue-num 0\n",
                Fate::Unknown("-j NFQUEUE --queue-num 0".into()),
            ),
        ] {
            assert_eq!(accepting(&format!("{before}-A FORWARD {reject}\n")), fate, "{before}");
        }
        for rule in [
            "-p udp -j DROP",
            "-m conntrack --ctstate INVALID -j DROP",
            // Some callers, or who knows which packets.
            "-s 192.0.2.0/24 -j DROP",
            "! -s 192.0.2.0/24 -j DROP",
            "-m set --match-set a src -j DROP",
            "-m mark ! --mark 0x1/0x1 -j DROP",
        ] {
            assert_eq!(accepting(&format!("-A FORWARD {rule}\n")), Fate::Accepted, "{rule}");
        }
        // Calico's profiles mark what they let through.
        let profiles = "-N SUB\n-A FORWARD -o cni0 -g SUB\n-A SUB -m set --match-set a src -j MARK --set-xmark 0x1/0x1\n\
                        -A SUB -m mark --mark 0x1/0x1 -j RETURN\n-A SUB -j DROP\n";
        assert_eq!(accepting(profiles), Fate::Accepted);
    }
}
