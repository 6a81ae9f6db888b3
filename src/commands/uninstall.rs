//! `portmap uninstall`: away with the binary, once nothing needs it any more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::flush::describe;
use super::install::{ListReport, describe_list, list_json, locate, version_at};
use super::{CommandError, Terminal, Verdict};
use crate::conflist::PLUGIN;
use crate::conflist::cache::{Cached, MULTUS_RESULTS, RESULTS};
use crate::conflist::edit::{Change, insert, remove};
use crate::conflist::files::{
    Choice, backup_name, is_backup, is_configuration, names_plugin, state_dirs,
};
use crate::engine::Engine;
use crate::error::Error;
use crate::sys::Host;
use crate::sys::install::{self, Before, ListFile, look};
use crate::sys::namespace::{Life, life_at};
use crate::sys::store::DEFAULT_DIR;

/// What to remove from where.
#[derive(Debug, Clone)]
pub struct Options {
    pub dest: PathBuf,
    /// The list to take the plugin out of; `None`: no list is touched.
    pub list: Option<Choice>,
    pub conf_dir: PathBuf,
    pub state_dir: PathBuf,
    /// What libcni remembers of attachments.
    pub cache_dir: PathBuf,
    /// Also if it is still needed.
    pub force: bool,
    pub json: bool,
}

/// What was done.
#[derive(Default)]
struct Report {
    list: Option<ListReport>,
    /// Whether there was a binary, which is gone now; `None` if it was left alone.
    removed: Option<bool>,
    notes: Vec<String>,
}

/// A runtime that does not find a plugin stops in the middle of a pod's DEL, so that neither Cilium's
/// nor any other plugin before it cleans up, and the pod never ends.
///
/// # Errors
///
/// A refusal that names who needs the binary; a list that was asked for is changed nevertheless, so
/// that no new pod comes.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    let mut report = Report::default();
    let path = options.dest.join(PLUGIN);
    let done = uninstall(host, options, &path, &mut report);
    report.notes.extend(host.take_warnings());
    if options.json {
        let removed = report.removed == Some(true);
        let report = json!({
            "binary": { "path": path, "change": if removed { "removed" } else { "none" } },
            "list": report.list.as_ref().map(list_json),
            "notes": report.notes,
            "failed": done.as_ref().err().map(CommandError::report),
        });
        writeln!(terminal.output, "{report}")?;
        return done.map(|()| Verdict::Fine);
    }
    if let Some(list) = &report.list {
        match list.change {
            Change::None => {
                writeln!(terminal.output, "{} has no entry of {PLUGIN}", list.path.display())?
            }
            _ => writeln!(terminal.output, "{}", describe_list(list))?,
        }
    }
    let path = path.display();
    match report.removed {
        Some(true) => writeln!(terminal.output, "removed {path}")?,
        Some(false) => writeln!(terminal.output, "{path} is not installed; nothing to do")?,
        None => {}
    }
    for note in report.notes {
        writeln!(terminal.output, "note: {note}")?;
    }
    done.map(|()| Verdict::Fine)
}

fn uninstall(
    host: &Host,
    options: &Options,
    path: &Path,
    report: &mut Report,
) -> Result<(), CommandError> {
    let list = match &options.list {
        Some(choice) => locate(choice, &options.conf_dir)?,
        None => None,
    };
    if options.list == Some(Choice::Auto) && list.is_none() {
        report.notes.push(format!(
            "there is no list in {}, and so nothing to take {PLUGIN} out of",
            options.conf_dir.display()
        ));
    }
    // While the list still says it.
    let mut state_dirs = BTreeSet::from([options.state_dir.clone()]);
    if !options.force {
        state_dirs.extend(configured_state_dirs(&options.conf_dir, list.as_deref())?);
    }
    if let Some(list) = list {
        report.list = leave_list(&list, &mut |note| report.notes.push(note))?;
    }
    if !options.force {
        let mut reasons = Vec::new();
        if is_strange(path)? {
            reasons.push("it is not a portmap of this project".to_owned());
        } else {
            reasons.extend(lists_that_name_it(&options.conf_dir, report.list.as_ref())?);
            for dir in &state_dirs {
                reasons.extend(records_that_need_it(host, dir)?);
            }
            for (results, who, also) in CACHES {
                let dir = options.cache_dir.join(results);
                reasons.extend(cached_lists_that_name_it(&dir, who, also)?);
            }
        }
        if !reasons.is_empty() {
            return Err(CommandError::Refused(format!(
                "{} was left where it is:\n  {}\nWhen that is settled, repeat this; --force removes it nevertheless.",
                path.display(),
                reasons.join("\n  ")
            )));
        }
    }
    report.removed = Some(install::remove(path)?);
    Ok(())
}

/// State directories that configurations name, and those that named portmap before an edit: attachments
/// outlive the entry that they were made with.
fn configured_state_dirs(
    conf_dir: &Path,
    list: Option<&Path>,
) -> Result<Vec<PathBuf>, CommandError> {
    let names = install::names(conf_dir)?;
    let names = names.iter().filter(|name| is_configuration(name) || is_backup(name));
    let mut paths: Vec<PathBuf> = names.map(|name| conf_dir.join(name)).collect();
    if let Some(list) = list {
        let name = list.file_name().unwrap_or_default().to_string_lossy();
        paths.extend([list.to_owned(), list.with_file_name(backup_name(&name))]);
    }
    let mut dirs = Vec::new();
    for path in paths {
        if let Some(file) = ListFile::read(&path)? {
            dirs.extend(state_dirs(&file.text));
            dirs.extend(file.drop_ins.iter().flat_map(|drop_in| state_dirs(&drop_in.text)));
        }
    }
    Ok(dirs)
}

