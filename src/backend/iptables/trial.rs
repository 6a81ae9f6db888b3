//! Whether the tools work here: in an empty network namespace, and beside what others have on the node.

use std::collections::BTreeSet;

use super::listing::Listing;
use super::script;
use crate::backend::{Unusable, probe_record};
use crate::error::Error;
use crate::model::{BackendKind, Family};
use crate::sys::Host;
use crate::sys::command::ToolError;
use crate::sys::iptables::{restore, table_in, used};
use crate::sys::namespace::in_scratch_netns;

pub fn probe(host: &Host, family: Family) -> Result<(), Unusable> {
    let sample = probe_record(BackendKind::Iptables, family);
    let desired = script::Desired {
        family,
        records: vec![&sample],
        parts: &sample.parts(),
        purge: &BTreeSet::new(),
        uplinks: &["eth0".to_owned()],
        keep_base: false,
        stale_bits: BTreeSet::new(),
    };
    let none = Listing::default();
    let raw = if family == Family::V4 { script::restore_raw(true, &none) } else { String::new() };
    let text = script::restore_nat(&desired, &none) + &raw;
    match in_scratch_netns(|| restore(host, family, &text)) {
        Ok(tried) => tried.map_err(unusable),
        Err(reason) => Err(Unusable::Broken(reason)),
    }
}

fn unusable(error: ToolError) -> Unusable {
    match error {
        ToolError::Busy { .. } => Unusable::Busy(error.into_error(String::new())),
        error => Unusable::Broken(error.to_string()),
    }
}

/// As [`unusable`], of the node's own table: with many rules of others, or many who change them, a tool that
/// works may not come to its end. In an empty namespace only a broken one hangs.
fn unusable_here(error: ToolError) -> Unusable {
    match error {
        ToolError::Hung { tool, seconds } => Unusable::Busy(Error::Hung { tool, seconds }),
        error => unusable(error),
    }
}

/// The first ADD reads table nat, which iptables-nft refuses where somebody has used nft in it.
pub fn probe_node(host: &Host, ipv6: bool) -> Result<(), Unusable> {
    for family in Family::ALL.into_iter().filter(|family| ipv6 || *family == Family::V4) {
        let table = used(host, family).and_then(|used| table_in(host, used, family, "nat"));
        table.transpose().map_err(unusable_here)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_hangs_on_the_node_s_table_is_not_broken_for_good() {
        let hung = || ToolError::Hung { tool: "iptables".into(), seconds: 40 };
        assert!(matches!(unusable(hung()), Unusable::Broken(_)));
        assert!(matches!(unusable_here(hung()), Unusable::Busy(error) if error.code() == 11));
        let (tool, stderr) = ("iptables".to_owned(), "table `nat' is incompatible".to_owned());
        let failed = ToolError::Failed { tool, status: Some(1), stderr };
        assert!(matches!(unusable_here(failed), Unusable::Broken(_)));
    }
}
