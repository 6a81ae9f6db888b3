//! Everything that is sent to a tool, and every error that goes to a runtime, as text in
//! testdata/golden. `UPDATE_GOLDEN=1 cargo test --test golden` writes the files anew; the difference
//! is then for the reviewer.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "support/golden.rs"]
mod golden;

use std::collections::BTreeSet;

use golden::holds as compare;
use portmap::backend::ebpf::layout::{ClaimKey, ClaimValue};
use portmap::backend::ebpf::objects as ebpf;
use portmap::backend::iptables::listing::Listing;
use portmap::backend::iptables::script::{self as iptables, Shared};
use portmap::backend::nftables::{objects, objects::Objects, script as nft};
use portmap::cni::reply::ErrorReply;
use portmap::conf::Options;
use portmap::error::Error;
use portmap::facts::NodeFacts;
use portmap::model::{Attachment, BackendKind, Family, Mapping, Protocol};
use portmap::record::Record;
use serde_json::json;
use zerocopy::IntoBytes;

const ID: &str = "d629b42b837dcb40bc6a45f2486e76616c72ca15a3dc5cefe2f881ebd0d8222c";

/// An attachment; mappings are `protocol hostPort containerPort [hostIP]`.
fn record(id: &str, order: u64, addresses: &[&str], mappings: &[&str]) -> Record {
    let mapping = |text: &&str| {
        let words: Vec<&str> = text.split(' ').collect();
        Mapping {
            protocol: Protocol::parse(words[0]).unwrap(),
            host_port: words[1].parse().unwrap(),
            container_port: words[2].parse().unwrap(),
            host_ip: words.get(3).map(|ip| ip.parse().unwrap()),
        }
    };
    let attachment =
        Attachment { network: "portmap".into(), container_id: id.into(), ifname: "eth0".into() };
    let mappings = mappings.iter().map(mapping).collect();
    let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    let kind = BackendKind::Iptables;
    Record { order, ..Record::new(attachment, mappings, addresses, Options::default(), kind) }
}

fn with_destination(mut record: Record) -> Record {
    record.options.conditions_v4 = ["!", "-d", "198.51.100.0/24"].map(Into::into).into();
    record.statements_v4 = vec![json!({"match": {"op": "!=",
        "left": {"payload": {"protocol": "ip", "field": "daddr"}},
        "right": {"prefix": {"addr": "198.51.100.0", "len": 24}}}})];
    record
}

