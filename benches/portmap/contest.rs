//! Who takes part: each side with each backend that it really has.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::plugin::{Attachment, Call, Verb};
use crate::rig::{self, Rig};
use crate::{Res, Variant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Peer,
    Ours,
}

#[derive(Debug, Clone)]
pub struct Contestant {
    pub side: Side,
    pub variant: Variant,
    pub binary: PathBuf,
}

impl Contestant {
    pub fn call(&self, verb: Verb, about: &Attachment) -> Res<Call> {
        Call::new(&self.binary, self.variant, verb, about)
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Peer => "peer",
            Side::Ours => "ours",
        };
        write!(f, "{side} {}", self.variant)
    }
}

/// The contestants, peer before ours for each variant, and a note for each one left out.
pub fn enter(
    ours: &Path,
    peer: Option<&Path>,
    variants: &[Variant],
) -> Res<(Vec<Contestant>, Vec<String>)> {
    let (mut contestants, mut notes) = (Vec::new(), Vec::new());
    for &variant in variants {
        for (side, binary) in [(Side::Peer, peer), (Side::Ours, Some(ours))] {
            let Some(binary) = binary else { continue };
            let contestant = Contestant { side, variant, binary: binary.to_owned() };
            match lack(&contestant)? {
                None => contestants.push(contestant),
                Some(reason) => notes.push(match side {
                    Side::Ours => format!("{contestant} is left out: {reason}"),
                    Side::Peer => format!(
                        "peer has no {variant} backend ({reason}); ratios marked † are to its iptables-nft"
                    ),
                }),
            }
        }
    }
    // What the peer lacks is compared with its iptables-nft, asked for or not.
    let reference = stand_in(&contestants, Variant::IptablesNft).is_some();
    if let (Some(peer), false) = (peer, reference) {
        let lacking = variants.iter().any(|v| stand_in(&contestants, *v).is_none());
        if lacking {
            contestants.insert(
                0,
                Contestant {
                    side: Side::Peer,
                    variant: Variant::IptablesNft,
                    binary: peer.to_owned(),
                },
            );
        }
    }
    Ok((contestants, notes))
}

/// Who stands for the peer beside `variant`: itself, or the peer's iptables-nft.
pub fn stand_in(contestants: &[Contestant], variant: Variant) -> Option<Variant> {
    let has = |v: Variant| contestants.iter().any(|c| c.side == Side::Peer && c.variant == v);
    [variant, Variant::IptablesNft].into_iter().find(|v| has(*v))
}

/// Why a binary does not have a backend. Asking is not enough: upstream before 1.6 ignores the
/// key `backend` as it ignores every unknown one, and would be measured writing iptables rules.
fn lack(contestant: &Contestant) -> Res<Option<String>> {
    let (side, variant) = (contestant.side, contestant.variant);
    match (variant, side) {
        (Variant::IptablesLegacy | Variant::IptablesNft, _) => return Ok(None),
        (Variant::Ebpf, Side::Peer) => return Ok(Some("upstream has none".to_owned())),
        _ => {}
    }
    let rig = match Rig::new(variant) {
        // A nested or restricted machine may refuse it a bpffs.
        Err(error) if variant == Variant::Ebpf => return Ok(Some(error.to_string())),
        rig => rig?,
    };
    rig.on(|| {
        let cost = contestant.call(Verb::Add, &Attachment::measured(1))?.run()?;
        if cost.failure.is_some() || side == Side::Ours {
            return Ok(cost.failure);
        }
        let rules = rig::shell("iptables-save -t nat")?;
        let ignored = rules.contains("CNI-HOSTPORT-DNAT");
        Ok(ignored.then(|| "it ignores `backend` and writes iptables rules".to_owned()))
    })
}