/// The inverse of what installing does to a list. An entry that installing would not put there, with
/// options or in another place, is kept beside the list. One that is gone, as when the network was removed
/// first, needs nothing.
fn leave_list(
    path: &Path,
    warn: &mut dyn FnMut(String),
) -> Result<Option<ListReport>, CommandError> {
    let Some(file) = ListFile::read(path)? else {
        warn(format!("{} does not exist, and so names {PLUGIN} no more", path.display()));
        return Ok(None);
    };
    let edited = remove(&file.text, &file.drop_ins)
        .map_err(|refusal| CommandError::Refused(format!("{}: {refusal}", path.display())))?;
    let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut report = ListReport::of(path, edited.change);
    if report.change == Change::Removed {
        if insert(&edited.text, &file.drop_ins).map_or(true, |again| again.text != file.text) {
            report.backup = Some(file.put_beside(&backup_name(&name), &file.text, warn)?);
        }
        file.replace(&edited.text, warn)?;
    }
    let backup = file.path.with_file_name(backup_name(&name));
    // One with another text is somebody's way back.
    if let Ok(Some(there)) = ListFile::read(&backup)
        && there.text == edited.text
        && let Err(error) = install::remove(&backup)
    {
        warn(error.to_string());
    }
    Ok(Some(report))
}

/// Whether something else has our name: upstream's plugin does, and pods may depend on it.
fn is_strange(path: &Path) -> Result<bool, CommandError> {
    match look(path).map_err(|error| Error::io(format!("read {}", path.display()), error))? {
        Before::Nothing | Before::Same => Ok(false),
        Before::Other => Ok(version_at(path).is_none()),
    }
}

/// Those of the directory, and the one that was to be left: it may be elsewhere, and have drop-ins.
fn lists_that_name_it(
    conf_dir: &Path,
    left: Option<&ListReport>,
) -> Result<Vec<String>, CommandError> {
    let names = install::names(conf_dir)?;
    let names = names.iter().filter(|name| is_configuration(name));
    let mut paths: BTreeSet<PathBuf> = names.map(|name| conf_dir.join(name)).collect();
    paths.extend(left.map(|left| left.path.clone()));
    let mut reasons = BTreeSet::new();
    for path in paths {
        let Some(file) = ListFile::read(&path)? else { continue };
        if names_plugin(&file.text) {
            let path = path.display();
            let way = match remove(&file.text, &file.drop_ins) {
                Ok(edited) if !names_plugin(&edited.text) => {
                    format!("portmap uninstall --conflist {path} takes it out")
                }
                _ => "which has to be edited by hand".to_owned(),
            };
            reasons.insert(format!("{path} names it ({way})"));
        }
        for drop_in in file.drop_ins.iter().filter(|drop_in| names_plugin(&drop_in.text)) {
            reasons.insert(format!(
                "{} names it (a drop-in of {}, which has to be removed by hand)",
                drop_in.path.display(),
                path.display()
            ));
        }
    }
    Ok(reasons.into_iter().collect())
}

fn records_that_need_it(host: &Host, state_dir: &Path) -> Result<Vec<String>, CommandError> {
    // Asking the store would make the directory.
    if install::names(&state_dir.join("records"))?.is_empty() {
        return Ok(Vec::new());
    }
    let (records, problems) = Engine::lock(host, state_dir)?.store.all()?;
    let flush = match state_dir == Path::new(DEFAULT_DIR) {
        true => "portmap flush".to_owned(),
        false => format!("portmap flush --state-dir {}", state_dir.display()),
    };
    let mut reasons: Vec<String> = records
        .iter()
        .map(|record| {
            format!("{} is forwarded (it ends with the pod, or with {flush})", describe(record))
        })
        .collect();
    reasons.extend(problems);
    Ok(reasons)
}

/// Who takes the list for DEL from which directory of libcni's cache, and what else there is to know.
const CACHES: [(&str, &str, &str); 2] = [
    (
        RESULTS,
        "CRI-O and podman call",
        "; containerd calls it with the list of now: --force will do when there is no other reason",
    ),
    (MULTUS_RESULTS, "Multus calls", ""),
];

/// Attachments without hostPorts have no record, and their DEL runs the plugin all the same where it is
/// called with the list that they were made with.
fn cached_lists_that_name_it(dir: &Path, who: &str, also: &str) -> Result<Option<String>, Error> {
    let is_needed =
        |cached: &Cached| names_plugin(&cached.list) && life_at(&cached.netns, None) != Life::Gone;
    let files = install::cached(dir, is_needed)?;
    Ok(files.first().map(|first| {
        let first = first.display();
        let of = match files.len() {
            1 => format!("{first} is of an attachment that was made with a list which names it"),
            many => format!(
                "{many} files of {} are of attachments that were made with a list which names it, such as {first}",
                dir.display()
            ),
        };
        format!(
            "{of} ({who} DEL with that list: delete these pods, or drain the node, and remove what is left \
             of containers that are gone{also})"
        )
    }))
}
