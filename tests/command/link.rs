//! A link that breaks or falls silent in the middle of a migration, and giving a migration up whatever it waits for.

use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use ferry_tests::process::{Host, Process, wait_until};
use ferry_tests::proxy::{Cuts, CuttingProxy};

use crate::{FERRY, turn};

const GUEST: &str = "dirty rate=20 set=8 fill=32 random=100";

/// A migration that goes on until somebody ends it or `ferry bandwidth` lets it go: less downtime is allowed than one takes.
fn slow(source: &Host<'_>, address: &str) -> Process {
    let slow = ["--bandwidth", "8M/s", "--downtime", "500ms", "--json"];
    source.start(source.command(&[&["migrate", "web", "--to", address][..], &slow].concat()))
}

/// The migration ends with the guest at the target; gives its report.
fn arrives(source: &Host<'_>, target: &Host<'_>, migrating: Process) -> serde_json::Value {
    source.ferry(&["bandwidth", "web", "off"]).well();
    let report = migrating.end().json_lines().pop().expect("events");
    assert_eq!((&report["event"], &report["digest_equal"]), (&"moved".into(), &true.into()), "{report}");
    target.until_state("web", "running");
    target.goes_on("web");
    report
}

#[test]
fn a_link_that_breaks_is_made_again_and_the_user_is_told() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs(GUEST);
    let (waiting, address) = target.receives();
    let cuts = Cuts { bytes_max: 5 << 20, count: 1, outage: Some(Duration::from_millis(200)) };
    let proxy = CuttingProxy::cutting(&address, cuts);
    let migrating = slow(&source, &proxy.address);
    let told = migrating.until("reconnecting");
    assert!(told["reason"].is_string(), "{told}");
    waiting.until("interrupted");
    let again = migrating.until("reconnected");
    assert!(again["arrived_pages"].as_u64().expect("a number") > 0, "{again}");
    let report = arrives(&source, &target, migrating);
    assert_eq!(report["reconnections"].as_array().map(Vec::len), Some(1), "{report}");
}

#[test]
fn a_target_that_is_stopped_is_noticed_and_taken_up_again_when_it_goes_on() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs(GUEST);
    let (waiting, address) = target.receives();
    let migrating = slow(&source, &address);
    migrating.until("transferred");
    // Its kernel goes on acknowledging what comes, and even takes connections.
    waiting.signal("STOP");
    let told = migrating.until("reconnecting");
    println!("{told}");
    source.goes_on("web");
    waiting.signal("CONT");
    migrating.until("reconnected");
    arrives(&source, &target, migrating);
}

#[test]
fn a_source_that_is_stopped_is_noticed_and_goes_on_where_it_was() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let running = source.runs(GUEST);
    let (waiting, address) = target.receives();
    let migrating = slow(&source, &address);
    migrating.until("transferred");
    running.signal("STOP");
    let told = waiting.until("interrupted");
    assert!(told["reason"].as_str().is_some_and(|reason| reason.contains("said nothing")), "{told}");
    running.signal("CONT");
    migrating.until("reconnected");
    arrives(&source, &target, migrating);
}

/// Cancels the migration that `migrating` follows, by the command or by an interrupt of it, and checks that nothing is lost.
fn cancels(source: &Host<'_>, migrating: Process, by_interrupt: bool) {
    source.until_state("web", "migrating");
    if by_interrupt {
        migrating.signal("INT");
    } else {
        source.ferry(&["migrate", "web", "--cancel", "--json"]).well();
    }
    migrating.end().refusal(&["goes on here", "cancel"]);
    source.until_state("web", "running");
    source.goes_on("web");
}

/// A listener that takes no connection any more: whoever tries to connect waits.
fn full_listener() -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut held = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        held.push(stream);
        assert!(held.len() < 10_000, "its backlog has no end");
    }
    (listener, held)
}

#[test]
fn a_migration_is_cancelled_while_it_connects_and_while_it_waits_for_an_answer() {
    let Some(_turn) = turn() else { return };
    let source = Host::new(FERRY);
    let _running = source.runs(GUEST);
    let (full, _held) = full_listener();
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    for listener in [&full, &silent] {
        for by_interrupt in [false, true] {
            let address = listener.local_addr().expect("an address").to_string();
            let migrating = slow(&source, &address);
            migrating.until("started");
            cancels(&source, migrating, by_interrupt);
        }
    }
}

#[test]
fn a_migration_is_cancelled_while_its_target_is_stopped_and_while_it_reconnects() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs(GUEST);
    let (waiting, address) = target.receives();
    for (until, by_interrupt) in [("transferred", false), ("reconnecting", true)] {
        let migrating = slow(&source, &address);
        migrating.until("transferred");
        // Without a cap the sockets are full at once.
        source.ferry(&["bandwidth", "web", "off"]).well();
        waiting.signal("STOP");
        migrating.until(until);
        cancels(&source, migrating, by_interrupt);
        waiting.signal("CONT");
        target.until_state("web", "waiting");
    }
    let migrating = slow(&source, &address);
    migrating.until("transferred");
    arrives(&source, &target, migrating);
}

#[test]
fn a_migration_is_cancelled_while_only_the_bandwidth_holds_it_up() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs(GUEST);
    let (_waiting, address) = target.receives();
    for by_interrupt in [false, true] {
        let migrating = slow(&source, &address);
        migrating.until("round-started");
        // A page every four seconds.
        source.ferry(&["bandwidth", "web", "1K/s"]).well();
        cancels(&source, migrating, by_interrupt);
        target.until_state("web", "waiting");
    }
}

#[test]
fn a_receiver_is_interrupted_while_it_keeps_what_has_arrived() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let running = source.runs(GUEST);
    for kept in [false, true] {
        let (waiting, address) = target.receives();
        let migrating = slow(&source, &address);
        migrating.until("transferred");
        if kept {
            running.signal("STOP");
            waiting.until("interrupted");
        }
        waiting.signal("INT");
        let said = waiting.end();
        assert_eq!(said.code, Some(0), "{said:?}");
        running.signal("CONT");
        let error = migrating.end().refusal(&["goes on here"]);
        println!("{error}");
        source.goes_on("web");
        wait_until("its port to be free", || TcpListener::bind(&address).ok());
    }
}
