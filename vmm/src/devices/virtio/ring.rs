//! What devices do alike with a split virtqueue, beside what `virtio-queue` does: serve its chains, decide when to interrupt,
//! refuse what is not offered.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::mmio::BrokenQueue;
use crate::memory::TrackedMemory;

const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

/// Flags and index, in front of the elements of both rings.
pub(super) const RING_HEADER_BYTES: u64 = 4;
const AVAILABLE_ELEMENT_BYTES: u64 = 2;

/// What is left to do after [`serve_chains`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    /// It has stopped before the queue was empty.
    pub(super) has_more: bool,
    /// The driver wants an interrupt.
    pub(super) interrupt: bool,
}

/// Serves the chains of a queue one after the other, until there is none, `chains_max` are done or `should_stop`. `serve` gives
/// the bytes that it has written to a chain.
pub(super) fn serve_chains<'m>(
    queue: &mut Queue,
    memory: &'m TrackedMemory,
    chains_max: usize,
    should_stop: &dyn Fn() -> bool,
    mut serve: impl FnMut(DescriptorChain<&'m TrackedMemory>) -> Result<u32, BrokenQueue>,
) -> Result<Served, BrokenQueue> {
    let interrupts = Interrupts::before(queue);
    let mut left = chains_max;
    let has_more = 'turn: loop {
        queue.disable_notification(memory)?;
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            refuse_indirect(queue, memory, head)?;
            let written = serve(chain)?;
            queue.add_used(memory, head, written)?;
            left -= 1;
            if left == 0 || should_stop() {
                break 'turn true;
            }
        }
        // What came between the last look and this is served as well.
        if !queue.enable_notification(memory)? {
            break false;
        }
    };
    Ok(Served { has_more, interrupt: interrupts.are_due(queue, memory)? })
}

/// Breaks the queue if a chain uses indirect descriptors: they are not offered, and virtio-queue would
/// follow them to chains far longer than a queue.
pub(super) fn refuse_indirect(queue: &Queue, memory: &TrackedMemory, head: u16) -> Result<(), BrokenQueue> {
    if head >= queue.size() {
        return Err(BrokenQueue(virtio_queue::Error::InvalidDescriptorIndex));
    }
    let mut index = head;
    for _ in 0..queue.size() {
        let address = offset(queue.desc_table(), DESCRIPTOR_BYTES * u64::from(index))?;
        let descriptor = memory.read_obj::<Descriptor>(address);
        let descriptor = descriptor.map_err(virtio_queue::Error::GuestMemory)?;
        if descriptor.refers_to_indirect_table() {
            return Err(BrokenQueue(virtio_queue::Error::InvalidIndirectDescriptor));
        }
        // A chain that leaves the table or bites its tail is cut off there, as by the iterator.
        if !descriptor.has_next() || descriptor.next() >= queue.size() {
            break;
        }
        index = descriptor.next();
    }
    Ok(())
}

/// Finds out whether the driver wants an interrupt for what a turn has used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interrupts {
    used_before: u16,
}

impl Interrupts {
    /// From the beginning of a turn.
    pub(super) fn before(queue: &Queue) -> Self {
        Self { used_before: queue.next_used() }
    }

    /// At the end of the turn. virtio-queue's own count does not know of several buffers at once.
    pub(super) fn are_due(self, queue: &Queue, memory: &TrackedMemory) -> Result<bool, BrokenQueue> {
        let used = queue.next_used();
        if used == self.used_before {
            return Ok(false);
        }
        // The driver says what it waits for, and then looks at the index once more; this side does it the other way
        // around.
        fence(Ordering::SeqCst);
        if !queue.event_idx_enabled() {
            let flags = load(memory, GuestAddress(queue.avail_ring()))?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let behind_ring = RING_HEADER_BYTES + AVAILABLE_ELEMENT_BYTES * u64::from(queue.size());
        let event = load(memory, offset(queue.avail_ring(), behind_ring)?)?;
        // vring_need_event of the specification (virtio 1.2, section 2.7.7.2).
        let passed = used.wrapping_sub(event).wrapping_sub(1);
        Ok(passed < used.wrapping_sub(self.used_before))
    }
}

fn load(memory: &TrackedMemory, address: GuestAddress) -> Result<u16, BrokenQueue> {
    let value: Result<u16, _> = memory.load(address, Ordering::Relaxed);
    Ok(u16::from_le(value.map_err(virtio_queue::Error::GuestMemory)?))
}

/// An address of a ring.
pub(super) fn offset(start: u64, bytes: u64) -> Result<GuestAddress, BrokenQueue> {
    Ok(GuestAddress(start.checked_add(bytes).ok_or(virtio_queue::Error::AddressOverflow)?))
}
