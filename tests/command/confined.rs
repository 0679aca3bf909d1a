//! What the processes that host VMs may still do to their host.

use std::fs;

use ferry_tests::process::{Host, Process};
use serde_json::json;

use crate::{FERRY, turn};

/// A thread's name, its `Seccomp`, and its sets of capabilities but the bounding one, as /proc shows them.
#[derive(Debug)]
struct Thread {
    name: String,
    filter: String,
    capabilities: [String; 4],
}

fn threads(process: &Process) -> Vec<Thread> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    let mut threads = Vec::new();
    for task in tasks.map(|task| task.unwrap().path()) {
        // A thread that has just ended has none.
        let Ok(status) = fs::read_to_string(task.join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect("a field of every thread").trim().to_owned()
        };
        // Of the kernel's own, that KVM made.
        if field("Kthread:") == "0" {
            let capabilities = ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"].map(field);
            threads.push(Thread { name: field("Name:"), filter: field("Seccomp:"), capabilities });
        }
    }
    threads
}

impl Thread {
    fn has_capabilities(&self) -> bool {
        self.capabilities.iter().any(|set| set != NONE)
    }
}

const FILTERED: &str = "2";
const NONE: &str = "0000000000000000";

fn all_confined(process: &Process, some: &[&str]) {
    let threads = threads(process);
    for name in some {
        assert!(threads.iter().any(|thread| thread.name == *name), "{name} is not among {threads:?}");
    }
    let confined = |thread: &Thread| thread.filter == FILTERED && !thread.has_capabilities();
    assert!(threads.iter().all(confined), "{threads:?}");
}

#[test]
fn every_thread_of_a_host_process_is_confined_once_its_vm_is_there() {
    let Some(_turn) = turn() else { return };
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let source = a.runs("dirty rate=100 set=16");
    all_confined(&source, &["vcpu0", "serial", "tokio-rt-worker"]);
    let (target, address) = b.receives();
    let waiting = threads(&target);
    assert!(waiting.iter().all(|thread| thread.filter == FILTERED), "{waiting:?}");
    let with_capabilities: Vec<_> = waiting.iter().filter(|thread| thread.has_capabilities()).collect();
    assert!(matches!(with_capabilities[..], [thread] if thread.name == "opener"), "{waiting:?}");
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
    assert!(threads.iter().all(|thread| thread.filter == "0" && !thread.has_capabilities()), "{threads:?}");
}
