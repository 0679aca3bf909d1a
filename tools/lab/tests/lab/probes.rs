//! The UDP and TCP probes: stalls, losses, a reset, and a target that is not there.

use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::Duration;

use ferry_lab::network::lab::{HOST_A_IPV4, ipv6_beside};
use ferry_lab::probe::{TcpProbe, UdpProbe};
use ferry_lab::{HttpTarget, Lab, LabClock, SwitchPort};

use crate::server::Server;
use crate::tier::namespaces_available;

const A: IpAddr = IpAddr::V4(HOST_A_IPV4);
const PAUSE: Duration = Duration::from_millis(200);

#[test]
fn a_pause_is_a_udp_gap_and_loses_nothing() {
    if !namespaces_available("udp pause") {
        return;
    }
    let lab = Lab::new().unwrap();
    for address in [A, IpAddr::V6(ipv6_beside(HOST_A_IPV4))] {
        let server = Server::start(&lab.host_a, address);
        let clock = LabClock::start();
        let probe = UdpProbe::start(&lab.client, clock, server.udp).unwrap();
        sleep(Duration::from_millis(200));
        let paused_ms = clock.now_ms();
        server.pause(PAUSE);
        sleep(Duration::from_millis(100));
        let (replies, gap) = probe.snapshot();
        let report = probe.stop();
        println!("{report:?}");
        assert!(report.sent > 250 && replies > 100, "{report:?}");
        assert_eq!((report.lost, report.duplicates, report.refused), (0, 0, 0), "{report:?}");
        assert!((180.0..300.0).contains(&report.longest_gap.ms), "{report:?}");
        assert!((report.longest_gap.from_ms - paused_ms).abs() < 50.0, "{report:?}");
        assert!(report.longest_send_gap.ms < 150.0 && report.gaps.contains(&gap), "{report:?}");
    }
}

#[test]
fn a_cut_cable_loses_datagrams_in_one_run() {
    if !namespaces_available("udp loss") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let clock = LabClock::start();
    let probe = UdpProbe::start(&lab.client, clock, server.udp).unwrap();
    sleep(Duration::from_millis(100));
    lab.unplug(SwitchPort::HostA).unwrap();
    sleep(Duration::from_millis(100));
    lab.replug(SwitchPort::HostA).unwrap();
    sleep(Duration::from_millis(100));
    let report = probe.stop();
    assert!((50..250).contains(&report.lost), "{report:?}");
    assert!(report.losses.iter().any(|run| run.count >= 50), "{report:?}");
    assert!(report.longest_gap.ms >= 90.0, "{report:?}");
}

#[test]
fn a_target_that_is_not_there_is_one_long_gap() {
    if !namespaces_available("udp nobody") {
        return;
    }
    let lab = Lab::new().unwrap();
    let nobody = SocketAddr::new(A, 9);
    let udp = UdpProbe::start(&lab.client, LabClock::start(), nobody).unwrap();
    sleep(Duration::from_millis(100));
    let report = udp.stop();
    assert_eq!((report.received, report.lost), (0, report.sent), "{report:?}");
    assert!((90.0..400.0).contains(&report.longest_gap.ms), "{report:?}");
    let target = HttpTarget::new(nobody, "/small");
    let tcp = TcpProbe::start(&lab.client, LabClock::start(), target, Duration::from_millis(2)).unwrap();
    sleep(Duration::from_millis(50));
    let report = tcp.stop();
    assert!(report.broken.is_some_and(|(_, why)| why.contains("refused")) && report.answered == 0);
}

#[test]
fn one_tcp_connection_stalls_through_a_pause_and_holds() {
    if !namespaces_available("tcp pause") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let clock = LabClock::start();
    let target = HttpTarget::new(server.http, "/small");
    let probe = TcpProbe::start(&lab.client, clock, target, Duration::from_millis(2)).unwrap();
    sleep(Duration::from_millis(100));
    server.pause(PAUSE);
    sleep(Duration::from_millis(100));
    let report = probe.stop();
    assert!(report.answered > 20 && report.broken.is_none(), "{report:?}");
    assert!((180.0..300.0).contains(&report.longest_stall.ms), "{report:?}");
    assert!(report.answer_max_ms >= report.longest_stall.ms - 1.0, "{report:?}");
}

#[test]
fn a_reset_tcp_connection_is_reported_and_not_made_anew() {
    if !namespaces_available("tcp reset") {
        return;
    }
    let lab = Lab::new().unwrap();
    let server = Server::start(&lab.host_a, A);
    let clock = LabClock::start();
    let target = HttpTarget::new(server.http, "/small");
    let probe = TcpProbe::start(&lab.client, clock, target, Duration::from_millis(2)).unwrap();
    sleep(Duration::from_millis(100));
    server.reset_one();
    let deadline = clock.now() + Duration::from_secs(5);
    while probe.snapshot().broken.is_none() && clock.now() < deadline {
        sleep(Duration::from_millis(1));
    }
    let answered = probe.snapshot().answered;
    sleep(Duration::from_millis(50));
    let report = probe.stop();
    assert_eq!(report.answered, answered);
    let (_, why) = report.broken.expect("the reset is seen");
    assert!(why.contains("reset") || why.contains("closed"), "{why}");
}
