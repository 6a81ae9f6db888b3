//! Reading the node: each part by itself, so that one that fails leaves the others.
//!
//! The lock is shared with other readers, and held only while records are compared with the kernel.

mod bypass;
mod chains;
mod firewall;
mod strays;
mod tables;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Facts, Told, attachments, backends, cilium, localhost, setup, some_of, state};
use crate::backend::{self, Unusable, ebpf};
use crate::commands::flush::describe;
use crate::conflist::files::is_configuration;
use crate::conflist::{CILIUM, PLUGIN};
use crate::engine::{self, Engine};
use crate::error::Error;
use crate::model::{BackendKind, Family};
use crate::record::Record;
use crate::sys::bpf::cgroup;
use crate::sys::install::drop_ins;
use crate::sys::namespace::{self, Life};
use crate::sys::netlink::route::Link;
use crate::sys::progress::Progress;
use crate::sys::store::{Looked, Store};
use crate::sys::survey::CILIUM_RUN;
use crate::sys::{Host, iptables, survey};
use crate::usage::NAME_AND_VERSION;
use tables::Tables;

/// Where to look.
#[derive(Debug, Clone)]
pub struct Places {
    pub state_dir: PathBuf,
    pub dest: PathBuf,
    pub conf_dir: PathBuf,
}

/// What the state directory says, beside what becomes of it in the report.
struct State {
    facts: state::Facts,
    records: Vec<Record>,
    remembered: Vec<(BackendKind, String)>,
}

/// Reads everything.
#[must_use]
pub fn gather(host: &Host, places: &Places, progress: &Progress) -> Facts {
    progress.step("reading the plugin list and the binary");
    let setup = setup(places);
    let mut tried = Vec::new();
    for kind in BackendKind::ALL {
        progress.step(&format!("trying {kind} out"));
        tried.push(backends::Tried { kind, tool: tool(host, kind), trial: trial(host, kind) });
    }
    progress.step("reading rules");
    let tables = Tables::find(host);
    progress.step("comparing the records with the kernel");
    let State { facts: state, records, remembered } =
        state(host, places, &tables, setup.elsewhere());
    progress.step("looking at the node's firewall and at Cilium");
    let backends = backends::Facts {
        privileged: survey::is_root(),
        tried,
        remembered,
        sockets: sockets(host),
        ebpf_in_use: records.iter().any(|record| record.backend == BackendKind::Ebpf),
    };
    let chosen = setup.configured_backend().or_else(|| backends.chosen());
    let live: Vec<&Record> = records.iter().filter(|record| is_alive(record)).collect();
    let links = host.node_facts().and_then(|facts| Ok((facts, host.links()?)));
    let (node, links) = links.unwrap_or_default();
    Facts {
        localhost: localhost::Facts {
            on: survey::routing_localnet().map_err(|error| error.to_string()),
            needed: live.iter().filter_map(|record| record.localnet_device.clone()).collect(),
            guard: tables.guard(host),
            make_guard: tables.make_guard(),
        },
        firewall: firewall::facts(host, &tables, &live, chosen, &node, &links),
        bypass: bypass::facts(host, &tables, &live, &node),
        cilium: cilium(places, &links, chosen, &records),
        backends,
        setup,
        state,
    }
}

fn told<T>(result: Result<T, Error>) -> Told<T> {
    result.map_err(|error| match error.details() {
        details if details.is_empty() => error.to_string(),
        details => format!("{error}: {details}"),
    })
}

/// Of which nobody can tell counts as alive, as it does for `restore` and `gc`.
fn is_alive(record: &Record) -> bool {
    namespace::life(record) != Life::Gone
}

