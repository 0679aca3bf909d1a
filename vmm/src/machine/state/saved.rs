//! A whole saved state, decoded. Whether it is of a machine like one that is here is found out when it is restored
//! ([`Machine::restore_state`](super::Machine::restore_state)).
//!
//! The bytes come from a peer: how much of anything there may be is bounded before it is decoded, so that they take little more memory
//! than they have bytes.

use super::devices::{self, SavedDevices};
use crate::config::{CPUS_MAX, DISKS_MAX};
use crate::saved::sections::{Clock, Irqchip, MachineShape, Pit, Power, Serial, Vcpu, VirtioMmio};
use crate::saved::{Reader, StateError};

/// The most windows of virtio-mmio that a machine has: its disks, and one each for the network and for entropy.
pub(super) const VIRTIO_DEVICES_MAX: usize = DISKS_MAX + 2;

/// A machine's state without its memory, as it is in the bytes that [`Machine::save_state`](super::Machine::save_state) gives.
#[derive(Debug)]
pub struct SavedState {
    pub(super) shape: MachineShape,
    pub(super) irqchip: Irqchip,
    pub(super) pit: Pit,
    pub(super) clock: Clock,
    /// As many as `shape` says, in their order.
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) serial: Serial,
    pub(super) power: Option<Power>,
    pub(super) virtio: Vec<VirtioMmio>,
    pub(super) devices: SavedDevices,
}

impl SavedState {
    /// Decodes a state. It needs no machine, and says nothing of whether KVM would take what is in it.
    ///
    /// # Errors
    /// The bytes are damaged, have a section that this version doesn't know, or lack one, or have more of it than any
    /// machine has.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let reader = Reader::new(bytes)?;
        let shape: MachineShape = reader.one()?;
        let vcpus: Vec<Vcpu> = reader.at_most(usize::from(CPUS_MAX))?;
        if vcpus.len() != usize::from(shape.cpus) {
            let (found, expected) = (vcpus.len(), usize::from(shape.cpus));
            return Err(StateError::SectionCount { section: "vcpu", found, expected });
        }
        if let Some(strange) = vcpus.iter().zip(0_u8..).find(|(saved, index)| saved.index != *index) {
            let what = format!("vCPU {} comes where {} belongs", strange.0.index, strange.1);
            return Err(StateError::Invalid { section: "vcpu", what });
        }
        Ok(Self {
            shape,
            irqchip: reader.one()?,
            pit: reader.one()?,
            clock: reader.one()?,
            vcpus,
            serial: reader.one()?,
            power: reader.one_at_most()?,
            virtio: reader.at_most(VIRTIO_DEVICES_MAX)?,
            devices: devices::read(&reader)?,
        })
    }

    /// How many vCPUs the machine has.
    #[must_use]
    pub const fn cpus(&self) -> u8 {
        self.shape.cpus
    }

    /// Bytes of its memory, which is not here.
    #[must_use]
    pub const fn memory_bytes(&self) -> u64 {
        self.shape.memory_bytes
    }
}
