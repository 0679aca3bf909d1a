//! The control queue: here only the acknowledgement of an announcement.
//!
//! After a migration the device asks a driver that can (GUEST_ANNOUNCE) to announce the guest's addresses by a bit of the
//! status in its configuration space; the driver clears it through this queue. Everything else is answered with an error,
//! as the specification wants of commands that a device does not have (virtio 1.2, section 5.1.6.5).

use std::io::{Read, Write};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK, VIRTIO_NET_S_ANNOUNCE,
};
use virtio_queue::Queue;

use super::{Net, Turn, offload};
use crate::devices::virtio::mmio::BrokenQueue;
use crate::devices::virtio::ring::serve_chains;
use crate::parking::Control;

/// Where the status lies in the configuration space, behind the MAC address; both bits are in its first byte.
const STATUS_OFFSET: usize = 6;

const ANNOUNCE: u8 = offload::byte(VIRTIO_NET_S_ANNOUNCE);

/// Class and command of the one command that there is.
const ACKNOWLEDGE: [u8; 2] =
    [offload::byte(VIRTIO_NET_CTRL_ANNOUNCE), offload::byte(VIRTIO_NET_CTRL_ANNOUNCE_ACK)];

const DONE: u8 = offload::byte(VIRTIO_NET_OK);
const REFUSED: u8 = offload::byte(VIRTIO_NET_ERR);

/// Commands taken a turn before the thread looks whether it should park.
const COMMANDS_PER_TURN: usize = 16;

impl Net {
    /// Asks the guest to announce itself, if its driver can. The interrupt comes with the next run.
    pub(crate) fn ask_for_announcement(&self) {
        let mut registers = self.transport.lock();
        let features = registers.features();
        let needed = [VIRTIO_NET_F_STATUS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE];
        if registers.is_live() && needed.into_iter().all(|feature| offload::has(features, feature)) {
            self.transport.change_config(STATUS_OFFSET, |status| *status |= ANNOUNCE);
            self.transport.interrupt_for_config(&mut registers);
        }
    }

    /// Answers the guest's commands.
    pub(super) fn serve_commands(&self, control: &Control, queue: &mut Queue) -> Result<Turn, BrokenQueue> {
        let should_stop = || control.should_park();
        let memory = self.ram.tracked();
        let served = serve_chains(queue, memory, COMMANDS_PER_TURN, &should_stop, |chain| {
            let mut command = [0; ACKNOWLEDGE.len()];
            let is_whole = chain.clone().reader(memory)?.read_exact(&mut command).is_ok();
            let answer = if is_whole && command == ACKNOWLEDGE {
                self.transport.change_config(STATUS_OFFSET, |status| *status &= !ANNOUNCE);
                DONE
            } else {
                REFUSED
            };
            // A driver that leaves no room for the answer does not want it.
            Ok(u32::from(chain.writer(memory)?.write_all(&[answer]).is_ok()))
        })?;
        Ok(self.turn_after(served))
    }
}
