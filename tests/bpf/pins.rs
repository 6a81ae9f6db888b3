use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use aya_obj::generated::bpf_map_type;
use portmap::sys::bpf::map::{Definition, Map};
use portmap::sys::bpf::pins::{Contents, Pins};

use crate::{classifier, definition, hash_map, isolated};

const ROOT: &str = "/sys/fs/bpf/portmap";

fn definitions() -> [Definition; 2] {
    ["pm_one", "pm_two"].map(|name| definition(name, bpf_map_type::BPF_MAP_TYPE_HASH, 10))
}

fn nothing(_: &BTreeMap<String, Map>) -> io::Result<()> {
    Ok(())
}

fn contents(layouts: &[u32], revisions: &[&str]) -> Contents {
    Contents {
        layouts: layouts.to_vec(),
        revisions: revisions.iter().map(|revision| (*revision).to_owned()).collect(),
    }
}

/// Every name under the directory.
fn names() -> Vec<String> {
    let mut names = Vec::new();
    let mut todo = vec![Path::new(ROOT).to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            names.push(path.strip_prefix(ROOT).unwrap().to_string_lossy().into_owned());
            if path.is_dir() {
                todo.push(path);
            }
        }
    }
    names.sort();
    names
}

#[test]
#[ignore = "privileged: needs bpf(2) and a mount namespace"]
fn maps_and_programs_are_named_and_found() {
    isolated(|| {
        let pins = Pins::open().unwrap();
        assert_eq!(pins.list().unwrap(), Contents::default());
        assert!(pins.maps(1, ["pm_one"]).unwrap().is_none());
        assert!(pins.program("abc", "pm_in").unwrap().is_none());
        pins.remove_programs("abc").unwrap();
        pins.remove_all().unwrap();

        let made = pins.create_maps(1, &definitions(), nothing).unwrap();
        assert_eq!(names(), ["m1", "m1/pm_one", "m1/pm_two"]);
        assert_eq!(fs::metadata(ROOT).unwrap().permissions().mode() & 0o777, 0o700);
        let pins = Pins::open().unwrap();
        let found = pins.maps(1, ["pm_one", "pm_two"]).unwrap().unwrap();
        for (name, map) in &made {
            assert_eq!(found[name].id(), map.id());
        }
        assert!(pins.maps(1, ["pm_one", "pm_three"]).unwrap().is_none());
        assert!(pins.maps(2, ["pm_one"]).unwrap().is_none());

        let (first, second) = (classifier("pm_in", 0), classifier("pm_out", 0));
        pins.add_programs("abc", [("pm_in", &first)]).unwrap();
        pins.add_programs("abc", [("pm_out", &second)]).unwrap();
        assert_eq!(pins.program("abc", "pm_out").unwrap().unwrap().id(), second.id());
        assert!(pins.add_programs("abc", [("pm_in", &second)]).is_err());
        pins.add_programs("def", [("pm_in", &second)]).unwrap();
        assert_eq!(pins.list().unwrap(), contents(&[1], &["abc", "def"]));
        pins.remove_programs("abc").unwrap();
        assert_eq!(pins.list().unwrap(), contents(&[1], &["def"]));
        assert!(pins.program("abc", "pm_in").unwrap().is_none());

        pins.create_maps(10, &definitions(), nothing).unwrap();
        pins.create_maps(2, &definitions(), nothing).unwrap();
        assert_eq!(pins.list().unwrap(), contents(&[1, 2, 10], &[]));
        pins.remove_maps(1).unwrap();
        assert_eq!(pins.list().unwrap().layouts, [2, 10]);
        pins.remove_all().unwrap();
        assert!(!Path::new(ROOT).exists());
    });
}

