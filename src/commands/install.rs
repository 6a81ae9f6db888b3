//! `portmap install`: the running binary among a runtime's plugins, and in its list.

use std::path::{Path, PathBuf};
use std::time::Duration;

use semver::Version;
use serde_json::{Value, json};

use super::{CommandError, Terminal, Verdict};
use crate::conflist::edit::{Change, insert};
use crate::conflist::files::{Choice, backup_name, first, owner};
use crate::conflist::{BEFORE_DROP_INS, List, PLUGIN};
use crate::sys::command::Tools;
use crate::sys::install::{Before, ListFile, install_binary, names};
use crate::usage::NAME_AND_VERSION;

/// How long another program may take to tell its version.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to install where.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the runtime looks for plugins.
    pub dest: PathBuf,
    /// `None`: no list is touched.
    pub list: Option<Choice>,
    /// Where the runtime looks for lists.
    pub conf_dir: PathBuf,
    pub json: bool,
}

/// What became of a list.
#[derive(Debug, Clone)]
pub(super) struct ListReport {
    pub path: PathBuf,
    pub change: Change,
    pub backup: Option<PathBuf>,
    /// The drop-in that names the plugin in the list's stead.
    pub drop_in: Option<PathBuf>,
    /// Who may undo it.
    pub owner: Option<String>,
}

impl ListReport {
    pub fn of(path: &Path, change: Change) -> Self {
        ListReport { path: path.to_owned(), change, backup: None, drop_in: None, owner: None }
    }
}

/// What was done.
#[derive(Default)]
struct Report {
    before: Option<Before>,
    list: Option<ListReport>,
    notes: Vec<String>,
}

/// Installs, and says what was done; a second time there is nothing to do.
pub fn run(options: &Options, terminal: &mut Terminal) -> Result<Verdict, CommandError> {
    let mut report = Report::default();
    let path = options.dest.join(PLUGIN);
    let done = install(options, &mut report);
    if options.json {
        let report = json!({
            "version": NAME_AND_VERSION,
            "binary": { "path": path, "change": report.before.map_or("none", change_of_binary) },
            "list": report.list.as_ref().map(list_json),
            "notes": report.notes,
            "failed": done.as_ref().err().map(CommandError::report),
        });
        writeln!(terminal.output, "{report}")?;
        return done.map(|()| Verdict::Fine);
    }
    if let Some(before) = report.before {
        writeln!(terminal.output, "{}", describe_binary(&path, before))?;
    }
    if let Some(list) = &report.list {
        if options.list == Some(Choice::Auto) {
            writeln!(
                terminal.output,
                "{} is the first list in {}",
                list.path.display(),
                options.conf_dir.display()
            )?;
        }
        writeln!(terminal.output, "{}", describe_list(list))?;
    }
    for note in report.notes {
        writeln!(terminal.output, "note: {note}")?;
    }
    done.map(|()| Verdict::Fine)
}

fn install(options: &Options, report: &mut Report) -> Result<(), CommandError> {
    report.before = Some(install_binary(&options.dest, &mut |note| report.notes.push(note))?);
    let Some(choice) = &options.list else { return Ok(()) };
    let path = locate(choice, &options.conf_dir)?
        .ok_or_else(|| nothing_there(choice, &options.conf_dir))?;
    let list = ensure_list(&path, &mut |note| report.notes.push(note))?;
    report.notes.extend(list.owner.clone());
    report.list = Some(list);
    Ok(())
}

/// The list that is meant; with `Auto` the one that runtimes take, if there is any.
pub(super) fn locate(choice: &Choice, conf_dir: &Path) -> Result<Option<PathBuf>, CommandError> {
    match choice {
        Choice::File(path) => Ok(Some(path.clone())),
        Choice::Auto => {
            let names = names(conf_dir)?;
            Ok(first(names.iter().map(String::as_str)).map(|name| conf_dir.join(name)))
        }
    }
}

