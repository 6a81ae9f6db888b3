//! `portmap uninstall`: away with the binary, once nothing needs it any more.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::flush::describe;
use super::install::{ListReport, describe_list, list_json, locate, nothing_there};
use super::{CommandError, Terminal, Verdict};
use crate::conflist::PLUGIN;
use crate::conflist::edit::{Change, remove};
use crate::conflist::files::{Choice, backup_name, is_configuration, names_plugin};
use crate::engine::Engine;
use crate::error::Error;
use crate::sys::Host;
use crate::sys::command::Tools;
use crate::sys::install::{self, Before, ListFile, look};

/// What to remove from where.
#[derive(Debug, Clone)]
pub struct Options {
    pub dest: PathBuf,
    /// The list to take the plugin out of; `None`: no list is touched.
    pub list: Option<Choice>,
    pub conf_dir: PathBuf,
    pub state_dir: PathBuf,
    /// Also if it is still needed.
    pub force: bool,
    pub json: bool,
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
    let mut notes = Vec::new();
    let list = match &options.list {
        Some(choice) => {
            let path = locate(choice, &options.conf_dir)?
                .ok_or_else(|| nothing_there(choice, &options.conf_dir))?;
            Some(leave_list(&path, &mut |note| notes.push(note))?)
        }
        None => None,
    };
    if let Some(report) = list.as_ref().filter(|_| !options.json) {
        writeln!(terminal.output, "{}", describe_list(report))?;
    }
    let path = options.dest.join(PLUGIN);
    if !options.force {
        let mut reasons = Vec::new();
        if is_strange(&path)? {
            reasons.push("it is not a portmap of this project".to_owned());
        } else {
            reasons.extend(lists_that_name_it(&options.conf_dir)?);
            reasons.extend(records_that_need_it(host, &options.state_dir)?);
        }
        if !reasons.is_empty() {
            return Err(CommandError::Refused(format!(
                "{} was left where it is:\n  {}\nWhen that is settled, repeat this; --force removes it nevertheless.",
                path.display(),
                reasons.join("\n  ")
            )));
        }
    }
    let removed = install::remove(&path)?;
    notes.extend(host.take_warnings());
    if options.json {
        let report = json!({
            "binary": { "path": path, "change": if removed { "removed" } else { "none" } },
            "list": list.as_ref().map(list_json),
            "notes": notes,
        });
        writeln!(terminal.output, "{report}")?;
        return Ok(Verdict::Fine);
    }
    match removed {
        true => writeln!(terminal.output, "removed {}", path.display())?,
        false => writeln!(terminal.output, "{} is not installed; nothing to do", path.display())?,
    }
    for note in notes {
        writeln!(terminal.output, "note: {note}")?;
    }
    Ok(Verdict::Fine)
}

/// The inverse of what installing does to a list.
fn leave_list(path: &Path, warn: &mut dyn FnMut(String)) -> Result<ListReport, CommandError> {
    let file = ListFile::read(path)?
        .ok_or_else(|| CommandError::Refused(format!("{} does not exist", path.display())))?;
    let edited = remove(&file.text)
        .map_err(|refusal| CommandError::Refused(format!("{}: {refusal}", path.display())))?;
    if edited.change == Change::Removed {
        file.replace(&edited.text, warn)?;
    }
    let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let backup = file.path.with_file_name(backup_name(&name));
    // One with another text is somebody's way back.
    if ListFile::read(&backup)?.is_some_and(|backup| backup.text == edited.text) {
        install::remove(&backup)?;
    }
    Ok(ListReport { path: path.to_owned(), change: edited.change, backup: None, owner: None })
}

/// Whether something else has our name: upstream's plugin does, and pods may depend on it.
fn is_strange(path: &Path) -> Result<bool, CommandError> {
    match look(path).map_err(|error| Error::io(format!("read {}", path.display()), error))? {
        Before::Nothing | Before::Same => Ok(false),
        Before::Other => {
            let tools = Tools::new(path.parent().map(Path::as_os_str));
            let said = tools.run(PLUGIN, &["--version"], "").unwrap_or_default();
            Ok(!said.starts_with("portmap "))
        }
    }
}

fn lists_that_name_it(conf_dir: &Path) -> Result<Vec<String>, CommandError> {
    let mut reasons = Vec::new();
    for name in install::names(conf_dir)?.iter().filter(|name| is_configuration(name)) {
        let path = conf_dir.join(name);
        if ListFile::read(&path)?.is_some_and(|file| names_plugin(&file.text)) {
            let path = path.display();
            reasons.push(format!(
                "{path} names it (portmap uninstall --conflist {path} takes it out)"
            ));
        }
    }
    reasons.sort();
    Ok(reasons)
}

fn records_that_need_it(host: &Host, state_dir: &Path) -> Result<Vec<String>, CommandError> {
    // Asking the store would make the directory.
    if install::names(&state_dir.join("records"))?.is_empty() {
        return Ok(Vec::new());
    }
    let (records, problems) = Engine::lock(host, state_dir)?.store.all()?;
    let mut reasons: Vec<String> = records
        .iter()
        .map(|record| {
            format!(
                "{} is forwarded (it ends with the pod, or with portmap flush)",
                describe(record)
            )
        })
        .collect();
    reasons.extend(problems);
    Ok(reasons)
}
