//! What the processes that host VMs may still do to their host.

use std::collections::BTreeMap;
use std::fs;

use ferry_tests::process::{Host, Process};
use serde_json::json;

use crate::{FERRY, turn};

/// `Seccomp` and `CapEff` of each kind of thread, as /proc shows them.
fn threads(process: &Process) -> BTreeMap<String, (String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    let mut threads = BTreeMap::new();
    for task in tasks.map(|task| task.unwrap().path()) {
        // A thread that has just ended has none.
        let Ok(status) = fs::read_to_string(task.join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect("a field of every thread").trim().to_owned()
        };
        // Of the kernel's own, that KVM made.
        if field("Kthread:") == "0" {
            threads.insert(field("Name:"), (field("Seccomp:"), field("CapEff:")));
        }
    }
    threads
}

const FILTERED: &str = "2";
const NONE: &str = "0000000000000000";

fn all_confined(process: &Process, some: &[&str]) {
    let threads = threads(process);
    for name in some {
        assert!(threads.contains_key(*name), "{name} is not among {threads:?}");
    }
    let confined = |(filter, capabilities): &(String, String)| filter == FILTERED && capabilities == NONE;
    assert!(threads.values().all(confined), "{threads:?}");
}

#[test]
fn every_thread_of_a_host_process_is_confined_once_its_vm_is_there() {
    let Some(_turn) = turn() else { return };
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let source = a.runs("dirty rate=100 set=16");
    all_confined(&source, &["vcpu0", "serial", "tokio-rt-worker"]);
    let (target, address) = b.receives();
    let waiting = threads(&target);
    assert!(waiting.values().all(|(filter, _)| filter == FILTERED), "{waiting:?}");
    let with_capabilities: Vec<_> = waiting.iter().filter(|(_, (_, held))| held != NONE).collect();
    assert!(matches!(with_capabilities[..], [(name, _)] if name == "opener"), "{waiting:?}");
    a.ferry(&["migrate", "web", "--to", &address, "--downtime", "2s", "--json"]).well();
    b.until_state("web", "running");
    all_confined(&target, &["vcpu0", "serial", "tokio-rt-worker"]);
    assert_eq!(b.vm("web")["refused_system_calls"], json!([]));
}

#[test]
fn filters_can_be_left_out() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let process = host.hosts(&[
        "run",
        "--name",
        "web",
        "--guest",
        "idle",
        "--memory",
        "64M",
        "--serial",
        "null",
        "--seccomp",
        "off",
    ]);
    host.until_ready("web");
    let threads = threads(&process);
    assert!(threads.values().all(|(filter, held)| filter == "0" && held == NONE), "{threads:?}");
}