fn setup(places: &Places) -> setup::Facts {
    let Places { state_dir, dest, conf_dir } = places;
    let files = survey::names(conf_dir).map_err(|error| error.to_string()).map(|names| {
        let read = |name: String| {
            let path = conf_dir.join(&name);
            // Others may be large, or be no text.
            let text = match is_configuration(&name) {
                true => match survey::text(&path) {
                    Ok(Some(text)) => Ok(text),
                    Ok(None) => Err("it is a link to nothing".into()),
                    Err(error) => Err(error.to_string()),
                },
                false => Ok(String::new()),
            };
            match text.and_then(|text| Ok((told(drop_ins(&path, &text))?, text))) {
                Ok((drop_ins, text)) => setup::File { name, text: Ok(text), drop_ins },
                Err(error) => setup::File { name, text: Err(error), drop_ins: Vec::new() },
            }
        };
        names.unwrap_or_default().into_iter().map(read).collect()
    });
    setup::Facts {
        version: NAME_AND_VERSION.into(),
        conf_dir: conf_dir.clone(),
        files,
        dest: dest.clone(),
        binary: survey::binary(&dest.join(PLUGIN)).map_err(|error| error.to_string()),
        state_dir: state_dir.clone(),
    }
}

fn tool(host: &Host, kind: BackendKind) -> String {
    let shown = |tool: &str| host.tools.find(tool).map(|path| path.display().to_string());
    match kind {
        BackendKind::Iptables => shown("iptables").map(|path| {
            let variant =
                iptables::used(host, Family::V4).map_or("iptables", iptables::Variant::name);
            format!("{variant}, {path}")
        }),
        BackendKind::Nftables => shown("nft"),
        BackendKind::Ebpf => host.kernel().ok().map(|kernel| {
            let lacking: Vec<&str> = [
                ("tcx (Linux 6.6)", kernel.tcx),
                ("clsact filters (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF)", kernel.clsact),
                ("the namespace's cookie in programs (5.7)", kernel.cookie_helper),
                ("the namespace's cookie by getsockopt (5.14)", kernel.cookie_option),
                ("batches of map entries (5.6)", kernel.batches),
                ("replacing programs of cgroups (5.6)", kernel.cgroup_replace),
                ("programs on getpeername (5.8)", kernel.getpeername),
            ]
            .into_iter()
            .filter_map(|(name, present)| (!present).then_some(name))
            .collect();
            match lacking.is_empty() {
                true => "no tool needed".to_owned(),
                false => format!("no tool needed; this kernel lacks {}", lacking.join(", ")),
            }
        }),
    }
    .unwrap_or_default()
}

fn trial(host: &Host, kind: BackendKind) -> backends::Trial {
    let backend = backend::of(kind);
    match backend.probe(host).and_then(|()| backend.probe_node(host, false)) {
        Ok(()) => {
            backend.objection(host).map_or(backends::Trial::Works, backends::Trial::Objection)
        }
        Err(Unusable::Busy(error)) => backends::Trial::Busy(error.to_string()),
        Err(Unusable::Broken(reason)) => backends::Trial::Broken(reason),
    }
}

fn sockets(host: &Host) -> Told<String> {
    let places = ebpf::socket_places(host)?;
    let mounted = cgroup::mounted_at();
    Ok(match (places.as_slice(), mounted) {
        ([root], Some(at)) if root == "/" => format!("the root of cgroup v2 ({})", at.display()),
        ([root], None) if root == "/" => {
            "the root of cgroup v2, which is mounted nowhere here".to_owned()
        }
        (some, Some(at)) => format!("{} below {}", some_of(some), at.display()),
        (some, None) => format!("{} of cgroup v2", some_of(some)),
    })
}

fn state(
    host: &Host,
    places: &Places,
    tables: &Tables,
    elsewhere: Option<(PathBuf, PathBuf)>,
) -> State {
    let dir = &places.state_dir;
    let directory = survey::state_directory(dir).map_err(|error| error.to_string());
    let nothing = |look| State {
        facts: state::Facts { dir: dir.clone(), directory: directory.clone(), look },
        records: Vec::new(),
        remembered: Vec::new(),
    };
    let look = match Store::look(dir, host.boot_id()) {
        Err(error) => return nothing(told(Err(error))),
        Ok(look) => look,
    };
    let store = match look {
        Looked::OtherBoot(records) => return nothing(Ok(state::Look::OtherBoot(records))),
        Looked::Busy { holder, seconds } => {
            return nothing(Ok(state::Look::Busy { holder, seconds }));
        }
        Looked::Absent => {
            let facts = attachments::Facts { elsewhere, ..attachments::Facts::default() };
            let facts = strays::add(host, tables, &[], facts);
            return nothing(Ok(state::Look::Read(facts)));
        }
        Looked::Store(store) => store,
    };
    let engine = Engine::on(host, store);
    let read = move |engine: &Engine| {
        let (records, damaged) = engine.store.all()?;
        let facts = attachments::Facts {
            attachments: compared(engine, &records),
            damaged,
            pending: engine.is_interrupted()?,
            elsewhere,
            ..attachments::Facts::default()
        };
        Ok((records, facts))
    };
    match read(&engine) {
        Err(error) => nothing(told(Err(error))),
        Ok((records, facts)) => {
            let facts = strays::add(host, tables, &records, facts);
            let remembered = [false, true].into_iter().filter_map(|ipv6| {
                let kind = engine.remembered_backend(ipv6).ok().flatten()?;
                let file = dir.join("notes").join(engine::backend_note(ipv6));
                Some((kind, file.display().to_string()))
            });
            let remembered = remembered.collect();
            State { records, remembered, ..nothing(Ok(state::Look::Read(facts))) }
        }
    }
}

