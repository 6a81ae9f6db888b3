//! Reading small files.
//!
//! Not `std::fs::read`: with musl, it asks the kernel to close what it has just opened so on exec(2),
//! and for a size that /proc and /sys do not tell.

use std::io;
use std::os::fd::AsFd;

use rustix::buffer::spare_capacity;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{read as read_some, retry_on_intr};
use rustix::path::Arg;

/// Bytes that one read(2) takes in: most records, and what there is to be read of /proc and /sys.
const USUAL: usize = 2048;

/// The content of a file.
///
/// # Errors
///
/// What open(2) and read(2) return.
pub fn read(path: impl Arg + Copy) -> io::Result<Vec<u8>> {
    read_at(CWD, path)
}

/// The content of a file of a directory that is open.
///
/// # Errors
///
/// As [`read`].
pub fn read_at(dir: impl AsFd, path: impl Arg + Copy) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = retry_on_intr(|| openat(&dir, path, flags, Mode::empty()))?;
    let mut content = Vec::with_capacity(USUAL);
    while retry_on_intr(|| read_some(&file, spare_capacity(&mut content)))? > 0 {
        if content.len() == content.capacity() {
            content.reserve(USUAL);
        }
    }
    Ok(content)
}

/// The content of a file of text.
///
/// # Errors
///
/// As [`read`], and `InvalidData` for what is not UTF-8.
pub fn read_to_string(path: impl Arg + Copy) -> io::Result<String> {
    text(read(path)?)
}

/// Bytes that must be text.
///
/// # Errors
///
/// `InvalidData` for what is not UTF-8.
pub fn text(content: Vec<u8>) -> io::Result<String> {
    String::from_utf8(content).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_to_its_end() {
        let path = std::env::temp_dir().join(format!("portmap-file-{}", std::process::id()));
        for length in [0, 1, USUAL - 1, USUAL, USUAL + 1, 3 * USUAL] {
            let content: Vec<u8> = (0..length).map(|at| b'a' + (at % 26) as u8).collect();
            std::fs::write(&path, &content).unwrap();
            assert_eq!(read(&path).unwrap(), content);
        }
        std::fs::write(&path, [0xff]).unwrap();
        assert_eq!(read_to_string(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(read_to_string("/proc/sys/kernel/ostype").unwrap(), "Linux\n");
    }
}
