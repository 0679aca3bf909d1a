//! Packet capture: announcements written into a tap reach the client, and the switch learns from them.

use std::io::Write;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use ferry_lab::capture::{CaptureError, Frame, FrameKind};
use ferry_lab::network::lab::{BRIDGE, CLIENT_INTERFACE, CLIENT_IPV4, TAP, VM_IPV4, VM_MAC, ipv6_beside};
use ferry_lab::{Capture, Lab, LabClock, Links, Namespace, Scope, SwitchPort};
use ferry_vmm::tap::{Tap, VNET_HEADER_BYTES};

use crate::tier::namespaces_available;

const ARRIVAL: Duration = Duration::from_secs(2);

/// A broadcast ARP or RARP packet of the VM, about itself.
fn announcement(ethertype: [u8; 2], operation: u8) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(VM_MAC.octets());
    frame.extend(ethertype);
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    for _ in 0..2 {
        frame.extend(VM_MAC.octets());
        frame.extend(VM_IPV4.octets());
    }
    frame
}

/// Attaches to the tap of `host`, waits until its bridge forwards, and announces.
fn announce(host: &Namespace, frame: &[u8], capture: &Capture, kind: FrameKind) -> Frame {
    let tap = host.run(|| Tap::attach(TAP).unwrap()).unwrap();
    Links::of(host).wait_until_carrying(TAP, ARRIVAL).unwrap();
    tap.file().write_all(frame).unwrap();
    capture.wait_for(ARRIVAL, |frame| frame.kind() == kind).expect("the announcement arrives")
}

#[test]
fn announcements_reach_the_client_and_move_the_vm_on_the_switch() {
    if !namespaces_available("announcements") {
        return;
    }
    let lab = Lab::new().unwrap();
    let clock = LabClock::start();
    let capture = Capture::start(&lab.client, clock, CLIENT_INTERFACE, Scope::Announcements, |frame| {
        frame.announced() == Some(VM_MAC)
    })
    .unwrap();
    let request = FrameKind::GratuitousArpRequest { mac: VM_MAC, ip: VM_IPV4 };
    let cases = [
        (&lab.host_a, SwitchPort::HostA, [0x08, 0x06], 1, request),
        (
            &lab.host_b,
            SwitchPort::HostB,
            [0x08, 0x06],
            2,
            FrameKind::GratuitousArpReply { mac: VM_MAC, ip: VM_IPV4 },
        ),
        (&lab.host_a, SwitchPort::HostA, [0x80, 0x35], 3, FrameKind::Rarp { mac: VM_MAC }),
    ];
    for (host, port, ethertype, operation, kind) in cases {
        let before_us = clock.now_us();
        let frame = announce(host, &announcement(ethertype, operation), &capture, kind);
        assert!(frame.at_us + 2000 >= before_us && frame.at_us <= clock.now_us() + 2000, "{frame:?}");
        assert!(!frame.outgoing && frame.source() == Some(VM_MAC));
        assert_eq!(lab.vm_port(VM_MAC).unwrap(), Some(port));
    }
    assert_eq!(capture.wait_for(Duration::ZERO, |frame| frame.source() != Some(VM_MAC)), None);
    let captured = capture.stop();
    assert!(captured.frames.len() == 3 && captured.left_out == 0, "{captured:?}");
}

#[test]
fn the_kernel_filter_keeps_neighbour_advertisements_and_drops_the_rest() {
    if !namespaces_available("capture scope") {
        return;
    }
    let lab = Lab::new().unwrap();
    let clock = LabClock::start();
    let start = |scope| Capture::start(&lab.client, clock, CLIENT_INTERFACE, scope, |_| true).unwrap();
    let (all, announcements) = (start(Scope::Everything), start(Scope::Announcements));
    let host_mac = Links::of(&lab.host_a).mac(BRIDGE).unwrap();
    for address in [IpAddr::V4(CLIENT_IPV4), IpAddr::V6(ipv6_beside(CLIENT_IPV4))] {
        lab.host_a
            .run(|| {
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                UdpSocket::bind(any).unwrap().send_to(b"knock", (address, 9)).unwrap();
            })
            .unwrap();
    }
    let is_datagram = |ethertype| {
        move |frame: &Frame| {
            frame.kind() == FrameKind::Other { ethertype }
                && frame.source() == Some(host_mac)
                && !frame.outgoing
        }
    };
    assert!(all.wait_for(ARRIVAL, is_datagram(0x0800)).is_some());
    assert!(all.wait_for(ARRIVAL, is_datagram(0x86dd)).is_some());
    // The kernel of the client answers for its own address, which this capture sees as sent.
    let answers = announcements.wait_for(ARRIVAL, |frame| {
        frame.outgoing && matches!(frame.kind(), FrameKind::SolicitedAdvertisement { .. })
    });
    assert!(answers.is_some(), "{:?}", announcements.snapshot());
    let frames = announcements.stop().frames;
    assert!(frames.iter().any(|frame| matches!(frame.kind(), FrameKind::ArpRequest { .. })), "{frames:?}");
    let foreign = frames
        .iter()
        .any(|frame| matches!(frame.kind(), FrameKind::Other { .. } | FrameKind::Malformed { .. }));
    assert!(!foreign, "{frames:?}");
}

#[test]
fn a_capture_on_no_interface_says_so() {
    if !namespaces_available("capture errors") {
        return;
    }
    let host = Namespace::new("bare").unwrap();
    let error = Capture::start(&host, LabClock::start(), "nic7", Scope::Everything, |_| true).unwrap_err();
    assert!(matches!(&error, CaptureError::Missing { interface, .. } if interface == "nic7"), "{error}");
}
