//! Runs the command `ferry` as its users do: processes with a state folder of their own, asked over their control
//! sockets. Which program that is, the caller says: only `ferry`'s own test targets know where cargo put it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_lab::Namespace;
use serde_json::Value;

/// How long anything may take before a test gives it up.
pub const PATIENCE: Duration = Duration::from_secs(60);

const STEP: Duration = Duration::from_millis(10);

/// Asks `question` every 10 ms until it has an answer; a test that waits longer than [`PATIENCE`] for `what` fails.
pub fn wait_until<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let mut waited = Duration::ZERO;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(waited < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(STEP);
        waited += STEP;
    }
}

/// What a process that has ended said.
#[derive(Debug)]
pub struct Said {
    /// Its exit code, or `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Said {
    /// The output of a command that did what was asked for.
    pub fn well(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Every line of output as JSON, of a command that did what was asked for.
    pub fn json_lines(self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.well().lines().map(parse).collect()
    }

    /// The whole output as one JSON value, of a command that did what was asked for.
    pub fn json(self) -> Value {
        let text = self.well();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The error of a command with `--json` that failed: the same sentence for scripts and for people, with
    /// every one of `words` in it.
    pub fn refusal(self, words: &[&str]) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        let last = self.stdout.lines().last().unwrap_or_default();
        let object: Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        let error = object["error"].as_str().unwrap_or_else(|| panic!("no error in {self:?}")).to_owned();
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert!(lines.contains(&format!("ferry: {error}").as_str()), "{self:?}");
        for word in words {
            assert!(error.contains(word), "'{word}' is missing in: {error}");
        }
        error
    }
}

/// A host as far as ferry is concerned: a state folder, perhaps in a network namespace.
#[derive(Debug)]
pub struct Host<'a> {
    program: PathBuf,
    folder: tempfile::TempDir,
    namespace: Option<&'a Namespace>,
}

impl<'a> Host<'a> {
    /// A host on which `program` is installed.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self { program: program.into(), folder, namespace: None }
    }

    /// A host inside `namespace`.
    pub fn inside(program: impl Into<PathBuf>, namespace: &'a Namespace) -> Self {
        Self { namespace: Some(namespace), ..Self::new(program) }
    }

    /// The state folder.
    pub fn state(&self) -> &Path {
        self.folder.path()
    }

    /// A file of the state folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.state().join(name)
    }

    /// Whether no VM has left a record under `name` on this host.
    pub fn has_no_record_of(&self, name: &str) -> bool {
        let entries = std::fs::read_dir(self.state()).expect("the state folder");
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        !names.into_iter().any(|file| file.starts_with(&format!("{name}.")) && file.ends_with(".record"))
    }

    /// `ferry` with these arguments on this host, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("FERRY_STATE_DIR", self.state())
            .env("FERRY_TLS_DIR", "")
            .env_remove("FERRY_LOG");
        command
    }

    /// Runs `ferry` with these arguments to its end.
    pub fn ferry(&self, arguments: &[&str]) -> Said {
        self.start(self.command(arguments)).end()
    }

    /// Runs `ferry` with these arguments and `--json`; it must refuse with these words.
    pub fn refuses(&self, arguments: &[&str], words: &[&str]) -> String {
        self.ferry(&[arguments, &["--json"]].concat()).refusal(words)
    }

    /// Starts `command` on this host.
    pub fn start(&self, mut command: Command) -> Process {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = match self.namespace {
            Some(namespace) => namespace.spawn(command),
            None => command.spawn(),
        };
        Process::follow(child.expect("a process"))
    }

    /// Starts a process that hosts a VM, which ends with the test however that ends, and waits for its first event.
    pub fn hosts(&self, arguments: &[&str]) -> Process {
        let mut process = self.start(self.command(&[arguments, &["--json", "--exit-with-stdin"]].concat()));
        process.first = process.next_event().unwrap_or_else(|| panic!("{arguments:?} ended at once"));
        assert!(process.first.get("error").is_none(), "{arguments:?}: {}", process.first);
        process
    }

    /// `ferry run` with the workload guest in 64 MiB under the name `web`; returns once the guest does its job.
    pub fn runs(&self, workload: &str) -> Process {
        let process =
            self.hosts(&["run", "--name", "web", "--guest", workload, "--memory", "64M", "--serial", "null"]);
        self.until_ready("web");
        process
    }

    /// `ferry receive` under the name `web`, and where it listens.
    pub fn receives(&self) -> (Process, String) {
        let process = self.hosts(&["receive", "--name", "web", "--listen", "127.0.0.1:0"]);
        let address = process.first["address"].as_str().expect("an address").to_owned();
        (process, address)
    }

    /// Asks the control API of `name` for `path`.
    ///
    /// # Errors
    /// What it answered instead, or that nobody did.
    pub fn get(&self, name: &str, path: &str) -> Result<Value, String> {
        let mut stream =
            UnixStream::connect(self.file(&format!("{name}.sock"))).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: ferry\r\nconnection: close\r\n\r\n")
            .map_err(|error| error.to_string())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no HTTP")?;
        if !head.starts_with("HTTP/1.1 200 ") {
            return Err(answer);
        }
        serde_json::from_str(body).map_err(|error| format!("{error}: {body}"))
    }

    /// `GET /api/v1/vm`.
    pub fn vm(&self, name: &str) -> Value {
        self.get(name, "/api/v1/vm").expect("the host process answers")
    }

    /// Waits until the VM `name` is in `state`.
    pub fn until_state(&self, name: &str, state: &str) -> Value {
        wait_until(&format!("'{name}' to be {state}"), || {
            self.get(name, "/api/v1/vm").ok().filter(|info| info["state"] == state)
        })
    }

    /// Waits until the guest of `name` does its job.
    pub fn until_ready(&self, name: &str) -> Value {
        wait_until("the guest to be ready", || {
            let report = self.get(name, "/api/v1/guest").ok()?;
            assert_eq!(report["fault"], Value::Null, "{report}");
            (report["ready"] == true).then_some(report)
        })
    }

    /// How many heartbeats the guest of `name` has had; it must be well.
    pub fn heartbeats(&self, name: &str) -> u64 {
        let report = self.get(name, "/api/v1/guest").expect("the guest's report");
        assert_eq!(report["errors"], 0, "the guest found its memory changed: {report}");
        assert_eq!(report["fault"], Value::Null, "{report}");
        report["heartbeats"].as_u64().expect("a number")
    }

    /// Waits until the guest of `name` has had a few heartbeats more.
    pub fn goes_on(&self, name: &str) {
        let before = self.heartbeats(name);
        wait_until("heartbeats", || (self.heartbeats(name) > before + 5).then_some(()));
    }
}

