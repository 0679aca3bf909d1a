//! What of the interface goes to another host: its state, what the driver uses, and a guest that announces itself.

use super::*;
use crate::saved::sections::VirtioMmio;

const STATUS_FEATURE: u64 = 1 << 16;
const CONTROL_QUEUE: u64 = 1 << 17;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const ANNOUNCING: u64 = FEATURES | STATUS_FEATURE | CONTROL_QUEUE | GUEST_ANNOUNCE;
const LINK_STATUS: u64 = 0x106;
const LINK_UP: u8 = 1;
const ANNOUNCE: u8 = 2;

/// An interface with two queues, as it was saved before there was a control queue.
const BEFORE_THE_CONTROL_QUEUE: &[u8] = &[
    0, 1, 15, 1, 0, 1, 160, 128, 128, 128, 18, 1, 0, 2, 128, 2, 1, 5, 3, 1, 128, 128, 4, 128, 160, 4, 128,
    192, 4, 128, 2, 1, 188, 5, 188, 5, 1, 128, 128, 8, 128, 160, 8, 128, 192, 8,
];

impl Driver {
    fn link_status(&self) -> u8 {
        let mut byte = [0];
        self.net.transport.read(LINK_STATUS, &mut byte);
        byte[0]
    }

    /// Sends a command in the pieces that Linux makes, and returns the answer.
    fn command(&self, number: u16, class: u8, command: u8) -> u8 {
        let at = BUFFERS + 0x20_0000 + 64 * u64::from(number);
        self.put(at, [class, command]);
        self.put(at + 8, 0xee_u8);
        let head = 2 * number;
        self.describe(CONTROL, head, at, 2, DESCRIPTOR_NEXT, head + 1);
        self.describe(CONTROL, head + 1, at + 8, 1, DESCRIPTOR_WRITE, 0);
        self.offer(CONTROL, head);
        eventually("the command is answered", || self.used(CONTROL) == number + 1);
        self.memory.tracked().read_obj(GuestAddress(at + 8)).unwrap()
    }

    fn copy_memory_to(&self, other: &Self) {
        let (from, to) = (&self.memory, &other.memory);
        from.for_each_page(0, from.page_count(), |page, bytes| to.write_page(page, bytes).unwrap()).unwrap();
    }
}

#[test]
fn a_guest_that_can_is_asked_to_announce_itself_and_acknowledges() {
    let Some((tap, _peer)) = taps_or_skip() else { return };
    let source = Driver::new(tap_again(&tap));
    source.start(ANNOUNCING);
    assert_eq!(source.link_status(), LINK_UP);
    let saved = source.net.transport.save();
    assert_eq!(saved.queues.len(), 3);

    let target = Driver::new(tap);
    source.copy_memory_to(&target);
    target.net.transport.restore(&saved, target.memory.tracked()).unwrap();
    target.net.ask_for_announcement();
    assert_eq!(target.link_status(), LINK_UP | ANNOUNCE);
    assert_eq!(target.get(0x60) & 2, 2, "no interrupt for the changed configuration");
    assert_eq!(target.get(0xfc), source.get(0xfc) + 1, "the configuration's generation");
    let running = target.spawn();
    assert!(running.control.run());
    assert_eq!(target.command(0, 4, 0), 1, "a command that there is not");
    assert_eq!(target.command(1, 3, 1), 1, "another");
    assert_eq!(target.link_status(), LINK_UP | ANNOUNCE);
    assert_eq!(target.command(2, 3, 0), 0, "the acknowledgement");
    assert_eq!(target.link_status(), LINK_UP);
    // No answer is possible to one, and the other says nothing.
    target.describe(CONTROL, 8, BUFFERS, 2, 0, 0);
    target.offer(CONTROL, 8);
    target.describe(CONTROL, 9, BUFFERS, 1, DESCRIPTOR_WRITE, 0);
    target.offer(CONTROL, 9);
    eventually("both are used up", || target.used(CONTROL) == 5);
    assert_eq!(target.get(STATUS) & NEEDS_RESET, 0);

    target.net.ask_for_announcement();
    target.set(STATUS, 0);
    assert_eq!(target.link_status(), LINK_UP, "a reset forgets it");
}

