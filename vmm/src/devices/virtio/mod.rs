//! Virtio devices behind virtio-mmio windows.
//!
//! A device is a set of queues in a [`mmio::MmioTransport`] and threads of its own that serve them.
//! Packed queues are not here yet.

pub(crate) mod block;
#[cfg(test)]
pub(crate) mod driver;
mod in_flight;
pub(crate) mod mmio;
pub(crate) mod net;
mod ring;
pub(crate) mod rng;
mod wait;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use self::mmio::MmioTransport;
use self::net::Net;
use crate::parking::{Control, Kick};

/// What the machine does with each device, whatever it is.
pub(crate) trait VirtioDevice: fmt::Debug + Send + Sync {
    /// Its window.
    fn transport(&self) -> &Arc<MmioTransport>;

    /// What makes all its threads come to [`Control::park`].
    fn kick(&self) -> Arc<dyn Kick>;

    /// Starts its threads, parked, and adds them to `threads`.
    ///
    /// # Errors
    /// If one can't be had; those that were added go on.
    fn spawn(self: Arc<Self>, control: &Arc<Control>, threads: &mut Vec<JoinHandle<()>>) -> io::Result<()>;
}

impl VirtioDevice for Net {
    fn transport(&self) -> &Arc<MmioTransport> {
        Self::transport(self)
    }

    fn kick(&self) -> Arc<dyn Kick> {
        Self::kick(self)
    }

    fn spawn(self: Arc<Self>, control: &Arc<Control>, threads: &mut Vec<JoinHandle<()>>) -> io::Result<()> {
        threads.push(Self::spawn(self, Arc::clone(control))?);
        Ok(())
    }
}
