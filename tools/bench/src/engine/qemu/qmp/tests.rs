//! The client against a socket that follows a script.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

use super::*;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}}, "capabilities": []}}"#;

/// Patience of clients that are to be answered.
const LONG: Duration = Duration::from_secs(20);
/// Patience of clients that are not.
const SHORT: Duration = Duration::from_millis(50);

/// What the other side does next.
enum Step {
    /// Sends this line.
    Say(&'static str),
    /// Reads a command and sends this line, with `ID` standing for the command's id.
    Answer(&'static str),
    /// Reads a command.
    Hear,
    /// Sends so many bytes without the end of a line.
    Flood(usize),
}

use Step::{Answer, Flood, Hear, Say};

/// Plays a script to whoever connects; returns the commands it heard. It closes when it has ended.
fn play(script: Vec<Step>) -> (tempfile::TempDir, PathBuf, JoinHandle<Vec<Value>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let player = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut heard: Vec<Value> = Vec::new();
        let mut hear =
            || lines.next().and_then(Result::ok).map(|line| serde_json::from_str::<Value>(&line).unwrap());
        for step in script {
            let said = match step {
                Say(line) => format!("{line}\r\n"),
                Flood(bytes) => "x".repeat(bytes),
                Answer(line) => {
                    let Some(command) = hear() else { break };
                    let line = line.replace("ID", &command["id"].to_string());
                    heard.push(command);
                    format!("{line}\r\n")
                }
                Hear => {
                    heard.extend(hear());
                    String::new()
                }
            };
            // A client that has had enough closes.
            if stream.write_all(said.as_bytes()).is_err() {
                break;
            }
        }
        heard
    });
    (folder, path, player)
}

