#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "here the process's arguments, environment and streams become values, and back"
)]

#[cfg(target_env = "musl")]
mod heap;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use portmap::cni::invocation::Invocation;
use portmap::commands::{
    CommandError, Terminal, Verdict, check_config, doctor, flush, gc, install, list, restore,
    uninstall, watch, who,
};
use portmap::conflist::files::Choice;
use portmap::demo::{self, DemoOptions};
use portmap::doctor::gather::Places;
use portmap::sys::{Host, terminal};
use portmap::usage::{Cli, Command, completions, introduction, manual};
use portmap::verb;

#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: heap::Heap = heap::Heap::new();

fn main() -> ExitCode {
    let env = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    match Invocation::read(env).transpose() {
        Some(invocation) => plugin(invocation),
        None if std::env::args_os().len() > 1 => command(Cli::parse()),
        None => {
            eprint!("{}", introduction());
            ExitCode::SUCCESS
        }
    }
}

/// A runtime runs the binary.
fn plugin(invocation: portmap::error::Result<Invocation>) -> ! {
    // Runtimes want a JSON object also of a plugin that has a bug.
    std::panic::set_hook(Box::new(|panic| {
        let msg = serde_json::Value::from(panic.to_string());
        println!(r#"{{"cniVersion":"1.1.0","code":999,"msg":{msg}}}"#);
    }));
    let host = Host::new(std::env::var_os("PATH").as_deref());
    let outcome = verb::run(invocation, &mut std::io::stdin().lock(), &host);
    for note in &outcome.notes {
        // Nobody may be there to read it, which is no reason to fail.
        drop(writeln!(std::io::stderr(), "portmap: {note}"));
    }
    if let Some(text) = outcome.stdout {
        // A runtime that is gone does not read it.
        drop(writeln!(std::io::stdout(), "{text}"));
    }
    end(i32::from(outcome.failed))
}

/// Ends the process, and leaves all that it has to the kernel, which takes it back at once.
#[allow(unsafe_code, reason = "libc knows no safe way to end without clearing up")]
fn end(status: i32) -> ! {
    // SAFETY: it does not return, and nothing is left that anybody would miss: lines that were printed are out.
    unsafe { libc::_exit(status) }
}

/// A person runs the binary.
fn command(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Demo { backend } => demonstrate(backend),
        Command::Install { dest, conflist, conf_dir, watch, pause, json } => {
            let (dest, conf_dir) = (absolute(dest), absolute(conf_dir));
            let options = install::Options { dest, list: conflist.map(choice), conf_dir, json };
            on_terminal("install", |_, terminal| match watch {
                true => {
                    let pause = Duration::from_secs(pause);
                    watch::run(&options, pause, &mut std::io::stderr()).map(|()| Verdict::Fine)
                }
                false => install::run(&options, terminal),
            })
        }
        Command::Uninstall { dest, conflist, conf_dir, state_dir, cache_dir, force, json } => {
            let (dest, conf_dir, list) = (absolute(dest), absolute(conf_dir), conflist.map(choice));
            let cache_dir = absolute(cache_dir);
            let options =
                uninstall::Options { dest, list, conf_dir, state_dir, cache_dir, force, json };
            on_terminal("uninstall", |host, terminal| uninstall::run(host, &options, terminal))
        }
        Command::CheckConfig { file, json } => on_terminal("check-config", |host, terminal| {
            check_config::run(host, &check_config::Options { file: &file, json }, terminal)
        }),
        Command::Doctor { json, state_dir, dest, conf_dir } => {
            let (dest, conf_dir) = (absolute(dest), absolute(conf_dir));
            let places = Places { state_dir: absolute(state_dir), dest, conf_dir };
            let options = doctor::Options { json, places };
            on_terminal("doctor", |host, terminal| doctor::run(host, &options, terminal))
        }
        Command::Completions { shell } => on_terminal("completions", |_, terminal| {
            terminal.output.write_all(&completions(shell))?;
            Ok(Verdict::Fine)
        }),
        Command::Man { command } => on_terminal("man", |_, terminal| {
            terminal.output.write_all(&manual(command)?)?;
            Ok(Verdict::Fine)
        }),
        Command::List { json, state_dir } => on_terminal("list", |host, terminal| {
            let width = terminal_width();
            list::run(host, &list::Options { json, state_dir: &state_dir, width }, terminal)
        }),
        Command::Who { port, ip, json, state_dir } => on_terminal("who", |host, terminal| {
            let address = ip.map(|ip| ip.to_canonical());
            who::run(host, &who::Options { port, address, json, state_dir: &state_dir }, terminal)
        }),
        Command::Gc { dry_run, json, state_dir } => on_terminal("gc", |host, terminal| {
            gc::run(host, &gc::Options { dry_run, json, state_dir: &state_dir }, terminal)
        }),
        Command::Restore { json, state_dir } => on_terminal("restore", |host, terminal| {
            restore::run(host, &restore::Options { json, state_dir: &state_dir }, terminal)
        }),
        Command::Flush { network, all: _, yes, json, state_dir } => {
            let options =
                flush::Options { network: network.as_deref(), yes, json, state_dir: &state_dir };
            on_terminal("flush", |host, terminal| flush::run(host, &options, terminal))
        }
    }
}

fn terminal_width() -> Option<usize> {
    terminal::width(std::env::var("COLUMNS").ok().as_deref())
}

/// As it is without the working directory.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn choice(choice: Choice) -> Choice {
    match choice {
        Choice::Auto => Choice::Auto,
        Choice::File(path) => Choice::File(absolute(path)),
    }
}

fn demonstrate(backend: Option<String>) -> ExitCode {
    let result = std::env::current_exe().map_err(demo::DemoError::from).and_then(|plugin| {
        demo::run(&DemoOptions { backend, plugin }, &mut std::io::stdout().lock())
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("portmap demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn on_terminal(
    name: &str,
    run: impl FnOnce(&Host, &mut Terminal) -> Result<Verdict, CommandError>,
) -> ExitCode {
    let host = Host::new(std::env::var_os("PATH").as_deref());
    let mut terminal = Terminal {
        input: &mut std::io::stdin().lock(),
        output: &mut std::io::stdout().lock(),
        questions: &mut std::io::stderr(),
        interactive: std::io::stdin().is_terminal(),
        // Any value but an empty one means no (no-color.org).
        colour: std::io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb"),
    };
    match run(&host, &mut terminal) {
        Ok(Verdict::Fine) => ExitCode::SUCCESS,
        Ok(Verdict::Warnings) => ExitCode::from(1),
        Ok(Verdict::Broken) => ExitCode::from(2),
        Err(error) => {
            eprintln!("portmap {name}: {}", error.report());
            ExitCode::FAILURE
        }
    }
}
