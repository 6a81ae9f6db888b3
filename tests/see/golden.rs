//! The commands' texts and JSON for a node that has everything, at a fixed time and widths.

use std::collections::BTreeMap;

use portmap::backend::iptables::{listing::Listing, path, rules};
use portmap::backend::{Counters, Leftover};
use portmap::commands::{Verdict, gc, list, who};
use portmap::conf::Options;
use portmap::engine::Collected;
use portmap::error::Error;
use portmap::inventory::{Attached, Inventory};
use portmap::model::{Attachment, BackendKind, Claim, Family, Forward, Mapping, Protocol};
use portmap::record::{PodIdentity, Record};
use portmap::sys::iptables::Variant;
use portmap::sys::netlink::socket_diag::Waiting;
use portmap::sys::process::Process;
use portmap::sys::store::{Damaged, Newer};
use portmap::who::evidence::Listener;
use portmap::who::{Evidence, Port, calls, first, judge};

use super::support::golden;

fn holds(name: &str, text: &str) {
    golden::holds(&format!("commands/{name}"), text);
}

/// Some time, in seconds since 1970.
const NOW: u64 = 1_800_000_000;

/// An attachment; mappings are `protocol hostPort containerPort [hostIP]`.
fn record(
    name: &str,
    order: u64,
    backend: BackendKind,
    addresses: &[&str],
    mappings: &[&str],
) -> Record {
    let mapping = |text: &&str| {
        let words: Vec<&str> = text.split(' ').collect();
        Mapping {
            protocol: Protocol::parse(words[0]).unwrap(),
            host_port: words[1].parse().unwrap(),
            container_port: words[2].parse().unwrap(),
            host_ip: words.get(3).map(|ip| ip.parse().unwrap()),
        }
    };
    let digit = format!("{order:x}");
    let attachment = Attachment {
        network: "cilium".into(),
        container_id: format!("{}{}", digit.repeat(4), "0123456789ab".repeat(5)),
        ifname: "eth0".into(),
    };
    let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    let mappings = mappings.iter().map(mapping).collect();
    let pod = match name.split_once('/') {
        Some((namespace, name)) => PodIdentity {
            namespace: namespace.into(),
            name: name.into(),
            uid: format!("uid-{name}"),
        },
        None => PodIdentity::default(),
    };
    Record {
        pod,
        order,
        time: NOW - 5000 / order,
        netns: format!("/run/netns/cni-{order}"),
        localnet_device: Some("cni0".into()),
        ..Record::new(attachment, mappings, addresses, Options::default(), backend)
    }
}

fn forward(port: u16, target: &str) -> Forward {
    let claim = Claim { family: Family::V4, protocol: Protocol::Tcp, address: None, port };
    Forward { claim, target: target.parse().unwrap() }
}

const NFTABLES_FLUSHED: [&str; 4] = [
    "192.0.2.1 in nodes4 of table inet portmap: expected, found nothing",
    "eth0 in uplinks of table inet portmap: expected, found nothing",
    "tcp . 4318 in any4_addr of table inet portmap: expected 198.18.2.33, found nothing",
    "tcp . 4318 in any4_port of table inet portmap: expected port 4318, found nothing",
];

