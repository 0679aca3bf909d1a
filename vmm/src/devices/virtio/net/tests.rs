//! The interface between a hand-made driver and a real tap, each test in a network namespace of its own.

use std::fs;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;

mod handover;
mod offloads;

use crate::config::{Backing, MemoryConfig};
use crate::memory;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const STATUS: u64 = 0x70;
const STATUS_LIVE: u32 = 1 | 2 | 4 | 8;
const NEEDS_RESET: u32 = 64;
const FEATURES: u64 = (1 << 32) | (1 << 29) | (1 << 5);

/// Guest memory of a queue: descriptors, available ring, used ring, buffers.
const QUEUE_BASES: [u64; 3] = [0x1_0000, 0x2_0000, 0x3_0000];
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const MEMORY_END: u32 = 16 << 20;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_BYTES: u32 = 2048;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;

/// A tap for the machine and one for its peer, joined by a bridge, in a namespace of the calling thread.
fn taps_or_skip() -> Option<(Tap, Tap)> {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        println!("SKIPPED tier tap: can't make a network namespace: {error}");
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs root: {error}");
        return None;
    }
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    ip("link add br0 type bridge forward_delay 0 mcast_snooping 0");
    for name in ["guest0", "peer0"] {
        Tap::make_persistent(name).unwrap();
        ip(&format!("link set {name} master br0"));
        ip(&format!("link set {name} up"));
    }
    ip("link set br0 up");
    let (guest, peer) = (Tap::attach("guest0").unwrap(), Tap::attach("peer0").unwrap());
    // A bridge's ports take their time until they forward.
    eventually("the bridge forwards", || {
        let states = ["guest0", "peer0"].map(|name| {
            fs::read_to_string(format!("/sys/class/net/{name}/brport/state")).unwrap_or_default()
        });
        let shown = Command::new("bridge").args(["-o", "link"]).output().unwrap().stdout;
        let shown = String::from_utf8_lossy(&shown).matches("state forwarding").count();
        shown == 2 || states.iter().all(|state| state.trim() == "3")
    });
    Some((guest, peer))
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("this never came true: {what}");
}

fn arp(fill: u8) -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC].concat();
    frame.extend(ETHERTYPE_ARP);
    frame.resize(60, fill);
    frame
}

fn to_guest(fill: u8) -> Vec<u8> {
    let mut frame = [MAC, [2, 0, 0, 0, 0, 9]].concat();
    frame.extend([0x88, 0xb5]);
    frame.resize(200, fill);
    frame
}

/// What a guest's driver would do.
struct Driver {
    net: Arc<Net>,
    memory: GuestRam,
}

impl Driver {
    fn new(tap: Tap) -> Self {
        let config = MemoryConfig::new(MEMORY_END.into(), Backing::PrivateAnonymous);
        let memory = memory::allocate(&config).unwrap();
        Self { net: Arc::new(Net::new(0, MAC, tap, memory.clone()).unwrap()), memory }
    }