#[test]
fn a_guest_that_can_not_announce_itself_is_not_asked() {
    let Some((tap, _peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    for features in
        [FEATURES, ANNOUNCING & !CONTROL_QUEUE, ANNOUNCING & !STATUS_FEATURE, ANNOUNCING & !GUEST_ANNOUNCE]
    {
        driver.start(features);
        driver.net.ask_for_announcement();
        assert_eq!((driver.link_status(), driver.get(0x60) & 2), (LINK_UP, 0), "{features:#x}");
    }
    assert!(driver.negotiate(ANNOUNCING));
    driver.net.ask_for_announcement();
    assert_eq!(driver.link_status(), LINK_UP, "its driver is not up yet");
}

#[test]
fn a_state_from_before_the_control_queue_is_taken_and_given_on() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let saved: VirtioMmio = postcard::from_bytes(BEFORE_THE_CONTROL_QUEUE).unwrap();
    assert_eq!((saved.queues.len(), saved.queues[1].next_avail, saved.driver_features), (2, 700, FEATURES));
    let driver = Driver::new(tap);
    driver.net.transport.restore(&saved, driver.memory.tracked()).unwrap();
    let again = postcard::to_stdvec(&driver.net.transport.save()).unwrap();
    assert_eq!(again, BEFORE_THE_CONTROL_QUEUE, "an older version can't take it back");
    // Both go on where they were.
    driver.put(QUEUE_BASES[TRANSMIT] + AVAILABLE + 2, 700_u16);
    driver.put(QUEUE_BASES[RECEIVE] + AVAILABLE + 2, 5_u16);
    let running = driver.spawn();
    assert!(running.control.run());
    driver.send(0, &arp(1));
    eventually("it is sent", || driver.used(TRANSMIT) == 701);
    assert!(peer_reads(&peer).is_some());
    driver.offer_buffer(7);
    peer_writes(&peer, &to_guest(2));
    eventually("it is received", || driver.used(RECEIVE) == 4);
    assert_eq!(driver.received(7, 200)[VNET_HEADER_BYTES..], to_guest(2));
}

#[test]
fn a_host_without_an_offload_that_the_driver_uses_is_refused_by_its_name() {
    let Some((tap, _peer)) = taps_or_skip() else { return };
    let source = Driver::new(tap_again(&tap));
    let tcp = FEATURES | 1 | 1 << 11;
    source.start(tcp);
    assert_eq!(source.net.features(), tcp);
    let saved = source.net.transport.save();
    let file = tap.file().try_clone().unwrap();
    let poor = Driver::new(Tap::from_parts(file, tap.name(), TapOffloads::CHECKSUM));
    let error = poor.net.check_features(source.net.features()).unwrap_err().to_string();
    assert!(error.contains("HOST_TSO4") && !error.contains("(CSUM)"), "{error}");
    assert!(poor.net.check_features(FEATURES | 1).is_ok());
    assert!(poor.net.transport.restore(&saved, poor.memory.tracked()).is_err());
    assert!(!poor.negotiate(tcp), "it is not offered either");
    let rich = Driver::new(tap_again(&tap));
    rich.net.check_features(tcp).unwrap();
    rich.net.transport.restore(&saved, rich.memory.tracked()).unwrap();
}

#[test]
fn after_a_pause_no_frame_reaches_memory() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    driver.start(FEATURES | 1 << 15);
    let (stop, stopped) = mpsc::channel::<()>();
    let hammer = thread::spawn(move || {
        let frame = [&[0; VNET_HEADER_BYTES][..], &to_guest(7)].concat();
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
            // A full tap drops frames, which is as good.
            let _ = peer.file().write(&frame);
        }
    });
    let digest = || {
        let mut digest = 0_u32;
        let pages = driver.memory.page_count();
        driver
            .memory
            .for_each_page(0, pages, |_, bytes| digest = crc32c::crc32c_append(digest, bytes))
            .unwrap();
        digest
    };
    let (mut offered, mut received) = (0_u16, 0);
    for round in 0..30 {
        // Always some that are free, so that only the pause holds frames back.
        while offered.wrapping_sub(driver.used(RECEIVE)) < 200 {
            driver.offer_buffer(offered % 256);
            offered = offered.wrapping_add(1);
        }
        let before = driver.used(RECEIVE);
        eventually("frames come", || driver.used(RECEIVE) != before);
        running.control.pause();
        let paused = digest();
        thread::sleep(Duration::from_millis(3));
        assert_eq!(digest(), paused, "memory changed after pause {round}");
        received += u32::from(driver.used(RECEIVE).wrapping_sub(before));
        assert!(running.control.run());
    }
    assert!(received > 30, "{received} frames");
    stop.send(()).unwrap();
    hammer.join().unwrap();
}
