//! What programs are told: the only entry of `pm_config`.

use std::net::SocketAddrV4;
use std::ops::RangeInclusive;

use zerocopy::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{ClaimKey, ClaimValue, claim_flags};

/// The lowest port that is chosen for a peer: those below are servers'.
const LOWEST: u32 = 1024;
/// With fewer ports to choose from, peers soon find none.
const ENOUGH: u32 = 4096;

/// Bits of `flags` in `struct config`.
pub mod config_flags {
    /// `netns_cookie` is the node's.
    pub const COOKIE: u32 = 1;
    /// Addresses that are not listed are not the node's, whatever its routes say.
    pub const LISTED_ONLY: u32 = 2;
    /// No claim has [`claim_flags::MASQUERADE`](super::super::claim_flags::MASQUERADE).
    pub const NO_MASQUERADE: u32 = 4;
    /// No claim has an address of the node as its hostIP.
    pub const NO_HOST_ADDRESS: u32 = 8;
}

/// `struct config`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Config {
    pub netns_cookie: u64,
    pub revision: u32,
    pub flags: u32,
    pub learn_address: [u8; 4],
    pub(super) learn_port: U16,
    pub(super) pad: u16,
    /// Ports that sockets get by themselves; 0 if nothing is known of them.
    pub(super) ephemeral_first: u32,
    pub(super) ephemeral_last: u32,
    /// CLOCK_MONOTONIC in 2^30 ns until which another version's programs are being replaced.
    pub hold_until: u32,
    pub(super) pad_at_end: u32,
}

impl Config {
    /// Lets the program on connect4 keep the cookie of who connects to this address.
    pub fn learn(&mut self, address: SocketAddrV4) {
        self.netns_cookie = 0;
        self.flags &= !config_flags::COOKIE;
        self.learn_address = address.ip().octets();
        self.learn_port = address.port().into();
    }

    /// Keeps the ports that sockets get by themselves free of those that are chosen for peers. A range
    /// that leaves hardly any others cannot be kept free.
    pub fn keep_free(&mut self, ephemeral: &RangeInclusive<u16>) {
        let (first, last) =
            (u32::from(*ephemeral.start()).max(LOWEST), u32::from(*ephemeral.end()));
        let others = (first - LOWEST) + (u32::from(u16::MAX) - last);
        (self.ephemeral_first, self.ephemeral_last) = match first <= last && others >= ENOUGH {
            true => (first, last),
            // None at all.
            false => (LOWEST, LOWEST - 1),
        };
    }

    /// Whether a route to an address of the node is enough to take its packets from outside.
    pub fn take_listed_only(&mut self, only: bool) {
        match only {
            true => self.flags |= config_flags::LISTED_ONLY,
            false => self.flags &= !config_flags::LISTED_ONLY,
        }
    }

    /// Of a node that has no claims of the kinds that packets would have to be asked more for.
    #[must_use]
    pub fn usual() -> Self {
        let mut config = Config::default();
        config.rule_out();
        config
    }

    /// Says that there are none of these.
    pub fn rule_out(&mut self) {
        self.flags |= config_flags::NO_MASQUERADE | config_flags::NO_HOST_ADDRESS;
    }

    /// Takes that back as far as there is one of them among these.
    pub fn expect<'a>(&mut self, claims: impl IntoIterator<Item = (&'a ClaimKey, &'a ClaimValue)>) {
        for (key, value) in claims {
            if value.flags & claim_flags::MASQUERADE != 0 {
                self.flags &= !config_flags::NO_MASQUERADE;
            }
            // No packet of a device is forwarded to a loopback address.
            let is_own = *key != key.of_any() && !key.addr.ip().is_loopback();
            if value.flags & claim_flags::SELF == 0 && is_own {
                self.flags &= !config_flags::NO_HOST_ADDRESS;
            }
        }
    }

    /// Whether none of these has been ruled out.
    #[must_use]
    pub fn expects<'a>(
        &self,
        claims: impl IntoIterator<Item = (&'a ClaimKey, &'a ClaimValue)>,
    ) -> bool {
        let mut after = *self;
        after.expect(claims);
        after == *self
    }

    /// The program takes the port away when it has seen the connection.
    #[must_use]
    pub fn has_learnt(&self) -> bool {
        self.learn_port.get() == 0 && self.netns_cookie != 0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::Protocol;

    #[test]
    fn ports_for_peers_are_left_whatever_sockets_get() {
        let kept = |range: RangeInclusive<u16>| {
            let mut config = Config::default();
            config.keep_free(&range);
            (config.ephemeral_first, config.ephemeral_last)
        };
        assert_eq!(kept(32768..=60999), (32768, 60999));
        assert_eq!(kept(32768..=65535), (32768, 65535));
        assert_eq!(kept(1..=60000), (1024, 60000));
        let wrong = RangeInclusive::new(60000, 50000);
        for range in [1024..=65535, 1024..=64000, 1..=65535, wrong] {
            assert_eq!(kept(range), (1024, 1023));
        }
    }

    #[test]
    fn what_packets_may_meet_is_not_ruled_out() {
        let ruled_out = |address: &str, flags: u16| {
            let address: IpAddr = address.parse().unwrap();
            let key = ClaimKey::new(address.into(), Protocol::Tcp, 8080);
            let mut value = ClaimValue::new(([10, 0, 0, 2], 80).into(), 7);
            value.flags |= flags;
            let mut config = Config::usual();
            config.expect([(&key, &value)]);
            assert_eq!(Config::usual().expects([(&key, &value)]), config == Config::usual());
            let bits = [config_flags::NO_MASQUERADE, config_flags::NO_HOST_ADDRESS];
            bits.map(|bit| config.flags & bit != 0)
        };
        for usual in ["0.0.0.0", "::", "127.0.0.1", "127.9.9.9", "::1"] {
            assert_eq!(ruled_out(usual, 0), [true, true], "{usual}");
        }
        for own in ["192.0.2.1", "169.254.1.1", "2001:db8::1"] {
            assert_eq!(ruled_out(own, 0), [true, false], "{own}");
            assert_eq!(ruled_out(own, claim_flags::SELF), [true, true], "a pod's {own}");
        }
        assert_eq!(ruled_out("0.0.0.0", claim_flags::MASQUERADE), [false, true]);
        assert_eq!(
            ruled_out("10.0.0.2", claim_flags::SELF | claim_flags::MASQUERADE),
            [false, true]
        );
    }
}
