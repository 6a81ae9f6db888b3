//! Which backend is taken, and what is said where none works.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use portmap::demo::plugin::{self, Output};
use portmap::demo::topology::Lab;
use portmap::demo::traffic::Transport;
use serde_json::{Value, json};

use crate::executable::write_executable;
use crate::site::{Site, bridge, on_each, tcp, with};
use crate::support::{Node, PORTMAP, Scratch, VARIANTS, Variant, attachment, foreign, prev_result};

const AUTO: &str = "auto";

fn auto(site: &Site) -> Value {
    with(site.config(0, &[tcp(8080)]), json!({"backend": AUTO, "cniVersion": "1.1.0"}))
}

fn error(output: &Output) -> Value {
    assert!(!output.success(), "{}", output.stdout);
    serde_json::from_str(&output.stdout).unwrap()
}

/// An executable that says `complaint` and fails.
fn broken(dir: &Path, tool: &str, complaint: &str) {
    let path = dir.join(tool);
    write_executable(&path, format!("#!/bin/sh\necho '{complaint}' >&2\nexit 3\n"));
}

/// A PATH with the tools of all given variants.
fn tools_of(scratch: &Scratch, variants: &[Variant]) -> PathBuf {
    let all = scratch.0.join("all");
    std::fs::create_dir_all(&all).unwrap();
    for variant in variants {
        for tool in std::fs::read_dir(variant.path(&scratch.0)).unwrap() {
            let tool = tool.unwrap();
            symlink(tool.path(), all.join(tool.file_name())).unwrap();
        }
    }
    all
}

/// siderolabs/talos#11846, talos#12617, plugins#1280, plugins#225, k0s#2141: the node has the tools
/// of one backend only. What is there is taken.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_04_auto_takes_what_the_node_has() {
    on_each(&VARIANTS, &bridge(), |site| {
        let pod = site.of(0, "a");
        site.node.ok("STATUS", &auto(site), &pod);
        site.node.ok("ADD", &auto(site), &pod);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.node.ok("CHECK", &auto(site), &pod);
        site.node.ok("DEL", &auto(site), &pod);
        site.assert_clean();
    });
}

/// netavark#740 and plugins' "neither iptables nor ip6tables usable": the reason was nowhere to be
/// read. Every backend is listed with what it lacks.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn pain_04_without_any_tool_each_backend_says_what_it_lacks() {
    on_each(&[Variant::Nftables], &bridge(), |site| {
        let empty = Scratch::new();
        site.forbid_ebpf(true);
        for path in [empty.0.clone(), PathBuf::new()] {
            site.node.path = path;
            let said = error(&site.call("ADD", &auto(site), &site.of(0, "a")));
            assert_eq!(said["code"], 101, "{said}");
            let text = format!("{} {}", said["msg"], said["details"]);
            for part in [
                "iptables: iptables-restore is not installed",
                "nftables: nft is not",
                "ebpf: cannot use the directory for eBPF maps: /sys/fs/bpf/portmap has owner",
            ] {
                assert!(text.contains(part), "{part}: {text}");
            }
            let said = error(&site.call("STATUS", &auto(site), &site.of(0, "a")));
            assert_eq!(said["code"], 50, "{said}");
            assert!(said.to_string().contains("nft is not installed"), "{said}");
        }
        site.forbid_ebpf(false);
        site.assert_clean();
    });
}

/// The same where the tools are there and do not work: their own words are shown.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables"]
fn pain_04_broken_tools_are_quoted() {
    on_each(&[Variant::Nftables], &bridge(), |site| {
        let dir = Scratch::new();
        broken(&dir.0, "iptables-restore", "no module ip_tables here");
        broken(&dir.0, "nft", "cannot talk to the kernel");
        site.forbid_ebpf(true);
        site.node.path = dir.0.clone();
        let said = error(&site.call("ADD", &auto(site), &site.of(0, "a")));
        assert_eq!(said["code"], 101, "{said}");
        for words in ["no module ip_tables here", "cannot talk to the kernel"] {
            assert!(said.to_string().contains(words), "{said}");
        }
        site.forbid_ebpf(false);
        site.assert_clean();
    });
}

/// talos#9223, talos#9883: what was tried out and found unusable is not fallen back to, and one broken
/// backend does not keep the other from being taken.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_04_a_broken_backend_is_passed_over() {
    for works in [Variant::Nftables, Variant::IptablesNft] {
        on_each(&[works], &bridge(), |site| {
            let dir = Scratch::new();
            let all = tools_of(&dir, &[works]);
            match works {
                Variant::Nftables => broken(&all, "iptables-restore", "broken"),
                _ => broken(&all, "nft", "broken"),
            }
            site.node.path = all;
            site.node.ok("ADD", &auto(site), &site.of(0, "a"));
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.node.ok("DEL", &auto(site), &site.of(0, "a"));
            site.assert_clean();
        });
    }
}