    fn set(&self, offset: u64, value: u32) {
        self.net.transport.write(offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.net.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn negotiate(&self, features: u64) -> bool {
        self.set(STATUS, 0);
        self.set(STATUS, 3);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.set(0x24, select);
            self.set(0x20, u32::try_from(half).unwrap());
        }
        self.set(STATUS, 11);
        self.get(STATUS) & 8 != 0
    }

    fn start(&self, features: u64) {
        assert!(self.negotiate(features));
        for (index, base) in (0..).zip(QUEUE_BASES) {
            self.memory.zero_pages(base / 4096, 4).unwrap();
            self.set_up_queue(index, base);
        }
        self.set(STATUS, STATUS_LIVE);
    }

    fn set_up_queue(&self, index: u32, base: u64) {
        self.set(0x30, index);
        assert_eq!(self.get(0x34), u32::from(QUEUE_SIZES_MAX[index as usize]));
        self.set(0x38, u32::from(QUEUE_SIZES_MAX[index as usize]));
        for (register, address) in [(0x80, base), (0x90, base + AVAILABLE), (0xa0, base + USED)] {
            self.set(register, u32::try_from(address & 0xffff_ffff).unwrap());
            self.set(register + 4, u32::try_from(address >> 32).unwrap());
        }
        self.set(0x44, 1);
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.tracked().write_obj(value, GuestAddress(address)).unwrap();
    }

    fn u16_at(&self, address: u64) -> u16 {
        self.memory.tracked().read_obj(GuestAddress(address)).unwrap()
    }

    fn describe(&self, queue: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = QUEUE_BASES[queue] + 16 * u64::from(index);
        self.put(at, address);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Makes the chain that starts at descriptor `head` available, and notifies.
    fn offer(&self, queue: usize, head: u16) {
        let ring = QUEUE_BASES[queue] + AVAILABLE;
        let index = self.u16_at(ring + 2);
        self.put(ring + 4 + 2 * u64::from(index % QUEUE_SIZES_MAX[queue]), head);
        self.put(ring + 2, index.wrapping_add(1));
        self.net.transport.notify(queue).write(1).unwrap();
    }

    fn used(&self, queue: usize) -> u16 {
        self.u16_at(QUEUE_BASES[queue] + USED + 2)
    }

    fn buffer(queue: usize, index: u16) -> u64 {
        BUFFERS + (queue as u64) * 0x8_0000 + u64::from(index) * u64::from(BUFFER_BYTES)
    }

    /// Sends a frame in two pieces, header apart, with rubbish in the header.
    fn send(&self, index: u16, frame: &[u8]) {
        let at = Self::buffer(TRANSMIT, index);
        self.memory.tracked().write_slice(&[0xee; VNET_HEADER_BYTES], GuestAddress(at)).unwrap();
        self.memory.tracked().write_slice(frame, GuestAddress(at + 64)).unwrap();
        self.describe(TRANSMIT, index, at, 12, DESCRIPTOR_NEXT, index + 1);
        self.describe(TRANSMIT, index + 1, at + 64, u32::try_from(frame.len()).unwrap(), 0, 0);
        self.offer(TRANSMIT, index);
    }

    fn offer_buffer(&self, index: u16) {
        let at = Self::buffer(RECEIVE, index);
        self.describe(RECEIVE, index, at, BUFFER_BYTES, DESCRIPTOR_WRITE, 0);
        self.offer(RECEIVE, index);
    }

    fn received(&self, index: u16, bytes: usize) -> Vec<u8> {
        let mut frame = vec![0; bytes + VNET_HEADER_BYTES];
        let at = GuestAddress(Self::buffer(RECEIVE, index));
        self.memory.tracked().read_slice(&mut frame, at).unwrap();
        frame
    }

    /// Starts the thread; the returned control parks and ends it.
    fn spawn(&self) -> Running {
        let control = Arc::new(Control::new());
        control.set_kicks(vec![self.net.kick()]);
        let thread = Arc::clone(&self.net).spawn(Arc::clone(&control)).unwrap();
        Running { control, thread: Some(thread) }
    }
}

struct Running {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control.exit();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The next frame at the peer, header and all, if one comes within a second.
fn peer_reads(peer: &Tap) -> Option<Vec<u8>> {
    let mut frame = vec![0; 4096];
    for _ in 0..1000 {
        if let Ok(length) = peer.file().read(&mut frame) {
            frame.truncate(length);
            return Some(frame);
        }
        thread::sleep(Duration::from_millis(1));
    }
    None
}

fn peer_writes(peer: &Tap, frame: &[u8]) {
    let bytes = [&[0; VNET_HEADER_BYTES], frame].concat();
    assert_eq!(peer.file().write(&bytes).unwrap(), bytes.len());
}

#[test]
fn frames_travel_both_ways_and_addresses_are_observed() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    for features in [FEATURES, FEATURES & !(1 << 29)] {
        let driver = Driver::new(tap_again(&tap));
        let (seen, observed) = mpsc::channel();
        driver.net.set_observer(Box::new(move |frame| seen.send(frame.to_vec()).unwrap()));
        let running = driver.spawn();
        assert!(running.control.run());
        driver.start(features);
        driver.send(0, &arp(7));
        let mut sent = vec![0; VNET_HEADER_BYTES];
        sent.extend(arp(7));
        assert_eq!(peer_reads(&peer).unwrap(), sent, "the header is cleared, the frame is whole");
        assert_eq!(observed.recv_timeout(Duration::from_secs(5)).unwrap(), arp(7));
        driver.send(2, &to_guest(1));
        eventually("both are used", || driver.used(TRANSMIT) == 2);
        assert!(observed.try_recv().is_err(), "only frames about addresses are observed");

        for region in driver.memory.tracked().iter() {
            (**region).bitmap().take(|_, _| {});
        }
        driver.offer_buffer(0);
        peer_writes(&peer, &to_guest(5));
        eventually("a frame is received", || driver.used(RECEIVE) == 1);
        let received = driver.received(0, 200);
        assert_eq!(received[..VNET_HEADER_BYTES], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(received[VNET_HEADER_BYTES..], to_guest(5));
        let region = driver.memory.tracked().iter().next().unwrap();
        for address in [Driver::buffer(RECEIVE, 0), QUEUE_BASES[RECEIVE] + USED] {
            assert!(region.bitmap().dirty_at(usize::try_from(address).unwrap()), "{address:#x} is clean");
        }
        assert_eq!(driver.get(0x60) & 1, 1, "an interrupt is pending");
    }
}

/// Each driver needs the tap for itself, one after the other.
fn tap_again(tap: &Tap) -> Tap {
    let file = tap.file().try_clone().unwrap();
    Tap::from_parts(file, tap.name(), tap.supported_offloads())
}

#[test]
fn nothing_moves_while_parked_and_waiting_frames_can_be_dropped() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    driver.start(FEATURES);
    for index in 0..4 {
        driver.offer_buffer(index);
    }
    peer_writes(&peer, &to_guest(1));
    eventually("the first arrives", || driver.used(RECEIVE) == 1);

    running.control.pause();
    peer_writes(&peer, &to_guest(2));
    driver.send(0, &arp(1));
    thread::sleep(Duration::from_millis(30));
    assert_eq!((driver.used(RECEIVE), driver.used(TRANSMIT)), (1, 0), "frames moved while parked");
    driver.net.drop_queued_frames();
    peer_writes(&peer, &to_guest(3));
    assert!(running.control.run());
    eventually("both go on", || (driver.used(RECEIVE), driver.used(TRANSMIT)) == (2, 1));
    assert_eq!(driver.received(1, 200)[VNET_HEADER_BYTES..], to_guest(3), "the stale frame arrived");
    assert!(peer_reads(&peer).is_some());

    driver.net.send(&arp(9)).unwrap();
    assert_eq!(peer_reads(&peer).unwrap()[VNET_HEADER_BYTES..], arp(9));
    drop(running);
    driver.net.close();
    assert_eq!(driver.net.send(&arp(9)).unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[test]
fn frames_wait_in_the_tap_until_there_are_buffers() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    driver.start(FEATURES);
    for fill in 1..=3 {
        peer_writes(&peer, &to_guest(fill));
    }
    thread::sleep(Duration::from_millis(20));
    for index in 0..3 {
        driver.offer_buffer(index);
        eventually("a frame arrives in its buffer", || driver.used(RECEIVE) == index + 1);
        let fill = u8::try_from(index + 1).unwrap();
        assert_eq!(driver.received(index, 200)[VNET_HEADER_BYTES..], to_guest(fill));
    }
    // A buffer that is too small costs the frame, not the queue.
    driver.describe(RECEIVE, 9, Driver::buffer(RECEIVE, 9), 100, DESCRIPTOR_WRITE, 0);
    driver.offer(RECEIVE, 9);
    peer_writes(&peer, &to_guest(4));
    thread::sleep(Duration::from_millis(20));
    assert_eq!((driver.used(RECEIVE), driver.get(STATUS) & NEEDS_RESET), (3, 0));
}

type Fault = Box<dyn Fn(&Driver)>;

/// Ways to break a queue.
fn faults() -> Vec<(&'static str, Fault)> {
    let beyond = 1_u64 << 40;
    vec![
        (
            "more available than the ring holds",
            Box::new(|driver| {
                driver.put(QUEUE_BASES[TRANSMIT] + AVAILABLE + 2, 1000_u16);
                driver.net.transport.notify(TRANSMIT).write(1).unwrap();
            }),
        ),
        (
            "a buffer outside memory",
            Box::new(move |driver| {
                driver.describe(TRANSMIT, 0, beyond, 100, 0, 0);
                driver.offer(TRANSMIT, 0);
            }),
        ),
        (
            "a receive buffer outside memory",
            Box::new(move |driver| {
                driver.describe(RECEIVE, 0, beyond, 2048, DESCRIPTOR_WRITE, 0);
                driver.offer(RECEIVE, 0);
            }),
        ),
        (
            "an indirect descriptor",
            Box::new(|driver| {
                // A table that would make a good frame.
                driver.put(BUFFERS, BUFFERS + 4096);
                driver.put(BUFFERS + 8, 100_u32);
                driver.put(BUFFERS + 12, 0_u32);
                driver.describe(TRANSMIT, 0, BUFFERS, 16, DESCRIPTOR_INDIRECT, 0);
                driver.offer(TRANSMIT, 0);
            }),
        ),
        (
            "an indirect descriptor to receive into, behind another",
            Box::new(|driver| {
                driver.put(BUFFERS, BUFFERS + 4096);
                driver.put(BUFFERS + 8, 2000_u32);
                driver.put(BUFFERS + 12, u32::from(DESCRIPTOR_WRITE));
                driver.describe(RECEIVE, 0, BUFFERS + 8192, 12, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1);
                driver.describe(RECEIVE, 1, BUFFERS, 16, DESCRIPTOR_INDIRECT, 0);
                driver.offer(RECEIVE, 0);
            }),
        ),
        ("a head outside the table", Box::new(|driver| driver.offer(TRANSMIT, 999))),
        (
            "a ring that ends outside memory",
            Box::new(|driver| {
                driver.set(STATUS, 0);
                assert!(driver.negotiate(FEATURES));
                driver.set_up_queue(1, QUEUE_BASES[TRANSMIT]);
                driver.set(0x90, MEMORY_END - 4);
                driver.put(u64::from(MEMORY_END) - 2, 1_u16);
                driver.set(STATUS, STATUS_LIVE);
            }),
        ),
        (
            "a queue outside memory",
            Box::new(move |driver| {
                driver.set(STATUS, 0);
                assert!(driver.negotiate(FEATURES));
                driver.set_up_queue(1, beyond);
                driver.set(STATUS, STATUS_LIVE);
            }),
        ),
    ]
}

#[test]
fn a_driver_that_breaks_a_queue_must_reset_and_can_go_on() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    assert!(running.control.run());
    for (what, fault) in faults() {
        driver.start(FEATURES);
        fault(&driver);
        if what.contains("receive") {
            peer_writes(&peer, &to_guest(1));
        }
        eventually(what, || driver.get(STATUS) & NEEDS_RESET != 0);
        assert_eq!(driver.get(0x60) & 2, 2, "{what}: the driver is told");
        driver.set(STATUS, STATUS_LIVE);
        assert_ne!(driver.get(STATUS) & NEEDS_RESET, 0, "{what}: only a reset helps");
        driver.start(FEATURES);
        driver.send(0, &arp(3));
        eventually("it works again", || driver.used(TRANSMIT) == 1);
    }
    // A chain that bites its tail is cut off, and what is no frame is dropped.
    driver.start(FEATURES);
    driver.describe(TRANSMIT, 0, BUFFERS, 2000, DESCRIPTOR_NEXT, 0);
    driver.offer(TRANSMIT, 0);
    driver.describe(TRANSMIT, 1, BUFFERS, 3, 0, 0);
    driver.offer(TRANSMIT, 1);
    eventually("both are used up", || driver.used(TRANSMIT) == 2);
}

#[test]
fn a_restored_interface_continues_its_queues() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let source = Driver::new(tap_again(&tap));
    let running = source.spawn();
    assert!(running.control.run());
    source.start(FEATURES);
    source.offer_buffer(0);
    source.offer_buffer(1);
    peer_writes(&peer, &to_guest(1));
    eventually("it is received", || source.used(RECEIVE) == 1);
    source.send(0, &arp(1));
    eventually("it is sent", || source.used(TRANSMIT) == 1);
    running.control.pause();
    let saved = source.net.transport.save();
    drop(running);

    let target = Driver::new(tap_again(&tap));
    let pages = source.memory.page_count();
    source
        .memory
        .for_each_page(0, pages, |page, bytes| target.memory.write_page(page, bytes).unwrap())
        .unwrap();
    target.net.transport.restore(&saved, target.memory.tracked()).unwrap();
    assert_eq!(target.net.transport.save(), saved);
    let running = target.spawn();
    assert!(running.control.run());
    peer_writes(&peer, &to_guest(2));
    eventually("the second buffer is next", || target.used(RECEIVE) == 2);
    assert_eq!(target.received(1, 200)[VNET_HEADER_BYTES..], to_guest(2));
    target.send(2, &arp(2));
    eventually("sending goes on", || target.used(TRANSMIT) == 2);
}

#[test]
fn impossible_saved_interfaces_are_refused() {
    let Some((tap, _peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    driver.start(FEATURES);
    let good = driver.net.transport.save();
    let restore = |change: &dyn Fn(&mut crate::saved::sections::VirtioMmio)| {
        let mut saved = good.clone();
        change(&mut saved);
        driver.net.transport.restore(&saved, driver.memory.tracked())
    };
    assert!(restore(&|_| {}).is_ok());
    assert!(restore(&|saved| saved.device_type = 2).is_err());
    assert!(restore(&|saved| saved.slot = 1).is_err());
    assert!(restore(&|saved| saved.driver_features |= 1 << 60).is_err());
    assert!(restore(&|saved| saved.queues.truncate(1)).is_err());
    assert!(restore(&|saved| saved.queues[0].size = 3).is_err());
    assert!(restore(&|saved| saved.queues[0].size = 512).is_err());
    assert!(restore(&|saved| saved.queues[1].used = 1 << 40).is_err());
    assert!(restore(&|saved| saved.queues[1].available += 1).is_err());
    assert_eq!(driver.net.transport.save(), good, "a refused state changed something");
}

#[test]
fn only_offered_features_can_be_negotiated() {
    let Some((tap, _peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    assert_eq!([driver.get(0), driver.get(4), driver.get(8)], [u32::from_le_bytes(*b"virt"), 2, 1]);
    assert!(driver.negotiate(FEATURES));
    assert!(!driver.negotiate(FEATURES & !(1 << 32)), "a legacy driver");
    assert!(!driver.negotiate(FEATURES | 1 << 22), "several queue pairs");
    let mut mac = [0; 6];
    driver.net.transport.read(0x100, &mut mac);
    assert_eq!(mac, MAC);
}

#[test]
fn no_driver_makes_the_interface_panic_or_hang() {
    let Some((tap, peer)) = taps_or_skip() else { return };
    let driver = Driver::new(tap);
    let running = driver.spawn();
    let rings = proptest::collection::vec(any::<u8>(), 4096);
    let registers = proptest::collection::vec((0_u64..0x140, any::<u32>()), 0..20);
    let everything = driver.net.transport.offered_features();
    let features = prop_oneof![Just(FEATURES), Just(everything)];
    let strategy = (rings.clone(), rings.clone(), rings, registers, 0..4_u16, features);
    proptest!(ProptestConfig::with_cases(300), |((table, available, used, registers, ahead, features) in strategy)| {
        running.control.run();
        driver.start(features);
        for base in QUEUE_BASES {
            for (offset, bytes) in [(0, &table), (AVAILABLE, &available), (USED, &used)] {
                driver.memory.tracked().write_slice(bytes, GuestAddress(base + offset)).unwrap();
            }
            driver.put(base + AVAILABLE + 2, ahead);
        }
        peer_writes(&peer, &to_guest(1));
        for queue in [RECEIVE, TRANSMIT, CONTROL] {
            driver.net.transport.notify(queue).write(1).unwrap();
        }
        for (register, value) in registers {
            driver.set(register, value);
            driver.get(register);
        }
        running.control.pause();
    });
}
