//! What devices do alike with a split virtqueue, beside what `virtio-queue` does.

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::mmio::BrokenQueue;
use crate::memory::TrackedMemory;

const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

/// Breaks the queue if a chain uses indirect descriptors: they are not offered, and virtio-queue would
/// follow them to chains far longer than a queue.
pub(super) fn refuse_indirect(queue: &Queue, memory: &TrackedMemory, head: u16) -> Result<(), BrokenQueue> {
    if head >= queue.size() {
        return Err(BrokenQueue(virtio_queue::Error::InvalidDescriptorIndex));
    }
    let mut index = head;
    for _ in 0..queue.size() {
        let place = DESCRIPTOR_BYTES * u64::from(index);
        let address = queue.desc_table().checked_add(place).ok_or(virtio_queue::Error::AddressOverflow)?;
        let descriptor = memory.read_obj::<Descriptor>(GuestAddress(address));
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

/// Whether the driver wants to be interrupted for the buffers that were just used.
pub(super) fn wants_interrupt(queue: &mut Queue, memory: &TrackedMemory) -> Result<bool, BrokenQueue> {
    if queue.event_idx_enabled() {
        return Ok(queue.needs_notification(memory)?);
    }
    let flags = memory.read_obj::<u16>(GuestAddress(queue.avail_ring()));
    let flags = flags.map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}
