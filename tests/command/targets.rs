//! Targets that are not there, are taken, speak something else, are too small or die: the guest goes on at its source.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;

use ferry_migrate::protocol::{Message, wire};
use ferry_tests::process::Host;
use ferry_tests::proxy::CuttingProxy;

use crate::{FERRY, turn};

/// A guest with enough memory in use that a capped migration of it can be met half-way.
const BUSY: &str = "dirty rate=20 set=8 fill=32 random=100";

/// Slow enough that pre-copy of [`BUSY`] takes several seconds.
const SLOW: &str = "10M/s";

/// Fits any machine that these tests may share: they are not about downtime.
const BUDGET: &str = "2s";

/// Migrates `web` from `source` to `target`, where it must arrive.
fn moves(source: &Host<'_>, target: &Host<'_>, address: &str) {
    let said = source.ferry(&["migrate", "web", "--to", address, "--downtime", BUDGET, "--json"]);
    let events = said.json_lines();
    let report = events.last().expect("events");
    assert_eq!((&report["event"], &report["digest_equal"]), (&"moved".into(), &true.into()), "{report}");
    target.until_state("web", "running");
    target.goes_on("web");
}

/// `ferry migrate` fails with these words; the guest goes on and can be asked.
fn stays(source: &Host<'_>, address: &str, words: &[&str]) {
    let words = [words, &["goes on here"]].concat();
    source.refuses(&["migrate", "web", "--to", address, "--reconnect", "1s"], &words);
    goes_on_here(source);
}

fn goes_on_here(source: &Host<'_>) {
    source.until_state("web", "running");
    source.goes_on("web");
}

/// A slow migration of `web` to `address` that is under way and sending pages.
fn half_way(source: &Host<'_>, address: &str) -> ferry_tests::process::Process {
    let slow = ["--bandwidth", SLOW, "--downtime", BUDGET, "--reconnect", "1s"];
    let arguments = [&["migrate", "web", "--to", address, "--json"][..], &slow].concat();
    let process = source.start(source.command(&arguments));
    process.until("transferred");
    process
}

#[test]
fn a_target_that_is_not_there_is_named() {
    let Some(_turn) = turn() else { return };
    let source = Host::new(FERRY);
    let _process = source.runs("dirty rate=20 set=8");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    stays(&source, &address, &[&address, "refused", "ferry receive"]);
    stays(&source, "no-such-host.invalid:4444", &["no-such-host.invalid"]);
    for no_port in ["127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:0"] {
        source.refuses(&["migrate", "web", "--to", no_port], &[no_port, "port"]);
        goes_on_here(&source);
    }
    let note = source.vm("web")["note"].to_string();
    assert!(note.contains("the last migration failed"), "{note}");
}

#[test]
fn a_target_that_speaks_something_else_is_named() {
    let Some(_turn) = turn() else { return };
    let source = Host::new(FERRY);
    let _process = source.runs("dirty rate=20 set=8");
    let mut next_version = wire::encode(&Message::Ping(1));
    next_version[4] = 99;
    for (answer, words) in [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), &["does not speak ferry's protocol"][..]),
        (next_version, &["version 99"]),
        (Vec::new(), &[]),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 16]);
            stream.write_all(&answer).unwrap();
        });
        stays(&source, &address, &[words, &[address.as_str()]].concat());
        server.join().unwrap();
    }
}

#[test]
fn garbage_on_the_port_does_not_disturb_a_waiting_target() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("dirty rate=20 set=8");
    let (mut waiting, address) = target.receives();
    let mut wrong_version = wire::encode(&Message::Ping(1));
    wrong_version[4] = 99;
    let silent = TcpStream::connect(&address).unwrap();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 70_000], &[0; 3], b"", &wrong_version] {
        let mut stream = TcpStream::connect(&address).unwrap();
        // It may have hung up already.
        let _ = stream.write_all(bytes);
        assert_eq!(target.vm("web")["state"], "waiting");
        assert!(waiting.lives());
    }
    moves(&source, &target, &address);
    drop(silent);
}

#[test]
fn a_target_that_has_a_vm_takes_no_other() {
    let Some(_turn) = turn() else { return };
    let (first, second, target) = (Host::new(FERRY), Host::new(FERRY), Host::new(FERRY));
    let _first = first.runs(BUSY);
    let _second = second.runs("dirty rate=20 set=8");
    let (_waiting, address) = target.receives();
    let migrating = half_way(&first, &address);
    stays(&second, &address, &["busy", "'web'", "target of its own"]);
    assert_eq!(target.vm("web")["state"], "receiving");
    first.ferry(&["migrate", "web", "--cancel", "--json"]).json_lines();
    assert_eq!(migrating.end().code, Some(1));
    goes_on_here(&first);

    target.until_state("web", "waiting");
    moves(&first, &target, &address);
    // The first one has arrived, and its host does not listen any more or says that it is taken.
    stays(&second, &address, &[&address]);
    target.goes_on("web");
}

