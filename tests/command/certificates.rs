//! Certificates that come and go while processes that use them run on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use ferry_tests::process::Host;
use ferry_tests::tier::is_root;

use crate::tls::{Site, migrate, receives};
use crate::{FERRY, turn};

/// Brings the files of one folder into another, as a renewal does.
fn renew(from: &str, into: &str) {
    for file in ["ca.pem", "host.pem", "host.key"] {
        fs::copy(Path::new(from).join(file), Path::new(into).join(file)).unwrap();
    }
}

#[test]
fn a_waiting_target_and_a_running_vm_take_up_renewed_certificates() {
    let Some(_turn) = turn() else { return };
    let (old, new) = (Site::new(), Site::new());
    let (a, b) = (old.issue("host-a", &[]), old.issue("host-b", &[]));
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let run = ["run", "--name", "web", "--guest", "idle", "--memory", "64M", "--serial", "null"];
    let _running = source.hosts(&[&run[..], &["--tls-dir", &a]].concat());
    source.until_ready("web");
    let (waiting, address) = receives(&target, &["--tls-dir", &b]);
    let mut migrating = source.command(&[&migrate(&address, &[])[..], &["--json"]].concat());
    migrating.env_remove("FERRY_TLS_DIR");
    let refused = |words: &[&str]| {
        let mut command = source.command(&[&migrate(&address, &[])[..], &["--json"]].concat());
        command.env_remove("FERRY_TLS_DIR");
        source.start(command).end().refusal(words);
        source.goes_on("web");
    };
    renew(&new.issue("host-a", &[]), &a);
    refused(&["another authority"]);
    renew(&new.issue("host-b", &[]), &b);
    // What can't be used is not taken up.
    let key = Path::new(&b).join("host.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    refused(&["another authority"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    source.start(migrating).end().well();
    target.until_state("web", "running");
    target.goes_on("web");
    target.ferry(&["stop", "web"]).well();
    let said = waiting.end().stderr;
    assert!(said.contains("is kept") && said.contains("chmod 600"), "{said}");
}

#[test]
fn a_certificate_that_comes_after_the_vm_was_started_is_used() {
    let Some(_turn) = turn() else { return };
    if !is_root("command (an /etc of its own)") {
        return;
    }
    let site = Site::new();
    let (a, b) = (site.issue("host-a", &[]), site.issue("host-b", &[]));
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    // Its own /etc/ferry, which nobody else sees and which is changed from here.
    let etc = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").args(["-a", "/etc/.", etc.path().to_str().unwrap()]).status().unwrap();
    assert!(copied.success());
    let _ = fs::remove_dir_all(etc.path().join("ferry"));
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$0\" /etc && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, etc.path().to_str().unwrap(), FERRY]);
    command.args(["run", "--name", "web", "--guest", "idle", "--memory", "64M", "--serial", "null"]);
    command.args(["--json", "--exit-with-stdin"]).env("FERRY_STATE_DIR", source.state());
    command.env_remove("FERRY_TLS_DIR").env_remove("FERRY_LOG");
    let _running = source.start(command);
    source.until_state("web", "running");
    source.until_ready("web");
    let (_waiting, address) = receives(&target, &["--tls-dir", &b]);
    let migrating = || {
        let mut command = source.command(&[&migrate(&address, &[])[..], &["--json"]].concat());
        command.env_remove("FERRY_TLS_DIR");
        source.start(command).end()
    };
    migrating().refusal(&["only talks to hosts with certificates"]);
    let tls = etc.path().join("ferry/tls");
    fs::create_dir_all(&tls).unwrap();
    renew(&a, tls.to_str().unwrap());
    // Whoever asks for none gets none.
    source.refuses(&migrate(&address, &[]), &["only talks to hosts with certificates"]);
    migrating().well();
    target.until_state("web", "running");
    target.goes_on("web");
}

/// What stands in for a host that is reached by ssh: its files are below a folder of this one.
const SSH: &str = "#!/bin/sh\nshift\nmkdir -p \"$HOST_ROOT/etc\"\neval \"$(echo \"$@\" | sed \"s:/etc/:$HOST_ROOT/etc/:\")\"\n";

/// The last word is where to.
const SCP: &str = "#!/bin/sh\nfor to; do :; done\nset -- $(echo \"$@\" | sed \"s|$to||\")\nexec cp \"$@\" \"$HOST_ROOT${to#*:}\"\n";

#[test]
fn the_commands_that_are_printed_bring_a_certificate_to_a_host_the_first_time_and_again() {
    let site = Site::new();
    let place = tempfile::tempdir().unwrap();
    for (name, script) in [("ssh", SSH), ("scp", SCP)] {
        let path = place.path().join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (root, ca) = (place.path().join("root"), site.ca());
    let path = format!("{}:{}", place.path().display(), std::env::var("PATH").unwrap());
    for (time, role) in ["source", "target"].into_iter().enumerate() {
        let out = site.path(&format!("out-{time}")).display().to_string();
        let issue = ["cert", "issue", "host-a", "--role", role, "--ca", &ca, "--out", &out];
        let said = site.host.ferry(&issue).well();
        let lines: Vec<&str> = said
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with("ssh ") || line.starts_with("scp "))
            .collect();
        assert_eq!(lines.len(), 2, "{said}");
        let script = format!("set -e\n{}", lines.join("\n"));
        let done = Command::new("sh")
            .args(["-c", &script])
            .env("PATH", &path)
            .env("HOST_ROOT", &root)
            .output()
            .unwrap();
        assert!(done.status.success(), "{script}: {done:?}");
        let tls = root.join("etc/ferry/tls");
        let shown = site.host.ferry(&["cert", "show", tls.to_str().unwrap(), "--json"]).json();
        assert_eq!(shown["roles"], serde_json::json!([role]), "the one that was issued last");
        let mode = fs::metadata(&tls).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode, fs::read_dir(&tls).unwrap().count()), (0o700, 3));
    }
    let six = site.host.ferry(&["cert", "issue", "fd00::2", "--ca", &ca]).well();
    assert!(six.contains("ssh root@fd00::2 ") && six.contains("root@[fd00::2]:/etc/ferry/tls/"), "{six}");
}
