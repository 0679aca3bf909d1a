//! A lab leaves nothing behind. Alone in its process, so that no other test's files and threads count.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use ferry_lab::network::lab::{CLIENT_INTERFACE, HOST_A_IPV4};
use ferry_lab::probe::{TcpProbe, UdpProbe};
use ferry_lab::{Capture, HttpLoad, HttpTarget, Lab, LabClock, Namespace, Scope};

/// What would remain of a lab that was not cleaned up.
#[derive(Debug, PartialEq, Eq)]
struct Remains {
    files: usize,
    threads: usize,
    interfaces: usize,
    named_namespaces: String,
}

impl Remains {
    fn now() -> Self {
        let entries = |path: &str| std::fs::read_dir(path).unwrap().count();
        let listed = Command::new("ip").args(["netns", "list"]).output().unwrap();
        Self {
            files: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            interfaces: entries("/sys/class/net"),
            named_namespaces: String::from_utf8(listed.stdout).unwrap(),
        }
    }
}

/// Starts everything that a lab can run, towards a server that is not there, and drops it running.
fn use_everything(lab: &Lab) {
    let clock = LabClock::start();
    let nobody = SocketAddr::new(HOST_A_IPV4.into(), 9);
    let target = HttpTarget::new(nobody, "/");
    let _load = HttpLoad::start(&lab.client, clock, target.clone(), 4).unwrap();
    let _udp = UdpProbe::start(&lab.client, clock, nobody).unwrap();
    let _tcp = TcpProbe::start(&lab.client, clock, target, Duration::from_millis(1)).unwrap();
    let _capture = Capture::start(&lab.client, clock, CLIENT_INTERFACE, Scope::Everything, |_| true).unwrap();
    sleep(Duration::from_millis(20));
}

#[test]
fn a_dropped_lab_leaves_no_file_thread_interface_or_namespace() {
    if let Err(why) = Namespace::new("tier") {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "tier lab can't run under CI: {why}");
        // Written past the test harness, which would swallow what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED tier lab: leaks: {why}");
        return;
    }
    let before = Remains::now();
    let lab = Lab::new().unwrap();
    let meanwhile = Remains::now();
    assert!(meanwhile.files > before.files && meanwhile.threads > before.threads, "{meanwhile:?}");
    assert_eq!(meanwhile.interfaces, before.interfaces, "a lab is out of sight");
    assert_eq!(meanwhile.named_namespaces, before.named_namespaces, "a lab is out of sight");
    use_everything(&lab);
    drop(lab);
    // A joined thread takes a moment more to leave /proc.
    for _ in 0..100 {
        if Remains::now() == before {
            return;
        }
        sleep(Duration::from_millis(10));
    }
    assert_eq!(Remains::now(), before);
}
