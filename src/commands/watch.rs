//! `portmap install --watch`: binary and list stay as wanted until a stop signal comes.

use std::cmp::Ordering;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use semver::Version;

use super::CommandError;
use super::install::{
    self, Options, describe_binary, describe_list, ensure_list, locate, version_at,
};
use crate::conflist::PLUGIN;
use crate::conflist::edit::Change;
use crate::conflist::files::Choice;
use crate::error::Error;
use crate::sys::install::events::{Events, Wake};
use crate::sys::install::{Before, Stamp, can_be_run, install_binary, is_outdated, look, stamp};
use crate::throttle::Throttle;

/// Changes that make no event (a network file system, another host's) are seen after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// After so many repairs in a row it is not an accident.
const FIGHT: u32 = 3;

/// One of the two things that are kept.
struct Kept {
    throttle: Throttle,
    /// What went wrong last, so that it is said once.
    problem: Option<String>,
    /// Notes that were made, each of them once.
    said: Vec<String>,
    /// What may be the reason that somebody keeps reverting it.
    hint: &'static str,
}

/// What looking at a thing has led to.
enum Looked {
    /// It was as wanted, or cannot be so yet.
    Fine,
    /// It was put back: what to say of it.
    Repaired(String),
}

/// Installs and then waits for changes. `pause` is the shortest time between two repairs of one file.
/// One line per action goes to `log`.
pub fn run(options: &Options, pause: Duration, log: &mut dyn Write) -> Result<(), CommandError> {
    let failed = |error| Error::io("wait for changes", error);
    let mut events = Events::open().map_err(failed)?;
    let kept =
        |hint| Kept { throttle: Throttle::new(pause), problem: None, said: Vec::new(), hint };
    let mut binary = kept(
        "another installer puts its own portmap there, such as the init container of the AWS VPC CNI, which copies \
         all of upstream's plugins: take portmap out of what it installs",
    );
    let mut list = kept(
        "with Cilium, set cni.exclusive=false, or better cni.chainingMode=portmap, with which its own list names portmap",
    );
    let mut known = Known::default();
    let list_dir = match &options.list {
        Some(Choice::File(path)) => path.parent().unwrap_or(path),
        _ => &options.conf_dir,
    };
    let mut directories = vec![options.dest.as_path()];
    directories.extend(options.list.iter().map(|_| list_dir));
    let shown: Vec<String> = directories.iter().map(|dir| dir.display().to_string()).collect();
    say(log, &format!("watching {}", shown.join(" and ")))?;
    let mut blind: Option<String> = None;
    loop {
        // Pods need the binary also where nobody tells when it goes.
        let problem = events.watch(&directories).err().map(|error| error.to_string());
        if problem != blind {
            say(
                log,
                &match &problem {
                    Some(problem) => format!(
                        "cannot watch directories: {problem}; looking every {} s instead",
                        LOOK_AGAIN.as_secs()
                    ),
                    None => "watching directories again".to_owned(),
                },
            )?;
            blind = problem;
        }
        let mut timeout = LOOK_AGAIN;
        binary.keep(&events, &mut timeout, log, |notes| known.keep(&options.dest, notes))?;
        if options.list.is_some() {
            list.keep(&events, &mut timeout, log, |notes| keep_list(options, notes))?;
        }
        if events.wait(timeout).map_err(failed)? == Wake::Stop {
            say(log, "stopped; binary and list stay as they are")?;
            return Ok(());
        }
    }
}

