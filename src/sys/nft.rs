//! The nft tool. JSON in, JSON out, through our own runner: the `nftables` crate's loses stderr.

use serde_json::Value;

use super::Host;
use super::command::ToolError;
use super::namespace::in_scratch_netns;

/// What nft reads as its input. Its own name for it, `-`, means /dev/stdin, which minimal images and
/// early boot stages may lack.
const STDIN: &str = "/proc/self/fd/0";

/// Sends commands in JSON; all of them are one transaction.
pub fn apply(host: &Host, json: &str) -> Result<(), ToolError> {
    host.tools.run("nft", &["-j", "-f", STDIN], json).map(drop)
}

/// A table as nft's JSON, without decoding by the crate's schema: one object it does not know makes
/// it refuse the whole list.
pub fn list_table(host: &Host, family: &str, table: &str) -> Result<Vec<Value>, ToolError> {
    let text = host.tools.run("nft", &["-j", "list", "table", family, table], "")?;
    Ok(objects(&text))
}

fn objects(text: &str) -> Vec<Value> {
    let mut document: Value = serde_json::from_str(text).unwrap_or_default();
    match document.get_mut("nftables").map(Value::take) {
        Some(Value::Array(objects)) => objects,
        _ => Vec::new(),
    }
}

/// Turns matches in nft's own syntax into its JSON: JSON cannot embed them, and only nft can read
/// them. They are added to a rule in a namespace that is gone afterwards, so whatever else the text
/// may do (it comes from the network configuration) it does nowhere.
pub fn compile(host: &Host, conditions: &str) -> Result<Vec<Value>, String> {
    in_scratch_netns(|| {
        let script =
            format!("table inet portmap {{\n chain conditions {{\n {conditions} accept\n }}\n}}\n");
        host.tools.run("nft", &["-f", STDIN], &script).map_err(|error| explained(&error))?;
        let objects = list_table(host, "inet", "portmap").map_err(|error| error.to_string())?;
        let mut rules = objects.iter().filter_map(|object| object.get("rule"));
        let (Some(rule), None) = (rules.next(), rules.next()) else {
            return Err("the conditions are not exactly one rule".into());
        };
        match rule.get("expr").and_then(Value::as_array).map(Vec::as_slice) {
            Some([matches @ .., last]) if last.get("accept").is_some() => Ok(matches.to_vec()),
            _ => Err("the conditions hold a verdict".into()),
        }
    })?
}

/// nft's reason, with what to write instead of `iif eth0`, which is compared by the device's number and
/// so looked up (nft 1.0.6): the namespace of the trial has no such device.
fn explained(error: &ToolError) -> String {
    let reason = error.to_string();
    match reason.contains("Interface does not exist") {
        true => format!("{reason} (conditions name devices by iifname and oifname)"),
        false => reason,
    }
}
