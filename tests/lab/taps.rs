//! Taps that are missing, busy or none: refused with the reason before anything runs.

use ferry_lab::network::lab::{BRIDGE, HOST_A_IPV4, TAP};
use ferry_lab::{Lab, Links};
use ferry_tests::process::Host;

use crate::{FERRY, turn};

fn run<'a>(name: &'a str, net: &'a str) -> [&'a str; 11] {
    ["run", "--name", name, "--guest", "idle", "--memory", "64M", "--serial", "null", "--net", net]
}

#[test]
fn a_tap_that_can_not_be_had_is_named() {
    let Some(_turn) = turn() else { return };
    let lab = Lab::new().unwrap();
    let host = Host::inside(FERRY, &lab.host_a);
    let listen = format!("{HOST_A_IPV4}:0");
    let refused = |net: &str, words: &[&str]| {
        host.refuses(&run("second", net), words);
        host.refuses(
            &["receive", "--name", "second", "--listen", &listen, "--net", net, "--insecure"],
            words,
        );
        assert!(!host.file("second.sock").exists() && host.has_no_record_of("second"));
    };
    refused("tap=tap9", &["'tap9'", "no interface", "ip tuntap add"]);
    refused("tap=this-name-is-too-long", &["this-name-is-too-long", "can't be an interface name"]);
    refused(&format!("tap={BRIDGE}"), &["'br0'"]);

    // Two machines never share a tap; the one that has it is not disturbed.
    let net = format!("tap={TAP}");
    let first = host.hosts(&run("first", &net));
    host.until_ready("first");
    refused(&net, &["'tap0'", "in use by another process"]);
    host.goes_on("first");
    host.ferry(&["stop", "first"]).well();
    assert_eq!(first.end().code, Some(0));
    let _second = host.hosts(&run("second", &net));
    host.until_ready("second");
}

#[test]
fn a_target_whose_tap_is_taken_meanwhile_refuses_and_takes_the_vm_later() {
    let Some(_turn) = turn() else { return };
    let lab = Lab::new().unwrap();
    let (source, target) = (Host::inside(FERRY, &lab.host_a), Host::inside(FERRY, &lab.host_b));
    let net = format!("tap={TAP}");
    let run = ["run", "--name", "web", "--memory", "64M", "--serial", "null", "--net", &net];
    let running = source.hosts(&[&run[..], &["--guest", "http ip=10.77.0.2/24"]].concat());
    source.until_ready("web");
    let address = format!("{}:4444", ferry_lab::network::lab::HOST_B_IPV4);
    let _waiting =
        target.hosts(&["receive", "--name", "web", "--listen", &address, "--net", &net, "--insecure"]);

    let thief = lab.host_b.run(|| ferry_vmm::tap::Tap::attach(TAP).unwrap()).unwrap();
    let migrate = ["migrate", "web", "--to", &address, "--downtime", "2s", "--insecure"];
    source.refuses(&migrate, &["goes on here", "'tap0'", "in use by another process"]);
    source.goes_on("web");
    drop(thief);
    source.ferry(&migrate).well();
    target.until_state("web", "running");
    target.goes_on("web");
    assert_eq!(running.end().code, Some(0));
    assert_eq!(Links::of(&lab.host_a).names().unwrap().iter().filter(|name| *name == TAP).count(), 1);
}

#[test]
fn a_vm_with_an_interface_needs_a_target_with_a_tap() {
    let Some(_turn) = turn() else { return };
    let lab = Lab::new().unwrap();
    let (source, target) = (Host::inside(FERRY, &lab.host_a), Host::inside(FERRY, &lab.host_b));
    let net = format!("tap={TAP}");
    let run = ["run", "--name", "web", "--memory", "64M", "--serial", "null", "--net", &net];
    let _running = source.hosts(&[&run[..], &["--guest", "http ip=10.77.0.2/24"]].concat());
    source.until_ready("web");
    let address = format!("{}:4444", ferry_lab::network::lab::HOST_B_IPV4);
    let _waiting = target.hosts(&["receive", "--name", "web", "--listen", &address, "--insecure"]);
    source.refuses(&["migrate", "web", "--to", &address, "--insecure"], &["goes on here", "tap"]);
    source.goes_on("web");
    target.until_state("web", "waiting");
}
