//! The verbs, one file each: short scripts over the engine.

mod add;
mod check;
mod del;
mod gc;
mod status;

use std::io::Read;

use crate::cni::envelope::Envelope;
use crate::cni::invocation::{Invocation, Verb};
use crate::cni::reply::{ErrorReply, VersionReply};
use crate::error::{Error, Result};
use crate::sys::Host;

/// Bytes of a configuration with its prevResult, which one read(2) takes in.
const USUAL_INPUT: usize = 16 * 1024;

/// What a call leaves behind: at most one JSON object on stdout, notes on stderr, an exit status.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: Option<String>,
    pub notes: Vec<String>,
    pub failed: bool,
}

/// Carries out a call of the CNI protocol. `invocation` is what the environment holds.
#[must_use]
pub fn run(invocation: Result<Invocation>, stdin: &mut dyn Read, host: &Host) -> Outcome {
    let mut input = Vec::with_capacity(USUAL_INPUT);
    let verb = invocation.as_ref().map(|invocation| invocation.verb).ok();
    let read = invocation.and_then(|invocation| {
        stdin.read_to_end(&mut input).map_err(|error| Error::io("read stdin", error))?;
        Ok(invocation)
    });
    let result = read.and_then(|invocation| dispatch(&invocation, &input, host));
    let notes = host.take_warnings();
    match result {
        Ok(stdout) => Outcome { stdout, notes, failed: false },
        Err(error) => {
            let mut reply = ErrorReply::new(&error, Envelope::peek_version(&input).as_deref());
            // Codes of the plugin's own, and what the system refused (5): an ADD could not work either.
            if verb == Some(Verb::Status) && (reply.code >= 100 || reply.code == 5) {
                reply.code = status::NOT_AVAILABLE;
            }
            // A call whose variables are wrong may be a DEL too.
            if matches!(verb, None | Some(Verb::Del)) {
                reply = reply.without_success_words();
            }
            // The reply holds strings and a number: it can be written.
            let stdout = serde_json::to_string(&reply).ok();
            Outcome { stdout, notes, failed: true }
        }
    }
}

fn dispatch(invocation: &Invocation, input: &[u8], host: &Host) -> Result<Option<String>> {
    if invocation.verb == Verb::Version {
        // libcni sends an object with a cniVersion; anything else is as good.
        return to_json(&VersionReply::new(Envelope::peek_version(input).as_deref())).map(Some);
    }
    let envelope = Envelope::parse(input)?;
    match invocation.verb {
        Verb::Add => add::run(invocation, &envelope, host).map(Some),
        Verb::Del => del::run(invocation, &envelope, host).map(|()| None),
        Verb::Check => check::run(invocation, &envelope, host).map(|()| None),
        Verb::Gc => gc::run(&envelope, host).map(|()| None),
        Verb::Status => status::run(&envelope, host).map(|()| None),
        Verb::Version => Ok(None),
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Error::Decode(format!("the reply cannot be written: {error}")))
}
