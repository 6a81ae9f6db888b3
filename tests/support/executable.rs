//! Programs that tests make.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test fails by a panic")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes a program, in the place of whatever was there. Another process writes it: what a test has open
/// belongs to every process that another test's thread is about to start as well, and a program that
/// anybody has open for writing cannot be started (ETXTBSY).
pub fn write_executable(path: &Path, content: impl AsRef<[u8]>) {
    let mut writer = Command::new("sh")
        .args(["-c", "rm -f \"$1\" && cat >\"$1\" && chmod 755 \"$1\"", "sh"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    writer.stdin.take().unwrap().write_all(content.as_ref()).unwrap();
    assert!(writer.wait().unwrap().success(), "{}", path.display());
}
