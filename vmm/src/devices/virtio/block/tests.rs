//! The device between a hand-made driver and a real file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::super::driver::{
    AVAILABLE, BUFFERS, Driver, EVENT_INDEX, MEMORY_BYTES, NEEDS_RESET, Piece, Running, STATUS, USED,
    VERSION_1, eventually, memory,
};
use super::*;
use crate::config::DiskConfig;

const SIZE_BYTES: u64 = 8 << 20;
const WITH_ALL: u64 = VERSION_1 | EVENT_INDEX | 1 << 9 | 1 << 13 | 1 << 14 | 1 << 2 | 1 << 6;
const PLAIN: u64 = VERSION_1 | 1 << 9;

const HEADER: u64 = BUFFERS;
const STATUS_BYTE: u64 = BUFFERS + 0x1000;
const DATA: u64 = BUFFERS + 0x2000;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const UNSET: u8 = 0xee;

/// A device on a file, its driver, its threads.
struct Bench {
    driver: Driver,
    device: Arc<Block>,
    running: Running,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn bench(read_only: bool) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    File::create(&path).unwrap().set_len(SIZE_BYTES).unwrap();
    let config = DiskConfig { path: path.clone(), read_only, serial: None, locked: true, taken_over: None };
    let ram = memory();
    let disk = Disk::open(&config).unwrap();
    let device = Arc::new(Block::new(3, disk, Some("serial-7"), ram.clone()).unwrap());
    let running = Running::spawn(&device);
    assert!(running.control.run());
    let driver = Driver::new(device.transport(), ram, QUEUE_SIZE_MAX);
    Bench { driver, device, running, path, _directory: directory }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

impl Bench {
    /// Offers one request and gives its status once it is used.
    fn ask(&self, kind: u32, sector: u64, data: &[Piece]) -> u8 {
        let Self { driver, .. } = self;
        driver.write(HEADER, &header(kind, sector));
        driver.put(STATUS_BYTE, UNSET);
        let mut pieces = vec![Piece::FromGuest(HEADER, 16)];
        pieces.extend(data);
        pieces.push(Piece::ToGuest(STATUS_BYTE, 1));
        driver.lay(0, &pieces);
        let before = driver.used();
        driver.offer(0);
        eventually("the request is used", || driver.used() != before);
        assert_eq!(driver.used(), before.wrapping_add(1));
        driver.read(STATUS_BYTE, 1)[0]
    }