impl Kept {
    fn keep(
        &mut self,
        events: &Events,
        timeout: &mut Duration,
        log: &mut dyn Write,
        look: impl FnOnce(&mut dyn FnMut(String)) -> Result<Looked, CommandError>,
    ) -> io::Result<()> {
        let wait = self.throttle.wait(events.now());
        if !wait.is_zero() {
            *timeout = wait.min(*timeout);
            return Ok(());
        }
        let mut notes = Vec::new();
        match look(&mut |note| notes.push(note)) {
            Ok(Looked::Fine) => self.problem = None,
            Ok(Looked::Repaired(what)) => {
                self.problem = None;
                say(log, &what)?;
                let now = events.now();
                let times = self.throttle.repaired(now);
                let pause = self.throttle.wait(now);
                if times == FIGHT {
                    say(
                        log,
                        &format!("somebody reverts it: {times} times in a row now; {}", self.hint),
                    )?;
                }
                if times >= FIGHT {
                    say(log, &format!("the next repair waits for {} s", pause.as_secs()))?;
                }
                *timeout = pause.min(*timeout);
            }
            Err(error) => {
                let problem = error.report().replace('\n', ": ");
                if self.problem.as_ref() != Some(&problem) {
                    say(log, &format!("cannot do it yet: {problem}"))?;
                }
                self.problem = Some(problem);
                // An attempt makes and removes a file, which is a change in the directory as well.
                if matches!(error, CommandError::Engine(_)) {
                    self.throttle.repaired(events.now());
                    *timeout = self.throttle.wait(events.now()).min(*timeout);
                }
            }
        }
        notes.retain(|note| !self.said.contains(note));
        notes.iter().try_for_each(|note| say(log, &format!("note: {note}")))?;
        self.said.append(&mut notes);
        Ok(())
    }
}

/// What is known of the binary's place.
#[derive(Default)]
struct Known {
    /// The file that was found to be as wanted, or was left alone.
    seen: Option<Stamp>,
    /// Whether it was ever looked at.
    looked: bool,
}

impl Known {
    /// The file is read only when it has changed: other plugins' installers are busy in that directory.
    fn keep(&mut self, dest: &Path, notes: &mut dyn FnMut(String)) -> Result<Looked, CommandError> {
        let path = dest.join(PLUGIN);
        let now = stamp(&path);
        if now.is_some() && now == self.seen {
            return Ok(Looked::Fine);
        }
        let reason = self.reason_to_stay(&path);
        self.looked = true;
        if let Some(reason) = reason {
            self.seen = now;
            notes(format!("{} is left alone: {reason}", path.display()));
            return Ok(Looked::Fine);
        }
        let before = install_binary(dest, notes)?;
        // Only what was compared after its stamp was taken is known: another installer may come between,
        // and what this one has written is looked at once more.
        self.seen = if before == Before::Same { now } else { None };
        Ok(match before {
            Before::Same => Looked::Fine,
            other => Looked::Repaired(describe_binary(&path, other)),
        })
    }

    /// Another build of this plugin that somebody has put there on purpose: an upgrade, which this
    /// program would undo. To begin with its own build goes before others of its version.
    fn reason_to_stay(&self, path: &Path) -> Option<String> {
        if !matches!(look(path), Ok(Before::Other)) {
            return None;
        }
        let theirs = version_at(path)?;
        let own = Version::parse(env!("CARGO_PKG_VERSION")).ok()?;
        let why = match theirs.cmp_precedence(&own) {
            Ordering::Greater => "a newer one",
            Ordering::Equal if self.looked => "another build",
            _ if is_outdated() => "and the file of this one has been replaced",
            _ => return None,
        };
        Some(format!(
            "it is portmap {theirs}, {why}, and this is {own}: where this runs from, put the same one there and restart it"
        ))
    }
}

fn keep_list(options: &Options, notes: &mut dyn FnMut(String)) -> Result<Looked, CommandError> {
    let Some(choice) = &options.list else { return Ok(Looked::Fine) };
    let plugin = options.dest.join(PLUGIN);
    // With a list that names a plugin which is not there, runtimes fail every ADD and every DEL.
    if !can_be_run(&plugin) {
        return Err(CommandError::Refused(format!(
            "no list is edited before there is an executable {}",
            plugin.display()
        )));
    }
    let path = locate(choice, &options.conf_dir)?
        .ok_or_else(|| install::nothing_there(choice, &options.conf_dir))?;
    let report = ensure_list(&path, notes)?;
    report.owner.iter().cloned().for_each(notes);
    Ok(match report.change {
        Change::None => Looked::Fine,
        _ => Looked::Repaired(describe_list(&report)),
    })
}

/// A log that nobody reads any more is no reason to stop.
fn say(log: &mut dyn Write, text: &str) -> io::Result<()> {
    match writeln!(log, "portmap: {text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
