//! A worker of this program that takes part in a migration: what it is told, and what it says line by line.
//!
//! Words are JSON, one object a line ([`super::ferry::words`], [`super::tcp::words`]).

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::process::Process;
use super::{EngineError, PairOrder, Place};

/// A source or a target that says `Said`.
#[derive(Debug)]
pub(super) struct Worker<Said> {
    engine: String,
    side: &'static str,
    process: Process,
    stdin: ChildStdin,
    said: Receiver<Said>,
}

impl<Said: DeserializeOwned + std::fmt::Debug + Send + 'static> Worker<Said> {
    /// Starts the worker `KIND-SIDE` at `place` with its order.
    pub(super) fn start(
        (engine, kind, side): (&str, &str, &'static str),
        place: &Place<'_>,
        order: &PairOrder<'_>,
        to_do: &impl Serialize,
    ) -> Result<Self, EngineError> {
        let broken = |what: String| EngineError::Broken { engine: engine.to_owned(), side, what };
        let program = crate::worker::program().map_err(|error| broken(format!("where is it? {error}")))?;
        let text = serde_json::to_string(to_do).map_err(|error| broken(error.to_string()))?;
        let arguments: Vec<OsString> =
            vec![crate::worker::WORD.into(), format!("{kind}-{side}").into(), text.into()];
        let log = order.folder.join(format!("{side}.log"));
        let (process, stdin, stdout) = Process::start_piped(place.namespace, &program, &arguments, &log)?;
        Ok(Self { engine: engine.to_owned(), side, process, stdin, said: listen(stdout) })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Gives it another order.
    pub(super) fn tell(&mut self, order: &impl Serialize) -> Result<(), EngineError> {
        let mut line = serde_json::to_string(order).map_err(|error| self.broken(error.to_string()))?;
        line.push('\n');
        let written = self.stdin.write_all(line.as_bytes());
        written.map_err(|error| self.broken(format!("it takes no order: {error}")))
    }

    /// The next thing that it says; `None` after `timeout`.
    pub(super) fn hear(&self, timeout: Duration) -> Result<Option<Said>, EngineError> {
        match self.said.recv_timeout(timeout) {
            Ok(said) => Ok(Some(said)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.broken("it ended".to_owned())),
        }
    }

    /// The same where silence is a failure.
    pub(super) fn next(&self, timeout: Duration) -> Result<Said, EngineError> {
        self.hear(timeout)?.ok_or_else(|| self.broken("it says nothing".to_owned()))
    }

    /// Waits until it says what `wanted` takes.
    pub(super) fn expect<T>(
        &self,
        timeout: Duration,
        wanted: impl Fn(Said) -> Option<T>,
    ) -> Result<T, EngineError> {
        let said = self.next(timeout)?;
        let words = format!("it said {said:?}");
        wanted(said).ok_or_else(|| self.broken(words))
    }

    fn broken(&self, what: String) -> EngineError {
        let words = self.process.last_words();
        let what = if words.is_empty() { what } else { format!("{what}: {words}") };
        EngineError::Broken { engine: self.engine.clone(), side: self.side, what }
    }
}

/// Reads what a worker says, until it ends.
fn listen<Said: DeserializeOwned + Send + 'static>(stdout: ChildStdout) -> Receiver<Said> {
    let (sender, said) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let Ok(words) = serde_json::from_str(&line) else { continue };
            if sender.send(words).is_err() {
                return;
            }
        }
    });
    said
}
