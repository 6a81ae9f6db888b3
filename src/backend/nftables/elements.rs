//! Elements as the kernel has them: keys and data in bytes, both ways. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::objects::{Atom, Data, Place, digit};
use crate::model::{Family, Protocol};
use crate::sys::netlink::nftables::Element;
use crate::sys::netlink::nftkey::Key;

/// The key of a place, by which the kernel finds its element.
#[must_use]
pub fn key(place: &Place) -> Vec<u8> {
    place
        .key
        .iter()
        .fold(Key::new(), |key, atom| match atom {
            Atom::Ip(ip) => key.ip(*ip),
            Atom::Protocol(protocol) => key.proto(protocol.number()),
            Atom::Port(port) => key.port(*port),
            Atom::Device(name) => key.device(name),
        })
        .bytes()
}

/// Whether an element has the data.
#[must_use]
pub fn holds(found: &Element, data: &Data) -> bool {
    match data {
        Data::None => true,
        Data::Ip(ip) => found.data.as_deref() == Some(&Key::new().ip(*ip).bytes()),
        Data::Port(port) => found.data.as_deref() == Some(&Key::new().port(*port).bytes()),
        Data::Jump(chain) => found.goto.as_ref() == Some(chain),
    }
}

/// One component of a set's keys.
#[derive(Clone, Copy)]
enum Component {
    Ip,
    Protocol,
    Port,
}

/// What a map has for each key.
#[derive(Clone, Copy)]
enum Kind {
    Nothing,
    Ip,
    Port,
    Chain,
}

/// Place and data of an element with this key in a set that attachments have elements in; `None` for
/// others' sets, and for what does not fit the set.
#[must_use]
pub fn read(set: &str, key: &[u8], found: &Element) -> Option<(Place, Data)> {
    let (family, components, kind) = shape(set)?;
    let address = |bytes: &[u8]| -> Option<IpAddr> {
        match family {
            Family::V4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
            Family::V6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        }
    };
    let number = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.try_into().ok()?));
    let (mut rest, mut atoms) = (key, Vec::new());
    for component in components {
        let length = match component {
            Component::Ip => usize::from(family.max_prefix() / 8),
            Component::Protocol => 1,
            Component::Port => 2,
        };
        let value = rest.get(..length)?;
        atoms.push(match component {
            Component::Ip => Atom::Ip(address(value)?),
            Component::Protocol => Atom::Protocol(
                Protocol::ALL.into_iter().find(|one| value.first() == Some(&one.number()))?,
            ),
            Component::Port => Atom::Port(number(value)?),
        });
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let data = match kind {
        Kind::Nothing => Data::None,
        Kind::Ip => Data::Ip(address(found.data.as_deref()?)?),
        Kind::Port => Data::Port(number(found.data.as_deref()?)?),
        Kind::Chain => Data::Jump(found.goto.clone()?),
    };
    Some((Place { set: set.to_owned(), key: atoms }, data))
}

/// The family of a set's keys, by its name.
#[must_use]
pub fn family_of(set: &str) -> Option<Family> {
    split(set).and_then(|(_, digit, _)| family_of_digit(digit))
}

/// Letters, the family's digit, and what comes behind it.
fn split(set: &str) -> Option<(&str, &str, &str)> {
    let (letters, rest) = set.split_at_checked(set.find(|c: char| c.is_ascii_digit())?)?;
    let (digit, suffix) = rest.split_at_checked(1)?;
    Some((letters, digit, suffix))
}

fn family_of_digit(text: &str) -> Option<Family> {
    Family::ALL.into_iter().find(|family| text.chars().eq([digit(*family)]))
}

