//! Frames that stand for many, in several buffers, and those that somebody else finishes.

use super::*;

const CHECKSUM: u64 = 1;
const GUEST_CHECKSUM: u64 = 1 << 1;
const GUEST_TCP4: u64 = 1 << 7;
const HOST_TCP4: u64 = 1 << 11;
const MERGED_BUFFERS: u64 = 1 << 15;
const LARGE: u64 = FEATURES | GUEST_CHECKSUM | GUEST_TCP4 | MERGED_BUFFERS;

const PAYLOAD_BYTES: usize = 8000;
const HEADERS_BYTES: usize = 14 + 20 + 20;
const SEGMENT_BYTES: usize = 1448;
const MTU_BYTES: usize = 1500;

/// Checksum unfinished, TCP over IPv4, in pieces of [`SEGMENT_BYTES`].
const TCP4_HEADER: [u8; VNET_HEADER_BYTES] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// Where the driver says up to where it has seen, behind the used ring.
const AVAILABLE_EVENT: u64 = USED + 4 + 8 * 256;

/// A TCP segment far longer than the link takes, its checksum left open.
fn large_tcp(to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend([8, 0]);
    let total = u16::try_from(40 + PAYLOAD_BYTES).unwrap().to_be_bytes();
    let mut ip = [0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    let sum = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(ip);
    frame.extend([0x1f, 0x90, 0x1f, 0x91, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend((0..PAYLOAD_BYTES).map(|index| u8::try_from(index % 251).unwrap()));
    frame
}

fn payload() -> Vec<u8> {
    large_tcp(MAC, MAC)[HEADERS_BYTES..].to_vec()
}

const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn peer_writes_large(peer: &Tap) {
    let bytes = [&TCP4_HEADER[..], &large_tcp(MAC, PEER_MAC)].concat();
    assert_eq!(peer.file().write(&bytes).unwrap(), bytes.len());
}

impl Driver {
    /// Has a frame come through, after which the tap knows what the driver can do.
    fn warm_up(&self, peer: &Tap) {
        self.offer_buffer(200);
        peer_writes(peer, &to_guest(0));
        eventually("the first frame comes", || self.used(RECEIVE) == 1);
    }

    /// The used ring's element: which head, how many bytes.
    fn used_element(&self, index: u16) -> [u32; 2] {
        let at = QUEUE_BASES[RECEIVE] + USED + 4 + 8 * u64::from(index);
        self.memory.tracked().read_obj(GuestAddress(at)).unwrap()
    }
}

#[test]
fn a_frame_that_stands_for_many_fills_several_buffers_at_once() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    driver.start(LARGE);
    driver.warm_up(&peer);
    driver.offer_buffer(3);
    driver.offer_buffer(2);
    peer_writes_large(&peer);
    eventually("it waits for more than two buffers", || {
        driver.u16_at(QUEUE_BASES[RECEIVE] + AVAILABLE_EVENT) == 3
    });
    assert_eq!(driver.used(RECEIVE), 1, "a part of a frame is none");
    for region in driver.memory.tracked().iter() {
        (**region).bitmap().take(|_, _| {});
    }
    driver.offer_buffer(1);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.used(RECEIVE), 1, "nor is a larger part");
    driver.offer_buffer(0);
    eventually("it arrives whole", || driver.used(RECEIVE) == 5);
    let bytes = HEADERS_BYTES + PAYLOAD_BYTES + VNET_HEADER_BYTES;
    let rest = u32::try_from(bytes).unwrap() - 3 * BUFFER_BYTES;
    let elements: Vec<_> = (1..5).map(|index| driver.used_element(index)).collect();
    assert_eq!(elements, [[3, BUFFER_BYTES], [2, BUFFER_BYTES], [1, BUFFER_BYTES], [0, rest]]);
    let mut frame = Vec::new();
    for [head, length] in elements {
        let mut part = vec![0; length as usize];
        let at = GuestAddress(Driver::buffer(RECEIVE, u16::try_from(head).unwrap()));
        driver.memory.tracked().read_slice(&mut part, at).unwrap();
        frame.extend(part);
    }
    assert_eq!(frame[..10], TCP4_HEADER[..10], "what is left to do");
    assert_eq!(frame[10..12], [4, 0], "in how many buffers it lies");
    assert_eq!(frame[VNET_HEADER_BYTES + HEADERS_BYTES..], payload());
    let region = driver.memory.tracked().iter().next().unwrap();
    let buffers = (0..4).map(|index| Driver::buffer(RECEIVE, index));
    for address in buffers.chain([QUEUE_BASES[RECEIVE] + USED]) {
        assert!(region.bitmap().dirty_at(usize::try_from(address).unwrap()), "{address:#x} is clean");
    }
}

#[test]
fn a_driver_without_offloads_gets_frames_that_fit_the_link() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    for features in [FEATURES, FEATURES | MERGED_BUFFERS, FEATURES | GUEST_CHECKSUM] {
        driver.start(features);
        driver.warm_up(&peer);
        (0..8).for_each(|index| driver.offer_buffer(index));
        peer_writes_large(&peer);
        let count = u16::try_from(PAYLOAD_BYTES.div_ceil(SEGMENT_BYTES)).unwrap();
        eventually("every segment arrives", || driver.used(RECEIVE) == count + 1);
        let mut received = Vec::new();
        for index in 1..=count {
            let [head, length] = driver.used_element(index);
            let length = length as usize - VNET_HEADER_BYTES;
            assert!(length <= MTU_BYTES + 14, "{length}");
            let frame = driver.received(u16::try_from(head).unwrap(), length);
            assert_eq!(frame[1], 0, "no segmentation is left to do");
            assert!(features & GUEST_CHECKSUM != 0 || frame[0] == 0, "no checksum is left to do");
            received.extend_from_slice(&frame[VNET_HEADER_BYTES + HEADERS_BYTES..]);
        }
        assert_eq!(received, payload());
    }
}

