//! What the demonstration shows to people: aligned tables and one line per proof.

use std::io::{self, Write};

use super::matrix::{Expect, Outcome};
use crate::model::Family;

/// Prints one row per outcome under a heading, columns aligned.
pub fn table(out: &mut dyn Write, outcomes: &[Outcome]) -> io::Result<()> {
    let mut rows = vec![
        ["path", "", "", "called", "result", "source seen", "expected", ""].map(str::to_owned),
    ];
    rows.extend(outcomes.iter().map(row));
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let widths: [usize; 8] = std::array::from_fn(width);
    for row in &rows {
        let mut line = String::from("  ");
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn row(outcome: &Outcome) -> [String; 8] {
    let case = &outcome.case;
    let (result, seen) = match &outcome.result {
        Ok(reply) => (format!("reached {}", reply.server), reply.seen.ip().to_string()),
        Err(failure) => (failure.to_string(), "-".to_owned()),
    };
    let expected = match case.expect {
        Expect::LeftAlone => case.expect.to_string(),
        Expect::Reached(_) | Expect::ReachedOrLeftAlone(_) => {
            format!("{}, {}", case.server, case.expect)
        }
    };
    [
        case.path.clone(),
        Family::of(&case.target.ip()).to_string(),
        case.transport.to_string(),
        case.target.to_string(),
        result,
        seen,
        expected,
        verdict(outcome.ok).to_owned(),
    ]
}

/// Prints one proof and whether it held; returns that.
pub fn proof(out: &mut dyn Write, what: &str, held: &Result<(), String>) -> io::Result<bool> {
    writeln!(out, "  {:6}  {what}", verdict(held.is_ok()))?;
    if let Err(reason) = held {
        for line in reason.lines() {
            writeln!(out, "          {line}")?;
        }
    }
    Ok(held.is_ok())
}

/// Prints a heading between blank lines.
pub fn heading(out: &mut dyn Write, text: &str) -> io::Result<()> {
    writeln!(out, "\n{text}\n")
}

fn verdict(held: bool) -> &'static str {
    if held { "ok" } else { "FAILED" }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test says by a panic that it failed")]
mod tests {
    use super::*;
    use crate::demo::matrix::{Case, Place, Source};
    use crate::demo::traffic::{Failure, Transport};

    fn outcome(path: &str, transport: Transport) -> Outcome {
        Outcome {
            case: Case {
                path: path.to_owned(),
                from: Place::Node,
                transport,
                target: "[fd00::1]:80".parse().unwrap(),
                server: "pod-a".to_owned(),
                expect: Expect::Reached(Source::Any),
            },
            result: Err(Failure::TimedOut),
            ok: false,
        }
    }

    #[test]
    fn columns_line_up_and_lines_do_not_end_in_blanks() {
        let outcomes =
            [outcome("node", Transport::Tcp), outcome("a longer path", Transport::UdpUnconnected)];
        let mut text = Vec::new();
        table(&mut text, &outcomes).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let columns: Vec<_> = lines[1..].iter().map(|line| line.find("[fd00::1]")).collect();
        assert_eq!(columns, [lines[0].find("called"); 2]);
        assert!(lines.iter().all(|line| line.trim_end() == *line));
        assert!(lines[1].ends_with("FAILED"));
    }

    #[test]
    fn a_failed_proof_says_why() {
        let mut text = Vec::new();
        let held = proof(&mut text, "nothing is left", &Err("a\nb".to_owned())).unwrap();
        assert!(!held);
        let expected = "  FAILED  nothing is left\n          a\n          b\n";
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}