/// A process that was started. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Its standard input, open until taken.
    pub stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    errors: Option<JoinHandle<String>>,
    /// The first event, of a process that hosts a VM.
    pub first: Value,
}

/// What a host process says when a seccomp filter has refused something to it, which is right in no test.
const REFUSED: &str = "tried the system call";

impl Process {
    fn follow(mut child: Child) -> Self {
        let (stdout, mut stderr) =
            (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let stdin = child.stdin.take();
        Self { child, stdin, lines, errors: Some(errors), first: Value::Null }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line of its output as JSON; `None` at its end.
    pub fn next_event(&self) -> Option<Value> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("it said nothing for {PATIENCE:?}"),
        }
    }

    /// Waits for an event of this kind.
    pub fn until(&self, event: &str) -> Value {
        loop {
            match self.next_event() {
                Some(found) if found["event"] == event => return found,
                Some(_) => {}
                None => panic!("it ended before it said '{event}'"),
            }
        }
    }

    /// Sends it a signal by its number or name, as in `kill -INT`.
    pub fn signal(&self, signal: &str) {
        // A child that is not waited for yet keeps its process id, so no other process can be hit.
        let status =
            Command::new("kill").args(["-s", signal, &self.id().to_string()]).status().expect("kill");
        assert!(status.success(), "no process {}", self.id());
    }

    /// Kills it at once, as a crash would.
    pub fn kill(mut self) {
        self.child.kill().expect("a process of ours");
        self.child.wait().expect("a process of ours");
    }

    /// Whether it is still there.
    pub fn lives(&mut self) -> bool {
        self.child.try_wait().expect("a process of ours").is_none()
    }

    /// Waits until it ends, and returns what it said since it was last asked.
    ///
    /// # Panics
    /// If it does not end, with what it said.
    pub fn end(mut self) -> Said {
        let mut waited = Duration::ZERO;
        while self.lives() && waited < PATIENCE {
            std::thread::sleep(STEP);
            waited += STEP;
        }
        let in_time = !self.lives();
        // Its pipes close with it.
        let _ = self.child.kill();
        let status = self.child.wait().expect("a process of ours");
        let stderr = self.errors.take().and_then(|errors| errors.join().ok()).unwrap_or_default();
        let stdout = self.lines.iter().fold(String::new(), |text, line| text + &line + "\n");
        let said = Said { code: status.code(), stdout, stderr };
        assert!(in_time, "it did not end within {PATIENCE:?}: {said:?}");
        assert!(!said.stderr.contains(REFUSED), "its seccomp filters miss something: {}", said.stderr);
        said
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.errors.take().and_then(|errors| errors.join().ok()).unwrap_or_default();
        let complete = std::thread::panicking() || !said.contains(REFUSED);
        assert!(complete, "its seccomp filters miss something: {said}");
    }
}
