use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use aya_obj::generated::bpf_map_type;
use portmap::sys::bpf::map::{Definition, Map};

use crate::ending::Ending;
use crate::{definition, hash_map, isolated};

const KINDS: [bpf_map_type; 4] = [
    bpf_map_type::BPF_MAP_TYPE_HASH,
    bpf_map_type::BPF_MAP_TYPE_LRU_HASH,
    bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH,
    bpf_map_type::BPF_MAP_TYPE_LRU_PERCPU_HASH,
];

fn key(number: u32) -> [u8; 4] {
    number.to_ne_bytes()
}

/// A value for every processor.
fn value(map: &Map, number: u64) -> Vec<u8> {
    (0..map.value_bytes().unwrap() / 8)
        .flat_map(|cpu| (number + cpu as u64).to_ne_bytes())
        .collect()
}

fn keys(map: &Map) -> BTreeSet<u32> {
    let entries = map.entries().unwrap();
    let keys: BTreeSet<u32> = entries
        .iter()
        .map(|(key, _)| u32::from_ne_bytes(key.as_slice().try_into().unwrap()))
        .collect();
    assert_eq!(keys.len(), entries.len(), "an entry came twice");
    keys
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn entries_come_and_go() {
    isolated(|| {
        for kind in KINDS {
            for batches in [true, false] {
                // More than one batch.
                let map = Map::create(&definition("pm_test", kind, 10_000)).unwrap();
                let map = if batches { map } else { map.without_batches() };
                assert_eq!(map.get(&key(1)).unwrap(), None);
                assert!(!map.remove(&key(1)).unwrap());
                assert_eq!(map.entries().unwrap(), []);
                for number in 0..5_000 {
                    map.put(&key(number), &value(&map, u64::from(number))).unwrap();
                }
                // Some that are there, and some that are not.
                let more: Vec<_> = (4_000..9_000)
                    .map(|number| (key(number), value(&map, u64::from(number))))
                    .collect();
                let more: Vec<_> = more.iter().map(|(key, value)| (&key[..], &value[..])).collect();
                map.put_all(&more).unwrap();
                map.put_all(&[]).unwrap();
                assert_eq!(map.get(&key(77)).unwrap(), Some(value(&map, 77)));
                assert!(!map.put_new(&key(77), &value(&map, 0)).unwrap());
                map.put(&key(77), &value(&map, 78)).unwrap();
                assert_eq!(map.get(&key(77)).unwrap(), Some(value(&map, 78)));
                assert!(map.remove(&key(77)).unwrap());
                assert!(map.put_new(&key(77), &value(&map, 77)).unwrap());

                let entries = map.entries().unwrap();
                for (key, found) in &entries {
                    let number = u32::from_ne_bytes(key.as_slice().try_into().unwrap());
                    assert_eq!(*found, value(&map, u64::from(number)));
                }
                let all = keys(&map);
                // An LRU map may drop some before it is full: each processor has its own free list.
                assert!(all.len() > 8_000 && all.iter().all(|key| *key < 9_000));

                let even = map.remove_where(|key, _| key[0].is_multiple_of(2)).unwrap();
                let odd = all.iter().copied().filter(|key| key % 2 == 1).collect();
                assert_eq!(even, all.len() - BTreeSet::len(&odd));
                assert_eq!(keys(&map), odd);
                // Absent keys among them, also the first and the last.
                let some: Vec<[u8; 4]> = (0..5_001).map(key).collect();
                assert_eq!(map.remove_all(&some).unwrap(), odd.range(..5_001).count());
                assert_eq!(map.remove_all(&some).unwrap(), 0);
                assert_eq!(keys(&map), odd.range(5_001..).copied().collect());
            }
        }
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn arrays_have_all_their_entries() {
    isolated(|| {
        for kind in [bpf_map_type::BPF_MAP_TYPE_ARRAY, bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY] {
            for batches in [true, false] {
                let map = Map::create(&definition("pm_test", kind, 3)).unwrap();
                let map = if batches { map } else { map.without_batches() };
                map.put(&key(1), &value(&map, 5)).unwrap();
                let expected = [(0, 0), (1, 5), (2, 0)].map(|(number, first)| match first {
                    0 => (key(number).to_vec(), vec![0; map.value_bytes().unwrap()]),
                    _ => (key(number).to_vec(), value(&map, first)),
                });
                let mut entries = map.entries().unwrap();
                entries.sort();
                assert_eq!(entries, expected);
                assert!(map.put(&key(3), &value(&map, 0)).is_err());
            }
        }
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn lengths_are_checked_here_because_the_kernel_cannot() {
    isolated(|| {
        let map = hash_map("pm_test", 8);
        for (key, value) in [(&[0; 3][..], &[0; 8][..]), (&[0; 5], &[0; 8]), (&[0; 4], &[0; 7])] {
            assert!(map.put(key, value).is_err());
        }
        assert!(map.get(&[0; 5]).is_err());
        assert!(map.remove(&[]).is_err());
        assert!(map.remove_all(&[&[0; 4][..], &[0; 5]]).is_err());
        let together: [(&[u8], &[u8]); 2] = [(&[0; 3], &[0; 8]), (&[0; 5], &[0; 8])];
        assert!(map.put_all(&together).is_err());
        let message = map.get(&[0; 5]).unwrap_err().to_string();
        assert_eq!(message, "keys of this map have 4 bytes and values 8");
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn a_map_that_changes_meanwhile_can_be_walked() {
    isolated(|| {
        for batches in [true, false] {
            let kind = bpf_map_type::BPF_MAP_TYPE_HASH;
            let map = Map::create(&definition("pm_test", kind, 4_096)).unwrap();
            let map = if batches { map } else { map.without_batches() };
            for number in 0..1_000 {
                map.put(&key(number), &value(&map, 1)).unwrap();
            }
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut number = 1_000;
                    while !done.load(Ordering::Relaxed) {
                        number = if number == 3_000 { 1_000 } else { number + 1 };
                        map.put(&key(number), &value(&map, 2)).unwrap();
                        map.remove(&key(number - 1)).ok();
                        map.put(&key(999), &value(&map, 1)).unwrap();
                    }
                });
                let _ending = Ending(&done);
                for _ in 0..50 {
                    // Those that stay are found.
                    let mut stayed = BTreeSet::new();
                    map.for_each(|key, value| {
                        if value[0] == 1 {
                            stayed.insert(key.to_vec());
                        }
                    })
                    .unwrap();
                    assert!(stayed.len() >= 999, "{} {batches}", stayed.len());
                    map.remove_where(|_, value| value[0] == 2).unwrap();
                }
            });
        }
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn the_kernel_says_what_a_map_is() {
    isolated(|| {
        let wanted = Definition {
            flags: 1, // BPF_F_NO_PREALLOC
            ..definition("pm_name_of_16_by", bpf_map_type::BPF_MAP_TYPE_HASH, 100)
        };
        let map = Map::create(&wanted).unwrap();
        let found = Definition { name: "pm_name_of_16_b".into(), ..wanted.clone() };
        assert_eq!(*map.definition(), found);
        assert!(wanted.fits(&Definition { max_entries: 5, ..found.clone() }));
        assert!(!wanted.fits(&Definition { value_size: 12, ..found }));
        let same = Map::from_id(map.id()).unwrap().unwrap();
        same.put(&key(1), &[7; 8]).unwrap();
        assert_eq!(map.get(&key(1)).unwrap(), Some(vec![7; 8]));
        assert_eq!((map.value_bytes().unwrap(), map.stride()), (8, 8));
        let id = map.id();
        drop((map, same));
        // The kernel lets go of it in a while.
        while Map::from_id(id).unwrap().is_some() {
            std::thread::yield_now();
        }
        let per_cpu = Definition {
            value_size: 4,
            ..definition("pm_cpu", bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY, 1)
        };
        let map = Map::create(&per_cpu).unwrap();
        assert_eq!((map.stride(), map.value_bytes().unwrap() % 8), (8, 0));
    });
}

#[test]
#[ignore = "privileged: needs bpf(2)"]
fn another_layout_takes_over_the_beginning_of_values() {
    isolated(|| {
        for kind in KINDS {
            let create = |value_size| {
                let definition = Definition { value_size, ..definition("pm_test", kind, 1_000) };
                Map::create(&definition).unwrap()
            };
            let cpus = create(8).value_bytes().unwrap() / 8;
            let each = |value: &[u8]| value.repeat(cpus);
            let (old, longer, shorter) = (create(8), create(16), create(4));
            for number in 0..100 {
                old.put(&key(number), &each(&[number as u8 + 1; 8])).unwrap();
            }
            longer.put(&key(7), &each(&[0xff; 16])).unwrap();
            assert_eq!(longer.take_over(&old, &[]).unwrap(), 99);
            assert_eq!(longer.take_over(&old, &[]).unwrap(), 0);
            assert_eq!(longer.get(&key(7)).unwrap(), Some(each(&[0xff; 16])));
            let mut expected = [9_u8; 16];
            expected[8..].fill(0);
            assert_eq!(longer.get(&key(8)).unwrap(), Some(each(&expected)));
            let other = create(16);
            assert_eq!(other.take_over(&old, &[5; 16]).unwrap(), 100);
            expected[8..].fill(5);
            assert_eq!(other.get(&key(8)).unwrap(), Some(each(&expected)));

            assert_eq!(shorter.take_over(&longer, &[]).unwrap(), 100);
            let found = shorter.get(&key(8)).unwrap().unwrap();
            assert_eq!(found.len(), shorter.value_bytes().unwrap());
            for value in found.chunks_exact(shorter.stride()) {
                assert_eq!(value[..4], [9; 4]);
            }
        }
        let full = hash_map("pm_full", 10);
        let many = hash_map("pm_many", 100);
        for number in 0..100 {
            many.put(&key(number), &[1; 8]).unwrap();
        }
        assert_eq!(full.take_over(&many, &[]).unwrap(), 10);
        let other = Definition {
            key_size: 8,
            ..definition("pm_test", bpf_map_type::BPF_MAP_TYPE_HASH, 10)
        };
        assert!(Map::create(&other).unwrap().take_over(&many, &[]).is_err());
    });
}