/// By what a call sees that nothing has changed since an earlier one.
#[test]
#[ignore = "privileged: needs bpf(2) and a mount namespace"]
fn stamps_tell_that_names_have_come_or_gone() {
    isolated(|| {
        let pins = Pins::open().unwrap();
        pins.create_maps(1, &definitions(), nothing).unwrap();
        pins.add_programs("abc", [("pm_in", &classifier("pm_in", 0))]).unwrap();
        let now = || {
            let pins = Pins::open().unwrap();
            [pins.stamp(), pins.maps_stamp(1), pins.programs_stamp("abc")]
        };
        let settled = || {
            std::thread::sleep(Duration::from_millis(150));
            let stamps = now();
            assert!(stamps.iter().all(Option::is_some));
            stamps
        };
        let first = settled();
        assert_eq!(now(), first);

        fs::remove_file(Path::new(ROOT).join("m1/pm_one")).unwrap();
        let second = settled();
        assert_eq!([first[0], first[2]], [second[0], second[2]]);
        assert_ne!(first[1], second[1]);

        pins.add_programs("abc", [("pm_out", &classifier("pm_out", 0))]).unwrap();
        let third = settled();
        assert_eq!([second[0], second[1]], [third[0], third[1]]);
        assert_ne!(second[2], third[2]);

        fs::create_dir(Path::new(ROOT).join("m2")).unwrap();
        let fourth = settled();
        assert_eq!(third[1..], fourth[1..]);
        assert_ne!(third[0], fourth[0]);

        // Another directory with the name.
        let dir = Path::new(ROOT).join("p-def");
        fs::create_dir(&dir).unwrap();
        fs::remove_dir_all(Path::new(ROOT).join("p-abc")).unwrap();
        fs::rename(dir, Path::new(ROOT).join("p-abc")).unwrap();
        assert_ne!(third[2], settled()[2]);
        pins.remove_programs("abc").unwrap();
        assert_eq!(pins.programs_stamp("abc"), None);

        // Of a change just now nobody knows whether another one has followed. Where the machine stands
        // still between the two, it is not just now any more.
        let dir = Path::new(ROOT).join("m3");
        let just_now = (0..100).any(|_| {
            fs::create_dir(&dir).unwrap();
            let stamp = Pins::open().unwrap().stamp();
            fs::remove_dir(&dir).unwrap();
            stamp.is_none()
        });
        assert!(just_now);
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and a mount namespace"]
fn an_interrupted_call_leaves_nothing_behind() {
    isolated(|| {
        let pins = Pins::open().unwrap();
        let dead = |fill: &dyn Fn(&BTreeMap<String, Map>) -> io::Result<()>| {
            let call = || pins.create_maps(1, &definitions(), fill).map(drop);
            catch_unwind(AssertUnwindSafe(call))
        };
        // While the maps are filled.
        assert!(dead(&|_| panic!("killed")).is_err());
        assert_eq!(names(), Vec::<String>::new());
        assert!(dead(&|_| Err(io::Error::other("no"))).unwrap().is_err());
        assert_eq!(names(), Vec::<String>::new());
        // With one map pinned, with all, and with a map where a directory is expected.
        for stage in 0..4 {
            let temporary = Path::new(ROOT).join("tmp-m1");
            match stage {
                3 => hash_map("pm_one", 5).pin(&temporary).unwrap(),
                count => {
                    fs::create_dir(&temporary).unwrap();
                    for definition in definitions().iter().take(count) {
                        let map = Map::create(definition).unwrap();
                        map.pin(&temporary.join(&definition.name)).unwrap();
                    }
                }
            }
            fs::create_dir(Path::new(ROOT).join("tmp-p-abc")).unwrap();
            assert_eq!(pins.list().unwrap(), Contents::default());
            assert!(pins.maps(1, ["pm_one"]).unwrap().is_none());
            pins.create_maps(1, &definitions(), nothing).unwrap();
            assert_eq!(names(), ["m1", "m1/pm_one", "m1/pm_two"]);
            pins.remove_maps(1).unwrap();
        }
        // Also by a call that has another thing to do.
        fs::create_dir(Path::new(ROOT).join("tmp-m1")).unwrap();
        pins.add_programs("abc", [("pm_in", &classifier("pm_in", 0))]).unwrap();
        assert_eq!(names(), ["p-abc", "p-abc/pm_in"]);
    });
}

/// What a call that was killed between two names has taken from the former maps is kept.
#[test]
#[ignore = "privileged: needs bpf(2) and a mount namespace"]
fn maps_that_only_lack_their_name_get_it() {
    isolated(|| {
        let pins = Pins::open().unwrap();
        pins.resume_maps(1).unwrap();
        let made = pins.create_maps(1, &definitions(), nothing).unwrap();
        let (named, temporary) = (pins.maps_dir(1), Path::new(ROOT).join("tmp-m1"));
        fs::rename(&named, &temporary).unwrap();
        pins.resume_maps(2).unwrap();
        assert_eq!(pins.list().unwrap(), Contents::default());
        pins.resume_maps(1).unwrap();
        assert_eq!(pins.map(1, "pm_one").unwrap().unwrap().id(), made["pm_one"].id());
        // Those that have it go before.
        fs::create_dir(&temporary).unwrap();
        pins.resume_maps(1).unwrap();
        assert_eq!(names(), ["m1", "m1/pm_one", "m1/pm_two", "tmp-m1"]);
        // The former ones, of which the new ones have taken what there was.
        fs::rename(temporary, Path::new(ROOT).join("tmp-former")).unwrap();
        pins.create_maps(1, &definitions(), nothing).unwrap();
        assert_eq!(names(), ["m1", "m1/pm_one", "m1/pm_two"]);
    });
}

/// Programs go on using the maps that they were loaded with, so new maps need new programs.
#[test]
#[ignore = "privileged: needs bpf(2) and a mount namespace"]
fn a_layout_that_lacks_a_map_is_made_anew_without_its_programs() {
    isolated(|| {
        let pins = Pins::open().unwrap();
        let old = pins.create_maps(1, &definitions(), nothing).unwrap();
        pins.add_programs("abc", [("pm_in", &classifier("pm_in", 0))]).unwrap();
        fs::remove_file(Path::new(ROOT).join("m1/pm_two")).unwrap();
        assert!(pins.maps(1, ["pm_one", "pm_two"]).unwrap().is_none());
        let refused = pins.create_maps(1, &definitions(), |_| Err(io::Error::other("no")));
        assert!(refused.is_err());
        assert_eq!(names(), ["m1", "m1/pm_one", "p-abc", "p-abc/pm_in"]);
        let new = pins
            .create_maps(1, &definitions(), |new| {
                new["pm_one"].take_over(&old["pm_one"], &[]).map(drop)
            })
            .unwrap();
        assert_ne!(new["pm_one"].id(), old["pm_one"].id());
        assert_eq!(names(), ["m1", "m1/pm_one", "m1/pm_two"]);
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and a mount namespace"]
fn a_bpffs_is_mounted_where_there_is_none() {
    isolated(|| {
        nix::mount::umount("/sys/fs/bpf").unwrap();
        // The machine's own may lie underneath.
        while nix::mount::umount("/sys/fs/bpf").is_ok() {}
        let pins = Pins::open().unwrap();
        assert_eq!(pins.list().unwrap(), Contents::default());
        pins.create_maps(1, &definitions(), nothing).unwrap();
        assert_eq!(fs::metadata("/sys/fs/bpf").unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(Pins::open().unwrap().list().unwrap(), contents(&[1], &[]));
    });
}

#[test]
#[ignore = "privileged: needs bpf(2) and a mount namespace"]
fn a_directory_that_others_can_write_to_is_refused() {
    isolated(|| {
        let refused = || Pins::open().unwrap_err().to_string();
        fs::create_dir(ROOT).unwrap();
        fs::set_permissions(ROOT, fs::Permissions::from_mode(0o755)).unwrap();
        Pins::open().unwrap();
        fs::set_permissions(ROOT, fs::Permissions::from_mode(0o775)).unwrap();
        assert!(refused().contains("mode 775"), "{}", refused());
        fs::set_permissions(ROOT, fs::Permissions::from_mode(0o700)).unwrap();
        chown(ROOT, Some(1000), None).unwrap();
        assert!(refused().contains("owner 1000"), "{}", refused());
    });
}
