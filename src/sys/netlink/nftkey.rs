//! Keys of nf_tables sets and maps, as the kernel stores them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A key, built from the components of the set's type in their order:
///
/// ```
/// use portmap::sys::netlink::nftkey::Key;
///
/// // type inet_proto . inet_service
/// let key = Key::new().proto(6).port(8080).bytes();
/// assert_eq!(key, [6, 0, 0, 0, 0x1f, 0x90, 0, 0]);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Key {
    components: Vec<Vec<u8>>,
}

impl Key {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `inet_proto`: an IANA number.
    #[must_use]
    pub fn proto(self, number: u8) -> Self {
        self.with(vec![number])
    }

    /// `inet_service`.
    #[must_use]
    pub fn port(self, port: u16) -> Self {
        self.with(port.to_be_bytes().to_vec())
    }

    /// `ipv4_addr`.
    #[must_use]
    pub fn v4(self, ip: Ipv4Addr) -> Self {
        self.with(ip.octets().to_vec())
    }

    /// `ipv6_addr`.
    #[must_use]
    pub fn v6(self, ip: Ipv6Addr) -> Self {
        self.with(ip.octets().to_vec())
    }

    /// `ipv4_addr` or `ipv6_addr`.
    #[must_use]
    pub fn ip(self, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.v4(ip),
            IpAddr::V6(ip) => self.v6(ip),
        }
    }

    /// `ifname`: the name, filled up with zeroes to 16 bytes (`IFNAMSIZ`).
    #[must_use]
    pub fn device(self, name: &str) -> Self {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(libc::IFNAMSIZ, 0);
        self.with(bytes)
    }

    /// The key in network byte order. Components of a concatenation are padded at their end to a
    /// multiple of 4 bytes, since the kernel compares registers of 4 bytes; a key of one component
    /// has that component's length. Data of maps has the same form.
    #[must_use]
    pub fn bytes(self) -> Vec<u8> {
        let single = self.components.len() == 1;
        let mut bytes = Vec::new();
        for component in self.components {
            bytes.extend(component);
            if !single {
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
        }
        bytes
    }

    fn with(mut self, component: Vec<u8>) -> Self {
        self.components.push(component);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_are_padded_in_concatenations_only() {
        assert_eq!(Key::new().port(80).bytes(), [0, 80]);
        assert_eq!(
            Key::new().v4(Ipv4Addr::LOCALHOST).proto(17).port(258).bytes(),
            [127, 0, 0, 1, 17, 0, 0, 0, 1, 2, 0, 0]
        );
        let v6 = Key::new().ip(Ipv6Addr::LOCALHOST.into()).port(80).bytes();
        assert_eq!(v6.len(), 20);
        assert_eq!(v6[15..], [1, 0, 80, 0, 0]);
        assert!(Key::new().bytes().is_empty());
    }
}