/// A connection that has been greeted, and the script goes on with `script`.
fn ready(mut script: Vec<Step>, timeout: Duration) -> (Qmp, tempfile::TempDir, JoinHandle<Vec<Value>>) {
    let mut all = vec![Say(GREETING), Answer(r#"{"return": {}, "id": ID}"#)];
    all.append(&mut script);
    let (folder, path, player) = play(all);
    let mut qmp = Qmp::connect(&path, LONG).unwrap();
    qmp.timeout = timeout;
    (qmp, folder, player)
}

#[test]
fn commands_are_answered_and_events_between_are_set_aside() {
    let (mut qmp, _folder, player) = ready(
        vec![
            Hear,
            Say(r#"{"timestamp": {"seconds": 12, "microseconds": 345678}, "event": "STOP"}"#),
            Say(
                r#"{"event": "MIGRATION_PASS", "data": {"pass": 2}, "timestamp": {"seconds": -1, "microseconds": -1}}"#,
            ),
            Say(""),
            Say(r#"{"return": {"status": "running"}, "id": 2}"#),
            Answer(r#"{"return": 7, "id": ID}"#),
        ],
        LONG,
    );
    assert_eq!(qmp.execute("query-status", json!({})).unwrap()["status"], "running");
    assert_eq!(qmp.execute("other", json!({ "a": [1] })).unwrap(), 7);
    let stop = qmp.wait_event(LONG).unwrap().unwrap();
    assert_eq!((stop.name.as_str(), &stop.data), ("STOP", &Value::Null));
    assert_eq!(stop.at, SystemTime::UNIX_EPOCH.checked_add(Duration::from_micros(12_345_678)));
    let pass = qmp.wait_event(LONG).unwrap().unwrap();
    assert_eq!((pass.data["pass"].as_u64(), pass.at), (Some(2), None));
    let heard = player.join().unwrap();
    assert_eq!(heard[0], json!({ "execute": "qmp_capabilities", "arguments": {}, "id": 1 }));
    assert_eq!(heard[2], json!({ "execute": "other", "arguments": { "a": [1] }, "id": 3 }));
}

#[test]
fn a_refusal_has_qemus_words_and_the_connection_goes_on() {
    let (mut qmp, _folder, _player) = ready(
        vec![
            Answer(r#"{"id": ID, "error": {"class": "GenericError", "desc": "no such thing"}}"#),
            Answer(r#"{"error": {"class": "GenericError", "desc": "Invalid JSON syntax"}}"#),
            Answer(r#"{"return": {}, "id": ID}"#),
        ],
        LONG,
    );
    let error = qmp.execute("migrate", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "QEMU refuses migrate: no such thing (GenericError)");
    assert!(matches!(qmp.execute("b", json!({})), Err(QmpError::Refused { description, .. })
        if description == "Invalid JSON syntax"));
    qmp.execute("c", json!({})).unwrap();
}

#[test]
fn an_answer_that_comes_too_late_is_not_taken_for_another() {
    let (mut qmp, _folder, _player) = ready(
        vec![
            Hear,
            Hear,
            Say(r#"{"return": "late", "id": 2}"#),
            Say(r#"{"return": "right", "id": 3}"#),
            Hear,
            Hear,
        ],
        SHORT,
    );
    let error = qmp.execute("slow", json!({})).unwrap_err();
    assert!(matches!(&error, QmpError::Timeout { during, waited_ms: 50 } if during == "slow"), "{error}");
    qmp.timeout = LONG;
    assert_eq!(qmp.execute("quick", json!({})).unwrap(), "right");
    assert_eq!(qmp.wait_event(SHORT).unwrap(), None);
}

#[test]
fn an_end_is_told_from_silence() {
    let (mut qmp, _folder, player) = ready(vec![Hear], LONG);
    let error = qmp.execute("quit", json!({})).unwrap_err();
    assert!(matches!(&error, QmpError::Closed { during } if during == "quit"), "{error}");
    player.join().unwrap();
    assert!(matches!(qmp.wait_event(SHORT), Err(QmpError::Closed { .. })));
    assert!(matches!(Qmp::connect(Path::new("/nowhere/qmp"), SHORT), Err(QmpError::Connect { .. })));
}

#[test]
fn what_is_not_qmp_is_refused_with_a_quote() {
    let not_json =
        |error: &QmpError| matches!(error, QmpError::NotJson { line, .. } if line == "{\"return\":");
    let unexpected = |error: &QmpError| matches!(error, QmpError::Unexpected { line, .. } if line.len() > 1);
    let too_long = |error: &QmpError| matches!(error, QmpError::TooLong);
    type IsRight<'a> = &'a dyn Fn(&QmpError) -> bool;
    let cases: [(Step, IsRight<'_>); 6] = [
        (Answer("{\"return\": "), &not_json),
        (Answer("[1, 2]"), &unexpected),
        (Answer(r#"{"id": ID, "error": "none"}"#), &unexpected),
        (Answer(r#"{"return": {}, "id": 99}"#), &unexpected),
        (Answer(GREETING), &unexpected),
        (Flood(LINE_BYTES_MAX + 20_000), &too_long),
    ];
    for (step, is_right) in cases {
        let (mut qmp, _folder, _player) = ready(vec![step, Hear], LONG);
        let error = qmp.execute("query-status", json!({})).unwrap_err();
        assert!(is_right(&error), "{error:?}");
    }
}

#[test]
fn only_a_greeting_opens_a_connection() {
    let (_folder, path, _player) = play(vec![Say(r#"{"return": {}, "id": 1}"#), Hear]);
    assert!(matches!(Qmp::connect(&path, LONG), Err(QmpError::Unexpected { .. })));
    let (_folder, path, _player) = play(vec![Hear]);
    assert!(matches!(Qmp::connect(&path, SHORT), Err(QmpError::Timeout { .. })));
}

#[test]
fn events_that_nobody_asks_for_are_bounded() {
    let mut script: Vec<Step> = vec![Hear];
    script.extend((0..=EVENTS_MAX).map(|_| Say(r#"{"event": "E"}"#)));
    script.push(Hear);
    let (mut qmp, _folder, _player) = ready(script, LONG);
    assert!(matches!(qmp.execute("query-status", json!({})), Err(QmpError::TooManyEvents)));
}
