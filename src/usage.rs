//! What the binary says of itself, and the commands that people type. Pure.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};

use crate::cni::version::SUPPORTED;
use crate::conflist::cache;
use crate::conflist::files::{self, Choice};
use crate::model::BackendKind;
use crate::sys::install::DEFAULT_BIN_DIR;
use crate::sys::store::DEFAULT_DIR;
use crate::who::Port;

/// Name and version, the first line of `--version` and of the introduction.
pub const NAME_AND_VERSION: &str = concat!("portmap ", env!("CARGO_PKG_VERSION"));

/// By this a program is known to be this plugin, and which version, without running it.
const IDENTITY: &str = concat!("portmap-identity=portmap ", env!("CARGO_PKG_VERSION"), ";");
const IDENTITY_BEGINS: usize = "portmap-identity=".len();

/// Name and version of this plugin's build whose file has these bytes; `None` if it is none.
#[must_use]
pub fn identity_in(bytes: &[u8]) -> Option<String> {
    // As a whole, so that the linker keeps it as a whole.
    let own = std::hint::black_box(IDENTITY).as_bytes();
    let begins = own.get(..IDENTITY_BEGINS)?;
    bytes.windows(begins.len()).enumerate().filter(|(_, window)| *window == begins).find_map(
        |(at, _)| {
            // A version has no more bytes than that.
            let rest = bytes.get(at + begins.len()..)?;
            let text = std::str::from_utf8(
                rest.get(..64.min(rest.len()))?.split(|byte| *byte == b';').next()?,
            );
            let version = text.ok()?.strip_prefix("portmap ")?;
            let sound = version.chars().all(|c| c.is_ascii_alphanumeric() || ".-+".contains(c));
            (sound && version.contains('.')).then(|| format!("portmap {version}"))
        },
    )
}

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
    /// Puts this very binary among the runtime's plugins, and into its plugin list
    ///
    /// Old or new file at any moment: the file is written beside the old one and renamed, running ones
    /// go on, and the SELinux label stays. A second time there is nothing to do. With --conflist the
    /// list gets {"type": "portmap", "capabilities": {"portMappings": true}} behind the plugin that
    /// makes the pod's interface (and bandwidth, if that is there); the rest of the file stays byte for
    /// byte, and its text before is kept beside it. Where Cilium's agent would revert that, it says so and
    /// names what lasts.
    Install {
        /// Where the runtime looks for plugins (containerd's bin_dir, CRI-O's plugin_dirs)
        #[arg(long, value_name = "DIR", default_value = DEFAULT_BIN_DIR)]
        dest: PathBuf,
        /// Also put portmap into this list; `auto` (or nothing) is the one that runtimes take: the first
        /// *.conflist, *.conf or *.json by name
        #[arg(long, value_name = "PATH|auto", num_args = 0..=1, default_missing_value = "auto")]
        conflist: Option<Choice>,
        /// Where the runtime looks for lists
        #[arg(long, value_name = "DIR", default_value = files::DEFAULT_DIR)]
        conf_dir: PathBuf,
        /// Stay, and put back whatever somebody changes or removes, until SIGTERM or SIGINT comes: the
        /// binary, unless it is a newer one of this plugin, and with --conflist the entry in the list
        #[arg(long, conflicts_with = "json")]
        watch: bool,
        /// With --watch: the shortest time between two repairs of one file; it doubles while somebody
        /// keeps reverting them
        #[arg(long, value_name = "SECONDS", default_value = "3", requires = "watch",
              value_parser = clap::value_parser!(u64).range(1..=300))]
        pause: u64,
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Removes the binary, unless something still needs it
    ///
    /// A runtime that does not find a plugin stops in the middle of removing a pod. So this refuses while
    /// a list of the directory names portmap, a pod has hostPorts, or the list that a pod was made with names
    /// portmap: libcni keeps it, and CRI-O, podman and Multus call DEL with it (containerd takes the list of
    /// now). With --conflist it first takes portmap out of that file, the exact inverse of what install did;
    /// if the entry has more than install puts there, such as options, the text before is kept beside the
    /// list. Then no new pod comes, and when those that are there have gone, repeat it.
    Uninstall {
        /// Where the binary is
        #[arg(long, value_name = "DIR", default_value = DEFAULT_BIN_DIR)]
        dest: PathBuf,
        /// First take portmap out of this list; `auto` (or nothing) is the one that runtimes take
        #[arg(long, value_name = "PATH|auto", num_args = 0..=1, default_missing_value = "auto")]
        conflist: Option<Choice>,
        /// Where the runtime looks for lists
        #[arg(long, value_name = "DIR", default_value = files::DEFAULT_DIR)]
        conf_dir: PathBuf,
        /// Where the records are, if not there; every `stateDir` of the directory's lists is looked at as well
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        state_dir: PathBuf,
        /// Where libcni keeps the lists that pods were made with
        #[arg(long, value_name = "DIR", default_value = cache::DEFAULT_DIR)]
        cache_dir: PathBuf,
        /// Remove it also if it is still needed, or is another program
        #[arg(long)]
        force: bool,
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Says what a plugin list would do on this node, and what is wrong with it
    ///
    /// Takes a list, or the object of this plugin alone. Names every problem with line and column and what
    /// to do about it, the backend that an ADD would choose here (tried out, without changing anything),
    /// and every option with its value. Exits 0 if all is well, 1 if something deserves attention and 2 if
    /// hostPorts would not work.
    CheckConfig {
        /// The file; `-` is standard input
        #[arg(value_name = "FILE|-")]
        file: PathBuf,
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Says what is wrong on this node, why that matters, and which command settles it
    ///
    /// Tries every backend out, and looks at the plugin list and the binary, records and the rules that
    /// they ask for, what forwards 127.0.0.1, firewalls that would drop hostPorts, and Cilium. Changes
    /// nothing. What it could not look at it says, too: run it as root. Exits 0 if all is fine, 1 if
    /// something deserves attention and 2 if hostPorts do not work.
    Doctor {
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
        /// Where the records are, if the network configuration has another `stateDir`
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        state_dir: PathBuf,
        /// Where the runtime looks for plugins (containerd's bin_dir, CRI-O's plugin_dirs)
        #[arg(long, value_name = "DIR", default_value = DEFAULT_BIN_DIR)]
        dest: PathBuf,
        /// Where the runtime looks for lists
        #[arg(long, value_name = "DIR", default_value = files::DEFAULT_DIR)]
        conf_dir: PathBuf,
    },
    /// Prints the completion script for a shell
    ///
    /// For bash: portmap completions bash > /etc/bash_completion.d/portmap
    Completions {
        /// Which shell
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Prints the manual page, or that of one command
    ///
    /// To read it: portmap man | man -l -
    Man {
        /// The command; without one the page is that of portmap itself
        #[arg(value_name = "COMMAND", value_parser = described)]
        command: Option<Box<clap::Command>>,
    },
    /// Shows every hostPort of this node, whose it is, and whether it works
    ///
    /// One line for each claim: protocol, address and port of the node, pod, where it leads, and the state:
    /// active; shadowed by a newer claim; missing in the kernel; dead, because the pod's network namespace
    /// is gone; no record, as upstream's portmap leaves it; unknown, because the kernel could not be read. PACKETS and BYTES are those to the pod and back,
    /// where the backend counts them (ebpf). On a narrow terminal columns are left out; into a pipe none.
    /// Changes nothing. Exits 0 if all is well, 1 if something is missing, dead or could not be read.
    List {
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
        /// Where the records are, if the network configuration has another `stateDir`
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        state_dir: PathBuf,
    },
    /// Says who answers on a port of this node, and why
    ///
    /// Shows what happens to a connection from outside and to one of the node itself, the claims to the
    /// port, the rules or map entries on the way, and what else would take the packets: Services, published
    /// ports of Docker, Cilium's own hostPorts, attachments without a record, processes that wait. Changes
    /// nothing. Exits 0 if a hostPort answers, and 1 if nobody or something else does.
    Who {
        /// The port, and the protocol if only one is meant: 8080, 53/udp
        #[arg(value_name = "PORT[/PROTOCOL]")]
        port: Port,
        /// The node's address that is called, if not any
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<IpAddr>,
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
        /// Where the records are, if the network configuration has another `stateDir`
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        state_dir: PathBuf,
    },
    /// Removes what containers have left that went without a DEL
    ///
    /// Removes rules or map entries and records of attachments whose network namespace is gone; never of
    /// one that lives, or of which that cannot be told. Rules of upstream's portmap have no record, and
    /// stay. Exits 0 if all is well, 1 if something could not be removed or read.
    Gc {
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
        /// Where the records are, if the network configuration has another `stateDir`
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        state_dir: PathBuf,
    },
    /// Puts back hostPorts that something has removed, such as a reload of the firewall
    ///
    /// Compares rules or map entries of every recorded attachment with what they should be, and where
    /// something is wrong brings all of that backend in order in one transaction. Says what was wrong.
    /// Changes nothing if all is well, and adds nothing for attachments whose network namespace is gone.
    Restore {
        /// Report as one JSON object
        #[arg(long)]
        json: bool,
        /// Where the records are, if the network configuration has another `stateDir`
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        state_dir: PathBuf,
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

/// The completion script for a shell.
#[must_use]
pub fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "portmap", &mut script);
    script
}

/// The manual page of one command, or of the program, as roff.
///
/// # Errors
///
/// None in practice: it is written into memory.
pub fn manual(command: Option<Box<clap::Command>>) -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let wanted = command.map_or_else(documented, |command| *command);
    clap_mangen::Man::new(wanted).section("8").render(&mut page)?;
    Ok(page)
}

/// The program as manual pages show it.
fn documented() -> clap::Command {
    let mut cli = Cli::command().disable_help_subcommand(true);
    // Names of commands and pages become `portmap-flush` and so on.
    cli.build();
    cli
}

/// The command of that name.
fn described(name: &str) -> Result<Box<clap::Command>, String> {
    let found = documented().find_subcommand(name).cloned().map(Box::new);
    found.ok_or_else(|| "there is no such command".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn every_shell_and_every_command_has_its_text() {
        use clap::ValueEnum;
        for shell in clap_complete::Shell::value_variants() {
            let script = String::from_utf8(completions(*shell)).unwrap_or_default();
            assert!(
                script.contains("check-config") && script.contains("conf-dir"),
                "{shell}: {script}"
            );
        }
        let names: Vec<String> =
            Cli::command().get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
        let main = manual(None).unwrap_or_default();
        let main = String::from_utf8_lossy(&main).replace('\\', "");
        for name in names {
            assert!(main.contains(&format!("portmap-{name}(8)")), "{name} is not in {main}");
            let page = described(&name).ok().and_then(|one| manual(Some(one)).ok());
            let page = page.unwrap_or_default();
            let page = String::from_utf8_lossy(&page).replace('\\', "");
            assert!(page.contains(&format!(".TH portmap-{name} 8")), "{page}");
        }
    }

    #[test]
    fn a_build_is_known_by_its_bytes() {
        let of = |text: &str| identity_in(text.as_bytes());
        assert_eq!(of(&format!("\0x{IDENTITY}\0")), Some(NAME_AND_VERSION.into()));
        assert_eq!(of("portmap-identity=portmap 9.9.9-rc.1;"), Some("portmap 9.9.9-rc.1".into()));
        // What looks for it has its beginning as well.
        assert_eq!(
            of("portmap-identity=\0\0portmap-identity=portmap 1.0.0;"),
            Some("portmap 1.0.0".into())
        );
        assert_eq!(of("portmap-identity=portmap \u{e9}.;"), None);
        assert_eq!(of("portmap 1.0.0"), None);
    }

    #[test]
    fn the_introduction_names_version_and_protocol() {
        let text = introduction();
        assert!(text.starts_with("portmap "));
        assert!(text.contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{text}");
    }
}