/// A node with an attachment in each state.
fn inventory() -> Inventory {
    let attached = |record: Record, alive: bool, problems: &[&str]| Attached {
        record,
        alive,
        problems: Some(problems.iter().map(|text| (*text).to_owned()).collect()),
    };
    let (iptables, nftables, ebpf) =
        (BackendKind::Iptables, BackendKind::Nftables, BackendKind::Ebpf);
    let dual = ["198.18.2.27/32", "fd00:18::27/128"];
    let unreadable = Attached {
        problems: None,
        ..attached(record("", 5, nftables, &["198.18.2.31/32"], &["sctp 7000 7000"]), true, &[])
    };
    let dns = record(
        "kube-system/node-local-dns-x7k2p",
        6,
        ebpf,
        &["198.18.2.32/32"],
        &["udp 53 1053 192.0.2.1"],
    );
    let counted = dns.forwards(Family::V4)[0].claim;
    let counters = Counters {
        connections: 12,
        packets_in: 3400,
        bytes_in: 288_000,
        packets_out: 3399,
        bytes_out: 1_200_000,
    };
    Inventory {
        packets: BTreeMap::from([("forwarded", 3400), ("answered", 3399), ("dropNoPort", 0)]),
        attached: vec![
            attached(
                record("shop/web-6f7d9c-abcde", 1, iptables, &dual, &["tcp 8080 80"]),
                true,
                &[],
            ),
            attached(
                record("shop/web-6f7d9c-vwxyz", 2, iptables, &["198.18.2.28/32"], &["tcp 8080 80"]),
                true,
                &[],
            ),
            attached(
                record("logs/agent", 3, iptables, &["198.18.2.29/32"], &["tcp 4317 4317"]),
                true,
                &[
                    "IPv4: tcp 0.0.0.0:4317 -> 198.18.2.29:4317 is not forwarded: table nat has no chain CNI-DN-0123456789abcdef01234",
                ],
            ),
            attached(
                record("logs/second-agent", 7, nftables, &["198.18.2.33/32"], &["tcp 4318 4318"]),
                true,
                &NFTABLES_FLUSHED,
            ),
            attached(
                record("logs/third-agent", 8, nftables, &["198.18.2.34/32"], &["tcp 4319 4319"]),
                true,
                &NFTABLES_FLUSHED,
            ),
            attached(
                record("jobs/import-1", 4, iptables, &["198.18.2.30/32"], &["tcp 9000 90"]),
                false,
                &[],
            ),
            unreadable,
            attached(dns, true, &[]),
        ],
        counters: [((ebpf, counted), counters)].into(),
        leftovers: vec![leftover()],
    }
}

fn leftover() -> Leftover {
    Leftover {
        place: "iptables-legacy".into(),
        object: "chain CNI-DN-fedcba9876543210fedcb".into(),
        network: "podman".into(),
        container_id: "feedfacefeedfacefeedface".into(),
        forwards: [forward(7070, "10.88.0.2:70")].into(),
    }
}

fn notes() -> Vec<String> {
    vec!["what nftables has in the kernel cannot be read: read the nftables rules (netlink): Operation not permitted".into()]
}

#[test]
fn list_at_every_width() {
    let inventory = inventory();
    for (name, width) in
        [("list", None), ("list-120", Some(120)), ("list-80", Some(80)), ("list-40", Some(40))]
    {
        let text = list::as_text(&inventory, &notes(), NOW, width);
        holds(name, &text);
        // What stands below the table is text, which the terminal breaks.
        let table = text.split("\n\n").next().unwrap();
        let widest = table.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(width.is_none_or(|width| widest <= width), "{name}: {widest}");
    }
    let json = list::as_json(&inventory, &notes(), NOW);
    holds("list.json", &format!("{json}\n"));
    assert_eq!(list::verdict(&inventory, &[]), Verdict::Warnings);
    let mut sound = inventory;
    sound.attached.truncate(2);
    assert_eq!(list::verdict(&sound, &[]), Verdict::Fine);
    assert_eq!(list::verdict(&sound, &notes()), Verdict::Warnings);
}

/// Table nat with everything of these records, and in IPv4 a NodePort for some callers.
fn nat(records: &[Record], family: Family) -> Listing {
    let mut text =
        "-N KUBE-NODEPORTS\n-N CNI-HOSTPORT-DNAT\n-A PREROUTING -j KUBE-NODEPORTS\n".to_owned();
    let mut add = |chain: &str, rule: &str| text += &format!("-A {chain} {rule}\n");
    if family == Family::V4 {
        add(
            "KUBE-NODEPORTS",
            "-s 10.0.0.0/8 -p tcp -m comment --comment \"shop/web\" -m tcp --dport 8080 -j DNAT --to-destination 10.9.9.9:80",
        );
    }
    for chain in ["PREROUTING", "OUTPUT"] {
        add(chain, rules::DNAT_JUMP);
    }
    add("POSTROUTING", rules::MASQ_JUMP);
    add(rules::MASQ, &rules::masq_rule(13));
    for record in records.iter().rev() {
        for rule in rules::entry_rules(record, family) {
            add(rules::DNAT, &rule);
        }
        for rule in rules::chain_rules(record, family) {
            add(&record.chain, &rule);
        }
    }
    Listing::parse(&text)
}

