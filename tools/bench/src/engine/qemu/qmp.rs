//! A small blocking client of QMP, QEMU's control protocol: JSON objects, one a line.
//!
//! ```text
//!   QEMU                             client
//!    ── greeting ────────────────────>  connect
//!    <──────────── qmp_capabilities ──
//!    ── return ──────────────────────>
//!    <──────────── command, id ───────  execute
//!    ── event, event ────────────────>  set aside
//!    ── return or error, id ─────────>
//! ```
//!
//! One command is under way at a time. Lines, waits and the number of events set aside are bounded. Left out: file
//! descriptors, and commands that overtake others (`exec-oob`). Source: `docs/interop/qmp-spec` of QEMU.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ferry_lab::LabClock;
use serde_json::{Map, Value, json};

#[cfg(test)]
mod tests;

/// The longest line that is taken, in bytes; those of `query-migrate` have a few thousand.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// The most events that are set aside until somebody asks for them.
pub const EVENTS_MAX: usize = 4096;

/// How much of a line that can't be understood is quoted, in characters.
const QUOTE_CHARS: usize = 200;

/// The shortest time that a socket can be told to wait.
const WAIT_MIN: Duration = Duration::from_micros(1);

/// Why QMP did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody answers at the socket.
    #[error("can't connect to QMP at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket broke.
    #[error("QMP broke during {during}")]
    Io {
        /// What was being done.
        during: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QEMU closed the connection, as it does when it ends.
    #[error("QEMU closed QMP during {during}")]
    Closed {
        /// What was being done.
        during: String,
    },
    /// No answer came.
    #[error("QMP did not answer {during} within {waited_ms} ms")]
    Timeout {
        /// What was being done.
        during: String,
        /// How long it was waited for, in ms.
        waited_ms: u128,
    },
    /// A line has no end.
    #[error("a line of QMP is longer than {LINE_BYTES_MAX} bytes; is this QMP?")]
    TooLong,
    /// A line is no JSON.
    #[error("a line of QMP is no JSON: {line}")]
    NotJson {
        /// How the line begins.
        line: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A line is JSON, but nothing that QMP has at this point.
    #[error("QMP said during {during}: {line}")]
    Unexpected {
        /// What was being done.
        during: String,
        /// How the line begins.
        line: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refuses {command}: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// Events came and nobody asked for them.
    #[error("QEMU reports more than {EVENTS_MAX} events at once")]
    TooManyEvents,
}

/// Something that happened in QEMU by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// What belongs to it; `null` if nothing does.
    pub data: Value,
    /// When it happened, by QEMU's wall clock.
    pub at: Option<SystemTime>,
}

/// A connection to QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Bytes that came, without the end of their line yet.
    received: Vec<u8>,
    events: VecDeque<Event>,
    last_id: u64,
    timeout: Duration,
}

/// What QEMU answers to a command.
type Answer = Result<Value, (String, String)>;

enum Message {
    Greeting,
    Event(Event),
    Answer(Option<u64>, Answer),
}

impl Qmp {
    /// Connects to the socket at `path` and gets ready for commands. Every command may then take `timeout`.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        let (received, events) = (Vec::new(), VecDeque::new());
        let mut qmp = Self { stream, received, events, last_id: 0, timeout };
        qmp.greet()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn greet(&mut self) -> Result<(), QmpError> {
        let during = "the greeting";
        match self.message(during, self.timeout)? {
            Some((Message::Greeting, _)) => Ok(()),
            Some((Message::Event(_) | Message::Answer(..), line)) => Err(unexpected(during, &line)),
            None => Err(self.too_late(during)),
        }
    }

