//! The terminal that a report goes to.

use std::io::IsTerminal;

/// Columns of the terminal at stdout; `None` if it is none. `COLUMNS` of the environment, as shells
/// and tests set it, goes before what the terminal says of itself (TIOCGWINSZ).
#[must_use]
pub fn width(columns: Option<&str>) -> Option<usize> {
    let stdout = std::io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    let said = columns.and_then(|text| text.parse().ok());
    let own = || rustix::termios::tcgetwinsize(&stdout).ok().map(|size| usize::from(size.ws_col));
    // A serial line does not know its width, and says 0.
    said.or_else(own).filter(|width| *width > 0)
}