/// Keys and data of a set, by its name.
fn shape(set: &str) -> Option<(Family, &'static [Component], Kind)> {
    use Component::{Ip, Port, Protocol};
    let (letters, digit, suffix) = split(set)?;
    let family = family_of_digit(digit)?;
    let kind = match suffix {
        "_addr" => Kind::Ip,
        "_port" => Kind::Port,
        "_own" => Kind::Chain,
        _ => Kind::Nothing,
    };
    let components: &[Component] = match (letters, suffix) {
        ("any", "_addr" | "_port" | "_own") => &[Protocol, Port],
        ("ip", "_addr" | "_port" | "_own") => &[Ip, Protocol, Port],
        ("flows", "") => &[Ip, Protocol, Port, Port],
        ("all" | "neighbours", "") => &[Ip],
        ("near", _) if suffix.starts_with('_') => &[Ip, Ip],
        _ => return None,
    };
    Some((family, components, kind))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::super::objects::Objects;
    use super::*;
    use crate::model::BackendKind;
    use crate::record::{Record, samples};

    fn records() -> Vec<Record> {
        let record = |id: &str, addresses: &[&str], order| {
            let mappings = ["tcp 80 8080", "udp 53 54 192.0.2.1", "sctp 9 10 2001:db8::1"];
            samples::record(id, addresses, &mappings, BackendKind::Nftables, order)
        };
        let mut all = record("all", &["10.0.0.2/24"], 1);
        all.options.masq_all = true;
        let mut conditions = record("conditions", &["10.0.0.3/24", "fd00::3/64"], 3);
        conditions.options.conditions_v4 = vec!["ip saddr 192.0.2.0/24".into()];
        conditions.options.conditions_v6 = vec!["ip6 saddr 2001:db8::/32".into()];
        vec![all, record("plain", &["10.88.0.2/32", "fd00::2/128"], 2), conditions]
    }

    fn as_kernel_has_it(data: &Data) -> Element {
        let data_bytes = match data {
            Data::Ip(ip) => Some(Key::new().ip(*ip).bytes()),
            Data::Port(port) => Some(Key::new().port(*port).bytes()),
            Data::None | Data::Jump(_) => None,
        };
        let goto = match data {
            Data::Jump(chain) => Some(chain.clone()),
            _ => None,
        };
        Element { data: data_bytes, goto, comment: None }
    }

    #[test]
    fn whatever_attachments_have_is_read_back() {
        let records = records();
        let objects = Objects::of(&records.iter().collect::<Vec<_>>());
        let letters = |set: &str| set.trim_end_matches(|c: char| !c.is_alphabetic()).to_owned();
        let mut sets: Vec<String> = objects.elements.keys().map(|one| letters(&one.set)).collect();
        sets.sort();
        sets.dedup();
        // No kind of set is left out of this.
        assert_eq!(sets.len(), 16, "{sets:?}");
        for (place, element) in objects.elements {
            let found = as_kernel_has_it(&element.data);
            let read = read(&place.set, &key(&place), &found);
            assert_eq!(read, Some((place, element.data)));
        }
    }

    #[test]
    fn nothing_else_is() {
        let found = as_kernel_has_it(&Data::Port(80));
        for (set, key) in [
            ("uplinks", &[0; 16][..]),
            ("listed_only", &[6]),
            ("nodes4", &[10, 0, 0, 1]),
            ("any5_port", &[6, 0, 0, 0, 0, 80, 0, 0]),
            ("any4_other", &[6, 0, 0, 0, 0, 80, 0, 0]),
            ("any4_addr", &[6, 0, 0, 0, 0, 80, 0, 0]),
            ("any4_own", &[6, 0, 0, 0, 0, 80, 0, 0]),
            ("any4_port", &[1, 0, 0, 0, 0, 80, 0, 0]),
            ("any4_port", &[6, 0, 0, 0]),
            ("all4", &[]),
            ("4", &[]),
            ("", &[]),
        ] {
            assert_eq!(read(set, key, &found), None, "{set} {key:?}");
        }
        assert!(read("any4_port", &[6, 0, 0, 0, 0, 80, 0, 0], &found).is_some());
    }
}
