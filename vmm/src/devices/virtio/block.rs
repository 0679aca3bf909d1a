//! A virtio block device on a disk of the host.
//!
//! Several threads serve its queue alike: each takes a request, does it, gives it back and takes the next. So a request that
//! waits for the storage holds up no other, and a pause has nothing to drain but what each thread has in hand: none parks
//! before its request is given back.
//!
//! ```text
//! thread:  park ─► take a request (registers locked) ─► do it ─► give it back (registers locked) ─┐
//!                        ▲                                                                        │
//!                        └─────────────────────── unless the machine is to park ◄─────────────────┘
//! ```
//!
//! The guest may flush, discard and zero. Several queues, indirect descriptors and zones are not here.

mod request;

use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::request::{Medium, Request, Serial};
use super::VirtioDevice;
use super::in_flight::Ticket;
use super::mmio::{BrokenQueue, DeviceKind, MmioTransport, Registers};
use super::ring::{Interrupts, refuse_indirect};
use super::wait::{DeviceKick, QueueWait};
use crate::confine::{self, Role};
use crate::disk::{Disk, SECTOR_BYTES};
use crate::memory::GuestRam;
use crate::parking::{Control, Kick, PanicGuard};

const QUEUE: usize = 0;
const QUEUE_SIZE_MAX: u16 = 256;

/// A request's descriptors beside its data: header and status.
const FRAME_DESCRIPTORS: u16 = 2;

/// Requests done at once. More only helps storage that is faster than this many threads can ask.
const THREADS: usize = 4;

/// What a thread moves at once between disk and guest.
const BUFFER_BYTES: usize = 256 << 10;

/// What Linux takes as the granularity of what can be discarded, in sectors: a page of the host's file system.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;

/// A block device, apart from its threads.
#[derive(Debug)]
pub(crate) struct Block {
    transport: Arc<MmioTransport>,
    ram: GuestRam,
    disk: Disk,
    serial: Serial,
    kick: Arc<DeviceKick>,
}

/// A request in a thread's hand.
struct Taken<'a> {
    head: u16,
    request: Request<'a>,
    write_through: bool,
    /// Dropped last, when the request has been given back.
    _ticket: Ticket<'a>,
}

impl Block {
    pub(crate) fn new(slot: u8, disk: Disk, serial: Option<&str>, ram: GuestRam) -> io::Result<Self> {
        let bit = |feature: u32| 1_u64 << feature;
        let changes = bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
        let access = if disk.is_read_only() { bit(VIRTIO_BLK_F_RO) } else { changes };
        let always =
            [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_RING_F_EVENT_IDX];
        let kind = DeviceKind {
            name: "disk",
            id: VIRTIO_ID_BLOCK,
            features: always.into_iter().fold(access, |features, feature| features | bit(feature)),
            config: config_space(disk.size_bytes()),
            queue_sizes_max: vec![QUEUE_SIZE_MAX],
        };
        let eventfd = || EventFd::new(EFD_NONBLOCK);
        let transport = MmioTransport::new(slot, kind, eventfd()?, vec![eventfd()?]);
        let mut padded = Serial::default();
        let serial = serial.unwrap_or_default().as_bytes();
        padded[..serial.len()].copy_from_slice(serial);
        let kick = Arc::new(DeviceKick::new()?);
        Ok(Self { transport: Arc::new(transport), ram, disk, serial: padded, kick })
    }

    pub(crate) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Takes and does requests until the machine is to park.
    fn serve(&self, control: &Control, wait: &QueueWait, buffer: &mut [u8]) {
        while !control.should_park() {
            if let Some(taken) = self.take() {
                self.perform(taken, buffer);
                continue;
            }
            if let Err(error) = wait.wait(self.transport.notify(QUEUE)) {
                // Without a wait there is no way to serve; a later resume tries again.
                tracing::error!(%error, disk = %self.disk.path().display(), "a disk can't wait for its guest");
                control.wait_for_wish_to_park();
                return;
            }
        }
    }

