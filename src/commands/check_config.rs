//! `portmap check-config`: what a configuration would do on this node, and what is wrong with it.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::{CommandError, Terminal, Verdict};
use crate::backend::{self, Unusable};
use crate::conf::{ConflictPolicy, NetConf};
use crate::conflist::BEFORE_DROP_INS;
use crate::conflist::check::{Analysis, Finding, Severity, analyse};
use crate::engine::probe;
use crate::error::Error;
use crate::model::BackendKind;
use crate::request;
use crate::sys::Host;
use crate::sys::install::ListFile;
use crate::sys::progress::Progress;
use crate::sys::survey;

/// What to look at.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// `-` is standard input.
    pub file: &'a Path,
    pub json: bool,
}

/// Looks at a list or at the object of our plugin. Backends are tried out, which changes nothing on
/// the node.
///
/// # Errors
///
/// A file that cannot be read.
pub fn run(
    host: &Host,
    options: &Options,
    terminal: &mut Terminal,
) -> Result<Verdict, CommandError> {
    let (shown, text, drop_ins) = match options.file.to_str() {
        Some("-") => {
            let mut text = String::new();
            terminal
                .input
                .read_to_string(&mut text)
                .map_err(|error| Error::io("read standard input", error))?;
            ("standard input".to_owned(), text, Vec::new())
        }
        _ => {
            let shown = options.file.display().to_string();
            let file = ListFile::read(options.file)?
                .ok_or_else(|| CommandError::Refused(format!("{shown} does not exist")))?;
            (shown, file.text, file.drop_ins)
        }
    };
    let mut analysis = analyse(&text, &drop_ins).unwrap_or_else(Analysis::refused);
    let progress = Progress::begin("portmap check-config");
    progress.step("trying the backends out");
    let chosen = analysis.conf.as_ref().map(|conf| choose(host, conf));
    drop(progress);
    if let Some(kind) = chosen.as_ref().and_then(Chosen::kind) {
        analysis.with_backend(kind);
    }
    analysis.findings.extend(chosen.as_ref().and_then(finding));
    if options.json {
        writeln!(terminal.output, "{}", as_json(&shown, &analysis, chosen.as_ref()))?;
    } else {
        write!(terminal.output, "{}", as_text(&shown, &analysis, chosen.as_ref()))?;
    }
    Ok(match analysis.findings.iter().map(|finding| finding.severity).max() {
        None => Verdict::Fine,
        Some(Severity::Warning) => Verdict::Warnings,
        Some(Severity::Broken) => Verdict::Broken,
    })
}

/// The backend of an ADD here and now.
enum Chosen {
    Kind(BackendKind),
    /// It shows to somebody else, or later.
    Unknown {
        reason: String,
        /// How to find out.
        fix: &'static str,
    },
    /// None: an ADD fails.
    Nothing(String),
}

impl Chosen {
    fn kind(&self) -> Option<BackendKind> {
        match self {
            Chosen::Kind(kind) => Some(*kind),
            Chosen::Unknown { .. } | Chosen::Nothing(_) => None,
        }
    }
}

fn choose(host: &Host, conf: &NetConf) -> Chosen {
    let (tried, question) = match conf.backend {
        None => (probe(host, false), "which backend auto takes cannot be told".to_owned()),
        Some(kind) => {
            let broken = |reason| Error::BackendUnusable { backend: kind.to_string(), reason };
            let backend = backend::of(kind);
            let tried = match backend.probe(host).and_then(|()| backend.probe_node(host, false)) {
                // Somebody else is at work, and an ADD would wait for that.
                Ok(()) | Err(Unusable::Busy(_)) => Ok(kind),
                Err(Unusable::Broken(reason)) => Err(broken(reason)),
            };
            (tried, format!("whether the {kind} backend works on this node cannot be told"))
        }
    };
    match tried {
        Ok(kind) => Chosen::Kind(kind),
        // Auto does not pass over a backend that may well work.
        Err(error @ (Error::Busy { .. } | Error::Hung { .. })) => Chosen::Unknown {
            reason: format!("{question} now: {error}"),
            fix: "portmap check-config once more",
        },
        Err(_) if !survey::is_root() => Chosen::Unknown {
            reason: format!("{question} without root"),
            fix: "portmap check-config as root",
        },
        Err(error) => Chosen::Nothing(error.to_string()),
    }
}