#[test]
fn a_target_without_the_memory_says_so() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _process =
        source.hosts(&["run", "--name", "web", "--guest", "idle", "--memory", "2G", "--serial", "null"]);
    source.until_ready("web");
    // A limit on its address space, as a service manager sets one, that the 2 GiB guest does not fit into.
    let mut command = std::process::Command::new("prlimit");
    command.arg(format!("--as={}", 2_u64 << 30)).arg(FERRY).env("FERRY_STATE_DIR", target.state());
    command.args(["receive", "--name", "web", "--listen", "127.0.0.1:0", "--json", "--exit-with-stdin"]);
    let mut waiting = target.start(command);
    let address = waiting.until("listening")["address"].as_str().unwrap().to_owned();
    stays(&source, &address, &["2147483648 bytes", "memory"]);
    assert!(waiting.lives());
    assert_eq!(target.until_state("web", "waiting")["listen"], address.as_str());
    drop(waiting);
    let (_waiting, address) = target.receives();
    moves(&source, &target, &address);
}

#[test]
fn a_link_that_is_cut_in_pre_copy_costs_nothing_and_the_next_attempt_works() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs(BUSY);
    let (_waiting, address) = target.receives();
    for bytes in [200, 8 << 20, 20 << 20] {
        let proxy = CuttingProxy::start(&address, bytes);
        stays(&source, &proxy.address, &[]);
        target.until_state("web", "waiting");
    }
    moves(&source, &target, &address);
}

#[test]
fn a_target_that_is_killed_in_pre_copy_costs_nothing() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs(BUSY);
    let (waiting, address) = target.receives();
    let migrating = half_way(&source, &address);
    waiting.kill();
    let error = migrating.end().refusal(&["goes on here"]);
    println!("{error}");
    goes_on_here(&source);
    let (_waiting, address) = target.receives();
    moves(&source, &target, &address);
}

#[test]
fn a_source_that_is_killed_in_pre_copy_leaves_the_target_waiting() {
    let Some(_turn) = turn() else { return };
    let (source, other, target) = (Host::new(FERRY), Host::new(FERRY), Host::new(FERRY));
    let running = source.runs(BUSY);
    let _other = other.runs("dirty rate=20 set=8");
    let (waiting, address) = target.receives();
    let migrating = half_way(&source, &address);
    running.kill();
    let said = migrating.end();
    assert_eq!(said.code, Some(1), "{said:?}");
    waiting.until("given-up");
    let info = target.until_state("web", "waiting");
    assert!(info["note"].to_string().contains("given up"), "{info}");
    moves(&other, &target, &address);
}

#[test]
fn a_vm_goes_back_and_forth() {
    let Some(_turn) = turn() else { return };
    let hosts = [Host::new(FERRY), Host::new(FERRY)];
    let [a, b] = &hosts;
    let mut here = a.runs("dirty rate=50 set=16 fill=16 random=50 zero=50");
    for (trip, (from, to)) in [(a, b), (b, a), (a, b), (b, a)].into_iter().enumerate() {
        let (there, address) = to.receives();
        moves(from, to, &address);
        let said = here.end();
        assert!(said.code == Some(0) && said.stdout.contains("it has moved to"), "{said:?}");
        assert!(!from.file("web.sock").exists());
        assert_eq!(to.vm("web")["epoch"], trip + 2);
        here = there;
    }
}

#[test]
fn a_paused_vm_arrives_paused() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("dirty rate=20 set=8");
    let (_waiting, address) = target.receives();
    source.ferry(&["pause", "web"]).well();
    source.ferry(&["migrate", "web", "--to", &address, "--downtime", BUDGET]).well();
    target.until_state("web", "paused");
    let stood = target.heartbeats("web");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(target.heartbeats("web"), stood);
    target.ferry(&["resume", "web"]).well();
    target.goes_on("web");
}

#[test]
fn a_guest_outlives_whoever_read_what_its_target_said() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _process = source.runs(BUSY);
    let mut command = target.command(&["receive", "--name", "web", "--listen", "127.0.0.1:0", "--json"]);
    command.arg("--exit-with-stdin").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut receiver = command.spawn().unwrap();
    // As `| head -1` does: the address is read, then the pipe breaks.
    let mut line = String::new();
    BufReader::new(receiver.stdout.take().unwrap()).read_line(&mut line).unwrap();
    drop(receiver.stderr.take());
    let listening: serde_json::Value = serde_json::from_str(&line).unwrap();
    moves(&source, &target, listening["address"].as_str().unwrap());
    // The receiver is done with the source by then; the guest is its process's own.
    std::thread::sleep(std::time::Duration::from_millis(300));
    target.goes_on("web");
    target.ferry(&["stop", "web", "--json"]).well();
    receiver.wait().unwrap();
}

#[test]
fn a_target_longer_than_any_address_is_refused() {
    let Some(_turn) = turn() else { return };
    let source = Host::new(FERRY);
    let _process = source.runs("idle");
    let address = format!("127.0.0.1:{}4444", "0".repeat(4200));
    source.refuses(&["migrate", "web", "--to", &address], &["longer than any address"]);
    goes_on_here(&source);
}

#[test]
fn people_are_shown_the_rounds_and_what_came_of_them() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs(BUSY);
    let (_waiting, address) = target.receives();
    let migrate = ["migrate", "web", "--to", &address, "--downtime", BUDGET];
    let text = source.ferry(&[&migrate[..], &["--compress", "lz4", "--streams", "2"]].concat()).well();
    for word in ["migrating 64.00 MiB", &address, "of 2.00 s allowed", " packed", "equal on both sides"] {
        assert!(text.contains(word), "'{word}' is missing in:\n{text}");
    }
    assert!(!text.contains('\u{1b}'), "no escape codes where there is no terminal");
}