    /// The next request, if there is one.
    fn take(&self) -> Option<Taken<'_>> {
        let mut registers = self.transport.lock();
        if !registers.is_live() || !registers.queues[QUEUE].ready() {
            return None;
        }
        self.take_from(&mut registers).unwrap_or_else(|error| {
            self.transport.need_reset(&mut registers, &error);
            None
        })
    }

    fn take_from(&self, registers: &mut Registers) -> Result<Option<Taken<'_>>, BrokenQueue> {
        let memory = self.ram.tracked();
        let write_through = !registers.has_feature(VIRTIO_BLK_F_FLUSH);
        let queue = &mut registers.queues[QUEUE];
        // Rings that lie in memory throughout: else a queue could look neither empty nor readable.
        if !queue.is_valid(memory) {
            return Err(BrokenQueue(virtio_queue::Error::QueueNotReady));
        }
        let Some(chain) = queue.iter(memory)?.next() else {
            if queue.enable_notification(memory)? {
                // One came meanwhile, whose guest has not notified.
                let _ = self.transport.notify(QUEUE).write(1);
            }
            return Ok(None);
        };
        queue.disable_notification(memory)?;
        let head = chain.head_index();
        refuse_indirect(queue, memory, head)?;
        let request = Request::parse(chain, memory)?;
        if queue.avail_idx(memory, Ordering::Acquire)? != Wrapping(queue.next_avail()) {
            // Another thread can begin with the next one.
            let _ = self.transport.notify(QUEUE).write(1);
        }
        Ok(Some(Taken { head, request, write_through, _ticket: self.transport.in_flight().begin() }))
    }

    fn perform(&self, taken: Taken<'_>, buffer: &mut [u8]) {
        let Taken { head, request, write_through, _ticket } = taken;
        let medium = Medium { disk: &self.disk, serial: &self.serial, write_through };
        let written = request.perform(medium, buffer);
        let mut registers = self.transport.lock();
        // A driver that has reset the device waits for its requests to end, not to be given back.
        if !registers.is_live() {
            return;
        }
        let memory = self.ram.tracked();
        let queue = &mut registers.queues[QUEUE];
        let interrupts = Interrupts::before(queue);
        let used = queue.add_used(memory, head, written).map_err(BrokenQueue::from);
        match used.and_then(|()| interrupts.are_due(queue, memory)) {
            Ok(true) => self.transport.interrupt_for_queue(),
            Ok(false) => {}
            Err(error) => self.transport.need_reset(&mut registers, &error),
        }
    }

    fn spawn_one(self: &Arc<Self>, control: &Arc<Control>) -> io::Result<JoinHandle<()>> {
        let wait = QueueWait::new(self.transport.notify(QUEUE), &self.kick)?;
        let (device, for_thread) = (Arc::clone(self), Arc::clone(control));
        control.add_thread();
        let thread = thread::Builder::new().name("disk".into()).spawn(move || {
            let guard = PanicGuard { control: for_thread, vcpu: 0, what: "disk's" };
            confine::enter(Role::Device);
            let mut buffer = vec![0; BUFFER_BYTES];
            while guard.control.park(&*device.kick) {
                device.serve(&guard.control, &wait, &mut buffer);
            }
        });
        if thread.is_err() {
            control.remove_thread();
        }
        thread
    }
}

impl VirtioDevice for Block {
    fn transport(&self) -> &Arc<MmioTransport> {
        &self.transport
    }

    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn spawn(self: Arc<Self>, control: &Arc<Control>, threads: &mut Vec<JoinHandle<()>>) -> io::Result<()> {
        for _ in 0..THREADS {
            threads.push(self.spawn_one(control)?);
        }
        Ok(())
    }
}

/// struct virtio_blk_config (virtio 1.2, section 5.2.4). Fields of features that are not offered are zero.
fn config_space(size_bytes: u64) -> Vec<u8> {
    let sector_bytes = u32::try_from(SECTOR_BYTES).expect("512");
    let mut config = (size_bytes / SECTOR_BYTES).to_le_bytes().to_vec();
    config.extend([0; 4]); // size_max
    config.extend(u32::from(QUEUE_SIZE_MAX - FRAME_DESCRIPTORS).to_le_bytes()); // seg_max
    config.extend([0; 4]); // geometry
    config.extend(sector_bytes.to_le_bytes()); // blk_size
    config.extend([0; 12]); // topology, writeback, num_queues
    for limit in [
        request::DISCARD_SECTORS_MAX,
        request::DISCARD_RANGES_MAX,
        DISCARD_ALIGNMENT_SECTORS,
        request::ZERO_SECTORS_MAX,
        request::ZERO_RANGES_MAX,
    ] {
        config.extend(limit.to_le_bytes());
    }
    config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
    config
}

#[cfg(test)]
mod tests;
