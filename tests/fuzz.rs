//! No input, however mangled, makes the plugin panic or print anything but one JSON object.
//!
//! Nothing here can change the machine: there are no tools in PATH, and where the user could change
//! sysctls, rules or programs (root), all of it happens in namespaces of its own.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

#[path = "fuzz/mangled.rs"]
mod mangled;
#[path = "support/raw.rs"]
mod raw;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use mangled::{configuration, mangled};
use portmap::cni::invocation::Invocation;
use portmap::cni::json::RawObject;
use portmap::sys::Host;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use raw::{Answer, NewPath, files_below};
use serde_json::Value;

/// Runs a property in a thread that cannot reach the machine's network.
fn isolated<S>(cases: u32, strategy: S, property: impl Fn(&Path, S::Value) + Send)
where
    S: Strategy + Send,
{
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            raw::seclude();
            let config = Config { cases, failure_persistence: None, ..Config::default() };
            TestRunner::new(config)
                .run(&strategy, |value| {
                    let dir = NewPath::new();
                    property(&dir.0, value);
                    let records = files_below(&dir.0.join("records"));
                    prop_assert!(records.is_empty(), "left: {records:?}");
                    Ok(())
                })
                .unwrap();
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

type Env = BTreeMap<&'static str, Vec<u8>>;

fn in_process(env: &Env, stdin: &[u8]) -> Option<Answer> {
    let get = |name: &str| env.get(name).map(|value| String::from_utf8_lossy(value).into_owned());
    let invocation = Invocation::read(get).transpose()?;
    let mut input = stdin;
    let outcome = portmap::verb::run(invocation, &mut input, &Host::new(None));
    Some(Answer {
        status: Some(i32::from(outcome.failed)),
        stdout: outcome.stdout.unwrap_or_default().into_bytes(),
        stderr: outcome.notes.join("\n"),
    })
}

fn as_process(env: &Env, stdin: &[u8]) -> Answer {
    let env: Vec<(&str, OsString)> =
        env.iter().map(|(name, value)| (*name, OsString::from_vec(value.clone()))).collect();
    raw::run(&env, stdin)
}

/// What holds for every answer to anything.
fn judge(env: &Env, stdin: &[u8], answer: &Answer) {
    let command = env.get("CNI_COMMAND").map(Vec::as_slice).unwrap_or_default();
    match (command, answer.status) {
        (b"", status) => assert_eq!((status, answer.stdout.len()), (Some(0), 0)),
        (b"ADD", Some(0)) => assert_eq!(without_version(answer.object()), prev_result(stdin)),
        (b"VERSION", status) => {
            assert_eq!(status, Some(0));
            assert_eq!(answer.object()["supportedVersions"].as_array().unwrap().len(), 7);
        }
        (_, Some(0)) => assert!(answer.stdout.is_empty(), "{answer:?}"),
        _ => {
            answer.error();
        }
    }
}

fn without_version(mut object: Value) -> Value {
    object.as_object_mut().unwrap().retain(|key, _| !key.eq_ignore_ascii_case("cniVersion"));
    object
}

fn prev_result(stdin: &[u8]) -> Value {
    let config: RawObject = serde_json::from_slice(stdin).unwrap();
    let result = config.get("prevResult").expect("an ADD without prevResult succeeded");
    without_version(serde_json::from_str(result.get()).unwrap())
}

/// The variables of a good call of this verb.
fn good(verb: &str) -> Env {
    let mut env: Env =
        raw::ADD.iter().map(|(name, value)| (*name, value.as_bytes().to_vec())).collect();
    env.insert("CNI_COMMAND", verb.as_bytes().to_vec());
    env
}

fn verb() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        6 => Just("ADD"),
        2 => Just("DEL"),
        1 => Just("CHECK"),
        1 => Just("GC"),
        1 => Just("STATUS"),
        1 => Just("VERSION"),
    ]
}

/// Values that are good for some variable, and anything that can be in an environment.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let known = [
        "",
        "ADD",
        "DEL",
        "CHECK",
        "GC",
        "STATUS",
        "VERSION",
        "add",
        "c1",
        "eth0",
        "..",
        "1",
        "true",
        "/proc/self/ns/net",
        "/proc/thread-self/ns/net",
        "/",
        "/dev/zero",
        "K8S_POD_NAME=a;=;;x",
        "\u{1f980}",
        "a\u{a0}b",
        "0123456789abcdef",
    ];
    prop_oneof![
        2 => prop::sample::select(known.to_vec()).prop_map(|text| text.as_bytes().to_vec()),
        1 => prop::collection::vec(1_u8.., 0..40),
        1 => ".{0,40}".prop_map(|text| text.replace('\0', "").into_bytes()),
    ]
}

fn environment() -> impl Strategy<Value = Env> {
    let name = prop::sample::select(vec![
        "CNI_COMMAND",
        "CNI_CONTAINERID",
        "CNI_NETNS",
        "CNI_IFNAME",
        "CNI_ARGS",
        "CNI_PATH",
        "CNI_NETNS_OVERRIDE",
        "CNI_UNKNOWN",
        "LC_ALL",
    ]);
    (verb(), prop::collection::btree_map(name, value(), 0..4)).prop_map(|(verb, changes)| {
        let mut env = good(verb);
        env.extend(changes);
        env
    })
}

#[test]
fn arbitrary_bytes_on_stdin() {
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        r#"[ \[\]{}:,"a-z0-9\\.eE+-]{0,60}"#.prop_map(String::into_bytes),
        any::<String>().prop_map(String::into_bytes),
    ];
    isolated(400, (verb(), bytes), |_, (verb, stdin)| {
        let env = good(verb);
        judge(&env, &stdin, &in_process(&env, &stdin).unwrap());
    });
}

#[test]
fn mangled_configurations() {
    isolated(600, (verb(), mangled()), |dir, (verb, config)| {
        let (env, stdin) = (good(verb), config.text(dir));
        judge(&env, &stdin, &in_process(&env, &stdin).unwrap());
    });
}

#[test]
fn arbitrary_environments() {
    isolated(400, (environment(), any::<bool>()), |dir, (env, mappings)| {
        let stdin = configuration(mappings).text(dir);
        if let Some(answer) = in_process(&env, &stdin) {
            judge(&env, &stdin, &answer);
        }
    });
}

#[test]
fn all_of_it_through_the_binary() {
    isolated(200, (environment(), mangled()), |dir, (env, config)| {
        let stdin = config.text(dir);
        judge(&env, &stdin, &as_process(&env, &stdin));
    });
}

/// Without this the others could prove nothing: calls that get far must be among them.
#[test]
fn good_calls_get_as_far_as_the_tools() {
    isolated(1, Just(()), |dir, ()| {
        let stdin = configuration(true).text(dir);
        let answer = in_process(&good("ADD"), &stdin).unwrap();
        assert_eq!(answer.error().0, 100, "{answer:?}");
        assert!(dir.join("lock").exists());
        let stdin = configuration(false).text(dir);
        let answer = in_process(&good("ADD"), &stdin).unwrap();
        assert_eq!(answer.status, Some(0));
        judge(&good("ADD"), &stdin, &answer);
    });
}
