//! A web server moves to the other host and back while a client uses it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ferry_guest_abi::content::http_file_part;
use ferry_guest_abi::{HTTP_FILE_LEN, HTTP_FILE_PATH, UDP_ECHO_PORT};
use ferry_lab::capture::{Frame, FrameKind};
use ferry_lab::http::fetch_when_served;
use ferry_lab::network::lab::{
    CLIENT_INTERFACE, HOST_A_IPV4, HOST_B_IPV4, TAP, VM_IPV4, VM_MAC, ipv6_beside,
};
use ferry_lab::probe::{TcpProbe, UdpProbe, UdpReport};
use ferry_lab::{Capture, ExpectedBody, HttpLoad, HttpTarget, Lab, LabClock, Namespace, Scope, SwitchPort};
use ferry_tests::process::{Host, Process, wait_until};
use serde_json::Value;

use crate::{FERRY, turn};

pub(crate) const PORT: u16 = 4444;

/// Concurrent requests of the client.
const CONNECTIONS: usize = 4;

/// Announcements of each kind after a migration: at once and five repetitions, 1.25 s in all.
const ANNOUNCEMENTS: usize = 6;
const ANNOUNCED_US: u64 = 1_250_000;

/// How far apart the clocks of two captures may be.
const CAPTURE_SLACK_US: u64 = 2000;

/// Far above what is needed: how long it takes is for the benches to say.
const BUDGET: &str = "500ms";

/// Watches a host's tap for frames that come out of the VM.
struct TapWatch {
    capture: Capture,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    frames: AtomicU64,
    /// When the first and the last came, in microseconds of the lab's clock.
    first_us: AtomicU64,
    last_us: AtomicU64,
}

impl TapWatch {
    fn start(host: &Namespace, clock: LabClock) -> Self {
        let seen = Arc::new(Seen::default());
        let kept = Arc::clone(&seen);
        let capture = Capture::start(host, clock, TAP, Scope::Everything, move |frame| {
            if frame.source() == Some(VM_MAC) && !frame.outgoing {
                if kept.frames.fetch_add(1, Ordering::SeqCst) == 0 {
                    kept.first_us.store(frame.at_us, Ordering::SeqCst);
                }
                kept.last_us.fetch_max(frame.at_us, Ordering::SeqCst);
            }
            // Counting is enough; keeping all of a loaded server's frames is not possible.
            false
        });
        Self { capture: capture.unwrap(), seen }
    }

    /// How many frames, and when the first and the last came.
    fn stop(self) -> (u64, u64, u64) {
        drop(self.capture);
        let read = |value: &AtomicU64| value.load(Ordering::SeqCst);
        (read(&self.seen.frames), read(&self.seen.first_us), read(&self.seen.last_us))
    }
}

pub(crate) fn run(host: &Host<'_>) -> Process {
    let workload = format!("http ip={VM_IPV4}/24 ip6={}/64 fill=32 random=100", ipv6_beside(VM_IPV4));
    let net = format!("tap={TAP},mac={VM_MAC}");
    let arguments = ["run", "--name", "web", "--memory", "96M", "--serial", "null", "--net", &net];
    let process = host.hosts(&[&arguments[..], &["--guest", &workload]].concat());
    host.until_ready("web");
    process
}

pub(crate) fn receive(host: &Host<'_>, address: &str) -> Process {
    let net = format!("tap={TAP}");
    host.hosts(&["receive", "--name", "web", "--listen", address, "--net", &net, "--insecure"])
}

fn migrate(from: &Host<'_>, to: &Host<'_>, address: &str) -> Value {
    let said = from.ferry(&["migrate", "web", "--to", address, "--downtime", BUDGET, "--insecure", "--json"]);
    let report = said.json_lines().pop().expect("events");
    assert_eq!((&report["event"], &report["digest_equal"]), (&"moved".into(), &true.into()), "{report}");
    to.until_state("web", "running");
    report
}

fn web_server(clock: LabClock, lab: &Lab) -> HttpTarget {
    let mut file = vec![0; HTTP_FILE_LEN];
    http_file_part(0, &mut file);
    let target = HttpTarget::new((VM_IPV4, 80).into(), HTTP_FILE_PATH);
    let target = target.expecting(ExpectedBody::Exactly(file.into()));
    fetch_when_served(&lab.client, clock, &target, Duration::from_secs(20)).unwrap();
    target
}

