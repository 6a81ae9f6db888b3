//! Waiting for a change in directories, which need not exist yet, or for a stop signal.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// How long changes are collected: who writes a file makes it first and fills it then.
const SETTLE: Duration = Duration::from_millis(100);

/// Why the waiting has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    Changed,
    TimedOut,
    Stop,
}

/// The two sources of events.
pub struct Events {
    /// `None` as long as the kernel gives none.
    inotify: Option<Inotify>,
    signals: SignalFd,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
    start: Instant,
}

impl Events {
    /// From now on SIGTERM and SIGINT only end a `wait`. As the first process of a container, which
    /// ignores signals that it does not handle, it gets them too: they are kept while they are blocked.
    pub fn open() -> io::Result<Self> {
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGTERM);
        stop.add(Signal::SIGINT);
        stop.thread_block()?;
        Ok(Events {
            inotify: None,
            signals: SignalFd::with_flags(&stop, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            watched: BTreeMap::new(),
            start: Instant::now(),
        })
    }

    /// Time since `open`.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Waits for changes in these directories from now on. Of one that does not exist, the nearest
    /// that does is watched for it to appear.
    ///
    /// # Errors
    ///
    /// What cannot be watched; a `wait` then ends by its timeout, unless a directory that can be changes.
    pub fn watch(&mut self, directories: &[&Path]) -> io::Result<()> {
        let inotify = match &self.inotify {
            Some(inotify) => inotify,
            None => {
                let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
                self.inotify.insert(Inotify::init(flags).map_err(named)?)
            }
        };
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        loop {
            let wanted = nearest(directories);
            let mut watched = BTreeMap::new();
            let mut failed = None;
            for path in &wanted {
                match inotify.add_watch(path, flags) {
                    Ok(descriptor) => drop(watched.insert(path.clone(), descriptor)),
                    // Gone again: the next round finds another.
                    Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                    // The others are watched all the same.
                    Err(error) => failed = Some(named(error)),
                }
            }
            for old in self.watched.values().filter(|old| !watched.values().any(|new| new == *old))
            {
                // The kernel has removed that of a directory that is gone.
                let _ = inotify.rm_watch(*old);
            }
            self.watched = watched;
            if let Some(error) = failed {
                return Err(error);
            }
            // One that appeared before its parent was watched.
            if nearest(directories) == wanted && self.watched.len() == wanted.len() {
                return Ok(());
            }
        }
    }

    /// Waits for the first change, a stop signal, or the end of `timeout`.
    pub fn wait(&self, timeout: Duration) -> io::Result<Wake> {
        if self.poll(true, timeout)? {
            return Ok(Wake::Stop);
        }
        if !self.drain()? {
            return Ok(Wake::TimedOut);
        }
        if self.poll(false, SETTLE)? {
            return Ok(Wake::Stop);
        }
        self.drain()?;
        Ok(Wake::Changed)
    }

    /// Waits; true if a stop signal has come.
    fn poll(&self, changes: bool, timeout: Duration) -> io::Result<bool> {
        let mut descriptors = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if let Some(inotify) = self.inotify.as_ref().filter(|_| changes) {
            descriptors.push(PollFd::new(inotify.as_fd(), PollFlags::POLLIN));
        }
        // Rounded up, so that the time is over when it says so.
        let milliseconds = i32::try_from(timeout.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
        match poll(
            &mut descriptors,
            PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(_) | Err(Errno::EINTR) => Ok(self.signals.read_signal()?.is_some()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what there is; true if there was anything.
    fn drain(&self) -> io::Result<bool> {
        let Some(inotify) = &self.inotify else { return Ok(false) };
        let mut any = false;
        loop {
            match inotify.read_events() {
                Ok(events) => any |= !events.is_empty(),
                Err(Errno::EAGAIN) => return Ok(any),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The limits of inotify have errors of files (inotify_init1(2), inotify_add_watch(2)).
fn named(error: Errno) -> io::Error {
    match error {
        Errno::EMFILE => io::Error::other(
            "this user's inotify instances are used up (fs.inotify.max_user_instances)",
        ),
        Errno::ENOSPC => io::Error::other(
            "this user's inotify watches are used up (fs.inotify.max_user_watches)",
        ),
        error => error.into(),
    }
}

fn nearest(directories: &[&Path]) -> Vec<PathBuf> {
    let mut nearest: Vec<PathBuf> = directories
        .iter()
        .filter_map(|path| path.ancestors().find(|path| path.is_dir()))
        .map(Path::to_owned)
        .collect();
    nearest.sort();
    nearest.dedup();
    nearest
}
