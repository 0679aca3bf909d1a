//! The registers of a virtio-mmio device, in its modern form and in the older one that QEMU still defaults to.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2, sections 4.2.2 and 4.2.4.

use crate::fail::give_up;

const MAGIC: u32 = 0x7472_6976;

const REG_MAGIC: u64 = 0x00;
const REG_VERSION: u64 = 0x04;
const REG_DEVICE_ID: u64 = 0x08;
const REG_DEVICE_FEATURES: u64 = 0x10;
const REG_DEVICE_FEATURES_SELECT: u64 = 0x14;
const REG_DRIVER_FEATURES: u64 = 0x20;
const REG_DRIVER_FEATURES_SELECT: u64 = 0x24;
const REG_LEGACY_PAGE_SIZE: u64 = 0x28;
const REG_QUEUE_SELECT: u64 = 0x30;
const REG_QUEUE_SIZE_MAX: u64 = 0x34;
const REG_QUEUE_SIZE: u64 = 0x38;
const REG_LEGACY_QUEUE_ALIGN: u64 = 0x3c;
const REG_LEGACY_QUEUE_PAGE: u64 = 0x40;
const REG_QUEUE_READY: u64 = 0x44;
const REG_QUEUE_NOTIFY: u64 = 0x50;
const REG_INTERRUPT_ACK: u64 = 0x64;
const REG_STATUS: u64 = 0x70;
const REG_QUEUE_DESCRIPTORS: u64 = 0x80;
const REG_QUEUE_DRIVER: u64 = 0x90;
const REG_QUEUE_DEVICE: u64 = 0xa0;
const REG_CONFIG: u64 = 0x100;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;

/// Addresses of the three parts of a queue.
pub struct QueueAddresses {
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// A device's registers.
pub struct Transport {
    base: u64,
    legacy: bool,
}

impl Transport {
    /// Looks for a device of kind `device_id` at `base`.
    pub fn find(base: u64, device_id: u32) -> Option<Self> {
        let mut transport = Self { base, legacy: false };
        if transport.read(REG_MAGIC) != MAGIC || transport.read(REG_DEVICE_ID) != device_id {
            return None;
        }
        transport.legacy = transport.read(REG_VERSION) == 1;
        Some(transport)
    }

    fn read(&self, register: u64) -> u32 {
        // SAFETY: the command line says that a virtio-mmio window is here; reading a register touches no memory.
        unsafe { ((self.base + register) as *const u32).read_volatile() }
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: as in `read`; the memory that the device may write is what `set_queue` is given.
        unsafe { ((self.base + register) as *mut u32).write_volatile(value) }
    }

    /// Resets the device and agrees on those of `wanted` that it offers.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.write(REG_STATUS, 0);
        self.write(REG_STATUS, STATUS_ACKNOWLEDGE);
        self.write(REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        let mut agreed = 0;
        for half in 0..2 {
            self.write(REG_DEVICE_FEATURES_SELECT, half);
            let offered = self.read(REG_DEVICE_FEATURES);
            let taken = offered & (wanted >> (32 * half)) as u32;
            self.write(REG_DRIVER_FEATURES_SELECT, half);
            self.write(REG_DRIVER_FEATURES, taken);
            agreed |= u64::from(taken) << (32 * half);
        }
        if self.legacy {
            self.write(REG_LEGACY_PAGE_SIZE, 4096);
            return agreed & 0xffff_ffff;
        }
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        self.write(REG_STATUS, status);
        if self.read(REG_STATUS) & STATUS_FEATURES_OK == 0 {
            give_up(format_args!("virtio device at {:#x} refuses the features {agreed:#x}", self.base));
        }
        agreed
    }

    /// Largest size of a queue; 0 if there is no such queue.
    pub fn queue_size_max(&self, queue: u32) -> u32 {
        self.write(REG_QUEUE_SELECT, queue);
        self.read(REG_QUEUE_SIZE_MAX)
    }

    /// Hands a queue's memory to the device.
    pub fn set_queue(&self, queue: u32, size: u16, at: &QueueAddresses) {
        self.write(REG_QUEUE_SELECT, queue);
        self.write(REG_QUEUE_SIZE, u32::from(size));
        if self.legacy {
            // The older form takes one page number; the parts follow each other as `Ring` lays them out.
            self.write(REG_LEGACY_QUEUE_ALIGN, 4096);
            self.write(REG_LEGACY_QUEUE_PAGE, (at.descriptors / 4096) as u32);
            return;
        }
        let parts = [
            (REG_QUEUE_DESCRIPTORS, at.descriptors),
            (REG_QUEUE_DRIVER, at.driver),
            (REG_QUEUE_DEVICE, at.device),
        ];
        for (register, address) in parts {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(REG_QUEUE_READY, 1);
    }

    /// Lets the device start.
    pub fn start(&self) {
        let modern = if self.legacy { 0 } else { STATUS_FEATURES_OK };
        self.write(REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | modern);
    }

    /// Tells the device that a queue has new buffers.
    pub fn notify(&self, queue: u32) {
        self.write(REG_QUEUE_NOTIFY, queue);
    }

    /// Acknowledges all interrupts, so that the line falls and the next one makes an edge.
    pub fn acknowledge(&self) {
        self.write(REG_INTERRUPT_ACK, 3);
    }

    /// Reads a byte of the device's configuration.
    pub fn config_byte(&self, at: u64) -> u8 {
        // SAFETY: as in `read`; configuration bytes may be read singly.
        unsafe { ((self.base + REG_CONFIG + at) as *const u8).read_volatile() }
    }
}
