//! The installation: the list that runtimes take, and the binary that they run for it.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::{Area, Finding, Severity, Told};
use crate::conflist::check::{Analysis, analyse};
use crate::conflist::files::{first, is_configuration, names_plugin, owner, plugin_alone};
use crate::conflist::{BEFORE_DROP_INS, DropIn, List, PLUGIN};
use crate::model::BackendKind;
use crate::request;

/// What is at the binary's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Binary {
    Missing,
    /// A link, and where it leads: to nothing.
    Dangling(PathBuf),
    /// Not a file: what else.
    NotAFile(&'static str),
    /// Nobody can run it, and why.
    NotExecutable(String),
    /// This very program, byte for byte.
    Same,
    /// Another build of this plugin, with its version.
    Ours(String),
    /// The plugin of containernetworking/plugins.
    Upstreams,
    Unknown,
}

/// One name among the lists.
#[derive(Debug, Clone)]
pub struct File {
    pub name: String,
    /// Of what runtimes read.
    pub text: Told<String>,
    pub drop_ins: Vec<DropIn>,
}

impl File {
    fn analysis(&self) -> Option<Analysis> {
        analyse(self.text.as_ref().ok()?, &self.drop_ins).ok()
    }

    fn names_plugin(&self) -> bool {
        let mut texts = self.text.iter().chain(self.drop_ins.iter().map(|drop_in| &drop_in.text));
        texts.any(|text| names_plugin(text))
    }
}

/// What the directories hold.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The version of this program.
    pub version: String,
    /// Where runtimes look for lists.
    pub conf_dir: PathBuf,
    pub files: Told<Vec<File>>,
    /// Where runtimes look for plugins.
    pub dest: PathBuf,
    pub binary: Told<Binary>,
    /// The state directory that was looked at.
    pub state_dir: PathBuf,
}

const AREA: Area = Area::Installation;

impl Facts {
    /// The file that runtimes take, if there is one that could be read.
    fn taken(&self) -> Option<&File> {
        let files = self.files.as_ref().ok()?;
        let name = first(files.iter().map(|file| file.name.as_str()))?;
        files.iter().find(|file| file.name == name)
    }

    fn analysis(&self) -> Option<Analysis> {
        self.taken()?.analysis()
    }

    /// What the list says of the backend; `None` if nothing or `auto`.
    #[must_use]
    pub fn configured_backend(&self) -> Option<BackendKind> {
        self.analysis()?.conf?.backend
    }

    /// A list, of whoever takes it, that keeps its records in another state directory than was looked at,
    /// and which.
    #[must_use]
    pub fn elsewhere(&self) -> Option<(PathBuf, PathBuf)> {
        self.files.iter().flatten().find_map(|file| {
            let dir = request::state_dir(file.analysis()?.conf?.state_dir);
            (dir != self.state_dir).then(|| (self.conf_dir.join(&file.name), dir))
        })
    }

    fn is_listed(&self) -> bool {
        self.analysis().is_some_and(|analysis| analysis.plugins.iter().any(|name| name == PLUGIN))
    }
}

/// `chosen` is the backend of new pods, configured or not; `None`: none works, or nobody can tell.
#[must_use]
pub fn findings(facts: &Facts, chosen: Option<BackendKind>) -> Vec<Finding> {
    let mut findings = lists(facts, chosen);
    findings.extend(other_state(facts));
    findings.push(binary(facts));
    findings
}