/// plugins#461, podman#5446: somebody uses nft in table nat, and `iptables -S` says "table `nat' is
/// incompatible, use 'nft' tool". A namespace in which things are tried out does not tell that.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_04_iptables_is_passed_over_where_its_table_is_not_its_own() {
    on_each(&[Variant::IptablesNft], &bridge(), |site| {
        let dir = Scratch::new();
        let only_iptables = site.node.path.clone();
        site.node.path = tools_of(&dir, &[Variant::IptablesNft, Variant::Nftables]);
        foreign::install_unreadable(&site.node, "nat");
        site.before = site.node.snapshot();
        let pod = site.of(0, "a");
        site.node.ok("STATUS", &auto(site), &pod);
        site.node.ok("ADD", &auto(site), &pod);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.node.ok("CHECK", &auto(site), &pod);
        assert!(site.node.shell("nft list tables").contains("table inet portmap"));
        site.node.ok("DEL", &auto(site), &pod);
        site.assert_clean();

        // Who asks for it is told what it says.
        let named = with(auto(site), json!({"backend": "iptables"}));
        site.node.path = only_iptables;
        let said = error(&site.call("ADD", &named, &pod));
        assert!(said.to_string().contains("is incompatible"), "{said}");
        site.forbid_ebpf(true);
        let said = error(&site.call("ADD", &auto(site), &pod));
        assert!(said["code"] == 101 && said.to_string().contains("is incompatible"), "{said}");
        site.forbid_ebpf(false);
        site.assert_clean();
    });
}

/// Trying things out needs rights that a sandboxed runtime may lack; the kernel's answer is shown.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables, nft and setpriv"]
fn pain_04_without_cap_net_admin_the_reason_is_clear() {
    on_each(&VARIANTS, &bridge(), |site| {
        let named = if site.node.variant == Variant::Ebpf { 5 } else { 100 };
        for (backend, code) in [(AUTO, 101), (site.node.variant.backend(), named)] {
            let config = with(auto(site), json!({ "backend": backend }));
            let mut command =
                plugin::command(Path::new("/usr/bin/setpriv"), "ADD", &site.of(0, "a"));
            command.env("PATH", &site.node.path).args([
                "--bounding-set=-net_admin",
                "--inh-caps=-net_admin",
                PORTMAP,
            ]);
            let input = config.to_string();
            let output = plugin::run(&mut command, input.as_bytes(), &site.lab.node).unwrap();
            let said = error(&output);
            assert_eq!(said["code"], code, "{said}");
            let text = said.to_string();
            // nft, iptables-nft, iptables-legacy and the kernel have words of their own for it.
            let clear = [
                "Operation not permitted",
                "Permission denied",
                "initialize table 'nat'",
                "lacks CAP_NET_ADMIN",
            ];
            assert!(clear.iter().any(|words| text.contains(words)), "{text}");
        }
        site.assert_clean();
    });
}

/// kubernetes#71305, kube-router#1069: asking iptables-legacy for anything makes its tables, and from
/// then on the node has two rule sets. Neither STATUS nor an ADD that fails leaves any.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_04_probing_leaves_no_tables_behind() {
    for variant in VARIANTS {
        // Not a `Site`: it lists rules with all tools, which makes the tables that must not be.
        let lab = Lab::build(bridge()).unwrap();
        let mut node = Node::new(&lab.node, variant);
        let tables = |node: &Node| {
            node.shell(
                "cat /proc/self/net/ip_tables_names /proc/self/net/ip6_tables_names
                 nft list tables",
            )
        };
        let pod = attachment(&lab.pods[0], "a");
        let config = node.config(json!([tcp(8080)]), prev_result(&lab, 0, "1.1.0"));
        let config = with(config, json!({"backend": AUTO, "cniVersion": "1.1.0"}));
        assert_eq!(tables(&node), "");
        node.ok("STATUS", &config, &pod);
        assert_eq!(tables(&node), "", "{variant:?}");

        let dir = Scratch::new();
        broken(&dir.0, "iptables-restore", "broken");
        broken(&dir.0, "nft", "broken");
        node.shell("mkdir -m 0777 /sys/fs/bpf/portmap");
        // What reads works, and only what writes does not.
        node.path = format!("{}:{}", dir.0.display(), node.path.display()).into();
        let (code, reason) = node.fails("ADD", &config, &pod);
        assert_eq!(code, 101, "{reason}");
        node.path = "/usr/sbin:/usr/bin:/bin".into();
        assert_eq!(tables(&node), "", "{variant:?}");
        node.shell("rmdir /sys/fs/bpf/portmap");
    }
}

/// plugins#1280: a configuration is switched from one backend to the other under running pods. DEL
/// cleans what ADD has used, and a repeated ADD moves over.
#[test]
#[ignore = "privileged: makes network namespaces, needs iptables and nft"]
fn pain_04_del_cleans_the_backend_that_add_used() {
    on_each(&VARIANTS, &bridge(), |site| {
        let dir = Scratch::new();
        let iptables = match site.node.variant {
            Variant::IptablesLegacy => Variant::IptablesLegacy,
            _ => Variant::IptablesNft,
        };
        site.node.path = tools_of(&dir, &[iptables, Variant::Nftables]);
        let pod = site.of(0, "a");
        let as_backend =
            |name: &str| with(site.config(0, &[tcp(8080)]), json!({ "backend": name }));
        let used = site.node.variant.backend();
        let other = if used == "iptables" { "nftables" } else { "iptables" };
        for named in [other, AUTO, used] {
            site.node.ok("ADD", &as_backend(used), &pod);
            site.reaches(Transport::Tcp, 8080, "pod-a");
            site.node.ok("DEL", &as_backend(named), &pod);
            site.refuses(8080);
            site.assert_clean();
        }
        site.node.ok("ADD", &as_backend(used), &pod);
        site.node.ok("ADD", &as_backend(other), &pod);
        site.reaches(Transport::Tcp, 8080, "pod-a");
        site.node.ok("CHECK", &as_backend(other), &pod);
        site.node.ok("DEL", &as_backend(used), &pod);
        site.assert_clean();
    });
}
