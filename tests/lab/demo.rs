//! `ferry demo` as it is started by somebody who has just cloned the repository.

use std::fs;
use std::path::Path;
use std::time::Duration;

use ferry_lab::SwitchPort;
use ferry_lab::network::lab::{BRIDGE, TAP, UPLINK};
use ferry_tests::process::{Host, Process, wait_until};
use serde_json::Value;

use crate::{FERRY, turn};

/// The lab's interfaces in sight of this process: none, as they are all in namespaces of the demo's own.
fn interfaces_left() -> Vec<&'static str> {
    let mut names = vec![BRIDGE, TAP, UPLINK];
    names.extend([SwitchPort::HostA, SwitchPort::HostB, SwitchPort::Client].map(SwitchPort::interface));
    names.retain(|name| Path::new("/sys/class/net").join(name).exists());
    names
}

/// The processes that `parent` has started, from whichever of its threads.
fn children(parent: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{parent}/task")) else { return Vec::new() };
    threads
        .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// Whether `id` is a process of ferry still.
fn is_ferry(id: u32) -> bool {
    fs::read_link(format!("/proc/{id}/exe")).is_ok_and(|program| program == Path::new(FERRY))
}

#[test]
fn the_demo_moves_a_loaded_server_and_says_so() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let mut command = host.command(&["demo", "--json", "out.json", "--downtime", "500ms"]);
    command.current_dir(host.state());
    let text = host.start(command).end().well();
    assert!(text.contains("downtime") || text.contains("Downtime"), "{text}");

    let result: Value = serde_json::from_slice(&fs::read(host.file("out.json")).unwrap()).unwrap();
    println!("{result:#}");
    for (field, wanted) in [
        ("network", Value::from(true)),
        ("http_failed", 0.into()),
        ("digest_equal", true.into()),
        ("self_check_errors", 0.into()),
        ("switch_learned", true.into()),
    ] {
        assert_eq!(result[field], wanted, "{field} in {result:#}");
    }
    let number = |field: &str| result[field].as_f64().unwrap_or_else(|| panic!("{field} in {result:#}"));
    assert!(number("downtime_ms") <= number("downtime_budget_ms"));
    assert!(number("http_ok") > 0.0 && number("client_gap_ms") > 0.0);
    assert!(number("total_ms") > number("downtime_ms") && number("wire_bytes") > 200e6);
    let rounds = result["rounds"].as_array().expect("rounds");
    assert!(!rounds.is_empty());
    for round in rounds {
        for field in ["sent_pages", "dirty_pages", "ms"] {
            assert!(round[field].is_number(), "{field} in {round}");
        }
    }
    let plot = fs::read_to_string(host.file("ferry-demo.html")).unwrap();
    assert!(plot.contains("<svg") && !plot.contains("src=\"http"), "a plot that needs nothing else");
    assert!(interfaces_left().is_empty(), "{:?}", interfaces_left());
}

#[test]
fn an_interrupted_or_killed_demo_leaves_nothing() {
    let Some(_turn) = turn() else { return };
    for signal in ["INT", "KILL"] {
        let host = Host::new(FERRY);
        let mut command = host.command(&["demo"]);
        command.current_dir(host.state());
        let demo = host.start(command);
        let hosts = until_both_hosts_are_up(&demo);
        demo.signal(signal);
        let said = demo.end();
        let code = if signal == "INT" { Some(1) } else { None };
        assert_eq!(said.code, code, "{said:?}");
        wait_until("the demo's hosts to end", || (!hosts.iter().any(|&id| is_ferry(id))).then_some(()));
        assert!(interfaces_left().is_empty(), "{:?}", interfaces_left());
        assert!(!host.file("ferry-demo.html").exists());
    }
}

fn until_both_hosts_are_up(demo: &Process) -> Vec<u32> {
    let hosts = wait_until("both hosts of the demo", || {
        let hosts: Vec<u32> = children(demo.id()).into_iter().filter(|&id| is_ferry(id)).collect();
        (hosts.len() == 2).then_some(hosts)
    });
    // Into the middle of whatever they do.
    std::thread::sleep(Duration::from_millis(500));
    hosts
}