#[test]
fn who_with_all_that_there_can_be() {
    let mut inventory = inventory();
    inventory.leftovers.clear();
    let records = inventory.records();
    let listener = Listener {
        protocol: Protocol::Tcp,
        socket: Waiting { addresses: vec!["0.0.0.0".parse().unwrap()], v6only: false, inode: 1 },
        processes: [Process { pid: 4711, name: "nginx".into() }].into(),
    };
    let evidence = Evidence {
        local: ["192.0.2.1", "127.0.0.1", "::1"].map(|ip| ip.parse().unwrap()).into(),
        nat: Family::ALL.map(|family| (family, Variant::Nft, nat(&records[..2], family))).into(),
        listeners: vec![listener],
        ..Evidence::default()
    };
    let ask = |port: &str, evidence: &Evidence| {
        let port: Port = port.parse().unwrap();
        let mut entries = inventory.entries(&records);
        entries.retain(|entry| entry.holding.forward.claim.port == port.number);
        let answers: Vec<_> = calls(port, None, &entries, &[])
            .into_iter()
            .filter_map(|call| {
                let way = first(&call, &entries).map(|entry| {
                    let listing = nat(&records[..2], call.family);
                    path::steps(entry.holding.record, &entry.holding.forward.claim, &listing)
                });
                judge(call, &entries, &[], evidence, way.unwrap_or_default())
            })
            .collect();
        let text = who::as_text(port, &answers, &notes(), NOW);
        let json = format!("{}\n", who::as_json(&answers, &notes()));
        (text, json, who::verdict(&answers))
    };
    let (text, json, verdict) = ask("8080/tcp", &evidence);
    holds("who", &text);
    holds("who.json", &json);
    assert_eq!(verdict, Verdict::Fine);
    let (text, _, verdict) = ask("4317", &Evidence { listeners: Vec::new(), ..evidence });
    holds("who-missing", &text);
    assert_eq!(verdict, Verdict::Warnings);
    let port = "8080/udp".parse().unwrap();
    holds("who-nobody", &who::as_text(port, &[], &[], NOW));
    assert_eq!(who::verdict(&[]), Verdict::Warnings);
}

#[test]
fn gc_with_all_that_there_can_be() {
    let mut attached = inventory().attached.into_iter();
    let unseen = Record { netns: "/var/run/netns/cni-1".into(), ..attached.next().unwrap().record };
    let dead = attached.nth(4).unwrap().record;
    let damaged = |id: &str, netns: Option<&str>| Damaged {
        id: id.repeat(16),
        reason: "EOF while parsing a string at line 1 column 80".into(),
        netns: netns.map(str::to_owned),
        view: None,
    };
    let busy = Error::Busy { path: "/run/xtables.lock".into(), seconds: 15, holder: None };
    let collected = Collected {
        removed: vec![dead],
        live: 3,
        unseen: vec![unseen],
        repaired: vec![damaged("0a", Some("/run/netns/cni-7"))],
        unclear: vec![damaged("0b", None)],
        newer: vec![Newer { id: "0c".repeat(16), format: 2 }],
        failed: vec![("container c interface eth0 on network cilium".into(), busy)],
    };
    holds("gc", &gc::as_text(&collected, &[leftover()], &notes(), false));
    holds("gc-dry-run", &gc::as_text(&collected, &[leftover()], &[], true));
    let json = gc::as_json(&collected, &[leftover()], &notes(), false);
    holds("gc.json", &format!("{json}\n"));
    assert_eq!(gc::verdict(&Collected { live: 3, ..Collected::default() }, &[]), Verdict::Fine);
    assert_eq!(gc::verdict(&Collected::default(), &notes()), Verdict::Warnings);
    let newer = Collected { newer: collected.newer, ..Collected::default() };
    assert_eq!(gc::verdict(&newer, &[]), Verdict::Warnings);
}
