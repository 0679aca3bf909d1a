//! A cable that is pulled in the middle of a migration, and plugged in again.

use ferry_lab::network::lab::HOST_B_IPV4;
use ferry_lab::{Lab, SwitchPort};
use ferry_tests::process::Host;

use crate::moves::{PORT, receive, run};
use crate::{FERRY, turn};

#[test]
fn a_cable_that_is_pulled_for_a_while_costs_seconds_and_not_the_migration() {
    let Some(_turn) = turn() else { return };
    let lab = Lab::new().unwrap();
    let (a, b) = (Host::inside(FERRY, &lab.host_a), Host::inside(FERRY, &lab.host_b));
    let on_a = run(&a);
    let address = format!("{HOST_B_IPV4}:{PORT}");
    let on_b = receive(&b, &address);
    let arguments = [
        "migrate",
        "web",
        "--to",
        &address,
        "--downtime",
        "500ms",
        "--bandwidth",
        "8M/s",
        "--insecure",
        "--json",
    ];
    let migrating = a.start(a.command(&arguments));
    for port in [SwitchPort::HostB, SwitchPort::HostA] {
        migrating.until("transferred");
        // Nobody says anything any more, and nobody is told: either side notices by itself.
        lab.unplug(port).unwrap();
        let told = migrating.until("reconnecting");
        println!("{told}");
        on_b.until("interrupted");
        a.goes_on("web");
        lab.replug(port).unwrap();
        println!("{}", migrating.until("reconnected"));
    }
    a.ferry(&["bandwidth", "web", "off"]).well();
    let report = migrating.end().json_lines().pop().expect("events");
    assert_eq!((&report["event"], &report["digest_equal"]), (&"moved".into(), &true.into()), "{report}");
    assert_eq!(report["reconnections"].as_array().map(Vec::len), Some(2), "{report}");
    b.until_state("web", "running");
    b.goes_on("web");
    assert_eq!(on_a.end().code, Some(0));
}
