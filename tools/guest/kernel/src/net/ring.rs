//! A split virtqueue whose every descriptor is one whole frame.
//!
//! ```text
//! descriptors | driver area (available) | padding to a page | device area (used)
//! ```
//!
//! Notifications in both directions are suppressed by event index where the device has it (the counters are
//! 16-bit and wrap, so all comparisons are by difference), else by flags. Frames chained over several
//! descriptors, indirect and packed rings are not used. Source: VIRTIO 1.2, section 2.7.

use super::transport::QueueAddresses;
use core::sync::atomic::{Ordering, compiler_fence, fence};

/// Most descriptors in a ring.
pub const SIZE_MAX: u16 = 256;

const PAGE: usize = 4096;
const DESCRIPTOR_LEN: usize = 16;
const DEVICE_WRITES: u16 = 2;
/// Driver-area flag: no interrupts, please. Device-area flag, the same bit: no notifications, please.
const FLAG_NO_EVENTS: u16 = 1;

/// Memory for the largest ring.
#[repr(C, align(4096))]
pub struct RingMemory([u8; 3 * PAGE]);

impl RingMemory {
    /// Cleared memory.
    pub const fn new() -> Self {
        Self([0; 3 * PAGE])
    }
}

/// A descriptor that the device has used.
#[derive(Clone, Copy)]
pub struct Used {
    /// Number of the descriptor.
    pub index: u16,
    /// Bytes that the device wrote.
    pub len: u32,
}

/// One queue as its driver sees it.
pub struct Ring {
    base: *mut u8,
    size: u16,
    event_index: bool,
    /// Descriptors made available so far, modulo 2^16.
    available: u16,
    /// Descriptors taken back so far.
    reclaimed: u16,
    /// Value of `available` when the device was last notified or found not to need it.
    announced: u16,
}

impl Ring {
    /// A ring of `size` descriptors, a power of two up to [`SIZE_MAX`].
    pub fn new(memory: &'static mut RingMemory, size: u16, event_index: bool) -> Self {
        assert!(size.is_power_of_two() && size <= SIZE_MAX);
        let base = memory.0.as_mut_ptr();
        let ring = Self { base, size, event_index, available: 0, reclaimed: 0, announced: 0 };
        ring.silence();
        ring
    }

    /// Number of descriptors.
    pub const fn size(&self) -> u16 {
        self.size
    }

    const fn driver_area(&self) -> usize {
        DESCRIPTOR_LEN * self.size as usize
    }

    const fn device_area(&self) -> usize {
        (self.driver_area() + 6 + 2 * self.size as usize).next_multiple_of(PAGE)
    }

    /// Where the device finds the parts.
    pub fn addresses(&self) -> QueueAddresses {
        let base = self.base as u64;
        let (driver, device) = (self.driver_area() as u64, self.device_area() as u64);
        QueueAddresses { descriptors: base, driver: base + driver, device: base + device }
    }

    fn store<T>(&self, at: usize, value: T) {
        debug_assert!(at + size_of::<T>() <= 3 * PAGE);
        // SAFETY: inside the ring's own memory (its three parts fit for every size up to SIZE_MAX) and aligned
        // for T by the layout; volatile because the device reads it.
        unsafe { self.base.wrapping_add(at).cast::<T>().write_volatile(value) }
    }

    fn load<T>(&self, at: usize) -> T {
        debug_assert!(at + size_of::<T>() <= 3 * PAGE);
        // SAFETY: as in `store`; only integers are loaded, for which any bytes are valid.
        unsafe { self.base.wrapping_add(at).cast::<T>().read_volatile() }
    }

    /// Describes the buffer that descriptor `index` stands for.
    pub fn describe(&self, index: u16, address: u64, len: u32, device_writes: bool) {
        let at = DESCRIPTOR_LEN * usize::from(index);
        self.store::<u64>(at, address);
        self.store::<u32>(at + 8, len);
        self.store::<u16>(at + 12, if device_writes { DEVICE_WRITES } else { 0 });
        self.store::<u16>(at + 14, 0);
    }

    /// Gives descriptor `index` to the device.
    pub fn offer(&mut self, index: u16) {
        let slot = usize::from(self.available % self.size);
        self.store::<u16>(self.driver_area() + 4 + 2 * slot, index);
        self.available = self.available.wrapping_add(1);
        // x86 keeps stores in order; only the compiler must be told to.
        compiler_fence(Ordering::Release);
        self.store::<u16>(self.driver_area() + 2, self.available);
    }

    /// Whether the device must be notified of what was offered since the last call.
    pub fn needs_notification(&mut self) -> bool {
        let offered = self.available.wrapping_sub(self.announced);
        if offered == 0 {
            return false;
        }
        self.announced = self.available;
        // The index just stored must be visible before reading whether the device sleeps.
        fence(Ordering::SeqCst);
        if !self.event_index {
            return self.load::<u16>(self.device_area()) & FLAG_NO_EVENTS == 0;
        }
        let event = self.load::<u16>(self.device_area() + 4 + 8 * usize::from(self.size));
        self.available.wrapping_sub(event).wrapping_sub(1) < offered
    }

    /// Whether the device has used a descriptor that was not taken back yet.
    pub fn has_used(&self) -> bool {
        self.load::<u16>(self.device_area() + 2) != self.reclaimed
    }

    /// Takes back the next descriptor that the device has used.
    pub fn reclaim(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        compiler_fence(Ordering::Acquire);
        let at = self.device_area() + 4 + 8 * usize::from(self.reclaimed % self.size);
        let index = self.load::<u32>(at) as u16;
        assert!(index < self.size, "the device used descriptor {index} of {}", self.size);
        self.reclaimed = self.reclaimed.wrapping_add(1);
        Some(Used { index, len: self.load::<u32>(at + 4) })
    }

    /// Asks for an interrupt once the device has used `count` more descriptors than were taken back.
    /// Says whether it already has: then no interrupt may come.
    pub fn wake_after(&self, count: u16) -> bool {
        let wanted = self.reclaimed.wrapping_add(count).wrapping_sub(1);
        if self.event_index {
            self.store::<u16>(self.driver_area() + 4 + 2 * usize::from(self.size), wanted);
        } else {
            self.store::<u16>(self.driver_area(), 0);
        }
        fence(Ordering::SeqCst);
        let used = self.load::<u16>(self.device_area() + 2);
        used.wrapping_sub(self.reclaimed) >= count
    }

    /// Asks for no interrupts.
    pub fn silence(&self) {
        if self.event_index {
            // An event that lies behind is not reached before 2^16 frames; `wake_after` renews it long before.
            let event = self.reclaimed.wrapping_sub(2);
            self.store::<u16>(self.driver_area() + 4 + 2 * usize::from(self.size), event);
        } else {
            self.store::<u16>(self.driver_area(), FLAG_NO_EVENTS);
        }
    }
}
