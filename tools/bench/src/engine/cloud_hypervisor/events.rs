//! What Cloud Hypervisor writes to the file of its event monitor: JSON objects, one behind the other.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ferry_lab::LabClock;
use serde_json::Value;

/// The most that is kept of an object that has not ended yet, in bytes.
const OBJECT_BYTES_MAX: usize = 1 << 20;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// Its name, such as `migration-finished`.
    pub(super) name: String,
    /// When, since the process began to count.
    pub(super) since_start: Duration,
}

/// A file of events that is being written.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: Option<File>,
    unread: Vec<u8>,
    seen: Vec<Event>,
    /// When the process began to count, at the latest, on the lab's clock.
    start: Option<Duration>,
}

impl EventFile {
    /// The file at `path`, which may not be there yet.
    pub(super) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), file: None, unread: Vec::new(), seen: Vec::new(), start: None }
    }

    /// Reads what has been written since.
    pub(super) fn read(&mut self, clock: LabClock) -> io::Result<()> {
        if self.file.is_none() {
            self.file = match File::open(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => Some(other?),
            };
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        file.read_to_end(&mut self.unread)?;
        let now = clock.now();
        for event in take(&mut self.unread)? {
            // The event that was read soonest after it happened ties the clocks together best.
            let start = now.saturating_sub(event.since_start);
            self.start = Some(self.start.map_or(start, |known| known.min(start)));
            self.seen.push(event);
        }
        Ok(())
    }

    /// Whether there was an event of that name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.seen.iter().any(|event| event.name == name)
    }

    /// When the events of that name happened, on the lab's clock.
    pub(super) fn times<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Duration> + 'a {
        let start = self.start.unwrap_or_default();
        self.seen.iter().filter(move |event| event.name == name).map(move |event| start + event.since_start)
    }
}

/// Takes the whole objects out of `bytes`.
fn take(bytes: &mut Vec<u8>) -> io::Result<Vec<Event>> {
    let mut objects = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    let mut events = Vec::new();
    let mut whole = 0;
    loop {
        match objects.next() {
            Some(Ok(object)) => {
                whole = objects.byte_offset();
                events.extend(event(&object));
            }
            Some(Err(error)) if !error.is_eof() => return Err(error.into()),
            Some(Err(_)) | None => break,
        }
    }
    bytes.drain(..whole);
    if bytes.len() > OBJECT_BYTES_MAX {
        return Err(io::Error::other("an event has no end"));
    }
    Ok(events)
}

fn event(object: &Value) -> Option<Event> {
    let part = |name: &str| object.pointer(name).and_then(Value::as_u64);
    let since_start = Duration::from_secs(part("/timestamp/secs")?)
        + Duration::from_nanos(part("/timestamp/nanos").filter(|nanos| *nanos < 1_000_000_000)?);
    Some(Event { name: object.get("event")?.as_str()?.to_owned(), since_start })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn text(secs: u64, name: &str) -> String {
        format!(
            "{{\n  \"timestamp\": {{\n    \"secs\": {secs},\n    \"nanos\": 500000000\n  }},\n  \"source\": \"vm\",\n  \
             \"event\": \"{name}\",\n  \"properties\": null\n}}\n\n"
        )
    }

    #[test]
    fn a_growing_file_is_read_object_by_object() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        let clock = LabClock::start();
        let mut events = EventFile::at(&path);
        events.read(clock).unwrap();
        let mut file = File::create(&path).unwrap();
        let (one, two) = (text(1, "booted"), text(3, "migration-started"));
        write!(file, "{one}{}", &two[..40]).unwrap();
        events.read(clock).unwrap();
        assert!(events.has("booted") && !events.has("migration-started"));
        write!(file, "{}{}", &two[40..], text(4, "booted")).unwrap();
        events.read(clock).unwrap();
        assert!(events.has("migration-started"));
        let booted: Vec<_> = events.times("booted").collect();
        assert_eq!(booted[1] - booted[0], Duration::from_secs(3));
        assert!(events.unread.len() < 3, "{:?}", events.unread);
    }

    #[test]
    fn what_is_no_event_is_an_error_or_passed_over() {
        assert!(take(&mut b"{\"event\": ]".to_vec()).is_err());
        assert!(take(&mut vec![b'['; OBJECT_BYTES_MAX + 1]).is_err());
        assert_eq!(take(&mut b"{\"event\": \"x\"} 7".to_vec()).unwrap(), []);
    }
}
