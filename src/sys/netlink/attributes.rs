//! Taking attributes (`struct nlattr`) apart.

use netlink_packet_core::{NLA_F_NESTED, NLA_F_NET_BYTEORDER};

/// The attributes in `bytes` as (number, value), in order. The flags in the upper two bits of the
/// number are removed. What does not parse ends the iteration: the kernel sends no such thing.
///
/// Not `NlasIterator` of netlink-packet-core, which checks each length several times: a device has some
/// 60 attributes.
pub(in crate::sys) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let ([first, second, third, fourth], _) = bytes.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([*first, *second]));
        let kind = u16::from_ne_bytes([*third, *fourth]) & !(NLA_F_NESTED | NLA_F_NET_BYTEORDER);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute with this number.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// Text up to the first NUL: the kernel terminates most, but not all of its strings. A byte that is no
/// UTF-8 (names of devices may have any) is a question mark: no name becomes longer than the kernel's are.
pub(in crate::sys) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    let text = value.get(..end).unwrap_or_default();
    if let Ok(text) = str::from_utf8(text) {
        return text.to_owned();
    }
    let chunks = text.utf8_chunks();
    chunks.map(|chunk| chunk.valid().to_owned() + &"?".repeat(chunk.invalid().len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        let bytes = [
            5, 0, 3, 0x80, b'a', 0xff, 0xff,
            0xff, // one byte and three of padding, nested flag
            8, 0, 7, 0x40, 1, 2, 3, 4, // network byte order flag
        ];
        let all: Vec<_> = attributes(&bytes).collect();
        assert_eq!(all, [(3, &b"a"[..]), (7, &[1, 2, 3, 4][..])]);
        assert_eq!(find(&bytes, 7), Some(&[1, 2, 3, 4][..]));
        assert_eq!(find(&bytes, 8), None);
    }

    #[test]
    fn broken_attributes_end_the_iteration() {
        for broken in [
            &[1, 0, 1, 0][..],            // shorter than its own header
            &[9, 0, 1, 0, 1, 2, 3, 4],    // longer than the buffer
            &[8, 0],                      // half a header
            &[8, 0, 1, 0, 1, 2, 3, 4, 1], // rubbish behind a good one
        ] {
            assert!(attributes(broken).count() <= 1);
        }
    }

    #[test]
    fn text_ends_at_nul() {
        assert_eq!(text(b"eth0\0"), "eth0");
        assert_eq!(text(b"eth0"), "eth0");
        assert_eq!(text(b"a\0b\0"), "a");
        assert_eq!(text(b""), "");
        assert_eq!(text(b"\xc3\xa4\xe2\x82b\xff\0"), "\u{e4}??b?");
    }
}
