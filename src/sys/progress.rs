//! What a command is doing, for people who wait for it.

use std::io::Write;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// Whatever is done sooner needs no word.
const SILENCE: Duration = Duration::from_secs(1);

/// Says on stderr what is being done if it takes longer than a second. Dropped, it says no more.
pub struct Progress {
    steps: Option<Sender<String>>,
    teller: Option<JoinHandle<()>>,
}

impl Progress {
    /// `name` stands before each line.
    #[must_use]
    pub fn begin(name: &str) -> Self {
        let (steps, told) = mpsc::channel::<String>();
        let name = name.to_owned();
        let teller = std::thread::spawn(move || {
            let mut step = String::new();
            loop {
                match told.recv_timeout(SILENCE) {
                    Ok(next) => step = next,
                    Err(RecvTimeoutError::Timeout) if !step.is_empty() => {
                        // Nobody may be there to read it.
                        drop(writeln!(std::io::stderr(), "{name}: {step} …"));
                        step.clear();
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        Progress { steps: Some(steps), teller: Some(teller) }
    }

    /// What is being done from now on.
    pub fn step(&self, what: &str) {
        if let Some(steps) = &self.steps {
            // Without the teller it is not told.
            drop(steps.send(what.to_owned()));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.steps.take());
        if let Some(teller) = self.teller.take() {
            drop(teller.join());
        }
    }
}
