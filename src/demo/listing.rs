//! Rule listings of other tools, reduced to what says something: comparable before and after.
//!
//! Counters go, and so do empty tables and untouched base chains: `iptables` (nf_tables) makes
//! those as soon as anyone asks for a table, and never removes them.

/// Reduces the text of `iptables-save`. A line is kept with its table's `*name` line before it.
#[must_use]
pub fn iptables(text: &str) -> Vec<String> {
    let mut kept: Vec<String> = Vec::new();
    let mut table = None;
    for line in text.lines() {
        if line.starts_with('*') {
            table = Some(line.to_owned());
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let (name, policy) = (words.next(), words.next());
            // A chain with a policy is a base chain; user chains have "-".
            if let (Some(name), Some(policy)) = (name, policy)
                && policy != "ACCEPT"
            {
                kept.extend(table.take());
                kept.push(format!(":{name} {policy}"));
            }
        } else if line.starts_with('-') || line.starts_with('[') {
            kept.extend(table.take());
            kept.push(line.to_owned());
        }
    }
    kept
}

/// Reduces the text of `nft list ruleset`. Lines are indented with two spaces a level.
#[must_use]
pub fn nft(text: &str) -> Vec<String> {
    let mut root = Block::default();
    let mut open: Vec<Block> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line == "}" {
            if let Some(block) = open.pop()
                && !block.is_untouched()
            {
                open.last_mut().unwrap_or(&mut root).push(block.into_lines());
            }
        } else if let Some(header) = line.strip_suffix('{') {
            open.push(Block { header: header.trim_end().to_owned(), lines: Vec::new() });
        } else {
            let line = without_counters(line);
            open.last_mut().unwrap_or(&mut root).push(vec![line]);
        }
    }
    root.lines
}

/// Leaves out the tables of `nft` that `iptables-save` shows too.
#[must_use]
pub fn without_iptables_tables(nft: &[String]) -> Vec<String> {
    let mut inside = false;
    let mut kept = Vec::new();
    for line in nft {
        if let Some(table) = line.strip_prefix("table ") {
            let mut words = table.split(' ');
            let family = words.next();
            let name = words.next();
            inside = matches!(family, Some("ip" | "ip6"))
                && matches!(name, Some("nat" | "filter" | "mangle" | "raw" | "security"));
        }
        if !inside {
            kept.push(line.clone());
        }
    }
    kept
}

/// The lines of `after` that `before` does not have, in their order.
#[must_use]
pub fn added(before: &[String], after: &[String]) -> Vec<String> {
    let new = after.iter().filter(|line| !before.contains(line));
    new.cloned().collect()
}

/// A `table` or `chain` and what is between its braces.
#[derive(Default)]
struct Block {
    header: String,
    lines: Vec<String>,
}

impl Block {
    fn push(&mut self, lines: Vec<String>) {
        self.lines.extend(lines);
    }

    /// A table with nothing in it, or a base chain that lets everything pass.
    fn is_untouched(&self) -> bool {
        match self.lines.as_slice() {
            [] => self.header.starts_with("table "),
            [line] => line.starts_with("type ") && line.ends_with("policy accept;"),
            _ => false,
        }
    }

    fn into_lines(self) -> Vec<String> {
        let mut lines = vec![format!("{} {{", self.header)];
        lines.extend(self.lines.iter().map(|line| format!("  {line}")));
        lines.push("}".to_owned());
        lines
    }
}

/// `counter packets 3 bytes 180` becomes `counter`.
fn without_counters(line: &str) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    while let Some(at) = words.windows(2).position(|pair| pair == ["counter", "packets"]) {
        words.drain(at + 1..words.len().min(at + 5));
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untouched_iptables_tables_say_nothing() {
        let text = "# Generated\n*nat\n:PREROUTING ACCEPT [1:60]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n";
        assert!(iptables(text).is_empty());
    }

    #[test]
    fn iptables_rules_chains_and_policies_stay() {
        let text = "*filter\n:INPUT DROP [9:540]\n:FORWARD ACCEPT [0:0]\nCOMMIT\n\
                    *nat\n:PREROUTING ACCEPT [0:0]\n:CNI-X - [0:0]\n-A CNI-X -j RETURN\nCOMMIT\n";
        let expected = ["*filter", ":INPUT DROP", "*nat", ":CNI-X -", "-A CNI-X -j RETURN"];
        assert_eq!(iptables(text), expected);
    }

    #[test]
    fn nft_keeps_rules_and_drops_counters_and_empty_base_chains() {
        let text = "# Warning: table ip nat is managed by iptables-nft, do not touch!\n\
                    table ip nat {\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority \
                    dstnat; policy accept;\n\t}\n}\ntable inet x {\n\tmap m {\n\t\ttype \
                    inet_service : verdict\n\t\telements = { 1 : accept,\n\t\t\t     2 : drop \
                    }\n\t}\n\tchain c {\n\t\tip daddr 10.0.0.1 counter packets 3 bytes 180 \
                    accept\n\t}\n}\n";
        let expected = [
            "table inet x {",
            "  map m {",
            "    type inet_service : verdict",
            "    elements = { 1 : accept,",
            "    2 : drop }",
            "  }",
            "  chain c {",
            "    ip daddr 10.0.0.1 counter accept",
            "  }",
            "}",
        ];
        assert_eq!(nft(text), expected);
    }

    #[test]
    fn nft_tables_of_iptables_can_be_left_out() {
        let lines = ["table ip nat {", "  x", "}", "table inet nat {", "  y", "}"];
        let lines = lines.map(str::to_owned);
        assert_eq!(without_iptables_tables(&lines), lines[3..]);
    }

    #[test]
    fn an_empty_set_of_a_table_is_something() {
        assert_eq!(nft("table ip x {\n\tset s {\n\t\ttype ipv4_addr\n\t}\n}\n").len(), 5);
        assert!(nft("table ip x {\n}\n").is_empty());
    }
}
