//! Findings as text for people, and as JSON for programs. Pure.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Area, Finding, Severity, count};

/// Lines of prose are broken here; commands never are, so that they can be copied.
const WIDTH: usize = 100;
/// Behind the word for the severity.
const INDENT: &str = "           ";

/// One object: the verdict, how many of each kind, and every finding.
#[must_use]
pub fn as_json(version: &str, findings: &[Finding]) -> Value {
    let number = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    json!({
        "version": version,
        "verdict": verdict(findings),
        "fine": number(Severity::Fine),
        "warnings": number(Severity::Warning),
        "broken": number(Severity::Broken),
        "findings": findings,
    })
}

/// The worst of them.
#[must_use]
pub fn verdict(findings: &[Finding]) -> Severity {
    findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Fine)
}

/// Area by area, with the sum at the end, where a terminal shows it.
#[must_use]
pub fn as_text(findings: &[Finding], colour: bool) -> String {
    let mut text = String::new();
    for area in Area::ALL {
        let own: Vec<&Finding> = findings.iter().filter(|finding| finding.area == area).collect();
        if own.is_empty() {
            continue;
        }
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "{}", area.name());
        for (index, finding) in own.iter().enumerate() {
            // What holds for several that stand together is said once, behind the last of them.
            let next = own.get(index + 1);
            let said_later = next.is_some_and(|next| {
                (&next.why, &next.fix, next.severity)
                    == (&finding.why, &finding.fix, finding.severity)
            });
            finding_as_text(&mut text, finding, !said_later, colour);
        }
    }
    let number = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let (warnings, broken) = (number(Severity::Warning), number(Severity::Broken));
    let warnings = count(warnings, "warning", "warnings");
    let sum = match verdict(findings) {
        Severity::Fine => "all is fine".to_owned(),
        Severity::Warning => warnings,
        Severity::Broken => format!("{broken} broken, {warnings}"),
    };
    let _ = writeln!(text, "{}", coloured(&sum, verdict(findings), colour));
    text
}

fn finding_as_text(text: &mut String, finding: &Finding, with_remedy: bool, colour: bool) {
    let word = match finding.severity {
        Severity::Fine => "fine",
        Severity::Warning => "warning",
        Severity::Broken => "broken",
    };
    // Colours take no room, so the word is filled up before.
    let word = coloured(&format!("{word:<7}"), finding.severity, colour);
    let _ = write!(text, "  {word}  ");
    folded(text, "", &finding.found);
    if !with_remedy {
        return;
    }
    if !finding.why.is_empty() {
        text.push_str(INDENT);
        folded(text, "why: ", &finding.why);
    }
    if !finding.fix.is_empty() {
        let label = if finding.severity == Severity::Fine { "ask" } else { "fix" };
        let _ = writeln!(text, "{INDENT}{label}: {}", finding.fix);
    }
}

/// Words in lines of `WIDTH`, from a cursor that stands behind the indent.
fn folded(text: &mut String, label: &str, words: &str) {
    let mut column = INDENT.len() + label.chars().count();
    text.push_str(label);
    let mut first = true;
    for word in words.split_whitespace() {
        let length = word.chars().count();
        if !first && column + 1 + length > WIDTH {
            let _ = write!(text, "\n{INDENT}{:1$}", "", label.chars().count());
            column = INDENT.len() + label.chars().count();
        } else if !first {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
        first = false;
    }
    text.push('\n');
}

fn coloured(text: &str, severity: Severity, colour: bool) -> String {
    // ANSI X3.64: green, yellow, bold red.
    let code = match severity {
        Severity::Fine => "32",
        Severity::Warning => "33",
        Severity::Broken => "1;31",
    };
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_folded_and_commands_are_not() {
        let long = "word ".repeat(40);
        let command = "command ".repeat(40);
        let text = as_text(&[Area::State.broken("x", long.clone(), long, command.trim())], false);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines.iter().filter(|line| !line.contains("fix:")).all(|line| line.len() <= WIDTH),
            "{text}"
        );
        assert!(text.contains(&format!("fix: {}\n", command.trim())), "{text}");
        assert!(lines.iter().all(|line| !line.ends_with(' ')), "{text}");
        assert_eq!(lines.last(), Some(&"1 broken, 0 warnings"));
    }

    #[test]
    fn what_several_have_in_common_is_said_once() {
        let one = |name: &str| Area::Cilium.unread("x", name, "no rights");
        let text = as_text(&[one("a"), one("b"), Area::Cilium.warning("x", "c", "d", "e")], false);
        assert_eq!(text.matches("sudo portmap doctor").count(), 1, "{text}");
        assert!(text.find("why: d") > text.find("sudo portmap doctor"), "{text}");
    }

    #[test]
    fn colours_come_only_when_asked_for() {
        let findings = [Area::State.fine("x", "y")];
        assert!(!as_text(&findings, false).contains('\x1b'));
        assert!(as_text(&findings, true).contains("\x1b[32mfine   \x1b[0m  y"));
        assert!(as_text(&findings, false).ends_with("all is fine\n"));
    }
}