#[test]
fn a_loaded_web_server_moves_there_and_back_and_its_clients_do_not_notice() {
    let Some(_turn) = turn() else { return };
    let lab = Lab::new().unwrap();
    let clock = LabClock::start();
    let (a, b) = (Host::inside(FERRY, &lab.host_a), Host::inside(FERRY, &lab.host_b));
    let on_a = run(&a);
    let target = web_server(clock, &lab);
    let echo = |ip: IpAddr| UdpProbe::start(&lab.client, clock, SocketAddr::new(ip, UDP_ECHO_PORT)).unwrap();
    let (udp, udp6) = (echo(VM_IPV4.into()), echo(ipv6_beside(VM_IPV4).into()));
    let tcp = TcpProbe::start(&lab.client, clock, target.clone(), Duration::from_millis(5)).unwrap();
    let load = HttpLoad::start(&lab.client, clock, target, CONNECTIONS).unwrap();
    std::thread::sleep(Duration::from_millis(300));

    let on_b = receive(&b, &format!("{HOST_B_IPV4}:{PORT}"));
    move_and_watch(&lab, clock, Way { source: &a, target: &b, to_b: true });
    assert_eq!(on_a.end().code, Some(0));
    let on_a = receive(&a, &format!("{HOST_A_IPV4}:{PORT}"));
    move_and_watch(&lab, clock, Way { source: &b, target: &a, to_b: false });
    assert_eq!(on_b.end().code, Some(0));

    let (tcp, http) = (tcp.stop(), load.stop());
    println!("TCP: {} answers, longest stall {:?}", tcp.answered, tcp.longest_stall);
    println!("HTTP: {} ok, {} failed, longest gap {:?}", http.ok, http.failed, http.longest_data_gap);
    assert_eq!(tcp.broken, None);
    assert!(tcp.answered > 10 && http.ok > 10, "{} {}", tcp.answered, http.ok);
    assert_eq!(http.failed, 0, "{:?}", http.failures);
    assert_eq!(http.connections_opened, CONNECTIONS as u64, "no connection was made anew");
    for (name, report) in [("UDP", udp.stop()), ("UDP over IPv6", udp6.stop())] {
        echoes_were_lost_for_a_moment_at_most(name, &report);
    }
    a.goes_on("web");
    a.ferry(&["stop", "web"]).well();
    assert_eq!(on_a.end().code, Some(0));
    for host in [&a, &b] {
        assert!(!host.file("web.sock").exists());
    }
}

fn echoes_were_lost_for_a_moment_at_most(name: &str, report: &UdpReport) {
    let longest_run = report.losses.iter().map(|run| run.count).max().unwrap_or_default();
    println!(
        "{name}: {} sent, {} lost, at most {longest_run} in a row; longest gap {:?}",
        report.sent, report.lost, report.longest_gap
    );
    assert!(report.received > 100, "{report:?}");
    // One a millisecond.
    assert!(longest_run < 1000 && report.longest_gap.ms < 1000.0, "{report:?}");
    assert_eq!(report.duplicates, 0, "a duplicate would mean that two guests answered");
}

/// Which way a VM goes.
struct Way<'a> {
    source: &'a Host<'a>,
    target: &'a Host<'a>,
    to_b: bool,
}

