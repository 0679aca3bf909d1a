//! Pause, resume, list, info, stop, and the JSON of each.

use std::os::unix::fs::PermissionsExt;

use ferry_tests::process::Host;

use crate::{FERRY, turn};

#[test]
fn a_vm_is_listed_paused_resumed_and_stopped() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    assert!(host.ferry(&["list"]).well().contains("no VMs"));
    let process = host.runs("dirty rate=20 set=8");
    let listed = host.ferry(&["list", "--json"]).json();
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!((&listed[0]["name"], &listed[0]["state"]), (&"web".into(), &"running".into()));
    let words = host.ferry(&["list"]).well();
    assert!(words.contains("web") && words.contains("running") && words.contains("64.00 MiB"), "{words}");

    let info = host.ferry(&["info", "web", "--json"]).json();
    assert_eq!(info["memory_bytes"], 64 << 20);
    assert_eq!((&info["cpus"], &info["epoch"], &info["pid"]), (&1.into(), &1.into(), &process.id().into()));
    assert!(host.ferry(&["info", "web"]).well().contains("running"));

    assert_eq!(host.ferry(&["pause", "web", "--json"]).json()["state"], "paused");
    let stood = host.heartbeats("web");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(host.heartbeats("web"), stood, "a paused guest stands still");
    // Asking twice changes nothing.
    host.ferry(&["pause", "web"]).well();
    assert_eq!(host.vm("web")["state"], "paused");
    assert_eq!(host.vm("web")["state"], "paused");
    assert_eq!(host.ferry(&["resume", "web", "--json"]).json()["state"], "running");
    host.goes_on("web");
    host.ferry(&["resume", "web"]).well();
    host.goes_on("web");

    assert_eq!(host.ferry(&["stop", "web", "--json"]).json()["state"], "stopped");
    let said = process.end();
    assert_eq!(said.code, Some(0), "{said:?}");
    let last: serde_json::Value = serde_json::from_str(said.stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["reason"]), (&"ended".into(), &"it was stopped".into()));
}

#[test]
fn a_waiting_host_has_nothing_to_pause_and_can_be_stopped() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let (process, address) = host.receives();
    let info = host.ferry(&["info", "web", "--json"]).json();
    assert_eq!((&info["state"], &info["listen"]), (&"waiting".into(), &address.as_str().into()));
    for verb in ["pause", "resume"] {
        host.refuses(&[verb, "web"], &["'web' has no VM yet"]);
    }
    host.refuses(&["migrate", "web", "--to", "127.0.0.1:1"], &["'web' has no VM yet"]);
    host.refuses(&["migrate", "web", "--cancel"], &["'web' has not been asked to migrate"]);
    assert_eq!(host.vm("web")["state"], "waiting");
    host.ferry(&["stop", "web"]).well();
    assert_eq!(process.end().code, Some(0));
    std::net::TcpListener::bind(&address).expect("its port is free again");
}

#[test]
fn a_vm_that_is_not_there_is_not_there_for_every_command() {
    let host = Host::new(FERRY);
    let migrate = ["migrate", "web", "--to", "127.0.0.1:1"];
    for arguments in [&["info", "web"][..], &["pause", "web"], &["resume", "web"], &["stop", "web"], &migrate]
    {
        host.refuses(arguments, &["there is no VM 'web' on this host", "web.sock"]);
    }
    // For people, the sentence is on standard error and standard output is empty.
    let said = host.ferry(&["info", "web"]);
    assert!(said.code == Some(1) && said.stdout.is_empty() && said.stderr.starts_with("ferry: "), "{said:?}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let (_process, address) = host.receives();
    host.refuses(
        &["receive", "--name", "other", "--listen", &address],
        &["can't listen on", &address, "in use"],
    );
    host.refuses(
        &["receive", "--name", "other", "--listen", "192.0.2.1:4444", "--insecure"],
        &["can't listen on 192.0.2.1:4444", "Cannot assign"],
    );
}

#[test]
fn only_the_user_who_hosts_a_vm_reaches_its_sockets() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let ferry = host.command(&["run", "--name", "web", "--guest", "idle", "--json", "--exit-with-stdin"]);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", r#"umask 0; exec "$@""#, "sh"]).arg(ferry.get_program()).args(ferry.get_args());
    shell.envs(ferry.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let _running = host.start(shell);
    host.until_state("web", "running");
    for socket in ["web.sock", "web.console"] {
        let mode = std::fs::metadata(host.file(socket)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{socket} has mode {mode:o}");
    }
}