    /// Executes `command` and returns what it returns. Events that come meanwhile are set aside.
    ///
    /// # Errors
    /// [`QmpError`]; the connection stays usable after [`QmpError::Refused`] and [`QmpError::Timeout`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.last_id += 1;
        let id = self.last_id;
        let mut line =
            json!({ "execute": command, "arguments": arguments, "id": id }).to_string().into_bytes();
        line.push(b'\n');
        self.stream
            .write_all(&line)
            .map_err(|source| QmpError::Io { during: format!("sending {command}"), source })?;
        let clock = LabClock::start();
        loop {
            let left = self.timeout.saturating_sub(clock.now());
            match self.message(command, left)? {
                None => return Err(self.too_late(command)),
                Some((Message::Event(event), _)) => self.set_aside(event)?,
                // It belongs to a command that was given up.
                Some((Message::Answer(Some(other), _), _)) if other < id => {}
                // What QEMU could not read as a command, it answers without an id.
                Some((Message::Answer(answered, answer), _)) if answered.unwrap_or(id) == id => {
                    return answer.map_err(|(class, description)| QmpError::Refused {
                        command: command.to_owned(),
                        class,
                        description,
                    });
                }
                Some((Message::Answer(..) | Message::Greeting, line)) => {
                    return Err(unexpected(command, &line));
                }
            }
        }
    }

    /// The next event, if one has come or comes within `timeout`.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn wait_event(&mut self, timeout: Duration) -> Result<Option<Event>, QmpError> {
        let clock = LabClock::start();
        let during = "waiting for events";
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.message(during, timeout.saturating_sub(clock.now()))? {
                None => return Ok(None),
                Some((Message::Event(event), _)) => self.set_aside(event)?,
                // It belongs to a command that was given up.
                Some((Message::Answer(Some(id), _), _)) if id <= self.last_id => {}
                Some((Message::Answer(..) | Message::Greeting, line)) => {
                    return Err(unexpected(during, &line));
                }
            }
        }
    }

    fn set_aside(&mut self, event: Event) -> Result<(), QmpError> {
        if self.events.len() >= EVENTS_MAX {
            return Err(QmpError::TooManyEvents);
        }
        self.events.push_back(event);
        Ok(())
    }

    fn too_late(&self, during: &str) -> QmpError {
        QmpError::Timeout { during: during.to_owned(), waited_ms: self.timeout.as_millis() }
    }

    /// The next message with its line; `None` if none comes within `timeout`.
    fn message(&mut self, during: &str, timeout: Duration) -> Result<Option<(Message, String)>, QmpError> {
        let clock = LabClock::start();
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if line.is_empty() {
                    continue;
                }
                let message = parse(&line, during)?;
                return Ok(Some((message, line)));
            }
            if self.received.len() > LINE_BYTES_MAX {
                return Err(QmpError::TooLong);
            }
            if !self.receive(during, timeout.saturating_sub(clock.now()))? {
                return Ok(None);
            }
        }
    }

    /// Takes what has come or comes within `timeout`; whether anything did.
    fn receive(&mut self, during: &str, timeout: Duration) -> Result<bool, QmpError> {
        let failed = |source| QmpError::Io { during: during.to_owned(), source };
        self.stream.set_read_timeout(Some(timeout.max(WAIT_MIN))).map_err(failed)?;
        let mut bytes = [0; 16 * 1024];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(QmpError::Closed { during: during.to_owned() }),
            Ok(count) => {
                self.received.extend_from_slice(&bytes[..count]);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Ok(false)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(QmpError::Closed { during: during.to_owned() })
            }
            Err(error) => Err(failed(error)),
        }
    }
}

fn parse(line: &str, during: &str) -> Result<Message, QmpError> {
    let value: Value =
        serde_json::from_str(line).map_err(|source| QmpError::NotJson { line: quote(line), source })?;
    let Value::Object(mut members) = value else { return Err(unexpected(during, line)) };
    if members.contains_key("QMP") {
        return Ok(Message::Greeting);
    }
    if let Some(Value::String(name)) = members.remove("event") {
        let at = members.get("timestamp").and_then(timestamp);
        let data = members.remove("data").unwrap_or_default();
        return Ok(Message::Event(Event { name, data, at }));
    }
    let id = members.get("id").and_then(Value::as_u64);
    if let Some(returned) = members.remove("return") {
        return Ok(Message::Answer(id, Ok(returned)));
    }
    match members.get("error").and_then(Value::as_object) {
        Some(error) => Ok(Message::Answer(id, Err((text(error, "class"), text(error, "desc"))))),
        None => Err(unexpected(during, line)),
    }
}

fn text(members: &Map<String, Value>, key: &str) -> String {
    members.get(key).and_then(Value::as_str).unwrap_or("not said").to_owned()
}

/// QEMU gives -1 s where it could not read its clock.
fn timestamp(value: &Value) -> Option<SystemTime> {
    let seconds = Duration::from_secs(value.get("seconds")?.as_u64()?);
    let rest = Duration::from_micros(value.get("microseconds")?.as_u64()?);
    SystemTime::UNIX_EPOCH.checked_add(seconds.checked_add(rest)?)
}

fn unexpected(during: &str, line: &str) -> QmpError {
    QmpError::Unexpected { during: during.to_owned(), line: quote(line) }
}

fn quote(line: &str) -> String {
    line.chars().take(QUOTE_CHARS).collect()
}
