//! What the receive queue needs beside what all queues do: frames in several buffers, handed over at once.

use std::io::Write;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;

use super::offload;
use crate::devices::virtio::mmio::BrokenQueue;
use crate::devices::virtio::ring::{RING_HEADER_BYTES, offset, refuse_indirect};
use crate::memory::TrackedMemory;

const USED_ELEMENT_BYTES: u64 = 8;

/// What became of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// It is in the guest's buffers.
    Whole,
    /// It can never fit.
    Dropped,
    /// There are too few buffers; the driver notifies of more.
    NoRoom,
}

/// Puts a frame with its header into as many receive buffers as it needs, `buffers_max` at most.
pub(super) fn place_frame(
    queue: &mut Queue,
    memory: &TrackedMemory,
    frame: &mut [u8],
    buffers_max: u16,
) -> Result<Placed, BrokenQueue> {
    let first = queue.next_avail();
    let mut buffers = Vec::new();
    let (mut room, mut count) = (0_usize, 0_u16);
    while room < frame.len() {
        if count == buffers_max {
            queue.set_next_avail(first);
            return Ok(Placed::Dropped);
        }
        let Some(chain) = queue.iter(memory)?.next() else {
            // All that is there has been looked at, so the driver notifies of what it adds to it.
            if queue.enable_notification(memory)? {
                continue;
            }
            queue.set_next_avail(first);
            return Ok(Placed::NoRoom);
        };
        let head = chain.head_index();
        refuse_indirect(queue, memory, head)?;
        let writer = chain.writer(memory)?;
        room = room.saturating_add(writer.available_bytes());
        buffers.push((head, writer));
        count += 1;
    }
    offload::set_buffers(frame, count);
    let mut rest = &frame[..];
    let mut used = Vec::with_capacity(buffers.len());
    for (head, mut writer) in buffers {
        let (part, others) = rest.split_at(writer.available_bytes().min(rest.len()));
        writer.write_all(part).map_err(|_| virtio_queue::Error::InvalidChain)?;
        used.push((head, u32::try_from(part.len()).expect("a frame is shorter")));
        rest = others;
    }
    add_used_at_once(queue, memory, &used)?;
    Ok(Placed::Whole)
}

/// Hands buffers back so that the driver sees all of them or none: it takes it amiss if a part of a frame is missing.
fn add_used_at_once(
    queue: &mut Queue,
    memory: &TrackedMemory,
    used: &[(u16, u32)],
) -> Result<(), BrokenQueue> {
    let Some(((last_head, last_bytes), others)) = used.split_last() else { return Ok(()) };
    for (head, bytes) in others {
        let place = u64::from(queue.next_used() % queue.size());
        let address = offset(queue.used_ring(), RING_HEADER_BYTES + USED_ELEMENT_BYTES * place)?;
        let element = [u32::from(*head).to_le(), bytes.to_le()];
        memory.write_obj(element, address).map_err(virtio_queue::Error::GuestMemory)?;
        queue.set_next_used(queue.next_used().wrapping_add(1));
    }
    // Only this one writes the index that the driver looks at.
    Ok(queue.add_used(memory, *last_head, *last_bytes)?)
}
