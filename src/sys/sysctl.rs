//! Kernel parameters under `/proc/sys`, of the network namespace of the calling thread where they
//! have one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::file;

const ROOT: &str = "/proc/sys";

/// Reads a parameter, without the newline at its end. The segments of its path are given one by
/// one, because names of devices may contain dots:
/// `["net", "ipv4", "conf", "eth0.5", "route_localnet"]`.
///
/// # Errors
///
/// `InvalidInput` for a segment that would lead elsewhere; `NotFound` for a parameter (or a device)
/// that does not exist; what reading returned, with the path.
pub fn read(segments: &[&str]) -> io::Result<String> {
    let path = path(segments)?;
    let text = file::read_to_string(&path).map_err(|error| with_path(&path, &error))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// Sets a parameter.
///
/// # Errors
///
/// As [`read`]; a value that the parameter does not take is `InvalidInput`.
pub fn write(segments: &[&str], value: &str) -> io::Result<()> {
    let path = path(segments)?;
    // Not created, and in one write: procfs takes a write at offset 0 only.
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|error| with_path(&path, &error))
}

fn path(segments: &[&str]) -> io::Result<PathBuf> {
    let mut path = PathBuf::from(ROOT);
    for segment in segments {
        if matches!(*segment, "" | "." | "..") || segment.contains(['/', '\0']) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{segment:?} cannot be part of a sysctl's name"),
            ));
        }
        path.push(segment);
    }
    Ok(path)
}

fn with_path(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    #[test]
    fn segments_stay_below_the_root() {
        let dotted = path(&["net", "ipv4", "conf", "eth0.5", "route_localnet"]).unwrap();
        assert_eq!(dotted, Path::new("/proc/sys/net/ipv4/conf/eth0.5/route_localnet"));
        for bad in ["..", ".", "", "a/b", "/etc", "a\0b"] {
            let error = path(&["net", bad]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bad:?}");
        }
    }

    #[test]
    fn reading_drops_the_newline() {
        assert_eq!(read(&["kernel", "ostype"]).unwrap(), "Linux");
        let error = read(&["net", "ipv4", "conf", "no-such-dev", "forwarding"]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("no-such-dev"));
    }
}
