//! The virtio-mmio transport, version 2 of its register layout (virtio 1.2, section 4.2.2).
//!
//! vCPUs set the device up through registers; its worker thread serves the queues under the same lock.
//! Queue notifications don't come here: KVM turns them into an eventfd, and interrupts go the same way
//! back.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::in_flight::InFlight;
use crate::memory::TrackedMemory;
use crate::saved::StateError;
use crate::saved::sections::{VirtioMmio as SavedTransport, Virtqueue as SavedQueue};

/// Bytes of a device's window in the guest's address space.
pub(crate) const WINDOW_BYTES: u64 = 4096;

/// Offset in a window where the guest writes the index of a queue to notify.
pub(crate) const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const LAYOUT_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"FRRY");

const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What makes one device type differ from another.
#[derive(Clone, Debug)]
pub(crate) struct DeviceKind {
    pub(crate) name: &'static str,
    /// The virtio device id.
    pub(crate) id: u32,
    /// Offered features, beside VERSION_1.
    pub(crate) features: u64,
    /// The device's configuration space; drivers only read it.
    pub(crate) config: Vec<u8>,
    /// The most elements of each queue.
    pub(crate) queue_sizes_max: Vec<u16>,
}

/// One device's window: registers, queues, interrupt.
#[derive(Debug)]
pub(crate) struct MmioTransport {
    slot: u8,
    kind: DeviceKind,
    registers: Mutex<Registers>,
    /// Apart from the registers, because a guest reads it in its interrupt handler while the worker is
    /// busy with the queues.
    interrupt_status: AtomicU32,
    interrupt: EventFd,
    /// One a queue, in KVM's hands; written here when the driver became ready.
    notify: Vec<EventFd>,
    /// The configuration space as it is now.
    config: Mutex<Vec<u8>>,
    /// Features that the last queue is only there with; it always is if there are none.
    last_queue_needs: u64,
    in_flight: InFlight,
    /// Whether the log has told of a broken queue.
    warned: AtomicBool,
}

/// What the driver set.
#[derive(Debug)]
pub(crate) struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    config_generation: u32,
    pub(crate) queues: Vec<Queue>,
}