#[test]
fn the_host_finishes_what_the_guest_leaves_undone() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    let send = |header: [u8; VNET_HEADER_BYTES], frame: &[u8]| {
        let at = Driver::buffer(TRANSMIT, 0);
        let frame = [&header[..], frame].concat();
        driver.memory.tracked().write_slice(&frame, GuestAddress(at)).unwrap();
        driver.describe(TRANSMIT, 0, at, u32::try_from(frame.len()).unwrap(), 0, 0);
        let before = driver.used(TRANSMIT);
        driver.offer(TRANSMIT, 0);
        eventually("it is sent", || driver.used(TRANSMIT) == before.wrapping_add(1));
    };
    driver.start(FEATURES | CHECKSUM | HOST_TCP4);
    let large = large_tcp(PEER_MAC, MAC);
    // Rubbish in the field that only a device writes.
    send([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0xee, 0xee], &large);
    let mut sent = Vec::new();
    for _ in 0..PAYLOAD_BYTES.div_ceil(SEGMENT_BYTES) {
        let frame = peer_reads(&peer).expect("a segment");
        assert_eq!(frame[..VNET_HEADER_BYTES], [0; VNET_HEADER_BYTES]);
        sent.extend_from_slice(&frame[VNET_HEADER_BYTES + HEADERS_BYTES..]);
    }
    assert_eq!(sent, payload());
    // Headers that make no sense, or were not agreed on: the frame is lost, and nothing else.
    for header in [
        [1, 4, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0],
        [1, 1, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        [1, 0x41, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0],
    ] {
        send(header, &large);
    }
    send([0; VNET_HEADER_BYTES], &arp(1));
    let next = peer_reads(&peer).expect("the next frame");
    assert_eq!(next[VNET_HEADER_BYTES..], arp(1), "one of them was sent");
    assert_eq!(driver.get(STATUS) & NEEDS_RESET, 0);
}

#[test]
fn a_frame_that_no_ring_can_hold_is_dropped_and_the_next_one_is_not() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    driver.start(LARGE);
    driver.warm_up(&peer);
    // The whole ring, with buffers of 8 bytes.
    for index in 0..256 {
        driver.describe(RECEIVE, index, Driver::buffer(RECEIVE, index), 8, DESCRIPTOR_WRITE, 0);
        driver.offer(RECEIVE, index);
    }
    peer_writes_large(&peer);
    peer_writes(&peer, &to_guest(3));
    eventually("the small one arrives", || driver.used(RECEIVE) == 28);
    assert_eq!(driver.get(STATUS) & NEEDS_RESET, 0);
}

#[test]
fn an_interrupt_comes_when_the_driver_said_it_wants_one() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    driver.start(FEATURES);
    let used_event = QUEUE_BASES[RECEIVE] + AVAILABLE + 4 + 2 * 256;
    driver.put(used_event, 2_u16);
    (0..4).for_each(|index| driver.offer_buffer(index));
    let interrupts = || driver.net.transport.interrupt().read().unwrap_or(0);
    interrupts();
    for count in 1..=4_u16 {
        peer_writes(&peer, &to_guest(1));
        eventually("it arrives", || driver.used(RECEIVE) == count);
        // The thread looks after the used index is written; parked, it is done.
        running.control.pause();
        assert_eq!(interrupts(), u64::from(count == 3), "after frame {count}");
        assert!(running.control.run());
    }
}
