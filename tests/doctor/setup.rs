//! The list and the binary.

use std::os::unix::fs::{PermissionsExt, symlink};

use crate::rig::{LIST, Rig, lab};
use crate::support::{UPSTREAM, Variant};

#[test]
#[ignore = "privileged: makes network namespaces"]
fn lists_that_do_not_name_portmap_or_not_as_they_should() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Nftables);
    assert_eq!(rig.doctor().checks(), []);
    let unlisted = r#"{"cniVersion": "1.0.0", "name": "portmap", "plugins": [{"type": "ptp"}]}"#;
    let no_capability = LIST.replace(r#""portMappings": true"#, "");
    for text in [unlisted, &no_capability] {
        rig.write_list(text);
        let said = rig.doctor();
        assert_eq!(
            (said.status, &said.only("list")["severity"]),
            (Some(2), &"broken".into()),
            "{text}"
        );
        rig.follow(said.only("list"));
        assert_eq!(rig.doctor().of("list"), Vec::<&serde_json::Value>::new(), "{text}");
    }
    let first = LIST.replace(r#"{"type": "ptp"},"#, "").replace("\n]", ", {\"type\": \"ptp\"}\n]");
    for (text, words) in [
        (first.as_str(), "portmap stands first"),
        ("{", "which is no list"),
        (&LIST.replace(r#""stateDir""#, r#""stateDirectory""#), "does not know the key"),
    ] {
        rig.write_list(text);
        let said = rig.doctor();
        assert!(
            said.of("list")
                .iter()
                .any(|finding| finding["found"].as_str().unwrap().contains(words)),
            "{:#}",
            said.json
        );
    }
    rig.write_list(LIST);
    std::fs::write(rig.conf_dir.join("05-first.conflist"), unlisted).unwrap();
    assert_eq!(rig.doctor().of("ignored-list").len(), 1);
    std::fs::remove_file(rig.conf_dir.join("05-first.conflist")).unwrap();
    std::fs::remove_file(rig.conf_dir.join("10-pods.conflist")).unwrap();
    assert_eq!(rig.doctor().checks(), [("list".into(), "warning".into())]);
    rig.write_list(&LIST.replace("STATE", "/run/elsewhere"));
    assert!(
        rig.doctor().only("state-dir")["fix"]
            .as_str()
            .unwrap()
            .ends_with("--state-dir /run/elsewhere")
    );
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn everything_that_can_be_at_the_binarys_place() {
    let lab = lab(1);
    let rig = Rig::new(&lab, Variant::Nftables);
    let place = rig.dest.join("portmap");
    let own = std::fs::read(&place).unwrap();
    // Another build of this version: one byte more.
    let other = [own.as_slice(), b"x"].concat();
    let write = |bytes: &[u8], mode| {
        std::fs::write(&place, bytes).unwrap();
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    type Provoke<'a> = (&'a dyn Fn(), &'a str, &'a str);
    let cases: [Provoke; 6] = [
        (&|| {}, "broken", "there is no"),
        (
            &|| symlink("/nowhere/portmap", &place).unwrap(),
            "broken",
            "is a link to /nowhere/portmap, which does not exist",
        ),
        (&|| write(&own, 0o644), "broken", "cannot be run: its mode is 644"),
        (&|| write(&other, 0o755), "warning", "is another build of portmap"),
        (
            &|| assert!(std::fs::copy(UPSTREAM, &place).unwrap() > 0),
            "warning",
            "containernetworking/plugins",
        ),
        (&|| write(b"#!/bin/sh\ntouch \"$0.was-run\"\n", 0o755), "warning", "it was not run"),
    ];
    for (provoke, severity, words) in cases {
        drop(std::fs::remove_file(&place));
        provoke();
        let said = rig.doctor();
        let found = said.only("binary");
        assert!(
            found["found"].as_str().unwrap().contains(words) && found["severity"] == severity,
            "{found}"
        );
        assert!(!rig.dest.join("portmap.was-run").exists());
        rig.follow(found);
        assert_eq!(rig.doctor().checks(), [], "{words}");
    }
    std::fs::remove_file(&place).unwrap();
    std::fs::create_dir(&place).unwrap();
    assert!(rig.doctor().only("binary")["found"].as_str().unwrap().contains("is a directory"));
    std::fs::remove_dir(&place).unwrap();
    // Through a link that leads to it, as some images have it.
    std::fs::write(rig.dest.join("real"), &own).unwrap();
    std::fs::set_permissions(rig.dest.join("real"), std::fs::Permissions::from_mode(0o755))
        .unwrap();
    symlink("real", &place).unwrap();
    assert_eq!(rig.doctor().checks(), []);
    rig.node.shell(&format!(
        "mount -t tmpfs -o noexec none {0} && cp {0}/../bin2 {0} 2>/dev/null || true",
        rig.dest.display()
    ));
    // The mount is the node's alone.
    rig.node.shell(&format!("cp {} {}", crate::support::PORTMAP, place.display()));
    assert!(rig.doctor().only("binary")["found"].as_str().unwrap().contains("noexec"));
}