/// The driver broke the rules of virtio; the device stops until it is reset.
#[derive(Debug, thiserror::Error)]
#[error("the guest's driver broke a virtqueue")]
pub(crate) struct BrokenQueue(#[from] pub(crate) virtio_queue::Error);

impl MmioTransport {
    pub(crate) fn new(slot: u8, kind: DeviceKind, interrupt: EventFd, notify: Vec<EventFd>) -> Self {
        let queues = kind.queue_sizes_max.iter().map(|size| Queue::new(*size));
        let queues = queues.collect::<Result<_, _>>().expect("queue sizes are powers of two");
        let registers = Registers {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            config_generation: 0,
            queues,
        };
        Self {
            slot,
            config: Mutex::new(kind.config.clone()),
            kind,
            registers: Mutex::new(registers),
            interrupt_status: AtomicU32::new(0),
            interrupt,
            notify,
            last_queue_needs: 0,
            in_flight: InFlight::default(),
            warned: AtomicBool::new(false),
        }
    }

    /// The same with a last queue that is only there if the driver takes `features`. It is not saved otherwise, so that
    /// a version that does not know it can take the device over.
    pub(crate) fn with_last_queue_for(mut self, features: u64) -> Self {
        self.last_queue_needs = features;
        self
    }

    /// Signalled when the device wants its interrupt.
    pub(crate) fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Signalled when the guest notifies a queue.
    pub(crate) fn notify(&self, queue: usize) -> &EventFd {
        &self.notify[queue]
    }

    pub(crate) fn notifiers(&self) -> &[EventFd] {
        &self.notify
    }

    /// What the device works on without holding its registers.
    pub(crate) fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    /// The registers and queues, for the worker.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the driver of used buffers.
    pub(crate) fn interrupt_for_queue(&self) {
        self.raise(INTERRUPT_QUEUE);
    }

    /// Changes a byte of the configuration space, which the driver finds out when it next looks.
    pub(crate) fn change_config(&self, offset: usize, change: impl FnOnce(&mut u8)) {
        if let Some(byte) = self.config().get_mut(offset) {
            change(byte);
        }
    }

    /// Tells the driver that the configuration space has changed.
    pub(crate) fn interrupt_for_config(&self, registers: &mut Registers) {
        registers.config_generation = registers.config_generation.wrapping_add(1);
        self.raise(INTERRUPT_CONFIG);
    }

    fn config(&self) -> MutexGuard<'_, Vec<u8>> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the device until the driver resets it.
    pub(crate) fn need_reset(&self, registers: &mut Registers, error: &BrokenQueue) {
        // Once for each machine: a guest can break and reset its queues as often as it likes.
        if self.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(device = self.kind.name, ?error, "the guest's driver broke a virtqueue again");
        } else {
            tracing::warn!(device = self.kind.name, ?error, "the guest's driver broke a virtqueue");
        }
        registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.raise(INTERRUPT_CONFIG);
    }

    /// Signals an interrupt that the driver has not acknowledged once more. One that was on its way when
    /// the machine was saved may not have reached the saved interrupt controller; one too many is
    /// harmless.
    pub(crate) fn repeat_interrupt(&self) {
        if self.interrupt_status.load(Ordering::SeqCst) != 0 {
            self.signal();
        }
    }

    fn raise(&self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::SeqCst);
        self.signal();
    }

    fn signal(&self) {
        // It can only fail when the counter is full, and then KVM has a signal to take already.
        let _ = self.interrupt.write(1);
    }

    /// Everything that a driver may choose from.
    pub(crate) fn offered_features(&self) -> u64 {
        self.kind.features | (1 << VIRTIO_F_VERSION_1)
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = u32::try_from(offset) else { return data.fill(0) };
        if offset >= VIRTIO_MMIO_CONFIG {
            let start = (offset - VIRTIO_MMIO_CONFIG) as usize;
            let config = self.config();
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = config.get(start + index).copied().unwrap_or(0);
            }
            return;
        }
        let value = self.read_register(offset);
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) => *word = value.to_le_bytes(),
            // Registers are 32 bits wide; other accesses read as nothing.
            Err(_) => data.fill(0),
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => return MAGIC,
            VIRTIO_MMIO_VERSION => return LAYOUT_VERSION,
            VIRTIO_MMIO_DEVICE_ID => return self.kind.id,
            VIRTIO_MMIO_VENDOR_ID => return VENDOR,
            VIRTIO_MMIO_INTERRUPT_STATUS => return self.interrupt_status.load(Ordering::SeqCst),
            _ => {}
        }
        let registers = self.lock();
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered_features(), registers.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => registers.selected().map_or(0, |queue| u32::from(queue.max_size())),
            VIRTIO_MMIO_QUEUE_READY => registers.selected().map_or(0, |queue| u32::from(queue.ready())),
            VIRTIO_MMIO_STATUS => registers.status,
            VIRTIO_MMIO_CONFIG_GENERATION => registers.config_generation,
            _ => 0,
        }
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else { return };
        let value = u32::from_le_bytes(word);
        match offset {
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupt_status.fetch_and(!value, Ordering::SeqCst);
            }
            // KVM takes these; one can only arrive here if its eventfd is gone.
            VIRTIO_MMIO_QUEUE_NOTIFY => self.wake(value as usize),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.lock().write(offset, value),
        }
    }

    fn wake(&self, queue: usize) {
        if let Some(notify) = self.notify.get(queue) {
            // A full counter is a notification already.
            let _ = notify.write(1);
        }
    }

    fn write_status(&self, value: u32) {
        let mut registers = self.lock();
        if value == 0 {
            registers.reset();
            self.config().clone_from(&self.kind.config);
            self.interrupt_status.store(0, Ordering::SeqCst);
            drop(registers);
            // The driver may use its memory for other things as soon as it has done this write.
            self.in_flight.wait_until_none();
            return;
        }
        let set = value & !registers.status;
        let mut accepted = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if set & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let features = registers.driver_features;
            let is_modern = features & (1 << VIRTIO_F_VERSION_1) != 0;
            if !is_modern || features & !self.offered_features() != 0 {
                accepted &= !VIRTIO_CONFIG_S_FEATURES_OK;
            } else {
                let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
                registers.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
            }
        }
        // The driver can't clear NEEDS_RESET but by a reset.
        registers.status = accepted | (registers.status & VIRTIO_CONFIG_S_NEEDS_RESET);
        let became_ready = set & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        drop(registers);
        if became_ready {
            (0..self.notify.len()).for_each(|queue| self.wake(queue));
        }
    }

    pub(crate) fn save(&self) -> SavedTransport {
        let registers = self.lock();
        let Registers {
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            config_generation,
            queues,
        } = &*registers;
        let saved_queues = self.queues_needed(*driver_features);
        SavedTransport {
            slot: self.slot,
            device_type: self.kind.id,
            status: *status,
            interrupt_status: self.interrupt_status.load(Ordering::SeqCst),
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            config_generation: *config_generation,
            queues: queues.iter().take(saved_queues).map(save_queue).collect(),
        }
    }

    /// How many queues a driver with these features has.
    fn queues_needed(&self, features: u64) -> usize {
        let all = self.kind.queue_sizes_max.len();
        if features & self.last_queue_needs == self.last_queue_needs { all } else { all - 1 }
    }

    /// Takes on a saved state; nothing changes if that is impossible.
    pub(crate) fn restore(&self, saved: &SavedTransport, memory: &TrackedMemory) -> Result<(), StateError> {
        let SavedTransport {
            slot,
            device_type,
            status,
            interrupt_status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            config_generation,
            queues,
        } = saved;
        let error = |what| StateError::Device { device: self.kind.name, what };
        if (*slot, *device_type) != (self.slot, self.kind.id) {
            return Err(error(format!("it is for device type {device_type} in window {slot}")));
        }
        let missing = driver_features & !self.offered_features();
        if missing != 0 {
            return Err(error(format!("its driver uses features {missing:#x}, which this version lacks")));
        }
        if queues.len() != self.queues_needed(*driver_features) {
            return Err(error(format!("it has {} queues", queues.len())));
        }
        let sizes_max = &self.kind.queue_sizes_max;
        let saved_queues = queues.iter().zip(sizes_max);
        let restored = saved_queues.map(|(queue, size_max)| restore_queue(queue, *size_max, memory));
        // The last queue is unused where the driver does not know it.
        let unused = sizes_max[queues.len()..].iter();
        let unused = unused.map(|size_max| Queue::new(*size_max).map_err(|error| error.to_string()));
        let queues = restored.chain(unused).collect::<Result<_, _>>().map_err(error)?;
        *self.lock() = Registers {
            status: *status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            config_generation: *config_generation,
            queues,
        };
        self.interrupt_status.store(*interrupt_status, Ordering::SeqCst);
        Ok(())
    }
}

