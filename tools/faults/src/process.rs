//! Processes of ferry's: started in a host's namespace, watched, signalled, ended. They end by themselves when this one does,
//! because their standard input closes.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_lab::{LabClock, Namespace};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often anything is looked at that is waited for.
pub const STEP: Duration = Duration::from_millis(2);

/// How long anything may take on a machine that has a lot to do.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// Asks `question` until it has an answer, for at most `patience`.
///
/// # Errors
/// If it has none by then, with `what` was waited for; or if asking fails.
pub fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut question: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let clock = LabClock::start();
    loop {
        if let Some(answer) = question().with_context(|| format!("waiting for {what}"))? {
            return Ok(answer);
        }
        if clock.now() > patience {
            bail!("waited {} s for {what}", patience.as_secs_f64());
        }
        thread::sleep(STEP);
    }
}

/// A process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    /// What it is, for messages.
    pub what: String,
    child: Child,
    ended: Option<ExitStatus>,
    _stdin: Option<ChildStdin>,
    readers: Vec<JoinHandle<()>>,
    lines: Arc<Mutex<Vec<String>>>,
    errors: Arc<Mutex<String>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// Starts `command` in `namespace`.
    ///
    /// # Errors
    /// If that does not work.
    pub fn start(what: &str, namespace: &Namespace, mut command: Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = namespace.spawn(command).with_context(|| format!("{what} can't be started"))?;
        let stdout = child.stdout.take().context("a pipe is missing")?;
        let mut stderr = child.stderr.take().context("a pipe is missing")?;
        let (lines, errors) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<Mutex<String>>::default());
        let (all_lines, all_errors) = (Arc::clone(&lines), Arc::clone(&errors));
        let reads_lines = thread::spawn(move || {
            let keep = |line| locked(&all_lines).push(line);
            BufReader::new(stdout).lines().map_while(Result::ok).for_each(keep);
        });
        let reads_errors = thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut bytes) {
                let text: &mut String = &mut locked(&all_errors);
                text.push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        let readers = vec![reads_lines, reads_errors];
        let stdin = child.stdin.take();
        Ok(Self { what: what.to_owned(), child, ended: None, _stdin: stdin, readers, lines, errors })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
            if self.ended.is_some() {
                // Its pipes have closed with it; what it said last is to be there.
                self.readers.drain(..).for_each(|reader| drop(reader.join()));
            }
        }
        Ok(self.ended)
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// If it does not.
    pub fn end(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("the end of {}", self.what);
        wait_for(&what, patience, || self.ended()).with_context(|| self.last_words())
    }

    /// Sends it a signal. One that has ended gets none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        if self.ended()?.is_none() {
            // A child that is not waited for keeps its process id, so no other process can be hit.
            kill(Pid::from_raw(i32::try_from(self.id())?), signal)?;
        }
        Ok(())
    }

    /// Kills it and waits for its end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.end(PATIENCE).map(drop)
    }

    /// Whether it stands still by a signal.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        // The state follows the name, which is in parentheses and may hold anything.
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// Its output so far, line by line.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        locked(&self.lines).clone()
    }

    /// Its output so far as JSON, as far as it is that.
    #[must_use]
    pub fn events(&self) -> Vec<serde_json::Value> {
        self.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for an event of this kind.
    ///
    /// # Errors
    /// If it ends before, or says nothing of the kind.
    pub fn until(&mut self, event: &str) -> anyhow::Result<serde_json::Value> {
        let what = format!("'{event}' from {}", self.what);
        let seen = wait_for(&what, PATIENCE, || {
            // Looked at first: its last words may come together with its end.
            let ended = self.ended()?.is_some();
            let found = self.events().into_iter().find(|found| found["event"] == event);
            if found.is_none() && ended { bail!("{} has ended", self.what) } else { Ok(found) }
        });
        seen.with_context(|| self.last_words())
    }

    /// The end of what it said on both outputs.
    #[must_use]
    pub fn last_words(&self) -> String {
        let lines = self.lines();
        let last = &lines[lines.len().saturating_sub(4)..];
        let shorten = |line: &String| line.chars().take(200).collect::<String>();
        let last: Vec<String> = last.iter().map(shorten).collect();
        format!("{} said: {} | {}", self.what, last.join(" / "), locked(&self.errors).trim())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
