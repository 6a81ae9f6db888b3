//! Names of maps and programs.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};

/// The name of a map or a program as the kernel keeps it (`BPF_OBJ_NAME_LEN`): 15 bytes, zeros behind it. Of a
/// longer one that is the beginning. Comparing two takes no loop, and a call compares hundreds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name([u8; 16]);

impl Name {
    #[must_use]
    pub fn of(name: &str) -> Self {
        let mut bytes = [0; 16];
        bytes.iter_mut().take(15).zip(name.bytes()).for_each(|(to, from)| *to = from);
        Name(bytes)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.split(|byte| *byte == 0).next().unwrap_or_default();
        f.write_str(&String::from_utf8_lossy(bytes))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_str<E>(self, name: &str) -> Result<Name, E> {
                Ok(Name::of(name))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn names_are_told_apart_by_what_the_kernel_keeps_of_them() {
        let name = Name::of;
        assert!(name("pm_out") < name("pm_out_l3") && name("pm_out_l3") < name("pm_pod_in"));
        assert_eq!(name("pm_uplink_in_l3").to_string(), "pm_uplink_in_l3");
        assert_eq!(name("pm_uplink_in_l3x"), name("pm_uplink_in_l3"));
        assert_ne!(name("pm_uplink_in_l"), name("pm_uplink_in_l3"));
        assert_eq!(name("").to_string(), "");
    }

    #[test]
    fn a_note_has_them_as_text() {
        let numbers = BTreeMap::from([(Name::of("pm_out"), 7), (Name::of("pm_pod_in"), 8)]);
        let text = r#"{"pm_out":7,"pm_pod_in":8}"#;
        assert_eq!(serde_json::to_string(&numbers).unwrap(), text);
        assert_eq!(serde_json::from_str::<BTreeMap<Name, u32>>(text).unwrap(), numbers);
    }
}
