//! The contract with runtimes (CNI specification 1.1.0, libcni, go-cni), on the built binary. No root
//! is needed: nothing here gets as far as the node.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "support/raw.rs"]
mod raw;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use portmap::cni::version::SUPPORTED;
use raw::{ADD, Answer, NewPath, owned, run, run_redirected, with};
use serde_json::{Value, json};

fn verb(verb: &str, config: &str) -> Answer {
    run(&with(&ADD, &[("CNI_COMMAND", verb)]), config.as_bytes())
}

fn config(version: &str, more: &str) -> String {
    format!(r#"{{"cniVersion":"{version}","name":"n","type":"portmap"{more}}}"#)
}

#[test]
fn version_answers_whatever_is_on_stdin() {
    // As go-cni and podman call it.
    let env = [
        ("CNI_COMMAND", "VERSION"),
        ("CNI_NETNS", "dummy"),
        ("CNI_IFNAME", "dummy"),
        ("CNI_PATH", "dummy"),
    ];
    for (stdin, expected) in [
        ("", "1.1.0"),
        ("garbage", "1.1.0"),
        (r#"{"cniVersion":"9.9.9"}"#, "1.1.0"),
        (r#"{"cniVersion":7}"#, "1.1.0"),
        (r#"{"CNIVersion":"0.2.0"}"#, "0.2.0"),
    ] {
        assert_version(&run(&env, stdin.as_bytes()), expected);
    }
    for version in SUPPORTED {
        let stdin = format!(r#"{{"cniVersion":"{version}"}}"#);
        assert_version(&run(&env, stdin.as_bytes()), version);
    }
    assert_version(&run(&[("CNI_COMMAND", "VERSION")], b""), "1.1.0");
    assert_version(&run_redirected(&env, "<&-", b""), "1.1.0");
}

fn assert_version(answer: &Answer, expected: &str) {
    assert_eq!(answer.status, Some(0), "{answer:?}");
    let supported = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    assert_eq!(answer.object(), json!({"cniVersion": expected, "supportedVersions": supported}));
    assert_eq!(answer.stderr, "");
}

#[test]
fn without_a_command_it_introduces_itself_on_stderr() {
    for env in [vec![], vec![("CNI_COMMAND", "")], with(&ADD, &[("CNI_COMMAND", "")])] {
        let answer = run(&env, b"");
        assert_eq!((answer.status, answer.stdout.as_slice()), (Some(0), &b""[..]), "{answer:?}");
        for version in SUPPORTED {
            assert!(answer.stderr.contains(version), "{}", answer.stderr);
        }
    }
}

#[test]
fn unknown_commands_are_environment_errors() {
    for command in ["add", "Add", "DELETE", "ADD ", "\u{c4}DD", "UPDATE"] {
        let (code, msg) = verb(command, &config("1.0.0", "")).error();
        assert_eq!(code, 4, "{command}");
        assert!(msg.contains("CNI_COMMAND") && msg.contains(command.trim()), "{msg}");
    }
}

#[test]
fn the_environment_is_checked_before_stdin_and_in_order() {
    let all = "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME";
    for (command, changes, expected) in [
        ("ADD", &[("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")][..], all),
        ("CHECK", &[("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")][..], all),
        (
            "DEL",
            &[("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")],
            "CNI_CONTAINERID, CNI_IFNAME",
        ),
        // Missing comes before malformed, and of the malformed the ID first.
        ("ADD", &[("CNI_CONTAINERID", "-"), ("CNI_NETNS", "")], "CNI_NETNS"),
        ("ADD", &[("CNI_CONTAINERID", "-"), ("CNI_IFNAME", "..")], "CNI_CONTAINERID"),
        ("DEL", &[("CNI_CONTAINERID", "c1\n")], "CNI_CONTAINERID"),
        ("DEL", &[("CNI_IFNAME", "a:b")], "CNI_IFNAME"),
    ] {
        let env = with(&with(&ADD, changes), &[("CNI_COMMAND", command)]);
        let (code, msg) = run(&env, b"not JSON").error();
        assert_eq!(code, 4, "{command} {changes:?}");
        assert!(msg.contains(expected), "{command} {changes:?}: {msg}");
    }
}

#[test]
fn stdin_is_checked_in_the_order_of_skel() {
    for (stdin, code, word) in [
        ("", 6, "EOF"),
        ("{", 6, "EOF"),
        ("[]", 6, "object"),
        ("{} {}", 6, "trailing"),
        (r#"{"name":1,"cniVersion":1}"#, 6, "name"),
        (r#"{"name":"","cniVersion":1}"#, 7, "name"),
        (r#"{"name":"n","cniVersion":1}"#, 6, "cniVersion"),
        (r#"{"name":"n","cniVersion":"1.0"}"#, 1, "1.0"),
        (r#"{"name":"n","cniVersion":"1.0.0","snat":1}"#, 7, "snat"),
        (r#"{"name":"n","cniVersion":"1.0.0"}"#, 7, "prevResult"),
    ] {
        let (got, msg) = verb("ADD", stdin).error();
        assert_eq!(got, code, "{stdin}: {msg}");
        assert!(msg.contains(word), "{stdin}: {msg}");
    }
}

#[test]
fn errors_carry_the_version_of_the_configuration() {
    for version in SUPPORTED {
        let object = verb("ADD", &config(version, "")).object();
        assert_eq!(object["cniVersion"], version, "{object}");
    }
    assert_eq!(verb("ADD", &config("7.0.0", "")).object()["cniVersion"], "1.1.0");
}

#[test]
fn add_without_mappings_passes_prev_result_on_to_the_letter() {
    let dir = NewPath::new();
    for version in SUPPORTED {
        let addresses = match version {
            "0.1.0" | "0.2.0" => r#""ip4":{"ip":"10.0.0.2/24","gateway":"10.0.0.1"}"#,
            _ => {
                r#""interfaces":[{"name":"eth0","sandbox":"/n","mtu":1500}],"ips":[{"version":"4","address":"10.0.0.2/24","interface":0}]"#
            }
        };
        let members = format!(
            r#"{addresses},"dns":{{}},"x-Unknown":{{"f":1.50,"e":1E+2,"z":-0.0,"big":123456789012345678901234567890,"deep":[null,{{"a":"\u00e9\/"}}, 1]}},"routes":[]"#
        );
        for (own, runtime_config) in [
            (String::new(), ""),
            (format!(r#""cniVersion":"{version}","#), r#","runtimeConfig":{}"#),
            (r#""CniVersion":"","#.to_owned(), r#","runtimeConfig":{"portMappings":null}"#),
            (String::new(), r#","runtimeConfig":{"portMappings":[]}"#),
            (String::new(), r#","runtimeConfig":null"#),
        ] {
            let state_dir = dir.text();
            let more = format!(
                r#","stateDir":"{state_dir}","prevResult":{{{own}{members}}}{runtime_config}"#
            );
            let answer = verb("ADD", &config(version, &more));
            assert_eq!(answer.status, Some(0), "{answer:?}");
            answer.object();
            let expected = format!("{{\"cniVersion\":\"{version}\",{members}}}\n");
            assert_eq!(String::from_utf8(answer.stdout).unwrap(), expected);
        }
    }
    assert!(!dir.0.exists(), "a call with nothing to do leaves nothing");
}

#[test]
fn verbs_are_refused_below_the_version_that_has_them() {
    let prev_result = r#","prevResult":{"ips":[]},"cni.dev/valid-attachments":[]"#;
    for (command, since) in [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")] {
        for version in SUPPORTED.iter().filter(|version| **version < since) {
            let (code, msg) = verb(command, &config(version, prev_result)).error();
            assert_eq!(code, 1, "{command} {version}: {msg}");
            assert!(msg.contains(command) && msg.contains(since) && msg.contains(version), "{msg}");
        }
    }
    // Nothing is forwarded, so there is nothing to compare.
    assert_eq!(verb("CHECK", &config("0.4.0", prev_result)).status, Some(0));
}

#[test]
fn the_plugin_s_own_namespace_is_refused_before_all_else() {
    let dir = NewPath::new();
    let own = [("CNI_NETNS", "/proc/self/ns/net")];
    let mappings = format!(
        r#","stateDir":"{}","prevResult":{{"ips":[{{"address":"10.0.0.2/32"}}]}},"runtimeConfig":{{"portMappings":[{{"hostPort":80,"containerPort":80}}]}}"#,
        dir.text()
    );
    for more in [&mappings, r#","snat":"bad""#] {
        let (code, msg) = run(&with(&ADD, &own), config("1.0.0", more).as_bytes()).error();
        assert_eq!(code, 8, "{msg}");
        assert!(msg.contains("/proc/self/ns/net") && msg.contains("CNI_NETNS_OVERRIDE"), "{msg}");
    }
    assert!(!dir.0.exists(), "the state directory was made");
    let idle = config("1.0.0", r#","prevResult":{"ips":[]}"#);
    for (value, status) in [("1", 0), ("true", 0), ("TRUE", 0), ("", 1), ("0", 1), ("yes", 1)] {
        let env = with(&with(&ADD, &own), &[("CNI_NETNS_OVERRIDE", value)]);
        let answer = run(&env, idle.as_bytes());
        assert_eq!(answer.status, Some(status), "CNI_NETNS_OVERRIDE={value}: {answer:?}");
    }
    // DEL must not fail over it: runtimes would repeat it for ever.
    let env = with(&with(&ADD, &own), &[("CNI_COMMAND", "DEL")]);
    assert_eq!(run(&env, idle.as_bytes()).status, Some(0));
}

#[test]
fn del_errors_avoid_the_words_that_go_cni_takes_for_success() {
    let del = with(&ADD, &[("CNI_COMMAND", "DEL")]);
    // Others may write to it, so that the records there are not used.
    let parent = NewPath::new();
    let dir = parent.0.join("Not Found/no such file or directory");
    std::fs::create_dir_all(dir.join("records/x.json")).unwrap();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).unwrap();
    let bad_dir =
        format!(r#","stateDir":"{}","runtimeConfig":{{"portMappings":[{{}}]}}"#, dir.display());
    for (changes, stdin) in [
        (&[][..], config("1.0.0", &bad_dir)),
        (&[("CNI_NETNS", "")], config("1.0.0", &bad_dir)),
        (&[], config("not found", "")),
        (&[], r#"{"name":"not found"}"#.to_owned()),
        (&[], r#"{"name":["no such file or directory"]}"#.to_owned()),
        (&[("CNI_IFNAME", "not found")], config("1.0.0", "")),
        (&[("CNI_CONTAINERID", "No such file or directory")], config("1.0.0", "")),
    ] {
        let answer = run(&with(&del, changes), stdin.as_bytes());
        answer.error();
        let text = String::from_utf8(answer.stdout).unwrap().to_lowercase();
        for word in ["not found", "no such file or directory"] {
            assert!(!text.contains(word), "{changes:?} {stdin}: {text}");
        }
    }
}

/// ADD fails there, and the runtime clears up after it.
#[test]
fn del_succeeds_where_no_state_can_be_kept() {
    let parent = NewPath::new();
    std::fs::create_dir_all(&parent.0).unwrap();
    let (shared, file) = (parent.0.join("shared"), parent.0.join("file"));
    std::fs::create_dir(&shared).unwrap();
    std::fs::set_permissions(&shared, PermissionsExt::from_mode(0o777)).unwrap();
    std::fs::write(&file, "").unwrap();
    for dir in [Path::new("/proc/x/y"), &shared, &file] {
        let more = format!(
            r#","stateDir":"{}","runtimeConfig":{{"portMappings":[{{"hostPort":80,"containerPort":80}}]}}"#,
            dir.display()
        );
        let added = format!(r#"{more},"prevResult":{{"ips":[{{"address":"10.0.0.2/32"}}]}}"#);
        let (code, msg) = run(&ADD, config("1.0.0", &added).as_bytes()).error();
        assert!([5, 7].contains(&code), "{code} {msg}");
        let answer = run(&with(&ADD, &[("CNI_COMMAND", "DEL")]), config("1.0.0", &more).as_bytes());
        assert_eq!(answer.status, Some(0), "{answer:?}");
        assert!(answer.stderr.contains(dir.to_str().unwrap()), "{answer:?}");
    }
}

#[test]
fn del_succeeds_over_everything_that_it_does_not_need() {
    let dir = NewPath::new();
    let del = with(&ADD, &[("CNI_COMMAND", "DEL"), ("CNI_NETNS", "")]);
    for more in [
        "",
        r#","prevResult":7"#,
        r#","prevResult":{"cniVersion":"9.9.9","ips":"x"}"#,
        r#","snat":"x","backend":"y","markMasqBit":-1,"conflictPolicy":[]"#,
        r#","runtimeConfig":7"#,
        r#","runtimeConfig":{"portMappings":null}"#,
    ] {
        let more = format!(r#","stateDir":"{}"{more}"#, dir.text());
        for version in SUPPORTED {
            let answer = run(&del, config(version, &more).as_bytes());
            assert_eq!(
                (answer.status, answer.stdout.as_slice()),
                (Some(0), &b""[..]),
                "{more}: {answer:?}"
            );
        }
    }
    assert!(!dir.0.exists());
}

#[test]
fn bytes_that_are_not_text_are_errors_like_any_other() {
    let idle = config("1.0.0", r#","prevResult":{"ips":[]}"#);
    let bytes = || OsString::from_vec(vec![b'a', 0xff, 0xc0, 0x80]);
    for (name, fine) in [
        ("CNI_COMMAND", false),
        ("CNI_CONTAINERID", false),
        ("CNI_NETNS", true),
        ("CNI_ARGS", true),
        ("CNI_PATH", true),
        ("CNI_NETNS_OVERRIDE", true),
    ] {
        let mut env = owned(&ADD);
        env.retain(|(other, _)| *other != name);
        env.push((name, bytes()));
        let answer = run(&env, idle.as_bytes());
        if fine {
            assert_eq!(answer.status, Some(0), "{name}: {answer:?}");
        } else {
            assert_eq!(answer.error().0, 4, "{name}");
        }
    }
    for (stdin, code) in [
        (&b"\xff\xfe{\0}\0"[..], 6),
        (b"{\"name\":\"\xff\"}", 6),
        (b"\0", 6),
        (b"{\"name\":\"n\0\"}", 6),
        (b"{\"name\":\"n\\u0000\"}", 7),
        (b"\xef\xbb\xbf{}", 6),
        (b"{\"name\":\"\\ud800\"}", 6),
    ] {
        assert_eq!(run(&ADD, stdin).error().0, code, "{}", String::from_utf8_lossy(stdin));
    }
}

#[test]
fn size_and_depth_do_not_matter() {
    let long = "x".repeat(6 << 20);
    let answer = verb(
        "ADD",
        &config("1.0.0", &format!(r#","pad":"{long}","prevResult":{{"ips":[],"pad":"{long}"}}"#)),
    );
    assert_eq!(answer.status, Some(0));
    assert!(answer.stdout.len() > long.len());
    assert_eq!(answer.object()["pad"], long.as_str());
    assert_eq!(verb("ADD", &long).error().0, 6);

    for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
        let deep = format!("{}1{}", open.repeat(10_000), close.repeat(10_000));
        let aside = config("1.0.0", &format!(r#","x":{deep},"prevResult":{{"ips":[]}}"#));
        assert_eq!(verb("ADD", &aside).status, Some(0), "what is not read is not judged");
        verb("ADD", &deep).error();
        for key in ["prevResult", "runtimeConfig", "backend", "conditionsV4", "name", "cniVersion"]
        {
            let text = config("1.0.0", &format!(r#","prevResult":{{}},"{key}":{deep}"#));
            let (code, _) = verb("ADD", &text).error();
            assert!([6, 7].contains(&code), "{key}: {code}");
            if !["name", "cniVersion"].contains(&key) {
                assert_eq!(verb("DEL", &text).status, Some(0), "{key}");
            }
        }
        verb("ADD", &open.repeat(1 << 20)).error();
    }
}

#[test]
fn of_duplicate_keys_the_last_counts_as_in_go() {
    let text = r#"{"cniVersion":"9.9.9","name":3,"NAME":"n","snat":"x","CNIVERSION":"0.4.0","SNAT":true,"prevResult":7,"PrevResult":{"ips":[],"a":1,"a":2}}"#;
    let answer = verb("ADD", text);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    assert_eq!(answer.stdout, b"{\"cniVersion\":\"0.4.0\",\"ips\":[],\"a\":1,\"a\":2}\n");
}

#[test]
fn closed_streams_do_no_harm() {
    let idle = config("1.0.0", r#","prevResult":{"ips":[]}"#);
    assert_eq!(run_redirected(&ADD, "<&-", b"").error().0, 6);
    let answer = run_redirected(&ADD, ">&-", idle.as_bytes());
    assert_eq!((answer.status, answer.stderr.as_str()), (Some(0), ""));
    assert_eq!(run_redirected(&ADD, "2>&-", b"{").error().0, 6);
    // A directory cannot be read.
    assert_eq!(run_redirected(&ADD, "</", b"").error().0, 5);
    let answer = run_redirected(&ADD, ">/dev/full", idle.as_bytes());
    assert!(answer.stderr.is_empty(), "{answer:?}");
}

#[test]
fn notes_go_to_stderr_and_the_result_alone_to_stdout() {
    let dir = NewPath::new();
    let more = format!(
        r#","stateDir":"{}","prevResult":{{"ips":[]}},"runtimeConfig":{{"portMappings":[{{"HostPort":80,"ContainerPort":80}}]}}"#,
        dir.text()
    );
    let answer = verb("ADD", &config("1.0.0", &more));
    assert_eq!(answer.status, Some(0));
    let expected: Value = json!({"cniVersion": "1.0.0", "ips": []});
    assert_eq!(answer.object(), expected);
    assert!(answer.stderr.contains("no address"), "{}", answer.stderr);
    assert!(!dir.0.exists());
}
