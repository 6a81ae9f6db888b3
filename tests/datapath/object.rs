//! The maps and programs of an object.

use std::collections::BTreeMap;

use portmap::backend::ebpf::layout::{ClaimKey, REASONS, port_bit};
use portmap::sys::bpf::map::Map;
use portmap::sys::bpf::object;
use portmap::sys::bpf::program::{Hook, Program};
use zerocopy::IntoBytes;

/// All maps, and the programs that were chosen.
pub struct Object {
    pub maps: BTreeMap<String, Map>,
    pub programs: BTreeMap<String, Program>,
}

impl Object {
    /// Makes all maps, and loads some of the programs.
    pub fn load(object: &[u8], choose: impl Fn(&str, Hook) -> bool) -> Self {
        let object = object::Object::parse(object).unwrap();
        let definitions = object.maps();
        let maps: BTreeMap<String, Map> = definitions
            .values()
            .map(|definition| (definition.name.clone(), Map::create(definition).unwrap()))
            .collect();
        let all = object.programs().unwrap();
        let chosen = all.iter().filter(|(name, hook)| choose(name, **hook));
        let names: Vec<&str> = chosen.map(|(name, _)| name.as_str()).collect();
        let programs = object::load(&object.link(&maps, &names).unwrap()).unwrap();
        let programs = programs.into_iter().map(|program| (program.name().to_owned(), program));
        Object { maps, programs: programs.collect() }
    }

    pub fn put(&self, map: &str, key: &[u8], value: &[u8]) {
        self.maps[map].put(key, value).unwrap();
    }

    pub fn mark_port(&self, port: u16) {
        let (word, bit) = port_bit(port);
        let before = self.maps["pm_ports"].get(word.as_bytes()).unwrap().unwrap();
        let after = u64::from_ne_bytes(before.try_into().unwrap()) | bit;
        self.put("pm_ports", word.as_bytes(), after.as_bytes());
    }

    /// How often something has happened, of all processors.
    pub fn count(&self, reason: &str) -> u64 {
        let index = REASONS.iter().position(|name| *name == reason).unwrap();
        let index = u32::try_from(index).unwrap();
        let values = self.maps["pm_reasons"].get(index.as_bytes()).unwrap().unwrap();
        values.chunks_exact(8).map(|value| u64::from_ne_bytes(value.try_into().unwrap())).sum()
    }

    /// `struct traffic` of a claim: connections, packets and bytes in, packets and bytes out.
    pub fn traffic(&self, key: &ClaimKey) -> [u64; 5] {
        let values = self.maps["pm_traffic"].get(key.as_bytes()).unwrap().unwrap();
        let mut sum = [0; 5];
        for value in values.chunks_exact(40) {
            for (sum, number) in sum.iter_mut().zip(value.chunks_exact(8)) {
                *sum += u64::from_ne_bytes(number.try_into().unwrap());
            }
        }
        sum
    }
}