/// Moves the VM and checks what the network saw of it.
fn move_and_watch(lab: &Lab, clock: LabClock, way: Way<'_>) {
    let (from, to, address) = if way.to_b {
        ((&lab.host_a, SwitchPort::HostA), (&lab.host_b, SwitchPort::HostB), HOST_B_IPV4)
    } else {
        ((&lab.host_b, SwitchPort::HostB), (&lab.host_a, SwitchPort::HostA), HOST_A_IPV4)
    };
    assert_eq!(lab.vm_port(VM_MAC).unwrap(), Some(from.1), "before");
    let (leaving, arriving) = (TapWatch::start(from.0, clock), TapWatch::start(to.0, clock));
    let announced = |frame: &Frame| !frame.outgoing && frame.announced() == Some(VM_MAC);
    let capture =
        Capture::start(&lab.client, clock, CLIENT_INTERFACE, Scope::Announcements, announced).unwrap();

    let report = migrate(way.source, way.target, &format!("{address}:{PORT}"));
    assert_eq!(lab.vm_port(VM_MAC).unwrap(), Some(to.1), "after");
    let rarp = FrameKind::Rarp { mac: VM_MAC };
    let count = |kind| capture.snapshot().frames.iter().filter(|frame| frame.kind() == kind).count();
    wait_until("the announcements", || (count(rarp) >= ANNOUNCEMENTS).then_some(()));
    way.target.goes_on("web");

    let (_, _, left_us) = leaving.stop();
    let (frames, arrived_us, _) = arriving.stop();
    println!(
        "downtime {} ms, of that the wire saw {} us",
        report["downtime_ms"],
        arrived_us.saturating_sub(left_us)
    );
    assert!(frames > 0 && arrived_us + CAPTURE_SLACK_US > left_us, "two hosts sent frames of one guest");
    check_announcements(&capture.stop().frames, left_us);

    let info = way.target.ferry(&["info", "web", "--json"]).json();
    let network = &info["network"];
    assert_eq!((&network["tap"], &network["mac"]), (&TAP.into(), &VM_MAC.to_string().into()), "{info}");
    let addresses = network["addresses"].to_string();
    for ip in [IpAddr::from(VM_IPV4), ipv6_beside(VM_IPV4).into()] {
        assert!(addresses.contains(&format!("\"{ip}\"")), "{ip} was not learned: {info}");
    }
}

/// Every kind of announcement arrived after the last frame from the source, and again on the schedule.
fn check_announcements(frames: &[Frame], left_us: u64) {
    let (mac, ip) = (VM_MAC, VM_IPV4);
    for kind in [
        FrameKind::GratuitousArpRequest { mac, ip },
        FrameKind::GratuitousArpReply { mac, ip },
        FrameKind::Rarp { mac },
        FrameKind::UnsolicitedAdvertisement { mac: Some(mac), ip: ipv6_beside(ip) },
    ] {
        let times: Vec<u64> =
            frames.iter().filter(|frame| frame.kind() == kind).map(|frame| frame.at_us).collect();
        let (Some(first), Some(last)) = (times.first(), times.last()) else {
            panic!("no {kind:?} arrived: {frames:?}")
        };
        assert!(first + CAPTURE_SLACK_US > left_us, "{kind:?} came before the handover");
        assert_eq!(times.len(), ANNOUNCEMENTS, "{kind:?} at {times:?}");
        // The sleeps between them can be longer than asked for, not shorter.
        assert!(last - first > ANNOUNCED_US * 9 / 10, "{kind:?} at {times:?}");
    }
}

#[test]
fn no_frame_of_the_guest_leaves_the_target_before_the_handover() {
    let Some(_turn) = turn() else { return };
    let lab = Lab::new().unwrap();
    let clock = LabClock::start();
    let (a, b) = (Host::inside(FERRY, &lab.host_a), Host::inside(FERRY, &lab.host_b));
    let _on_a = run(&a);
    let target = web_server(clock, &lab);
    let load = HttpLoad::start(&lab.client, clock, target, 1).unwrap();
    let address = format!("{HOST_B_IPV4}:{PORT}");
    let watch = TapWatch::start(&lab.host_b, clock);
    let _on_b = receive(&b, &address);
    let slowly = [
        "migrate",
        "web",
        "--to",
        &address,
        "--bandwidth",
        "10M/s",
        "--downtime",
        "2ms",
        "--insecure",
        "--json",
    ];
    let migrating = a.start(a.command(&slowly));
    migrating.until("transferred");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(b.vm("web")["state"], "receiving");
    a.ferry(&["migrate", "web", "--cancel"]).well();
    assert_eq!(migrating.end().code, Some(1));
    b.until_state("web", "waiting");
    assert_eq!(watch.stop().0, 0, "the target sent frames of a guest that it does not run");
    assert_eq!(lab.vm_port(VM_MAC).unwrap(), Some(SwitchPort::HostA));
    let report = load.stop();
    assert!(report.failed == 0 && report.ok > 0, "{:?}", report.failures);

    // The same watch sees the guest once it is there.
    let watch = TapWatch::start(&lab.host_b, clock);
    migrate(&a, &b, &address);
    wait_until("frames of the guest", || (watch.seen.frames.load(Ordering::SeqCst) > 0).then_some(()));
}
