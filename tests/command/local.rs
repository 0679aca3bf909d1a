//! A VM's process is replaced on one host: `ferry receive --listen unix:..` takes its memory over.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use ferry_tests::process::{Host, Process};

use crate::{FERRY, turn};

const WORKLOAD: &str = "dirty rate=50 set=16";

/// Fits any machine that these tests may share: they are not about downtime.
const BUDGET: &str = "2s";

/// `ferry run` under the name `web` with memory that can be handed over.
fn runs_shared(host: &Host<'_>) -> Process {
    let memory = ["--memory", "size=64M,shared=on", "--serial", "null"];
    let process = host.hosts(&[&["run", "--name", "web", "--guest", WORKLOAD][..], &memory].concat());
    host.until_ready("web");
    process
}

fn address(host: &Host<'_>) -> String {
    format!("unix:{}", host.file("web.handover").display())
}

fn receives(host: &Host<'_>) -> (Process, String) {
    let address = address(host);
    let process = host.hosts(&["receive", "--name", "web", "--listen", &address]);
    assert_eq!(process.first["address"], address.as_str());
    (process, address)
}

#[test]
fn a_vm_goes_from_process_to_process_and_back() {
    let Some(_turn) = turn() else { return };
    // Two state folders, as one name can't be taken twice in one.
    let (old, new) = (Host::new(FERRY), Host::new(FERRY));
    let first = runs_shared(&old);
    let (second, address) = receives(&new);
    let socket = new.file("web.handover");
    assert_eq!(fs::symlink_metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(new.vm("web")["listen"], address.as_str());
    let beats = old.heartbeats("web");

    let said = old.ferry(&["migrate", "web", "--to", &address, "--downtime", BUDGET, "--json"]);
    let events = said.json_lines();
    let report = events.last().expect("events");
    assert_eq!((&report["event"], &report["kind"]), (&"moved".into(), &"local".into()), "{report}");
    assert_eq!((&report["digest"], &report["wire_bytes"]), (&serde_json::Value::Null, &0.into()), "{report}");
    assert_eq!(report["rounds"].as_array().map(Vec::len), Some(0), "{report}");
    new.until_state("web", "running");
    assert!(new.heartbeats("web") >= beats, "the guest's counters go on");
    new.goes_on("web");
    assert_eq!(first.end().code, Some(0));
    assert!(!socket.exists(), "the socket went with the listener");

    let (_third, address) = receives(&old);
    let text = new.ferry(&["migrate", "web", "--to", &address, "--downtime", BUDGET]).well();
    assert!(
        text.contains("handing 64.00 MiB of memory over") && text.contains("no page was copied"),
        "{text}"
    );
    assert!(!text.contains("round"), "{text}");
    old.until_state("web", "running");
    old.goes_on("web");
    assert_eq!(second.end().code, Some(0));
}

#[test]
fn what_can_not_be_handed_over_says_why_and_goes_on() {
    let Some(_turn) = turn() else { return };
    let (old, new) = (Host::new(FERRY), Host::new(FERRY));
    let private = old.runs(WORKLOAD);
    let (_target, address) = receives(&new);
    let words = ["private", "shared=on", "goes on here"];
    old.refuses(&["migrate", "web", "--to", &address], &words);
    old.goes_on("web");
    new.until_state("web", "waiting");
    for bad in ["unix:relative", "unix:"] {
        old.refuses(&["migrate", "web", "--to", bad], &["absolute"]);
    }
    private.kill();
    let nobody = format!("unix:{}", old.file("nobody").display());
    let shared = Host::new(FERRY);
    let _shared = runs_shared(&shared);
    shared.refuses(&["migrate", "web", "--to", &nobody], &[&nobody, "ferry receive", "goes on here"]);
    shared.goes_on("web");
}

#[test]
fn a_socket_is_replaced_only_if_nobody_listens_on_it() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let socket = host.file("web.handover");
    let address = address(&host);
    let receive = ["receive", "--name", "other", "--listen", &address];

    drop(UnixListener::bind(&socket).unwrap());
    let (process, _) = receives(&host);
    host.refuses(&receive, &[&address, "another process listens"]);
    host.until_state("web", "waiting");
    // A process that is killed leaves its socket, which the next one replaces.
    process.kill();
    assert!(socket.exists());
    let (process, _) = receives(&host);
    host.ferry(&["stop", "web"]).well();
    assert_eq!(process.end().code, Some(0));
    assert!(!socket.exists());
    fs::write(&socket, "precious").unwrap();
    host.refuses(&receive, &[&address, "no socket"]);
    assert_eq!(fs::read(&socket).unwrap(), b"precious");
}