impl Registers {
    /// Whether the worker may serve the queues.
    pub(crate) fn is_live(&self) -> bool {
        let stopped = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        self.status & (VIRTIO_CONFIG_S_DRIVER_OK | stopped) == VIRTIO_CONFIG_S_DRIVER_OK
    }

    /// The features that driver and device have agreed on; none before that.
    pub(crate) fn features(&self) -> u64 {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 { 0 } else { self.driver_features }
    }

    /// Whether the driver has accepted a feature.
    pub(crate) fn has_feature(&self, bit: u32) -> bool {
        self.driver_features >> bit & 1 == 1
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    fn reset(&mut self) {
        let Self {
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            config_generation: _,
            queues,
        } = self;
        *status = 0;
        *device_features_select = 0;
        *driver_features_select = 0;
        *driver_features = 0;
        *queue_select = 0;
        queues.iter_mut().for_each(QueueT::reset);
    }

    fn write(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 => {
                let (value, old) = (u64::from(value), self.driver_features);
                match self.driver_features_select {
                    0 => self.driver_features = (old & !0xffff_ffff) | value,
                    1 => self.driver_features = (old & 0xffff_ffff) | (value << 32),
                    _ => {}
                }
            }
            _ if self.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 => self.write_queue(offset, value),
            _ => {}
        }
    }

    /// Values that can't be (sizes that are no power of two, misaligned addresses) change nothing; a
    /// queue that makes no sense is refused when it is first served.
    fn write_queue(&mut self, offset: u32, value: u32) {
        let index = self.queue_select as usize;
        let Some(queue) = self.queues.get_mut(index) else { return };
        let (descriptors, available, used) = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        // Not the setters without `try`: they log an error, with which a guest could fill the log.
        let _ = match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.try_set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_READY => {
                queue.set_ready(value == 1);
                Ok(())
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.try_set_desc_table_address(with_low(descriptors, value)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.try_set_desc_table_address(with_high(descriptors, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.try_set_avail_ring_address(with_low(available, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.try_set_avail_ring_address(with_high(available, value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.try_set_used_ring_address(with_low(used, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.try_set_used_ring_address(with_high(used, value)),
            _ => Ok(()),
        };
    }
}

fn with_low(address: u64, low: u32) -> GuestAddress {
    GuestAddress(address & !0xffff_ffff | u64::from(low))
}

fn with_high(address: u64, high: u32) -> GuestAddress {
    GuestAddress(address & 0xffff_ffff | u64::from(high) << 32)
}

/// The half of a 64-bit feature set that `select` names.
fn half(features: u64, select: u32) -> u32 {
    let [low, high] = [features & 0xffff_ffff, features >> 32];
    let half = match select {
        0 => low,
        1 => high,
        _ => 0,
    };
    u32::try_from(half).expect("half of 64 bits")
}

fn save_queue(queue: &Queue) -> SavedQueue {
    let QueueState {
        max_size: _, // the device's, not the driver's
        next_avail,
        next_used,
        event_idx_enabled,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    } = queue.state();
    SavedQueue {
        size,
        ready,
        next_avail,
        next_used,
        event_idx: event_idx_enabled,
        descriptors: desc_table,
        available: avail_ring,
        used: used_ring,
    }
}

fn restore_queue(saved: &SavedQueue, max_size: u16, memory: &TrackedMemory) -> Result<Queue, String> {
    let SavedQueue { size, ready, next_avail, next_used, event_idx, descriptors, available, used } = *saved;
    let state = QueueState {
        max_size,
        next_avail,
        next_used,
        event_idx_enabled: event_idx,
        size,
        ready,
        desc_table: descriptors,
        avail_ring: available,
        used_ring: used,
    };
    let queue = Queue::try_from(state).map_err(|error| format!("a queue is impossible: {error}"))?;
    if ready && !queue.is_valid(memory) {
        return Err("a queue lies outside the guest's memory".into());
    }
    Ok(queue)
}
