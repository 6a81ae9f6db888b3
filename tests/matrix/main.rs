//! Traffic to hostPorts on every kind of node: who is reached, and which source address the pod saw.
//!
//! Run as root: `cargo test --test matrix -- --ignored`. Each test makes a node, its pods and a client
//! in namespaces of its own, lets the plugin change that node, calls, and looks what is left.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says by a panic that it failed"
)]

/// One test for each variant of a node's tools, so that a failure's name says where.
macro_rules! on_each_variant {
    ($($(#[$meta:meta])* fn $name:ident($variant:ident: Variant) $body:block)*) => {$(
        $(#[$meta])*
        mod $name {
            use super::*;

            fn holds($variant: Variant) $body

            on_variants!(
                iptables_nft: Variant::IptablesNft,
                iptables_legacy: Variant::IptablesLegacy,
                nftables: Variant::Nftables,
                ebpf: Variant::Ebpf,
            );
        }
    )*};
}

/// The same for what only rules of netfilter can do.
macro_rules! on_each_variant_with_rules {
    ($($(#[$meta:meta])* fn $name:ident($variant:ident: Variant) $body:block)*) => {$(
        $(#[$meta])*
        mod $name {
            use super::*;

            fn holds($variant: Variant) $body

            on_variants!(
                iptables_nft: Variant::IptablesNft,
                iptables_legacy: Variant::IptablesLegacy,
                nftables: Variant::Nftables,
            );
        }
    )*};
}

macro_rules! on_variants {
    ($($name:ident: $variant:expr,)*) => {$(
        #[test]
        #[ignore = "privileged: makes network namespaces"]
        fn $name() {
            holds($variant);
        }
    )*};
}

mod conditions;
mod counters;
mod flows;
mod guests;
mod host_ip;
mod localhost;
mod masquerade;
mod nodes;
#[allow(dead_code, reason = "a part is needed here")]
#[path = "../datapath/packet.rs"]
mod packet;
mod precedence;
mod recordings;
mod replay;
mod rig;
mod sctp;
mod services;
mod shapes;
mod sockets;
#[path = "../support/mod.rs"]
mod support;
mod versions;