/// Every attachment with its state in the kernel, which is read once for each backend.
fn compared(engine: &Engine, records: &[Record]) -> Vec<attachments::Attachment> {
    let mut all = Vec::new();
    for kind in BackendKind::ALL {
        let own: Vec<Record> =
            records.iter().filter(|record| record.backend == kind).cloned().collect();
        if own.is_empty() {
            continue;
        }
        let found: Vec<Told<Vec<String>>> = match told(engine.problems_of_all(kind, &own)) {
            Ok(problems) => problems.into_iter().map(Ok).collect(),
            Err(reason) => vec![Err(reason); own.len()],
        };
        all.extend(own.iter().zip(found).map(|(record, problems)| attachments::Attachment {
            who: describe(record),
            netns: record.netns.clone(),
            alive: is_alive(record),
            problems,
        }));
    }
    all
}

/// The directories that Cilium's agent keeps things in.
const PINS: [&str; 2] = ["/sys/fs/bpf/cilium", "/sys/fs/bpf/tc/globals"];

fn cilium(
    places: &Places,
    links: &[Link],
    chosen: Option<BackendKind>,
    records: &[Record],
) -> cilium::Facts {
    let (mut signs, mut unread) = (Vec::new(), Vec::new());
    let mut look =
        |path: &str, counts: &dyn Fn(&[String]) -> bool| match survey::names(Path::new(path)) {
            Ok(None) => {}
            Ok(Some(names)) if counts(&names) => signs.push(path.to_owned()),
            Ok(Some(_)) => {}
            Err(error) => unread.push((path.to_owned(), error.to_string())),
        };
    look(CILIUM_RUN, &|_| true);
    look(PINS[0], &|_| true);
    look(PINS[1], &|names| names.iter().any(|name| name.starts_with("cilium_")));
    let names = survey::names(&places.conf_dir).ok().flatten().unwrap_or_default();
    let own = |name: &&String| name.starts_with("05-cilium.conf") && is_configuration(name);
    signs.extend(
        names.iter().filter(own).map(|name| places.conf_dir.join(name).display().to_string()),
    );
    let device = |wanted: &&str| links.iter().any(|link| link.name == **wanted);
    signs.extend(
        ["cilium_host", "cilium_net", "cilium_vxlan"]
            .into_iter()
            .filter(device)
            .map(|name| format!("device {name}")),
    );
    if let Some(link) = links.iter().find(|link| link.name.starts_with("lxc") && !signs.is_empty())
    {
        signs.push(format!("device {} and others", link.name));
    }
    if survey::names(&places.dest)
        .ok()
        .flatten()
        .unwrap_or_default()
        .iter()
        .any(|name| name == CILIUM)
    {
        signs.push(places.dest.join(CILIUM).display().to_string());
    }
    let used: BTreeSet<BackendKind> =
        records.iter().map(|record| record.backend).chain(chosen).collect();
    cilium::Facts {
        signs,
        unread,
        settings: survey::cilium_settings(),
        socket_programs: ebpf::trial::cilium_balances().map_err(|error| error.to_string()),
        renamed: names.iter().filter(|name| name.ends_with(".cilium_bak")).cloned().collect(),
        by_rules: used.iter().any(|kind| *kind != BackendKind::Ebpf),
    }
}
