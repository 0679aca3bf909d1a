//! A migration under way: what can be asked of it, what is refused, and giving it up.

use ferry_tests::process::{Host, Process};
use serde_json::Value;

use crate::{FERRY, turn};

/// A slow migration of a guest from one host to another.
struct UnderWay {
    source: Host<'static>,
    target: Host<'static>,
    running: Process,
    waiting: Process,
    migrating: Process,
    address: String,
}

impl UnderWay {
    fn start() -> Self {
        let (source, target) = (Host::new(FERRY), Host::new(FERRY));
        let running = source.runs("dirty rate=20 set=8 fill=32 random=100");
        let (waiting, address) = target.receives();
        let migrating = Self::again(&source, &address);
        Self { source, target, running, waiting, migrating, address }
    }

    fn again(source: &Host<'_>, address: &str) -> Process {
        // Less than what a standstill takes without any page: it goes on until somebody ends it.
        let slow = ["--bandwidth", "10M/s", "--downtime", "2ms"];
        let arguments = [&["migrate", "web", "--to", address, "--json"][..], &slow].concat();
        let process = source.start(source.command(&arguments));
        process.until("transferred");
        process
    }
}

/// Both sides are as they were before the attempt, and the guest is well.
fn nothing_lost(source: &Host<'_>, target: &Host<'_>) {
    source.until_state("web", "running");
    source.goes_on("web");
    target.until_state("web", "waiting");
}

#[test]
fn the_api_answers_during_a_migration_and_refuses_what_would_cross_it() {
    let Some(_turn) = turn() else { return };
    let UnderWay { source, target, migrating, address, .. } = &UnderWay::start();
    for verb in ["pause", "resume", "stop"] {
        source.refuses(&[verb, "web"], &["'web' is migrating", verb, "--cancel"]);
    }
    source.refuses(&["migrate", "web", "--to", address], &["'web' is migrating"]);
    let info = source.ferry(&["info", "web", "--json"]).json();
    assert_eq!(info["state"], "migrating", "{info}");
    assert!(info["note"].to_string().contains(address), "{info}");
    assert_eq!(source.ferry(&["list", "--json"]).json()[0]["state"], "migrating");
    assert_eq!(target.ferry(&["list", "--json"]).json()[0]["state"], "receiving");
    target.refuses(&["pause", "web"], &["'web' has no VM yet"]);
    source.goes_on("web");
    // It is still the same attempt, and it still sends.
    migrating.until("transferred");
}

#[test]
fn a_migration_can_be_cancelled_from_elsewhere() {
    let Some(_turn) = turn() else { return };
    let UnderWay { source, target, mut migrating, address, running: _running, waiting: _waiting } =
        UnderWay::start();
    for last in [false, true] {
        let events = source.ferry(&["migrate", "web", "--cancel", "--json"]).json_lines();
        assert_eq!(events.last().expect("events")["event"], "failed");
        migrating.end().refusal(&["goes on here", "cancel"]);
        nothing_lost(&source, &target);
        if last {
            break;
        }
        migrating = UnderWay::again(&source, &address);
    }
    source.refuses(&["migrate", "nobody", "--cancel"], &["there is no VM 'nobody'"]);
}

#[test]
fn its_bandwidth_can_be_changed() {
    let Some(_turn) = turn() else { return };
    let UnderWay { source, target, mut migrating, address, running: _running, waiting: _waiting } =
        UnderWay::start();
    let said = source.ferry(&["bandwidth", "web", "0/s"]);
    assert!(said.code == Some(2) && said.stderr.contains("never send anything"), "{said:?}");
    source.refuses(&["bandwidth", "nobody", "off"], &["there is no VM 'nobody'"]);
    let said = source.ferry(&["bandwidth", "web", "20M/s", "--json"]).json();
    assert_eq!(said["bytes_per_s"], 20 << 20, "{said}");
    source.ferry(&["migrate", "web", "--cancel", "--json"]);
    migrating.end().refusal(&["cancel"]);
    nothing_lost(&source, &target);
    source.refuses(&["bandwidth", "web", "off"], &["the migration is over"]);
    // At this rate the first round would take some minutes.
    let arguments = ["migrate", "web", "--to", &address, "--bandwidth", "100K/s", "--json"];
    migrating = source.start(source.command(&arguments));
    migrating.until("round-started");
    source.ferry(&["bandwidth", "web", "off"]).well();
    let events = migrating.end().json_lines();
    assert_eq!(events.last().expect("events")["event"], "moved", "{events:?}");
    target.goes_on("web");
}

#[test]
fn an_interrupt_of_the_command_cancels_the_migration() {
    let Some(_turn) = turn() else { return };
    let UnderWay { source, target, migrating, running: _running, waiting: _waiting, .. } = UnderWay::start();
    migrating.signal("INT");
    let said = migrating.end();
    assert!(said.stderr.contains("cancelling"), "{said:?}");
    said.refusal(&["goes on here", "cancel"]);
    nothing_lost(&source, &target);
}

#[test]
fn a_killed_command_leaves_the_migration_to_the_host_process() {
    let Some(_turn) = turn() else { return };
    let UnderWay { source, target, migrating, .. } = &mut UnderWay::start();
    assert!(migrating.lives());
    migrating.signal("KILL");
    source.goes_on("web");
    assert_eq!(source.vm("web")["state"], "migrating");
    source.ferry(&["migrate", "web", "--cancel"]).well();
    nothing_lost(source, target);
}

#[test]
fn a_target_that_is_told_to_stop_lets_go_and_the_guest_goes_on() {
    let Some(_turn) = turn() else { return };
    let UnderWay { source, target, migrating, address, running: _running, waiting } = UnderWay::start();
    target.ferry(&["stop", "web"]).well();
    migrating.end().refusal(&["goes on here", &address]);
    let said = waiting.end();
    assert_eq!(said.code, Some(0), "{said:?}");
    source.until_state("web", "running");
    source.goes_on("web");
    std::net::TcpListener::bind(&address).expect("its port is free again");
}

#[test]
fn a_guest_that_dirties_faster_than_the_link_is_given_up_with_the_figures() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("dirty rate=200 set=24");
    let (_waiting, address) = target.receives();
    // The cap does not hold in the last round, so what can't be met must be the budget.
    let migrate = ["migrate", "web", "--to", &address, "--bandwidth", "20M/s", "--downtime", "2ms"];
    let error = source.refuses(&[&migrate[..], &["--timeout", "3s"]].concat(), &["the guest dirties"]);
    println!("{error}");
    nothing_lost(&source, &target);

    let said = source.ferry(&[&migrate[..], &["--timeout", "2s", "--on-timeout", "stop", "--json"]].concat());
    let events = said.json_lines();
    let stopping = events.iter().find(|event| event["event"] == "stopping").expect("it is stopped");
    assert_eq!(stopping["forced"], true, "{stopping}");
    let report = events.last().expect("events");
    assert_eq!(
        (&report["event"], &report["digest_equal"]),
        (&Value::from("moved"), &true.into()),
        "{report}"
    );
    target.until_state("web", "running");
    target.goes_on("web");
}
