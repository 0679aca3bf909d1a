//! Names, sockets and records: what a host keeps of its VMs, and what happens when that is taken, stale or damaged.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use ferry_migrate::FileRecords;
use ferry_migrate::ports::RecordStore;
use ferry_migrate::protocol::record::{Record, Standing};
use ferry_migrate::protocol::{Epoch, VmId};
use ferry_tests::process::{Host, Process};
use ferry_tests::tier::is_root;

use crate::{FERRY, turn};

const RUN: [&str; 9] = ["run", "--name", "web", "--guest", "idle", "--memory", "64M", "--serial", "null"];
const RECEIVE: [&str; 5] = ["receive", "--name", "web", "--listen", "127.0.0.1:0"];

/// The user and group that own nothing.
const NOBODY: u32 = 65534;

#[test]
fn a_name_is_taken_once_and_free_again_when_its_process_has_ended() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let process = host.runs("idle");
    for arguments in [&RUN[..], &RECEIVE[..]] {
        host.refuses(arguments, &["'web' is taken", "ferry stop web"]);
        host.goes_on("web");
    }
    host.ferry(&["stop", "web"]).well();
    assert_eq!(process.end().code, Some(0));
    assert!(!host.file("web.sock").exists());
    drop(host.hosts(&RECEIVE));
}

#[test]
fn what_a_killed_process_leaves_does_not_hold_the_name() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    host.runs("idle").kill();
    assert!(host.file("web.sock").exists(), "a killed process can't clean up");
    assert_eq!(host.ferry(&["list", "--json"]).json(), serde_json::json!([]));
    host.refuses(&["info", "web"], &["there is no VM 'web'", "ferry list"]);
    let _process = host.runs("idle");
    assert_eq!(host.vm("web")["state"], "running");
}

#[test]
fn a_host_process_ends_when_its_standard_input_closes_if_told_so() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let starts: [fn(&Host<'_>) -> Process; 2] = [|host| host.runs("idle"), |host| host.receives().0];
    for start in starts {
        let mut process = start(&host);
        assert!(process.lives());
        drop(process.stdin.take());
        assert_eq!(process.end().code, Some(3));
    }
    // Without the word it stays, as a service does.
    let mut process = host.start(host.command(&[&RUN[..], &["--json"]].concat()));
    drop(process.stdin.take());
    assert_eq!(process.next_event().expect("an event")["event"], "running");
    host.until_ready("web");
    host.goes_on("web");
    assert!(process.lives());
}

#[test]
fn a_signal_stops_a_host_process_in_order() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    for signal in ["TERM", "INT"] {
        let process = host.runs("idle");
        process.signal(signal);
        let said = process.end();
        assert_eq!(said.code, Some(0), "{said:?}");
        assert!(said.stdout.contains("stopped by a signal"), "{said:?}");
        assert!(!host.file("web.sock").exists());
        let (process, _) = host.receives();
        process.signal(signal);
        assert_eq!(process.end().code, Some(0));
    }
}

#[test]
fn a_state_folder_that_can_not_be_is_named() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    fs::write(host.file("a-file"), "").unwrap();
    let folder = host.file("a-file").join("state");
    for arguments in [&RUN[..], &RECEIVE[..]] {
        let mut command = host.command(&[arguments, &["--json"]].concat());
        command.env("FERRY_STATE_DIR", &folder);
        host.start(command).end().refusal(&["state folder", folder.to_str().unwrap(), "Not a directory"]);
    }
}

fn record(standing: Standing) -> Record {
    Record::of_own(VmId([9; 16]), "web".parse().unwrap(), Epoch::FIRST, standing)
}

#[test]
fn a_record_in_doubt_or_damaged_is_no_permission_to_run() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let path = host.file(&format!("web.{}.record", VmId([9; 16])));
    let records = FileRecords::new(host.state().to_owned(), "web".parse().unwrap());

    let target = "10.0.0.7:4444".to_owned();
    records.store(&record(Standing::Committed { target })).unwrap();
    host.refuses(&RUN, &["'web' is in doubt", "10.0.0.7:4444", "ferry resolve web --discard"]);

    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for (bytes, flaw) in [(&whole[..9], "torn"), (&flipped, "checksum"), (b"", "torn")] {
        fs::write(&path, bytes).unwrap();
        for arguments in [&RUN[..], &RECEIVE[..]] {
            host.refuses(
                arguments,
                &["in doubt", path.to_str().unwrap(), flaw, "ferry resolve web --discard"],
            );
        }
        assert_eq!(fs::read(&path).unwrap(), bytes, "the evidence is kept");
    }
    // A folder where the record should be can't be read at all.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    host.refuses(&RUN, &["in doubt", path.to_str().unwrap()]);
    fs::remove_dir(&path).unwrap();

    // Standings that settle the matter are in nobody's way.
    for standing in [Standing::Stopped, Standing::Released { target: "t".into() }, Standing::Discarded] {
        records.store(&record(standing)).unwrap();
        let _process = host.runs("idle");
    }
}

#[test]
fn without_permission_for_kvm_the_cause_is_named() {
    let Some(_turn) = turn() else { return };
    if !is_root("command (another user)") {
        return;
    }
    // A copy where anybody may run it, wherever this one was built.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = folder.path().join("ferry");
    fs::copy(FERRY, &program).unwrap();
    let host = Host::new(&program);
    let as_nobody = |arguments: &[&str]| {
        let mut command = host.command(arguments);
        command.env("FERRY_STATE_DIR", folder.path().join("state")).uid(NOBODY).gid(NOBODY);
        command
    };
    let run = as_nobody(&[&RUN[..], &["--json"]].concat());
    host.start(run).end().refusal(&["no permission to open /dev/kvm"]);
    let said = host.start(as_nobody(&["demo"])).end();
    assert!(said.code == Some(1) && said.stderr.contains("/dev/kvm"), "{said:?}");

    // Nor may another user reach a VM's socket.
    let root = Host::new(FERRY);
    let _process = root.runs("idle");
    let mut command = host.command(&["stop", "web", "--json"]);
    command.env("FERRY_STATE_DIR", root.state()).uid(NOBODY).gid(NOBODY);
    host.start(command).end().refusal(&["no permission", "web.sock"]);
    root.goes_on("web");

    let mut command = host.command(&["list", "--json"]);
    command.env_remove("FERRY_STATE_DIR").env_remove("XDG_RUNTIME_DIR").uid(NOBODY).gid(NOBODY);
    host.start(command).end().refusal(&["FERRY_STATE_DIR"]);
}

#[test]
fn without_kvm_the_cause_is_named() {
    let Some(_turn) = turn() else { return };
    if !is_root("command (a /dev without kvm)") {
        return;
    }
    let host = Host::new(FERRY);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$@\"", "sh", FERRY]);
    command.args(RUN).arg("--json").env("FERRY_STATE_DIR", host.state());
    host.start(command).end().refusal(&["there is no /dev/kvm", "kvm_intel"]);
    assert!(host.has_no_record_of("web"));
}
