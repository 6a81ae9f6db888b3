//! Maps that have no room for another entry.

use std::net::SocketAddr;

use portmap::demo::traffic::{Call, Transport, reach};
use portmap::model::Family;

use super::support::{ebpf, files_of};
use super::{Scene, TIMEOUT, lab};

/// Of one mapping: two for each family.
const ENTRIES: usize = 4;

impl Scene<'_> {
    fn server(&self, port: u16) -> Option<String> {
        let call = Call::new(Transport::Tcp, self.lab.node_socket(Family::V4, port), TIMEOUT);
        reach(&self.lab.client, call).ok().map(|reply| reply.server)
    }

    fn all_there_is(&self) -> (Vec<String>, Vec<std::path::PathBuf>) {
        let records = files_of(&self.node.state_dir.join("records"));
        (ebpf::state(&self.lab.node), records.into_keys().collect())
    }

    fn entries_of(&self, map: &str) -> usize {
        let prefix = format!("{map} ");
        ebpf::entries(&self.lab.node).iter().filter(|line| line.starts_with(&prefix)).count()
    }
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn an_add_for_which_there_is_no_room_changes_nothing() {
    let lab = lab(3);
    let map = "pm_claims";
    let scene = Scene::new(&lab);
    // Two pods of two mappings each, and less than a third one needs for its own address alone.
    let room = 2 * 2 * ENTRIES + 2;
    scene.with_room(map, u32::try_from(room).unwrap());
    scene.ok("ADD", 0);
    assert_eq!(scene.entries_of(map), 2 * ENTRIES);
    scene.ok("ADD", 1);
    // A hostPort of its own, and pod-a's.
    for port in [8082, 8080] {
        let before = scene.all_there_is();
        let config = scene.config_with(2, port);
        let (code, text) = scene.node.fails("ADD", &config, &scene.key(2));
        let expected = format!(
            "map {map} is full: it has room for {room} entries, and a mapping has up to two for each address family"
        );
        assert!(code == 5 && text.contains(&expected), "{code} {text}");
        assert!(!text.contains("Argument list too long"), "{text}");
        assert_eq!(scene.all_there_is(), before, "{port}");
        (0..2).for_each(|pod| drop(scene.ok("CHECK", pod)));
        assert_eq!(scene.server(8080).as_deref(), Some("pod-a"));
        assert_eq!(scene.server(8081).as_deref(), Some("pod-b"));
        scene.node.ok("DEL", &config, &scene.key(2));
    }
    scene.ok("DEL", 1);
    scene.ok("ADD", 2);
    scene.ok("CHECK", 2);
    assert_eq!(scene.server(8082).as_deref(), Some("pod-c"));
    scene.ok("DEL", 2);
    scene.ok("DEL", 0);
    assert!(scene.node.flush().success());
}

/// Programs make room for what they count, with a claim's first connection; they forward all the same.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn claims_that_cannot_be_counted_are_claims() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.with_room("pm_traffic", 1);
    (0..2).for_each(|pod| drop(scene.ok("ADD", pod)));
    let entries_of = |map| lab.node.run(|| ebpf::map(map).entries().unwrap().len()).unwrap();
    assert_eq!(entries_of("pm_traffic"), 0);
    for _ in 0..2 {
        assert_eq!(scene.server(8080).as_deref(), Some("pod-a"));
        assert_eq!(scene.server(8081).as_deref(), Some("pod-b"));
    }
    // Of calls of a pod's own address it is only noted that there were any.
    let pod = SocketAddr::new(lab.pods[1].address(Family::V4).unwrap(), 80);
    // A port that the kernel chooses may be that of a call before, whose flow this would take over.
    let bind = Some(SocketAddr::new(lab.client_address(Family::V4), 20080));
    reach(&lab.client, Call { bind, ..Call::new(Transport::Tcp, pod, TIMEOUT) }).unwrap();
    assert_eq!(entries_of("pm_traffic"), 1);
    // Which flows there are is not told by what was counted.
    assert_eq!(entries_of("pm_flows"), 5);
    (0..2).for_each(|pod| drop(scene.ok("CHECK", pod)));
    scene.ok("DEL", 1);
    assert_eq!(entries_of("pm_flows"), 2);
    assert_eq!(scene.server(8081), None);
    scene.ok("DEL", 0);
    assert_eq!((entries_of("pm_flows"), entries_of("pm_traffic")), (0, 0));
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn addresses_for_which_there_is_no_room_are_said() {
    let lab = lab(2);
    let scene = Scene::new(&lab);
    scene.with_room("pm_addresses", 2);
    let note = scene.ok("ADD", 0);
    assert!(
        note.contains("map pm_addresses is full: it has room for 2 addresses of the node"),
        "{note}"
    );
    assert_eq!(scene.server(8080).as_deref(), Some("pod-a"));
    let (code, text) = scene.fails("CHECK", 0);
    assert!(code == 102 && text.contains("is not known as an address of the node"), "{text}");
    scene.ok("DEL", 0);
    assert_eq!(scene.server(8080), None);
}