    fn on_disk(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        File::open(&self.path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from((index * 7 + index / 512) % 251).unwrap() ^ seed).collect()
}

#[test]
fn the_guest_writes_reads_and_flushes() {
    for features in [WITH_ALL, PLAIN, VERSION_1] {
        let bench = bench(false);
        let driver = &bench.driver;
        assert_eq!(driver.offered() & WITH_ALL, WITH_ALL);
        driver.start(features);
        // Three pieces that are no sectors by themselves, and more than a thread's buffer.
        let bytes = pattern(1, 600 << 10);
        driver.write(DATA, &bytes);
        let rest = u32::try_from(bytes.len()).unwrap() - 1000 - 24;
        let out = [
            Piece::FromGuest(DATA, 1000),
            Piece::FromGuest(DATA + 1000, 24),
            Piece::FromGuest(DATA + 1024, rest),
        ];
        assert_eq!(bench.ask(VIRTIO_BLK_T_OUT, 9, &out), OK);
        assert_eq!(driver.used_entry(0), (0, 1), "only the status was written");
        assert_eq!(bench.on_disk(9 * 512, bytes.len()), bytes);
        assert_eq!(bench.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        let into = DATA + (1 << 20);
        let length = u32::try_from(bytes.len()).unwrap();
        let back = [Piece::ToGuest(into, 100), Piece::ToGuest(into + 100, length - 100)];
        assert_eq!(bench.ask(VIRTIO_BLK_T_IN, 9, &back), OK);
        assert_eq!(driver.used_entry(2), (0, length + 1));
        assert_eq!(driver.read(into, bytes.len()), bytes);
        assert_eq!(driver.get(0x60) & 1, 1, "an interrupt is pending");
    }
}

#[test]
fn the_guest_is_told_what_the_disk_is() {
    let bench = bench(false);
    let driver = &bench.driver;
    let config = |offset: u64| driver.get(0x100 + offset);
    assert_eq!((config(0), config(4)), (u32::try_from(SIZE_BYTES / 512).unwrap(), 0));
    assert_eq!((config(12), config(20)), (254, 512), "seg_max, blk_size");
    assert_eq!((config(36), config(40), config(44)), (1 << 21, 16, 8), "discard");
    assert_eq!((config(48), config(52), config(56)), (1 << 15, 1, 1), "write zeroes");
    driver.start(WITH_ALL);
    driver.write(DATA, &[UNSET; 32]);
    assert_eq!(bench.ask(VIRTIO_BLK_T_GET_ID, 0, &[Piece::ToGuest(DATA, 20)]), OK);
    assert_eq!(driver.read(DATA, 21), *b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0\xee");
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn ranges_are_discarded_and_zeroed_where_they_are_sound() {
    let bench = bench(false);
    let driver = &bench.driver;
    driver.start(WITH_ALL);
    let filled = pattern(9, 64 << 10);
    driver.write(DATA, &filled);
    assert_eq!(bench.ask(VIRTIO_BLK_T_OUT, 0, &[Piece::FromGuest(DATA, 64 << 10)]), OK);
    let ask = |kind, ranges: &[Vec<u8>]| {
        let bytes = ranges.concat();
        driver.write(DATA, &bytes);
        bench.ask(kind, 0, &[Piece::FromGuest(DATA, u32::try_from(bytes.len()).unwrap())])
    };
    let zeroed = |sector: usize, sectors: usize| {
        let bytes = bench.on_disk(sector as u64 * 512, sectors * 512);
        bytes.iter().all(|byte| *byte == 0)
    };
    assert_eq!(ask(VIRTIO_BLK_T_WRITE_ZEROES, &[range(3, 2, 0)]), OK);
    assert_eq!(ask(VIRTIO_BLK_T_WRITE_ZEROES, &[range(16, 8, 1)]), OK);
    assert_eq!(ask(VIRTIO_BLK_T_DISCARD, &[range(32, 8, 0), range(64, 16, 0)]), OK);
    assert!(zeroed(3, 2) && zeroed(16, 8) && zeroed(32, 8) && zeroed(64, 16));
    assert_eq!(bench.on_disk(0, 3 * 512), filled[..3 * 512]);
    assert_eq!(bench.on_disk(40 * 512, 24 * 512), filled[40 * 512..64 * 512]);

    let end = SIZE_BYTES / 512;
    for (kind, ranges, status) in [
        (VIRTIO_BLK_T_DISCARD, vec![range(end - 1, 2, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(u64::MAX, 1, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, (1 << 21) + 1, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, 1, 0); 17], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, 1, 0), vec![0; 15]], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, 1, 1)], UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![range(0, 1, 2)], UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![range(0, (1 << 15) + 1, 0)], IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![range(0, 1, 0); 2], IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![range(0, 0, 0)], OK),
    ] {
        assert_eq!(ask(kind, &ranges), status, "{kind} {ranges:?}");
    }
    assert_eq!(bench.on_disk(0, 512), filled[..512], "a range that was refused was touched");
}

#[test]
fn what_cannot_be_done_is_answered_with_its_status() {
    let bench = bench(false);
    let driver = &bench.driver;
    driver.start(WITH_ALL);
    let end = SIZE_BYTES / 512;
    let out = |length| [Piece::FromGuest(DATA, length)];
    for (kind, sector, data, status) in [
        (VIRTIO_BLK_T_OUT, end - 1, &out(1024)[..], IOERR),
        (VIRTIO_BLK_T_OUT, u64::MAX / 512, &out(1024), IOERR),
        (VIRTIO_BLK_T_OUT, u64::MAX, &out(512), IOERR),
        (VIRTIO_BLK_T_OUT, 0, &out(511), IOERR),
        (VIRTIO_BLK_T_IN, end, &[Piece::ToGuest(DATA, 512)], IOERR),
        (VIRTIO_BLK_T_IN, 0, &[], OK),
        (VIRTIO_BLK_T_GET_ID, 0, &[Piece::ToGuest(DATA, 3)], OK),
        (77, 0, &[], UNSUPP),
    ] {
        assert_eq!(bench.ask(kind, sector, data), status, "{kind} at {sector}");
    }
    // Far more data than a request may have, by naming the same memory again and again.
    let many = vec![Piece::ToGuest(DATA, 4 << 20); 9];
    assert_eq!(bench.ask(VIRTIO_BLK_T_IN, 0, &many), IOERR);
    // The storage itself fails: the file has lost its end.
    File::options().write(true).open(&bench.path).unwrap().set_len(512).unwrap();
    assert_eq!(bench.ask(VIRTIO_BLK_T_IN, 1, &[Piece::ToGuest(DATA, 512)]), IOERR);
    assert_eq!(bench.ask(VIRTIO_BLK_T_IN, 0, &[Piece::ToGuest(DATA, 512)]), OK, "others go on");
}

#[test]
fn a_read_only_disk_is_never_written() {
    let bench = bench(true);
    let driver = &bench.driver;
    assert_eq!(
        driver.offered() & (1 << 5 | 1 << 13 | 1 << 14),
        1 << 5,
        "read-only, without discard and zeroes"
    );
    driver.start(PLAIN | 1 << 5);
    driver.write(DATA, &pattern(3, 512));
    assert_eq!(bench.ask(VIRTIO_BLK_T_OUT, 0, &[Piece::FromGuest(DATA, 512)]), IOERR);
    driver.write(DATA, &range(0, 1, 0));
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(bench.ask(kind, 0, &[Piece::FromGuest(DATA, 16)]), IOERR);
    }
    assert_eq!(bench.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(bench.ask(VIRTIO_BLK_T_IN, 0, &[Piece::ToGuest(DATA, 512)]), OK);
    assert_eq!(driver.read(DATA, 512), vec![0; 512]);
}

#[test]
fn a_disk_read_marks_the_pages_that_it_wrote() {
    let bench = bench(false);
    let driver = &bench.driver;
    driver.start(WITH_ALL);
    let region = driver.ram.tracked().iter().next().unwrap();
    let is_dirty = |address: u64| region.bitmap().dirty_at(usize::try_from(address).unwrap());
    (**region).bitmap().take(|_, _| {});
    assert_eq!(bench.ask(VIRTIO_BLK_T_IN, 0, &[Piece::ToGuest(DATA + 512, 8192)]), OK);
    for address in [DATA, DATA + 4096, DATA + 8192, STATUS_BYTE, USED] {
        assert!(is_dirty(address), "{address:#x} is clean");
    }
    assert!(!is_dirty(DATA + 3 * 4096));
}

#[test]
fn frames_that_cannot_be_answered_stop_the_device_until_it_is_reset() {
    let bench = bench(false);
    let driver = &bench.driver;
    for break_it in [
        |driver: &Driver| driver.lay(0, &[Piece::FromGuest(HEADER, 16)]),
        |driver: &Driver| driver.lay(0, &[Piece::FromGuest(HEADER, 15), Piece::ToGuest(STATUS_BYTE, 1)]),
        |driver: &Driver| driver.lay(0, &[Piece::ToGuest(STATUS_BYTE, 1)]),
        |driver: &Driver| {
            driver.lay(0, &[Piece::FromGuest(u64::MAX - 3, 16), Piece::ToGuest(STATUS_BYTE, 1)])
        },
        |driver: &Driver| driver.lay(0, &[Piece::FromGuest(HEADER, 16), Piece::ToGuest(MEMORY_BYTES, 1)]),
        |driver: &Driver| driver.describe(0, HEADER, 16, 4, 0),
        |driver: &Driver| driver.put(AVAILABLE + 2, 999_u16),
    ] {
        driver.start(WITH_ALL);
        break_it(driver);
        driver.offer(0);
        eventually("the device gives up", || driver.get(STATUS) & NEEDS_RESET != 0);
        driver.start(WITH_ALL);
        assert_eq!(bench.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), OK, "it works again");
    }
}

/// A hammering driver: whatever comes back is offered again at once.
struct Hammer {
    /// By number: whether the device has it.
    outstanding: Vec<bool>,
    seen: u16,
    offered: u16,
}

const HAMMER_DATA: u64 = BUFFERS + 0x10_0000;

impl Hammer {
    /// Lays the chains: even ones write what is in memory, odd ones read into it.
    fn lay(driver: &Driver, window: u16) {
        for number in 0..window {
            let at = HAMMER_DATA + u64::from(number) * 0x4000;
            let is_read = number % 2 == 1;
            let kind = if is_read { VIRTIO_BLK_T_IN } else { VIRTIO_BLK_T_OUT };
            driver.write(at, &header(kind, u64::from(number / 2) * 24));
            let data = if is_read {
                Piece::ToGuest(at + 0x1000, 12288)
            } else {
                Piece::FromGuest(at + 0x1000, 12288)
            };
            driver.lay(number * 3, &[Piece::FromGuest(at, 16), data, Piece::ToGuest(at + 16, 1)]);
        }
    }

