//! `portmap demo` is the README's first promise: it must hold on every kind of node.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test says by a panic that it failed"
)]

mod support;

use std::process::Command;

use support::{PORTMAP, Scratch, VARIANTS, Variant};

fn demo(variant: Variant, backend: Option<&str>) -> (bool, String) {
    let scratch = Scratch::new();
    let mut command = Command::new(PORTMAP);
    command.arg("demo").env("PATH", variant.path(&scratch.0));
    if let Some(backend) = backend {
        command.args(["--backend", backend]);
    }
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn holds_with_each_variant_s_tools_alone() {
    for variant in VARIANTS {
        for backend in [None, Some(variant.backend())] {
            let (held, text) = demo(variant, backend);
            assert!(held, "{variant:?} {backend:?}:\n{text}");
            assert!(text.contains("All held."), "{text}");
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn says_why_where_the_backend_cannot_work() {
    let (held, text) = demo(Variant::Nftables, Some("iptables"));
    assert!(!held);
    assert!(text.contains("iptables"), "{text}");
}

/// As on an image that is being built, or on a disk that is being repaired: the root is no mount point, which
/// the kernel refuses to keep private.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn holds_in_a_plain_directory_as_root() {
    let root = Scratch::new();
    for dir in ["proc", "sys", "tmp"] {
        std::fs::create_dir(root.0.join(dir)).unwrap();
    }
    std::fs::copy(PORTMAP, root.0.join("portmap")).unwrap();
    // What is mounted in the test's mount namespace, whose root is one, goes with it.
    let script = "mount --rbind /proc proc && mount --rbind /sys sys && exec chroot . /portmap demo --backend ebpf";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]);
    let output = command.current_dir(&root.0).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("All held."), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
}
