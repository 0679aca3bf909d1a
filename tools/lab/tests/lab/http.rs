//! The HTTP load: right answers, wrong ones, stalls, broken connections, silence.

use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::Duration;

use bytes::Bytes;
use ferry_lab::http::{FailureKind, HttpError, fetch_when_served};
use ferry_lab::network::lab::HOST_A_IPV4;
use ferry_lab::{ExpectedBody, HttpLoad, HttpReport, HttpTarget, Lab, LabClock, SwitchPort};

use crate::server::{FILE_BYTES, Server, file};
use crate::tier::namespaces_available;

const A: IpAddr = IpAddr::V4(HOST_A_IPV4);

fn expecting_file(server: &Server) -> HttpTarget {
    HttpTarget::new(server.http, "/file").expecting(ExpectedBody::Exactly(Bytes::from(file())))
}

fn load_of(lab: &Lab, target: HttpTarget, load_ms: u64) -> HttpReport {
    let load = HttpLoad::start(&lab.client, LabClock::start(), target, 3).unwrap();
    sleep(Duration::from_millis(load_ms));
    load.stop()
}

#[test]
fn right_answers_are_counted_in_full() {
    if !namespaces_available("http load") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let report = load_of(&lab, expecting_file(&server), 500);
    println!(
        "{} answers, {:.0} MiB/s, {:?}, gap {:?}",
        report.ok,
        report.bytes as f64 / 1048576.0 / (report.end_ms - report.start_ms) * 1e3,
        report.latency,
        report.longest_data_gap
    );
    assert!(report.ok > 10, "{report:?}");
    assert_eq!((report.failed, report.connections_opened), (0, 3), "{:?}", report.failures);
    assert_eq!(report.requests.len() as u64, report.ok);
    // Every answer is the file and a few dozen bytes of headers.
    let least = report.ok * FILE_BYTES as u64;
    assert!((least..least + report.ok * 100).contains(&report.bytes), "{}", report.bytes);
    assert_eq!(report.timeline.bytes.iter().sum::<u64>(), report.bytes);
}

#[test]
fn a_pause_of_the_server_is_the_longest_gap() {
    if !namespaces_available("http pause") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start_slow(&lab.host_a, A, Duration::from_millis(1));
    let clock = LabClock::start();
    let load = HttpLoad::start(&lab.client, clock, expecting_file(&server), 3).unwrap();
    sleep(Duration::from_millis(200));
    let paused_ms = clock.now_ms();
    server.pause(Duration::from_millis(200));
    sleep(Duration::from_millis(200));
    let snapshot = load.snapshot();
    let report = load.stop();
    for gap in [report.longest_data_gap, report.longest_connection_gap] {
        assert!((180.0..400.0).contains(&gap.ms), "{report:?}");
        assert!((paused_ms - 100.0..paused_ms + 50.0).contains(&gap.from_ms), "{gap:?} {paused_ms}");
    }
    // An answer takes 33 chunks, each with its own wait, besides the pause.
    assert!((180.0..1000.0).contains(&report.longest_response_gap.ms), "{report:?}");
    assert_eq!(snapshot.longest_data_gap, report.longest_data_gap);
    assert!(snapshot.mib_per_s > 0.0 && report.ok > 3 && report.failed == 0, "{report:?}");
    let silent =
        report.timeline.samples(10).iter().filter(|(t_ms, rate)| *t_ms > paused_ms && *rate == 0.0).count();
    assert!((16..40).contains(&silent), "{silent} silent buckets");
}

#[test]
fn a_reset_connection_is_one_failure_and_is_made_anew() {
    if !namespaces_available("http reset") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let load = HttpLoad::start(&lab.client, LabClock::start(), expecting_file(&server), 3).unwrap();
    sleep(Duration::from_millis(100));
    server.reset_one();
    sleep(Duration::from_millis(300));
    let report = load.stop();
    assert_eq!(
        report.failures_by_kind.iter().collect::<Vec<_>>(),
        [(&FailureKind::Broken, &1)],
        "{report:?}"
    );
    assert_eq!((report.failed, report.connections_opened), (1, 4));
    let failed_ms = report.failures[0].at_ms;
    assert!(report.requests.iter().any(|request| request.ok && request.start_us as f64 / 1e3 > failed_ms));
}

#[test]
fn wrong_answers_are_failures_of_their_kind() {
    if !namespaces_available("http wrong answers") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let exactly =
        |path| HttpTarget::new(server.http, path).expecting(ExpectedBody::Exactly(Bytes::from(file())));
    let refusing = SocketAddr::new(A, 9);
    let cases = [
        (exactly("/none"), FailureKind::Status),
        (exactly("/small"), FailureKind::Content),
        (exactly("/other"), FailureKind::Content),
        (HttpTarget::new(server.http, "/small").expecting(ExpectedBody::Length(6)), FailureKind::Length),
        (HttpTarget::new(server.http, "no path"), FailureKind::Request),
        (HttpTarget::new(refusing, "/file"), FailureKind::Connect),
    ];
    for (target, kind) in cases {
        let report = load_of(&lab, target, 60);
        assert_eq!(report.failures_by_kind.keys().collect::<Vec<_>>(), [&kind], "{:?}", report.failures);
        assert_eq!(report.ok, 0);
    }
}

#[test]
fn requests_that_a_dead_link_swallows_time_out_and_end_the_drain() {
    if !namespaces_available("http dead link") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start_slow(&lab.host_a, A, Duration::from_millis(1));
    let target = expecting_file(&server).within(Duration::from_millis(400));
    let load = HttpLoad::start(&lab.client, LabClock::start(), target, 3).unwrap();
    sleep(Duration::from_millis(200));
    lab.unplug(SwitchPort::HostA).unwrap();
    sleep(Duration::from_millis(50));
    let report = load.stop();
    assert_eq!(report.failures_by_kind.get(&FailureKind::Timeout), Some(&3), "{report:?}");
    for gap in [report.longest_data_gap, report.longest_response_gap, report.longest_connection_gap] {
        assert!(gap.ms > 250.0, "silence until the end counts: {report:?}");
    }
}

#[test]
fn dropping_a_load_does_not_wait_for_its_requests() {
    if !namespaces_available("http drop") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let clock = LabClock::start();
    let load = HttpLoad::start(&lab.client, clock, expecting_file(&server), 3).unwrap();
    lab.unplug(SwitchPort::HostA).unwrap();
    drop(load);
    assert!(clock.now() < Duration::from_secs(2), "{:?}", clock.now());
}

#[test]
fn fetching_waits_for_the_server_and_says_why_it_gave_up() {
    if !namespaces_available("http fetch") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let clock = LabClock::start();
    let patience = Duration::from_millis(300);
    let target = HttpTarget::new(server.http, "/file");
    assert_eq!(fetch_when_served(&lab.client, clock, &target, patience).unwrap(), file());
    drop(server);
    let error = fetch_when_served(&lab.client, clock, &target, patience).unwrap_err();
    assert!(matches!(&error, HttpError::NotServed { last, .. } if last.contains("refused")), "{error}");
}