pub(super) fn nothing_there(choice: &Choice, conf_dir: &Path) -> CommandError {
    CommandError::Refused(match choice {
        Choice::File(path) => format!("{} does not exist", path.display()),
        Choice::Auto => format!(
            "there is no list in {} yet: repeat this when the network is set up, let it wait with --watch, or \
             name the list with --conflist PATH or its directory with --conf-dir",
            conf_dir.display()
        ),
    })
}

/// Makes a list name the plugin.
pub(super) fn ensure_list(
    path: &Path,
    warn: &mut dyn FnMut(String),
) -> Result<ListReport, CommandError> {
    let file = ListFile::read(path)?
        .ok_or_else(|| CommandError::Refused(format!("{} does not exist", path.display())))?;
    let edited = insert(&file.text, &file.drop_ins)
        .map_err(|refusal| CommandError::Refused(format!("{}: {refusal}", path.display())))?;
    let mut report = ListReport::of(path, edited.change);
    if report.change == Change::None {
        let list = List::parse(&file.text, &file.drop_ins).ok();
        report.drop_in = list.and_then(|list| Some(list.find(PLUGIN)?.file?.to_owned()));
        if let Some(drop_in) = &report.drop_in {
            warn(format!("{} counts, and {BEFORE_DROP_INS}", drop_in.display()));
        }
        return Ok(report);
    }
    let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    report.backup = Some(file.put_beside(&backup_name(&name), &file.text, warn)?);
    file.replace(&edited.text, warn)?;
    // Runtimes repeat no ADD for what a list gains.
    warn("pods that were made without it have no hostPorts until they are made anew".to_owned());
    if let Ok(list) = List::parse(&edited.text, &file.drop_ins) {
        let around = names(file.path.parent().unwrap_or(path)).unwrap_or_default();
        report.owner = owner(&name, &list, &around);
    }
    Ok(report)
}

/// The version of a build of this plugin, which it tells if it can be run. Runtimes start what is there
/// for every pod; upstream's plugin introduces itself on stderr.
pub(super) fn version_at(path: &Path) -> Option<Version> {
    let mut tools = Tools::new(path.parent().map(Path::as_os_str));
    tools.deadline = PATIENCE;
    let said = tools.run(PLUGIN, &["--version"], "").ok()?;
    Version::parse(said.lines().next()?.strip_prefix("portmap ")?).ok()
}

pub(super) fn describe_binary(path: &Path, before: Before) -> String {
    let path = path.display();
    match before {
        Before::Nothing => format!("installed {path} ({NAME_AND_VERSION})"),
        Before::Other => format!("installed {path} ({NAME_AND_VERSION}) in place of another file"),
        Before::Same => format!("{path} is up to date ({NAME_AND_VERSION})"),
    }
}

fn change_of_binary(before: Before) -> &'static str {
    match before {
        Before::Nothing => "installed",
        Before::Other => "replaced",
        Before::Same => "none",
    }
}

pub(super) fn describe_list(report: &ListReport) -> String {
    let path = report.path.display();
    let backup = report.backup.as_ref().map(|backup| format!("; as it was: {}", backup.display()));
    let backup = backup.unwrap_or_default();
    match &report.change {
        Change::None => match &report.drop_in {
            None => format!("{path} names {PLUGIN} already"),
            Some(drop_in) => {
                format!("{path} has {PLUGIN} already, from {}", drop_in.display())
            }
        },
        Change::Inserted { after } => format!("{path}: put {PLUGIN} behind {after}{backup}"),
        Change::CapabilityAdded => {
            format!("{path}: gave {PLUGIN} the capability portMappings{backup}")
        }
        Change::Removed => format!("{path}: took {PLUGIN} out{backup}"),
    }
}

pub(super) fn list_json(report: &ListReport) -> Value {
    let (change, after) = match &report.change {
        Change::None => ("none", None),
        Change::Inserted { after } => ("inserted", Some(after)),
        Change::CapabilityAdded => ("capability-added", None),
        Change::Removed => ("removed", None),
    };
    json!({ "path": report.path, "change": change, "after": after, "backup": report.backup })
}
