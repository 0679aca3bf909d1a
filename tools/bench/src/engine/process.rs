//! VMM processes: started in a host's namespace, ended with their owner, with their last words at hand.
//!
//! A process is started through this program's own [`bench-worker exec`](crate::worker), which asks the kernel
//! to kill it when its parent dies and then becomes the program. So nothing is left behind, not even if the
//! harness is killed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use ferry_lab::Namespace;

use super::EngineError;
use crate::worker;

/// How much of its output is quoted when a process fails, bytes.
const LAST_WORDS_BYTES: usize = 2000;

/// A process of a VMM. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` inside `namespace`; what it says on both outputs goes to the file `log`.
    ///
    /// # Errors
    /// [`EngineError::Spawn`].
    pub fn start(
        namespace: &Namespace,
        program: &Path,
        arguments: &[OsString],
        log: &Path,
    ) -> Result<Self, EngineError> {
        let failed = |source| EngineError::Spawn { program: program.to_owned(), source };
        let mut command = through_worker(program, arguments).map_err(failed)?;
        let output = File::create(log).map_err(failed)?;
        command.stdin(Stdio::null()).stdout(output.try_clone().map_err(failed)?).stderr(output);
        let child = namespace.spawn(command).map_err(failed)?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// The same with pipes to its standard input and from its standard output; only errors go to `log`.
    ///
    /// # Errors
    /// [`EngineError::Spawn`].
    pub fn start_piped(
        namespace: &Namespace,
        program: &Path,
        arguments: &[OsString],
        log: &Path,
    ) -> Result<(Self, ChildStdin, ChildStdout), EngineError> {
        let failed = |source| EngineError::Spawn { program: program.to_owned(), source };
        let mut command = through_worker(program, arguments).map_err(failed)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(log).map_err(failed)?);
        let mut child = namespace.spawn(command).map_err(failed)?;
        let pipe_missing = || failed(io::Error::other("a pipe is missing"));
        let stdin = child.stdin.take().ok_or_else(pipe_missing)?;
        let stdout = child.stdout.take().ok_or_else(pipe_missing)?;
        Ok((Self { child, log: log.to_owned() }, stdin, stdout))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// The end of what it said.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(LAST_WORDS_BYTES)..];
        String::from_utf8_lossy(tail).trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A child that was not waited for keeps its process id, so no other process can be hit.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn through_worker(program: &Path, arguments: &[OsString]) -> io::Result<Command> {
    let mut command = Command::new(worker::program()?);
    command.arg(worker::WORD).arg("exec").arg(program).args(arguments);
    Ok(command)
}
