//! The device with a hand-made driver.

use super::super::driver::{
    BUFFERS, Driver, EVENT_INDEX, MEMORY_BYTES, NEEDS_RESET, Piece, Running, STATUS, VERSION_1, eventually,
    memory,
};
use super::*;

fn device() -> (Driver, Running, Arc<Rng>) {
    let ram = memory();
    let device = Arc::new(Rng::new(0, ram.clone()).unwrap());
    let running = Running::spawn(&device);
    assert!(running.control.run());
    (Driver::new(device.transport(), ram, QUEUE_SIZE_MAX), running, device)
}

#[test]
fn requests_are_filled_with_different_bytes_up_to_the_bound() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX] {
        let (driver, running, _device) = device();
        driver.start(features);
        driver.lay(0, &[Piece::ToGuest(BUFFERS, 100), Piece::ToGuest(BUFFERS + 4096, 28)]);
        driver.lay(2, &[Piece::ToGuest(BUFFERS + 0x1_0000, 0x1_0000)]);
        driver.lay(3, &[Piece::FromGuest(BUFFERS, 8)]);
        for (used, head) in [(1, 0), (2, 2), (3, 3), (4, 0)] {
            driver.offer(head);
            eventually("it is used", || driver.used() == used);
        }
        let first = driver.read(BUFFERS + 4096, 28);
        assert_eq!(
            [0, 1, 2, 3].map(|index| driver.used_entry(index)),
            [(0, 128), (2, 4096), (3, 0), (0, 128)]
        );
        let bounded = driver.read(BUFFERS + 0x1_0000, 8192);
        assert!(
            bounded[..4096].iter().any(|byte| *byte != 0) && bounded[4096..].iter().all(|byte| *byte == 0)
        );
        running.control.pause();
        driver.offer(0);
        thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(driver.used(), 4, "it went on while paused");
        assert_eq!(driver.read(BUFFERS + 4096, 28), first);
        assert!(running.control.run());
        eventually("the one that waited is used", || driver.used() == 5);
        assert_ne!(driver.read(BUFFERS + 4096, 28), first);
    }
}

#[test]
fn broken_chains_stop_it_until_it_is_reset() {
    let (driver, _running, _device) = device();
    for (address, flags) in [(MEMORY_BYTES, 2), (u64::MAX, 2), (BUFFERS, 4)] {
        driver.start(VERSION_1);
        driver.describe(0, address, 64, flags, 0);
        driver.offer(0);
        eventually("the device gives up", || driver.get(STATUS) & NEEDS_RESET != 0);
    }
    driver.start(VERSION_1);
    driver.lay(0, &[Piece::ToGuest(BUFFERS, 16)]);
    driver.offer(0);
    eventually("it works again", || driver.used() == 1);
}