    fn new(window: u16) -> Self {
        Self { outstanding: vec![false; window.into()], seen: 0, offered: 0 }
    }

    /// Takes what was used, each of which must have been offered and not come back before.
    fn collect(&mut self, driver: &Driver) {
        while self.seen != driver.used() {
            let number = usize::try_from(driver.used_entry(self.seen).0 / 3).unwrap();
            assert!(std::mem::take(&mut self.outstanding[number]), "request {number} came back twice");
            self.seen = self.seen.wrapping_add(1);
        }
    }

    /// Offers what the device has not.
    fn turn(&mut self, driver: &Driver) {
        self.collect(driver);
        for (number, outstanding) in (0_u16..).zip(&mut self.outstanding) {
            if !std::mem::replace(outstanding, true) {
                // A read finds other bytes each time if a write changed them in between.
                let mark = u64::from(self.offered);
                driver.put(HAMMER_DATA + u64::from(number) * 0x4000 + 0x1000, mark);
                driver.offer(number * 3);
                self.offered = self.offered.wrapping_add(1);
            }
        }
    }
}

/// Proves by looking: while the control has the device paused, neither memory nor disk changes, however many requests wait.
#[test]
fn nothing_touches_memory_or_disk_after_a_pause_and_nothing_is_lost() {
    let bench = bench(false);
    let Bench { driver, running, .. } = &bench;
    driver.start(WITH_ALL);
    let window = 64;
    Hammer::lay(driver, window);
    let mut hammer = Hammer::new(window);
    let everything = || {
        let memory = driver.read(0, usize::try_from(MEMORY_BYTES).unwrap());
        (crc32c::crc32c(&memory), crc32c::crc32c(&bench.on_disk(0, 1 << 20)), driver.used())
    };
    let mut paused_in_between = 0;
    for round in 0..100 {
        hammer.turn(driver);
        (0..round % 7).for_each(|_| thread::yield_now());
        running.control.pause();
        // At once: what is in hand takes microseconds to be given back.
        let taken = bench.device.transport().lock().queues[QUEUE].next_avail();
        assert_eq!(driver.used(), taken, "one is still in hand in round {round}");
        let before = everything();
        driver.notify();
        thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(everything(), before, "round {round}");
        paused_in_between += u32::from(driver.used() != hammer.offered);
        assert!(running.control.run());
    }
    assert!(paused_in_between > 3, "only {paused_in_between} pauses found requests waiting");
    eventually("all are used", || driver.used() == hammer.offered);
    hammer.collect(driver);
    assert!(!hammer.outstanding.contains(&true), "one was lost");
}

#[test]
fn a_reset_waits_for_what_is_in_hand_and_nothing_is_given_back_after_it() {
    const LENGTH: u32 = 4 << 20;
    let bench = bench(false);
    let driver = &bench.driver;
    let last = DATA + u64::from(LENGTH) - 8;
    for round in 0..50 {
        driver.start(WITH_ALL);
        driver.put(last, u64::MAX);
        driver.write(HEADER, &header(VIRTIO_BLK_T_IN, 0));
        let pieces =
            [Piece::FromGuest(HEADER, 16), Piece::ToGuest(DATA, LENGTH), Piece::ToGuest(STATUS_BYTE, 1)];
        driver.lay(0, &pieces);
        driver.offer(0);
        while driver.transport.lock().queues[QUEUE].next_avail() == 0 {
            thread::yield_now();
        }
        driver.set(STATUS, 0);
        let seen = || (driver.read(last, 8), driver.used());
        let before = seen();
        thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(seen(), before, "the device wrote to memory after its reset in round {round}");
    }
}

#[test]
fn a_saved_device_goes_on_in_another() {
    let (one, other) = (bench(false), bench(false));
    one.driver.start(WITH_ALL);
    one.driver.write(DATA, &pattern(4, 512));
    assert_eq!(one.ask(VIRTIO_BLK_T_OUT, 0, &[Piece::FromGuest(DATA, 512)]), OK);
    one.running.control.pause();
    one.driver.offer(0);
    other.running.control.pause();
    let pages = one.driver.ram.page_count();
    let copy = |page, bytes: &[u8; 4096]| other.driver.ram.write_page(page, bytes).unwrap();
    one.driver.ram.for_each_page(0, pages, copy).unwrap();
    let saved = one.device.transport().save();
    other.device.transport().restore(&saved, other.driver.ram.tracked()).unwrap();
    assert_eq!(other.driver.used(), 1);
    assert!(other.running.control.run());
    eventually("the request that waited is done", || other.driver.used() == 2);
    assert_eq!(other.on_disk(0, 512), pattern(4, 512));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_chain_makes_the_device_panic(
        descriptors in proptest::collection::vec((0..MEMORY_BYTES + 8192, 0_u32..1 << 20, 0_u16..8, 0_u16..20), 16),
        bytes in proptest::collection::vec(any::<u8>(), 64),
        kind in 0_u32..16,
        heads in proptest::collection::vec(0_u16..300, 1..8),
    ) {
        let bench = bench(false);
        let driver = &bench.driver;
        driver.start(WITH_ALL);
        for (index, (address, length, flags, next)) in (0..).zip(descriptors) {
            // Half of them name what could be a header.
            let address = if index % 2 == 0 { HEADER + address % 64 } else { address };
            driver.describe(index, address, length, flags, next);
        }
        driver.write(HEADER, &bytes);
        driver.write(HEADER, &header(kind, 3));
        for head in &heads {
            driver.offer(*head);
        }
        let offered = u16::try_from(heads.len()).unwrap();
        eventually("all are done, or the device has given up", || {
            driver.used() == offered || driver.get(STATUS) & NEEDS_RESET != 0
        });
        driver.start(WITH_ALL);
        prop_assert_eq!(bench.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    }
}