fn lists(facts: &Facts, chosen: Option<BackendKind>) -> Vec<Finding> {
    const CHECK: &str = "list";
    let dir = facts.conf_dir.display();
    let files = match &facts.files {
        Ok(files) => files,
        Err(reason) => return vec![AREA.unread(CHECK, &format!("the lists in {dir}"), reason)],
    };
    let Some(taken @ File { name, text, drop_ins }) = facts.taken() else {
        return vec![AREA.warning(
            CHECK,
            format!("there is no list in {dir}"),
            "runtimes give pods no network yet; or they look for lists elsewhere, which --conf-dir names",
            "portmap install --conflist auto, once the network is set up",
        )];
    };
    let path = facts.conf_dir.join(name);
    let path = path.display();
    let text = match text {
        Ok(text) => text,
        Err(reason) => return vec![AREA.unread(CHECK, &path.to_string(), reason)],
    };
    let mut analysis = match analyse(text, drop_ins) {
        Ok(analysis) => analysis,
        Err(refusal) => {
            let broken = || {
                AREA.broken(
                    CHECK,
                    format!("runtimes take {path}, which is no list: {refusal}"),
                    "no pod gets a network",
                    format!("portmap check-config {path}"),
                )
            };
            return vec![alone(name, &path.to_string(), text).unwrap_or_else(broken)];
        }
    };
    if let Some(kind) = chosen {
        analysis.with_backend(kind);
    }
    let names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
    // An edit of Cilium's list needs more than a command.
    let reverted = List::parse(text, drop_ins).ok().and_then(|list| owner(name, &list, &names));
    let mut findings: Vec<Finding> = analysis
        .findings
        .iter()
        .map(|problem| {
            let place =
                problem.place.as_ref().map(|place| format!(", {place}")).unwrap_or_default();
            let found = format!("{path}{place}: {}", problem.problem);
            let severity = Severity::from(problem.severity);
            let mut why = match severity {
                Severity::Broken => "hostPorts of new pods do not work".to_owned(),
                _ => "it is probably not what was meant".to_owned(),
            };
            let fix = match problem.fix.contains("portmap install") {
                true => {
                    why.extend(reverted.iter().map(|reverted| format!(". {reverted}")));
                    format!("portmap install --conflist {path}")
                }
                false => format!("{} (portmap check-config {path} says more)", problem.fix),
            };
            Finding { severity, ..AREA.warning(CHECK, found, why, fix) }
        })
        .collect();
    if findings.is_empty() {
        let mut found = format!("runtimes take {path}: {}", analysis.plugins.join(", then "));
        for (path, plugin) in &analysis.drop_ins {
            let _ = write!(found, "; {plugin} is from {}: {BEFORE_DROP_INS}", path.display());
        }
        findings.push(AREA.fine(CHECK, found));
    }
    if !facts.is_listed() {
        // It may have been put into a file that nobody reads.
        let ignored: Vec<&str> = files
            .iter()
            .filter(|other| {
                other.name != taken.name && is_configuration(&other.name) && other.names_plugin()
            })
            .map(|other| other.name.as_str())
            .collect();
        if !ignored.is_empty() {
            findings.push(AREA.warning(
                "ignored-list",
                format!("portmap is listed in {}, which runtimes do not take", ignored.join(", ")),
                format!("they take the first file of {dir} by name, which is {name}"),
                format!("portmap install --conflist {path}"),
            ));
        }
    }
    findings
}

/// One plugin's object, of which go-cni and ocicni make a list unless the file is called a list: such as
/// Multus', which runs lists itself.
fn alone(name: &str, path: &str, text: &str) -> Option<Finding> {
    const CHECK: &str = "list";
    let kind = plugin_alone(text).filter(|_| !name.ends_with(".conflist"))?;
    Some(match kind.as_str() {
        PLUGIN => AREA.broken(
            CHECK,
            format!("runtimes take {path}, which has no plugin but portmap"),
            "nothing gives pods the network that hostPorts lead to",
            format!("remove {path}"),
        ),
        _ if names_plugin(text) => {
            AREA.fine(CHECK, format!("runtimes take {path}: {kind}, which runs portmap"))
        }
        _ => AREA.warning(
            CHECK,
            format!("runtimes take {path}, which has no plugin but {kind}"),
            format!(
                "hostPorts work only if {kind} runs a list with portmap itself, as Multus does"
            ),
            format!("portmap install --conflist FILE, with the list that {kind} runs"),
        ),
    })
}

/// Records that nobody looked at because the list says that they are elsewhere.
fn other_state(facts: &Facts) -> Option<Finding> {
    let conf = facts.analysis()?.conf?;
    let theirs = request::state_dir(conf.state_dir);
    (theirs != facts.state_dir).then(|| {
        let theirs = theirs.display();
        AREA.warning(
            "state-dir",
            format!(
                "the list keeps records in {theirs}, and this looked at {}",
                facts.state_dir.display()
            ),
            "what it says of attachments is not of those that the list makes",
            format!("portmap doctor --state-dir {theirs}"),
        )
    })
}