fn finding(chosen: &Chosen) -> Option<Finding> {
    let (severity, problem, fix) = match chosen {
        Chosen::Kind(_) => return None,
        Chosen::Unknown { reason, fix } => (Severity::Warning, reason.clone(), *fix),
        Chosen::Nothing(reason) => (
            Severity::Broken,
            reason.clone(),
            "install nft or iptables, or name a backend that works here",
        ),
    };
    Some(Finding { severity, place: None, problem, fix: fix.into() })
}

/// Every option as it will be, with its default where nothing is said.
fn settings(conf: &NetConf) -> Vec<(&'static str, Value)> {
    let options = &conf.options;
    let mut settings =
        vec![("snat", (!options.no_snat).into()), ("masqAll", options.masq_all.into())];
    match &options.external_set_mark_chain {
        Some(chain) => settings.push(("externalSetMarkChain", chain.as_str().into())),
        None => settings.push(("markMasqBit", options.mark().trailing_zeros().into())),
    }
    for (key, words) in
        [("conditionsV4", &options.conditions_v4), ("conditionsV6", &options.conditions_v6)]
    {
        if !words.is_empty() {
            settings.push((key, words.as_slice().into()));
        }
    }
    let policy = match conf.conflict_policy {
        ConflictPolicy::Takeover => "takeover",
        ConflictPolicy::Deny => "deny",
    };
    settings.push(("conflictPolicy", policy.into()));
    settings.push(("stateDir", json!(request::state_dir(conf.state_dir.clone()))));
    settings
}

fn as_json(shown: &str, analysis: &Analysis, chosen: Option<&Chosen>) -> Value {
    let options: Option<serde_json::Map<_, _>> = analysis.conf.as_ref().map(|conf| {
        settings(conf).into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    });
    json!({
        "file": shown,
        "name": analysis.name,
        "cniVersion": analysis.cni_version,
        "plugins": analysis.plugins,
        "dropIns": analysis.drop_ins.iter().map(|(path, plugin)| json!({ "path": path, "plugin": plugin })).collect::<Vec<_>>(),
        "configuredBackend": analysis.conf.as_ref().map(|conf| conf.backend.map_or("auto", BackendKind::name)),
        "backend": chosen.and_then(Chosen::kind).map(BackendKind::name),
        "options": options,
        "findings": analysis.findings,
    })
}

fn as_text(shown: &str, analysis: &Analysis, chosen: Option<&Chosen>) -> String {
    let plugins = match analysis.plugins.is_empty() {
        true => "no list".to_owned(),
        false => analysis.plugins.join(", then "),
    };
    let mut text = format!("{shown}: {plugins}");
    if !analysis.name.is_empty() {
        let _ = write!(
            text,
            " (network {:?}, CNI {})",
            analysis.name,
            match analysis.cni_version.as_str() {
                "" => "0.1.0",
                version => version,
            }
        );
    }
    text.push('\n');
    for (path, plugin) in &analysis.drop_ins {
        let _ = writeln!(text, "  {plugin} is from {}: {BEFORE_DROP_INS}", path.display());
    }
    if let (Some(conf), Some(chosen)) = (&analysis.conf, chosen) {
        let backend = match (conf.backend, chosen) {
            (_, Chosen::Nothing(_)) => "none works here".to_owned(),
            (None, Chosen::Unknown { .. }) => "auto, on this node not known now".to_owned(),
            (Some(kind), Chosen::Unknown { .. }) => format!("{kind}, on this node not known now"),
            (None, Chosen::Kind(kind)) => format!("auto, on this node {kind}"),
            (Some(_), Chosen::Kind(kind)) => kind.to_string(),
        };
        let _ = writeln!(text, "  {:<21} {backend}", "backend");
        for (key, value) in settings(conf) {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(text, "  {key:<21} {value}");
        }
    }
    for finding in &analysis.findings {
        let severity = match finding.severity {
            Severity::Warning => "warning",
            Severity::Broken => "broken",
        };
        let place = finding.place.as_ref().map(|place| format!("{place}: ")).unwrap_or_default();
        let _ = writeln!(text, "{place}{severity}: {}\n  to do: {}", finding.problem, finding.fix);
    }
    if analysis.findings.is_empty() {
        text.push_str("nothing is wrong with it\n");
    }
    text
}