/// Attachments, oldest first, by the name of what they show. The last one is the one that comes and
/// goes on the fast path.
fn cases() -> Vec<(&'static str, Vec<Record>)> {
    let dual = ["10.88.0.2/24", "fd00:88::2/64"];
    let option = |change: fn(&mut Options)| {
        let mut record = record(ID, 1, &dual, &["tcp 8080 80"]);
        change(&mut record.options);
        vec![record]
    };
    let many: Vec<String> = (0..17).map(|n| format!("tcp {} {}", 9000 + n, 80 + n)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut guarded = record(ID, 1, &["10.88.0.2/24"], &["tcp 8080 80"]);
    guarded.localnet_device = Some("cni0".into());
    let mut conditional = record("b", 2, &dual, &["tcp 8080 80"]);
    conditional.options.conditions_v4 =
        ["!", "-s", "192.0.2.0/24", "-m", "comment", "--comment", "a \"b\" c"]
            .map(Into::into)
            .into();
    conditional.statements_v4 = vec![json!({"match": {"op": "!=",
        "left": {"payload": {"protocol": "ip", "field": "saddr"}},
        "right": {"prefix": {"addr": "192.0.2.0", "len": 24}}}})];
    vec![
        ("host-prefix", vec![record(ID, 1, &["198.18.2.27/32"], &["tcp 8080 80"])]),
        ("dual-stack", vec![record(ID, 1, &dual, &["tcp 8080 80", "udp 53 53", "sctp 54 54"])]),
        (
            "host-ip",
            vec![record(
                ID,
                1,
                &dual,
                &["tcp 80 80 192.0.2.1", "tcp 81 81 0.0.0.0", "tcp 82 82 ::", "tcp 83 83 fd00::1"],
            )],
        ),
        ("ipv6-only", vec![record(ID, 1, &["fd00:88::2/128"], &["udp 53 5353"])]),
        ("many-ports", vec![record(ID, 1, &["10.88.0.2/24"], &many)]),
        ("long-comment", vec![record(&"c".repeat(300), 1, &["10.88.0.2/24"], &["tcp 80 80"])]),
        ("no-snat", option(|options| options.no_snat = true)),
        ("masq-all", option(|options| options.masq_all = true)),
        ("mark-bit", option(|options| options.mark_masq_bit = Some(5))),
        ("guard", vec![guarded]),
        ("conditions", vec![record("a", 1, &dual, &["tcp 8080 8081"]), conditional]),
        (
            "two-owners",
            vec![
                record("a", 1, &dual, &["tcp 80 1"]),
                record("b", 2, &["10.88.0.3/24"], &["tcp 80 2"]),
            ],
        ),
        (
            "specific-and-any",
            vec![
                record("a", 1, &["10.88.0.2/24"], &["tcp 80 1 192.0.2.1", "tcp 81 1"]),
                record("b", 2, &["10.88.0.3/24"], &["tcp 80 2", "tcp 81 2"]),
            ],
        ),
        (
            "specific-and-any-with-destination",
            vec![
                with_destination(record("a", 1, &dual, &["tcp 80 1 192.0.2.1", "tcp 81 1"])),
                record("b", 2, &["10.88.0.3/24"], &["tcp 80 2", "tcp 81 2"]),
            ],
        ),
        (
            "specific-and-any-in-one",
            vec![record(ID, 1, &["10.88.0.2/24"], &["tcp 80 1", "tcp 80 2 192.0.2.1"])],
        ),
    ]
}

fn external_mark_chain() -> Vec<Record> {
    let mut record = record(ID, 1, &["10.88.0.2/24"], &["tcp 8080 80"]);
    record.options.external_set_mark_chain = Some("KUBE-MARK-MASQ".into());
    vec![record]
}

fn facts() -> NodeFacts {
    NodeFacts {
        uplinks: BTreeSet::from(["eth0".into(), "eth1".into()]),
        addresses: ["192.0.2.1", "fd00::1", "127.0.0.1", "::1"]
            .iter()
            .map(|ip| ip.parse().unwrap())
            .collect(),
        ..NodeFacts::default()
    }
}

#[test]
fn iptables_scripts_are_as_reviewed() {
    let uplinks: Vec<String> = facts().uplinks.into_iter().collect();
    for (name, records) in
        cases().into_iter().chain([("external-mark-chain", external_mark_chain())])
    {
        let mut text = String::new();
        let last = records.last().unwrap();
        let parts = records.iter().flat_map(Record::parts).collect();
        for family in Family::ALL.into_iter().filter(|family| last.network(*family).is_some()) {
            let desired = iptables::Desired {
                family,
                records: records.iter().filter(|record| record.network(family).is_some()).collect(),
                parts: &parts,
                purge: &BTreeSet::new(),
                uplinks: &uplinks,
                keep_base: false,
                stale_bits: BTreeSet::new(),
            };
            let parts = last.parts();
            let guard = family == Family::V4 && last.localnet_device.is_some();
            text += &format!("# {family}, from nothing to everything\n");
            text += &iptables::restore_raw(guard, &Listing::default());
            text += &iptables::restore_nat(&desired, &Listing::default());
            text += &format!(
                "\n# {family}, fast path: ADD of the newest\n{}",
                iptables::add(
                    last,
                    None,
                    family,
                    Shared::CheckedInside { uplinks: &facts().uplinks }
                )
            );
            text += &format!(
                "\n# {family}, fast path: the same again, shared chains checked before\n{}",
                iptables::add(last, Some(last), family, Shared::CheckedBefore)
            );
            text += &format!(
                "\n# {family}, fast path: DEL, others remain\n{}",
                iptables::remove(last, family, &BTreeSet::new(), &parts, &facts().uplinks)
            );
            text += &format!(
                "\n# {family}, fast path: DEL of the last\n{}\n",
                iptables::remove(last, family, &parts, &BTreeSet::new(), &facts().uplinks)
            );
        }
        compare(&format!("{name}.iptables"), &text);
    }
}

/// One command a line.
fn lines(document: &str) -> String {
    let document: serde_json::Value = serde_json::from_str(document).unwrap();
    document["nftables"].as_array().unwrap().iter().map(|command| format!("{command}\n")).collect()
}

#[test]
fn nft_scripts_are_as_reviewed() {
    for (name, mut records) in cases() {
        for record in &mut records {
            record.backend = BackendKind::Nftables;
        }
        let all: Vec<&Record> = records.iter().collect();
        let (last, others) = all.split_last().unwrap();
        let names = objects::names_of(last);
        let before = Objects::of(others).restricted_to(&names);
        let after = Objects::of(&all).restricted_to(&names);
        let parts = all.iter().flat_map(|record| record.parts()).collect();
        let whole = nft::restore(&all, &parts, &facts());
        let mut text = format!("# from nothing to everything\n{}", lines(&whole));
        text += &format!(
            "\n# fast path: ADD of the newest\n{}",
            lines(&nft::change(&before, &after, None, &parts))
        );
        text += &format!(
            "\n# fast path: DEL of the newest\n{}",
            lines(&nft::change(&after, &before, None, &parts))
        );
        // Services' addresses are bound to the node by now.
        let addresses = BTreeSet::from(["192.0.2.9".parse().unwrap()]);
        let moved = NodeFacts { addresses, binds_services: true, ..facts() };
        text += &format!(
            "\n# fast path: nothing but the node's addresses\n{}",
            lines(&nft::change(&after, &after, Some((&facts(), &moved)), &parts))
        );
        let nothing = nft::restore(&[], &BTreeSet::new(), &facts());
        text += &format!("\n# nothing is left\n{}", lines(&nothing));
        compare(&format!("{name}.nft"), &text);
    }
}

/// One map entry a line: what it means, and its bytes.
fn entries(claims: &ebpf::Claims) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let line = |(key, value): (&ClaimKey, &ClaimValue)| {
        format!(
            "{} -> {} flags {} source {}\n    {}\n    {}\n",
            ebpf::describe(key),
            value.target(),
            value.flags,
            value.source.ip(),
            hex(key.as_bytes()),
            hex(value.as_bytes())
        )
    };
    claims.iter().map(line).collect()
}

