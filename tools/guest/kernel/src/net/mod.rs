//! The network: a virtio-mmio network card, from registers to Ethernet frames.
//!
//! Written for few exits rather than from a driver crate: on the machines that ferry is tested on, each register access
//! costs some 30 us, so frames are handed over in batches and interrupts are asked for only before halting.
//! What the frames mean is smoltcp's business, and the `http` module's.

pub mod announce;
pub mod nic;
mod ring;
mod transport;

pub use nic::Nic;
