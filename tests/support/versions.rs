//! Programs of other versions than the plugin's own, and nodes that these have been at.

use portmap::backend::ebpf::devices::{self, Mode, Scope};
use portmap::backend::ebpf::loaded::{Build, Loaded};
use portmap::backend::ebpf::{entries, objects, sockets};
use portmap::demo::netns::Netns;
use portmap::sys::Host;
use portmap::sys::bpf::object::{self, Aligned};
use portmap::sys::bpf::pins::{Contents, Pins};
use portmap::sys::store::Store;

use super::Node;

static OLDER: &Aligned<[u8]> = &Aligned(*include_bytes!("../../testdata/bpf/older.bpf.o"));
static NEWER: &Aligned<[u8]> = &Aligned(*include_bytes!("../../testdata/bpf/newer.bpf.o"));

/// One whose maps have the layout before this one.
pub fn older() -> Build {
    build(&OLDER.0, 0, 0)
}

/// One whose maps have a layout that the plugin does not know.
pub fn newer() -> Build {
    build(&NEWER.0, 2, 2)
}

pub fn build(object: &'static [u8], layout: u32, revision: u32) -> Build {
    let digest = Box::leak(object::revision(object).into_boxed_str());
    Build { object, digest, layout, revision }
}

/// Makes the node one that another version has loaded and that the same pods have come to.
pub fn load(node: &Node, build: &Build) {
    let work = || {
        Pins::open().unwrap().remove_all().unwrap();
        let host = Host::new(None);
        if let Some(features) = node.pretended() {
            host.remember_kernel(features);
        }
        let records = Store::open(&node.state_dir, host.boot_id()).unwrap().all().unwrap().0;
        let loaded = Loaded::ensure(build, true).unwrap();
        let facts = host.node_facts().unwrap();
        let wanted = objects::claims(&records.iter().collect::<Vec<_>>());
        entries::restore(&loaded.maps, &wanted).unwrap();
        entries::addresses(&loaded.maps, &objects::addresses(&facts)).unwrap();
        let links = host.links().unwrap();
        let done =
            devices::sync(&host, &loaded, &links, &facts, Scope::All, Mode::Restore).unwrap();
        assert!(done && sockets::sync(&host, &loaded, Mode::Restore).unwrap());
        loaded.claim_revision().unwrap();
    };
    node.netns.run(work).unwrap();
    assert_eq!(pinned(node.netns), only(build));
}

/// Whose maps and programs are pinned.
pub fn pinned(node: &Netns) -> Contents {
    node.run(|| Pins::open().unwrap().list().unwrap()).unwrap()
}

/// What is pinned where no other version has been, or has left anything.
pub fn only(build: &Build) -> Contents {
    Contents { layouts: vec![build.layout], revisions: vec![build.digest.to_owned()] }
}
