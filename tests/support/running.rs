//! Programs that a test starts, and what they leave in directories.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test says by a panic that it failed"
)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output};

/// A program that ends with the test, however that ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What it says.
#[track_caller]
pub fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stderr), "", "a success says nothing on stderr");
    text(&output.stdout)
}

#[track_caller]
pub fn fails(command: &mut Command, status: i32, message: &str) -> Output {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    assert!(text(&output.stderr).contains(message), "{message:?} is not in {output:?}");
    output
}

/// The names in a directory, hidden ones included.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
