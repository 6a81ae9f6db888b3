//! What the binary says of itself, and the commands that people type. Pure.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::cni::version::SUPPORTED;
use crate::model::BackendKind;
use crate::sys::store::DEFAULT_DIR;

/// Name and version, the first line of `--version` and of the introduction.
pub const NAME_AND_VERSION: &str = concat!("portmap ", env!("CARGO_PKG_VERSION"));

/// Shown when a person runs the plugin without arguments.
#[must_use]
pub fn introduction() -> String {
    let backends: Vec<&str> = BackendKind::ALL.iter().map(|kind| kind.name()).collect();
    format!(
        "{NAME_AND_VERSION}: a CNI plugin that forwards hostPorts of pods\n\
         CNI protocol versions supported: {}\n\
         backends: {}\n\
         container runtimes run it with CNI_COMMAND set; `portmap --help` shows what you can run yourself\n",
        SUPPORTED.join(", "),
        backends.join(", ")
    )
}

/// A chained CNI plugin that forwards hostPorts of pods.
///
/// Container runtimes run it with CNI_COMMAND set and a network configuration on stdin; it belongs
/// into the CNI binary directory (/opt/cni/bin), and into a plugin list after the main plugin.
#[derive(Debug, Parser)]
#[command(name = "portmap", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows on a throw-away node that hostPorts work here, and cleans up
    ///
    /// Builds a node, two pods and an outside client in network namespaces of their own, runs ADD,
    /// CHECK and DEL through a Cilium-like chain, sends TCP and UDP over every path, prints what was
    /// reached and which source the pod saw, and proves that nothing is left. Needs root; changes
    /// nothing outside of its namespaces. Exits 0 only if everything held.
    Demo {
        /// Use this backend instead of the first that works
        #[arg(long, value_name = "BACKEND", value_parser = ["auto", "iptables", "nftables", "ebpf"])]
        backend: Option<String>,
    },
    /// Removes hostPorts from this node, for decommissioning
    ///
    /// Removes the rules or map entries and the records of every attachment, or of one network's; with
    /// the last attachment of all also eBPF programs, maps, hooks and pins. Containers that still run
    /// lose their hostPorts. Shows what goes and asks first, unless --yes is given.
    #[command(group(clap::ArgGroup::new("what").required(true)))]
    Flush {
        /// The attachments of this network configuration (its `name`)
        #[arg(long, value_name = "NAME", group = "what")]
        network: Option<String>,
        /// All attachments
        #[arg(long, group = "what")]
        all: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
        /// Where the records are, if the network configuration has another `stateDir`
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        state_dir: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound_and_every_command_is_explained() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            assert!(sub.get_about().is_some(), "{} has no help", sub.get_name());
            for arg in sub.get_arguments() {
                assert!(
                    arg.get_help().is_some(),
                    "{} {} has no help",
                    sub.get_name(),
                    arg.get_id()
                );
            }
        }
    }

    #[test]
    fn the_introduction_names_version_and_protocol() {
        let text = introduction();
        assert!(text.starts_with("portmap "));
        assert!(text.contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{text}");
    }
}