fn binary(facts: &Facts) -> Finding {
    const CHECK: &str = "binary";
    let path = facts.dest.join(PLUGIN);
    let path = path.display();
    let install = format!("portmap install --dest {}", facts.dest.display());
    let every_pod = "runtimes run it for every pod, also for those without hostPorts: none starts";
    let missing = |found: String| {
        if facts.is_listed() {
            AREA.broken(CHECK, found, every_pod, install.clone())
        } else {
            AREA.warning(
                CHECK,
                found,
                "a list that names portmap would keep every pod from starting",
                install.clone(),
            )
        }
    };
    let (found, why) = match &facts.binary {
        Err(reason) => return AREA.unread(CHECK, &path.to_string(), reason),
        Ok(Binary::Same) => {
            return AREA.fine(CHECK, format!("{path} is this very program, {}", facts.version));
        }
        Ok(Binary::Missing) => return missing(format!("there is no {path}")),
        Ok(Binary::Dangling(target)) => {
            return missing(format!(
                "{path} is a link to {}, which does not exist",
                target.display()
            ));
        }
        Ok(Binary::NotAFile(what)) => return missing(format!("{path} is {what}")),
        Ok(Binary::NotExecutable(reason)) => {
            return missing(format!("{path} cannot be run: {reason}"));
        }
        Ok(Binary::Ours(version)) if *version == facts.version => (
            format!("{path} is another build of {version}"),
            "what this program says of the node need not hold for calls of runtimes",
        ),
        Ok(Binary::Ours(version)) => (
            format!("{path} is {version}, and this is {}", facts.version),
            "what this program says of the node need not hold for calls of runtimes",
        ),
        Ok(Binary::Upstreams) => (
            format!("{path} is the portmap of containernetworking/plugins"),
            "runtimes run that one, which knows neither the records nor the backends of this one",
        ),
        Ok(Binary::Unknown) => (
            format!("{path} is some other program (it was not run)"),
            "runtimes run that one for every pod",
        ),
    };
    AREA.warning(CHECK, found, why, install)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    use crate::sys::store::DEFAULT_DIR;

    const LISTED: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;
    const UNLISTED: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"cilium-cni"}]}"#;

    fn facts(files: &[(&str, &str)], binary: Binary) -> Facts {
        let file = |(name, text): &(&str, &str)| File {
            name: (*name).to_owned(),
            text: Ok((*text).to_owned()),
            drop_ins: Vec::new(),
        };
        Facts {
            version: "portmap 1.0.0".into(),
            conf_dir: "/etc/cni/net.d".into(),
            files: Ok(files.iter().map(file).collect()),
            dest: "/opt/cni/bin".into(),
            binary: Ok(binary),
            state_dir: DEFAULT_DIR.into(),
        }
    }

    #[track_caller]
    fn found(facts: &Facts, check: &str) -> Finding {
        findings(facts, None).into_iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_sound_list_and_this_binary_are_fine() {
        let facts = facts(&[("10-x.conflist", LISTED)], Binary::Same);
        assert!(findings(&facts, None).iter().all(|finding| finding.severity == Severity::Fine));
        assert!(found(&facts, "list").found.ends_with("10-x.conflist: ptp, then portmap"));
        let nftables =
            LISTED.replace(r#""type":"portmap""#, r#""type":"portmap","backend":"nftables""#);
        let facts = super::tests::facts(&[("10-x.conflist", &nftables)], Binary::Same);
        assert_eq!(facts.configured_backend(), Some(BackendKind::Nftables));
    }

    #[test]
    fn a_list_with_another_state_directory_is_pointed_to() {
        let listed =
            LISTED.replace(r#""type":"portmap""#, r#""type":"portmap","stateDir":"/run/other""#);
        let found = found(&facts(&[("10-x.conflist", &listed)], Binary::Same), "state-dir");
        assert_eq!(found.fix, "portmap doctor --state-dir /run/other");
        // One that the kubelet's runtime does not take may be podman's.
        let facts = facts(&[("10-x.conflist", LISTED), ("87-y.conflist", &listed)], Binary::Same);
        let elsewhere = ("/etc/cni/net.d/87-y.conflist".into(), "/run/other".into());
        assert_eq!(facts.elsewhere(), Some(elsewhere));
        assert_eq!(super::tests::facts(&[("x.conflist", LISTED)], Binary::Same).elsewhere(), None);
    }

    #[test]
    fn a_list_without_portmap_says_how_and_what_would_undo_it() {
        let facts =
            facts(&[("05-cilium.conflist", UNLISTED), ("20-x.conflist", LISTED)], Binary::Missing);
        let list = found(&facts, "list");
        assert_eq!(list.severity, Severity::Broken);
        assert_eq!(list.fix, "portmap install --conflist /etc/cni/net.d/05-cilium.conflist");
        assert!(list.why.contains("cni.chainingMode=portmap"), "{list:?}");
        assert_eq!(found(&facts, "ignored-list").severity, Severity::Warning);
        // Nothing needs it yet.
        assert_eq!(found(&facts, "binary").severity, Severity::Warning);
    }

    #[test]
    fn a_list_is_judged_by_the_backend_of_new_pods() {
        let listed = LISTED.replace("]}", r#",{"type":"bandwidth"}]}"#);
        let facts = facts(&[("10-x.conflist", &listed)], Binary::Same);
        let worst = |chosen| findings(&facts, chosen).iter().map(|finding| finding.severity).max();
        assert_eq!(worst(Some(BackendKind::Ebpf)), Some(Severity::Broken));
        for other in [Some(BackendKind::Nftables), None] {
            assert_eq!(worst(other), Some(Severity::Fine));
        }
    }

    #[test]
    fn drop_ins_are_part_of_their_list() {
        let mut facts =
            facts(&[("10-x.conflist", UNLISTED), ("20-y.conflist", UNLISTED)], Binary::Missing);
        let text = r#"{"type":"portmap","stateDir":"/a","capabilities":{"portMappings":true}}"#;
        let drop_ins = vec![DropIn { path: "/n/50.conf".into(), text: text.into() }];
        let files = facts.files.as_mut().unwrap();
        files[1].drop_ins.clone_from(&drop_ins);
        assert!(found(&facts, "ignored-list").found.contains("listed in 20-y.conflist"));
        assert_eq!(facts.elsewhere().unwrap().1, PathBuf::from("/a"));

        facts.files.as_mut().unwrap()[0].drop_ins = drop_ins;
        let list = found(&facts, "list");
        let end = "cilium-cni, then portmap; portmap is from /n/50.conf: runtimes with libcni before 1.3 do not read it";
        assert_eq!((list.severity, list.found.ends_with(end)), (Severity::Fine, true), "{list:?}");
        assert_eq!(found(&facts, "state-dir").fix, "portmap doctor --state-dir /a");
        assert_eq!(found(&facts, "binary").severity, Severity::Broken);
    }

    #[test]
    fn a_plugin_alone_is_what_runtimes_make_a_list_of() {
        const MULTUS: &str = r#"{"type":"multus","delegates":[{"plugins":[{"type":"X"}]}]}"#;
        let list = |name, text: &str| found(&facts(&[(name, text)], Binary::Same), "list");
        let multus = list("00-multus.conf", MULTUS);
        assert_eq!(multus.severity, Severity::Warning);
        assert!(multus.why.contains("hostPorts work only if multus"), "{multus:?}");
        let multus = list("00-multus.conf", &MULTUS.replace('X', "portmap"));
        assert_eq!(multus.severity, Severity::Fine);
        for (name, text) in [("00-multus.conflist", MULTUS), ("10-x.conf", r#"{"type":"portmap"}"#)]
        {
            assert_eq!(list(name, text).severity, Severity::Broken, "{name}");
        }
    }

    #[test]
    fn no_list_no_json_and_what_cannot_be_read() {
        let mut none = facts(&[("README", "")], Binary::Same);
        assert_eq!(found(&none, "list").severity, Severity::Warning);
        let broken = facts(&[("10-x.conflist", "{")], Binary::Same);
        assert_eq!(found(&broken, "list").fix, "portmap check-config /etc/cni/net.d/10-x.conflist");
        none.files = Err("no rights".into());
        none.binary = Err("no rights".into());
        assert!(findings(&none, None).iter().all(|finding| finding.severity == Severity::Warning));
    }

    #[test]
    fn what_is_at_the_binarys_place_matters_by_the_list() {
        let of = |binary| found(&facts(&[("10-x.conflist", LISTED)], binary), "binary");
        for broken in [
            Binary::Missing,
            Binary::Dangling("/gone".into()),
            Binary::NotAFile("a directory"),
            Binary::NotExecutable("its mode is 644".into()),
        ] {
            assert_eq!(of(broken.clone()).severity, Severity::Broken, "{broken:?}");
        }
        for other in [Binary::Ours("portmap 0.9.0".into()), Binary::Upstreams, Binary::Unknown] {
            let finding = of(other.clone());
            assert_eq!(
                (finding.severity, finding.fix.as_str()),
                (Severity::Warning, "portmap install --dest /opt/cni/bin"),
                "{other:?}"
            );
        }
        assert!(of(Binary::Ours("portmap 1.0.0".into())).found.contains("another build"));
    }
}
