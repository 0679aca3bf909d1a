//! Virtio devices behind virtio-mmio windows.
//!
//! A device is a set of queues in a [`mmio::MmioTransport`] and a thread of its own that serves them.
//! Block, rng, offloads and packed queues are not here yet.

pub(crate) mod mmio;
pub(crate) mod net;
