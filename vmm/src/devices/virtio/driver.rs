//! For tests: what a guest's driver does with a device of one queue.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::VirtioDevice;
use super::mmio::MmioTransport;
use crate::config::{Backing, MemoryConfig};
use crate::memory::{self, GuestRam};
use crate::parking::Control;

pub(crate) const STATUS: u64 = 0x70;
pub(crate) const NEEDS_RESET: u32 = 64;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_INDEX: u64 = 1 << 29;

/// Where the queue lies: descriptors, available ring, used ring.
pub(crate) const QUEUE: u64 = 0x1_0000;
pub(crate) const AVAILABLE: u64 = QUEUE + 0x1000;
pub(crate) const USED: u64 = QUEUE + 0x2000;
/// From here on memory is free for buffers.
pub(crate) const BUFFERS: u64 = 0x10_0000;
pub(crate) const MEMORY_BYTES: u64 = 8 << 20;

const STATUS_DRIVER: u32 = 3;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_LIVE: u32 = 15;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A piece of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Piece {
    FromGuest(u64, u32),
    ToGuest(u64, u32),
}

/// A driver of the device with this window.
pub(crate) struct Driver {
    pub(crate) transport: Arc<MmioTransport>,
    pub(crate) ram: GuestRam,
    pub(crate) queue_size: u16,
}

/// Memory for a device and its driver.
pub(crate) fn memory() -> GuestRam {
    memory::allocate(&MemoryConfig::new(MEMORY_BYTES, Backing::PrivateAnonymous)).unwrap()
}

impl Driver {
    pub(crate) fn new(transport: &Arc<MmioTransport>, ram: GuestRam, queue_size: u16) -> Self {
        Self { transport: Arc::clone(transport), ram, queue_size }
    }

    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select| {
            self.set(0x14, select);
            u64::from(self.get(0x10))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and sets it up anew with an empty queue.
    pub(crate) fn start(&self, features: u64) {
        self.set(STATUS, 0);
        self.set(STATUS, STATUS_DRIVER);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.set(0x24, select);
            self.set(0x20, u32::try_from(half).unwrap());
        }
        self.set(STATUS, STATUS_DRIVER | STATUS_FEATURES_OK);
        assert_eq!(self.get(STATUS) & STATUS_FEATURES_OK, STATUS_FEATURES_OK, "{features:#x}");
        self.ram.zero_pages(QUEUE / 4096, 4).unwrap();
        self.set(0x30, 0);
        assert!(self.get(0x34) >= u32::from(self.queue_size));
        self.set(0x38, self.queue_size.into());
        for (register, address) in [(0x80, QUEUE), (0x90, AVAILABLE), (0xa0, USED)] {
            self.set(register, u32::try_from(address).unwrap());
            self.set(register + 4, 0);
        }
        self.set(0x44, 1);
        self.set(STATUS, STATUS_LIVE);
    }

    pub(crate) fn put<T: ByteValued>(&self, address: u64, value: T) {
        self.ram.tracked().write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.ram.tracked().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.tracked().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(crate) fn u16_at(&self, address: u64) -> u16 {
        self.ram.tracked().read_obj(GuestAddress(address)).unwrap()
    }

    pub(crate) fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = QUEUE + 16 * u64::from(index);
        self.put(at, address);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Lays a chain into the descriptors from `head` on.
    pub(crate) fn lay(&self, head: u16, pieces: &[Piece]) {
        for (index, piece) in (head..).zip(pieces) {
            let (address, length, kind) = match *piece {
                Piece::FromGuest(address, length) => (address, length, 0),
                Piece::ToGuest(address, length) => (address, length, WRITE),
            };
            let is_last = usize::from(index - head) + 1 == pieces.len();
            let flags = if is_last { kind } else { kind | NEXT };
            self.describe(index, address, length, flags, index + 1);
        }
    }

    /// Makes the chain at `head` available, and notifies.
    pub(crate) fn offer(&self, head: u16) {
        let index = self.u16_at(AVAILABLE + 2);
        self.put(AVAILABLE + 4 + 2 * u64::from(index % self.queue_size), head);
        self.put(AVAILABLE + 2, index.wrapping_add(1));
        self.notify();
    }

    pub(crate) fn notify(&self) {
        self.transport.notify(0).write(1).unwrap();
    }

    /// How many chains were used.
    pub(crate) fn used(&self) -> u16 {
        self.u16_at(USED + 2)
    }

    /// Head and length of the chain that was used as number `index`.
    pub(crate) fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = USED + 4 + 8 * u64::from(index % self.queue_size);
        let memory = self.ram.tracked();
        (memory.read_obj(GuestAddress(at)).unwrap(), memory.read_obj(GuestAddress(at + 4)).unwrap())
    }
}

/// A device's threads, parked at first; ended when it is dropped.
pub(crate) struct Running {
    pub(crate) control: Arc<Control>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn spawn(device: &Arc<impl VirtioDevice + 'static>) -> Self {
        let control = Arc::new(Control::new());
        control.set_kicks(vec![device.kick()]);
        let mut threads = Vec::new();
        Arc::clone(device).spawn(&control, &mut threads).unwrap();
        Self { control, threads }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control.exit();
        let ended = self.threads.drain(..).map(JoinHandle::join).filter(Result::is_err).count();
        assert!(ended == 0 || std::thread::panicking(), "{ended} threads of the device panicked");
    }
}

pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("this never came true: {what}");
}
