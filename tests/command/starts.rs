//! What `ferry receive` finds out when it starts rather than when a VM comes, and what it says to do.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};

use ferry_tests::process::Host;
use ferry_tests::tier::is_root;

use crate::{FERRY, turn};

/// The user and group that own nothing.
const NOBODY: Option<u32> = Some(65534);

fn receive(listen: &str) -> [&str; 5] {
    ["receive", "--name", "web", "--listen", listen]
}

#[test]
fn an_address_that_can_not_be_listened_on_is_named_with_a_way_out() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let words = [&format!("127.0.0.1:{port}"), "in use", &format!("ss -ltnp sport = :{port}"), "--listen"];
    host.refuses(&receive(&format!("127.0.0.1:{port}")), &words);
    host.refuses(&receive("127.0.0.1:700"), &["127.0.0.1:700", "capabilit", "from 1024 on"]);
    // An address of nobody (RFC 5737).
    let nowhere = [&receive("192.0.2.1:4444")[..], &["--insecure"]].concat();
    host.refuses(&nowhere, &["192.0.2.1:4444", "ip address"]);
}

#[test]
fn folders_of_another_user_are_named_with_their_owner() {
    let Some(_turn) = turn() else { return };
    if !is_root("command (folders of another user)") {
        return;
    }
    let host = Host::new(FERRY);
    let other = tempfile::tempdir().unwrap();
    let of_nobody = |name: &str, mode: u32| {
        let path = other.path().join(name);
        fs::create_dir(&path).unwrap();
        chown(&path, NOBODY, NOBODY).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    };
    for (name, mode) in [("hidden", 0o700), ("shown", 0o755)] {
        let folder = of_nobody(name, mode);
        let mut command = host.command(&[&receive("127.0.0.1:0")[..], &["--json"]].concat());
        command.env("FERRY_STATE_DIR", &folder);
        let chown = format!("chown -R 0 {folder}");
        host.start(command).end().refusal(&[&folder, "capabilities", "belongs to user 65534", &chown]);
    }
    let tls = of_nobody("tls", 0o700);
    let with_tls = [&receive("127.0.0.1:0")[..], &["--tls-dir", &tls]].concat();
    host.refuses(&with_tls, &["ca.pem", "capabilities", "belongs to user 65534", &tls]);
}

#[test]
fn a_witness_that_does_not_answer_is_found_out_at_once() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let witness = ["--witness", "file:/nonexistent/witness"];
    let words = ["/nonexistent/witness", "does not answer", "mounted"];
    host.refuses(&[&receive("127.0.0.1:0")[..], &witness].concat(), &words);
    assert!(!host.file("web.sock").exists());
    // A guest can run without it, and its operator knows.
    let run = ["run", "--name", "web", "--guest", "idle", "--memory", "64M", "--serial", "null"];
    let running = host.hosts(&[&run[..], &witness].concat());
    host.ferry(&["stop", "web"]).well();
    let said = running.end();
    assert!(said.stderr.contains("/nonexistent/witness does not answer"), "{said:?}");
}
