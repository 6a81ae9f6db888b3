use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;

use portmap::backend::ebpf::loaded::OWN;
use portmap::sys::bpf::features::Features;
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::object::{self, Object};
use portmap::sys::bpf::program::{Hook, Program, SocketHook};

use crate::isolated;

fn create_maps(object: &Object) -> BTreeMap<String, Map> {
    let make = |(name, definition)| {
        let map = Map::create(&definition).unwrap();
        assert!(definition.fits(map.definition()));
        (name, map)
    };
    object.maps().into_iter().map(make).collect()
}

/// Programs that the kernel can take.
fn loadable(object: &Object) -> Vec<String> {
    let kernel = Features::probe().unwrap();
    let programs = object.programs().unwrap();
    let possible = programs.into_iter().filter(|(name, hook)| match hook {
        Hook::Socket(SocketHook::Getpeername4 | SocketHook::Getpeername6) => kernel.getpeername,
        Hook::Socket(SocketHook::Recvmsg4 | SocketHook::Recvmsg6) => true,
        Hook::Socket(_) => kernel.cookie_helper || name.ends_with("_any"),
        Hook::Classifier => true,
    });
    possible.map(|(name, _)| name).collect()
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn every_program_is_accepted_and_uses_the_maps_that_it_was_given() {
    isolated(|| {
        let object = Object::parse(OWN.object).unwrap();
        let maps = create_maps(&object);
        let names = loadable(&object);
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        // Nobody asks in this order.
        names.reverse();
        assert!(names.contains(&"pm_pod_in") && names.contains(&"pm_recvmsg4"));
        let programs = object::load(&object.clone().link(&maps, &names).unwrap()).unwrap();
        let given: BTreeSet<u32> = maps.values().map(Map::id).collect();
        for (name, program) in names.iter().zip(&programs) {
            // The kernel keeps 15 bytes.
            assert_eq!(program.name(), &name[..name.len().min(15)]);
            let used = program.map_ids().unwrap();
            assert!(!used.is_empty() && used.iter().all(|id| given.contains(id)), "{name}");
        }

        // One alone is the same, whatever else is linked.
        let alone = object.link(&maps, &["pm_out"]).unwrap();
        assert_eq!((alone.len(), alone[0].hook), (1, Hook::Classifier));
        let alone = object::load(&alone).unwrap().remove(0);
        let among = names.iter().position(|name| *name == "pm_out").unwrap();
        assert_eq!(alone.tag(), programs[among].tag());
        assert_ne!(alone.id(), programs[among].id());
        let others: BTreeSet<[u8; 8]> = programs.iter().map(Program::tag).collect();
        assert!(others.len() > 1);
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn what_an_object_lacks_is_named() {
    isolated(|| {
        let object = Object::parse(OWN.object).unwrap();
        let mut maps = create_maps(&object);
        let missing = object.clone().link(&maps, &["pm_out", "pm_no"]).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert_eq!(missing.to_string(), "the object has no program pm_no");
        maps.remove("pm_flows");
        let missing = object.link(&maps, &["pm_out"]).unwrap_err();
        assert_eq!(missing.to_string(), "no map for pm_flows");
        assert_eq!(Object::parse(b"rubbish").unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(Object::parse(b"").unwrap_err().kind(), ErrorKind::InvalidData);
        assert!(Object::parse(&OWN.object[..OWN.object.len() / 2]).is_err());
    });
}

#[test]
fn a_revision_is_a_part_of_the_sha_256() {
    // sha256sum of the same.
    assert_eq!(object::revision(b"abc"), "ba7816bf8f01cfea");
}