#[test]
fn ebpf_map_entries_are_as_reviewed() {
    let macvlan = Record {
        mac: Some("02:42:ac:11:00:02".into()),
        ..record(ID, 1, &["192.0.2.77/24"], &["udp 53 53"])
    };
    for (name, mut records) in cases().into_iter().chain([("macvlan", vec![macvlan])]) {
        for record in &mut records {
            record.backend = BackendKind::Ebpf;
            record.masquerade_as = match record.options.masq_all {
                true => vec!["10.88.0.1".parse().unwrap(), "fd00:88::1".parse().unwrap()],
                false => Vec::new(),
            };
        }
        let all: Vec<&Record> = records.iter().collect();
        let (last, others) = all.split_last().unwrap();
        let keys = ebpf::keys(last);
        let touched = |records: &[&Record]| {
            let mut claims = ebpf::claims(records);
            claims.retain(|key, _| keys.contains(key));
            entries(&claims)
        };
        let ports = ebpf::port_uses(&ebpf::claims(&all));
        let text = format!(
            "# everything\n{}\n# ports and their uses\n{ports:?}\n\n# entries that the newest touches, before it came\n{}\n# and after\n{}",
            entries(&ebpf::claims(&all)),
            touched(others),
            touched(&all)
        );
        compare(&format!("{name}.ebpf"), &text);
    }
}

#[test]
fn every_error_has_its_code_and_text() {
    let io = |code| std::io::Error::from_raw_os_error(code);
    let errors = [
        Error::UnsupportedVersion { version: "9.9.9".into() },
        Error::VerbTooNew { verb: "GC", since: "1.1.0", version: "1.0.0".into() },
        Error::Environment("ADD needs CNI_IFNAME: not set".into()),
        Error::io("write record /run/cni/portmap/records/x.json", io(28)),
        Error::Decode("stdin is not a network configuration: EOF while parsing a value at line 1 column 0".into()),
        Error::Config("markMasqBit is 32: it must be an integer from 0 to 31".into()),
        Error::OwnNetns { path: "/proc/self/ns/net".into() },
        Error::Busy {
            path: "/run/cni/portmap/lock".into(),
            seconds: 60,
            holder: Some("process 4711 (nft)".into()),
        },
        Error::Hung { tool: "iptables".into(), seconds: 40 },
        Error::NoBackend { reasons: "iptables: iptables-restore is not installed (not in PATH); nftables: nft is not installed (not in PATH)".into() },
        Error::BackendUnusable { backend: "nftables".into(), reason: "nft is not installed (not in PATH)".into() },
        Error::PortTaken { claim: "tcp 0.0.0.0:80".into(), owner: "abc".into() },
        Error::Tool { what: "cannot change the rules (IPv4)".into(), tool: "iptables-restore".into(), details: "iptables-restore exited with status 2: unknown option".into(), },
        Error::MarkChainMissing { chain: "KUBE-MARK-MASQ".into(), family: Family::V4 },
        Error::Drift("container abc interface eth0 on network portmap: tcp 0.0.0.0:80 -> 10.88.0.2:80 expected, found nothing".into()),
        Error::Record { path: "/run/cni/portmap/records/x.json".into(), reason: "key must be a string".into() },
        Error::NewerMaps { newest: 3, own: 1 },
        Error::Several { what: "GC of network portmap".into(), errors: vec![Error::Config("a".into()), Error::io("b", io(13))] },
    ];
    let text: String = errors
        .iter()
        .map(|error| {
            format!(
                "{}\n",
                serde_json::to_string_pretty(&ErrorReply::new(error, Some("1.0.0"))).unwrap()
            )
        })
        .collect();
    compare("errors.json", &text);
}
