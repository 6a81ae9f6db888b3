//! What programs are told of the node.

use std::io;
use std::net::SocketAddrV4;
use std::ops::RangeInclusive;

use zerocopy::{FromBytes, IntoBytes};

use super::super::layout::{Config, config_flags};
use super::super::objects::Claims;
use super::{Loaded, Maps, failed};
use crate::error::Result;
use crate::facts::NodeFacts;

impl Loaded {
    /// Says which version's programs are attached from now on.
    pub fn claim_revision(&self) -> Result<()> {
        self.reconfigure(|config| config.revision = config.revision.max(self.build.revision))
    }

    /// Says in which network namespace the socket hooks act.
    pub fn set_cookie(&self, cookie: u64) -> Result<()> {
        self.reconfigure(|config| {
            config.netns_cookie = cookie;
            config.flags |= config_flags::COOKIE;
        })
    }

    /// Lets the program on connect4 keep the cookie of whoever connects to an address next.
    pub fn learn_from(&self, address: SocketAddrV4) -> io::Result<()> {
        self.reconfigure(|config| config.learn(address)).map_err(io::Error::other)
    }

    /// After that connection: what was learnt holds from now on, if anything was.
    pub fn trust_learnt_cookie(&self) -> Result<()> {
        // A program has changed it.
        self.config.set(config(&self.maps)?);
        self.reconfigure(|config| {
            if config.has_learnt() {
                config.flags |= config_flags::COOKIE;
            }
        })
    }

    /// What has to be said before claims are written: which ports are not to be chosen for peers, whether
    /// the node has bound addresses that are not its own, and what kinds of claims there will be.
    pub fn describe(
        &self,
        ephemeral: &RangeInclusive<u16>,
        facts: &NodeFacts,
        claims: &Claims,
    ) -> Result<()> {
        self.reconfigure(|config| {
            config.keep_free(ephemeral);
            config.take_listed_only(facts.binds_services);
            config.expect(claims);
        })
    }

    /// Says what kinds of claims there are not: after all others than these are gone.
    pub fn rule_out_but(&self, claims: &Claims) -> Result<()> {
        self.reconfigure(|config| {
            config.rule_out();
            config.expect(claims);
        })
    }

    /// Whether programs look for claims of these kinds.
    pub fn expects(&self, claims: &Claims) -> Result<bool> {
        Ok(config(&self.maps)?.expects(claims))
    }

    /// Whether programs take the node's listed addresses alone from outside.
    pub fn takes_listed_only(&self) -> Result<bool> {
        Ok(config(&self.maps)?.flags & config_flags::LISTED_ONLY != 0)
    }

    /// The network namespace that the socket hooks act in, if it is known.
    pub fn cookie(&self) -> Result<Option<u64>> {
        let config = config(&self.maps)?;
        Ok((config.flags & config_flags::COOKIE != 0).then_some(config.netns_cookie))
    }

    pub(super) fn reconfigure(&self, change: impl Fn(&mut Config)) -> Result<()> {
        let changes = |config: &mut Config| {
            let before = *config;
            change(config);
            *config != before
        };
        if !changes(&mut self.config.get()) {
            return Ok(());
        }
        let mut after = config(&self.maps)?;
        if changes(&mut after) {
            self.maps
                .config
                .put(0_u32.as_bytes(), after.as_bytes())
                .map_err(failed("write the configuration of the eBPF programs"))?;
        }
        self.config.set(after);
        Ok(())
    }
}

pub(super) fn config(maps: &Maps) -> Result<Config> {
    let value = maps
        .config
        .get(0_u32.as_bytes())
        .map_err(failed("read the configuration of the eBPF programs"))?;
    Ok(value.and_then(|value| Config::read_from_bytes(&value).ok()).unwrap_or_default())
}
