//! Reading directories.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::fs::{CWD, Mode, OFlags, RawDir, openat};
use rustix::io::Errno;
use rustix::path::Arg;

/// Bytes for what one getdents64(2) returns: those of some hundred names.
const BUFFER: usize = 4096;

/// The names in a directory, in the order of the file system; none if there is no such directory.
///
/// Not `std::fs::read_dir`: musl's `opendir` asks the kernel for memory, and returns it, for each one.
///
/// # Errors
///
/// What open(2) and getdents64(2) return.
pub fn names(path: impl Arg) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let keep = |name: &str| {
        names.push(name.to_owned());
        None::<()>
    };
    find_at(CWD, path, keep)?;
    Ok(names)
}

/// Looks at the names in a directory below one that is open, and reads it no further than to the one of
/// which something was found out.
///
/// # Errors
///
/// As [`names`].
pub fn find_at<T>(
    dir: impl AsFd,
    path: impl Arg,
    mut look: impl FnMut(&str) -> Option<T>,
) -> io::Result<Option<T>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = match openat(dir, path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        dir => dir?,
    };
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        if !matches!(&*name, "." | "..")
            && let Some(found) = look(&name)
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;

    #[test]
    fn a_directory_is_read_to_its_end_or_to_what_is_found() {
        let path = std::env::temp_dir().join(format!("portmap-names-{}", std::process::id()));
        assert_eq!(names(&path).unwrap(), Vec::<String>::new());
        fs::create_dir(&path).unwrap();
        assert_eq!(names(&path).unwrap(), Vec::<String>::new());
        // More than fit into the buffer, of up to the longest that there are.
        let made: BTreeSet<String> = (1..=255).map(|length| "n".repeat(length)).collect();
        made.iter().for_each(|name| fs::write(path.join(name), "").unwrap());
        assert_eq!(names(&path).unwrap().into_iter().collect::<BTreeSet<_>>(), made);
        let mut seen = 0;
        let third = find_at(CWD, &path, |name| {
            seen += 1;
            (seen == 3).then(|| name.to_owned())
        });
        assert!(made.contains(&third.unwrap().unwrap()));
        assert_eq!(seen, 3);
        fs::remove_dir_all(&path).unwrap();
    }
}
