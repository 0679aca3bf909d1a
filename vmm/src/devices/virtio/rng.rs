//! A virtio entropy device: random bytes of the host's kernel for the guest, a bounded number a request.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VirtioDevice;
use super::mmio::{BrokenQueue, DeviceKind, MmioTransport};
use super::ring::{Served, serve_chains};
use super::wait::{DeviceKick, QueueWait};
use crate::confine::{self, Role};
use crate::memory::GuestRam;
use crate::parking::{Control, Kick, PanicGuard};

const QUEUE: usize = 0;
const QUEUE_SIZE_MAX: u16 = 64;

/// The most bytes a request is given; a driver that wants more asks again.
const REQUEST_BYTES_MAX: usize = 4096;

/// Requests served before the thread looks whether it should park.
const REQUESTS_PER_TURN: usize = 16;

/// An entropy device, apart from its thread.
#[derive(Debug)]
pub(crate) struct Rng {
    transport: Arc<MmioTransport>,
    ram: GuestRam,
    kick: Arc<DeviceKick>,
}

impl Rng {
    pub(crate) fn new(slot: u8, ram: GuestRam) -> io::Result<Self> {
        let kind = DeviceKind {
            name: "entropy device",
            id: VIRTIO_ID_RNG,
            features: 1 << VIRTIO_RING_F_EVENT_IDX,
            config: Vec::new(),
            queue_sizes_max: vec![QUEUE_SIZE_MAX],
        };
        let eventfd = || EventFd::new(EFD_NONBLOCK);
        let transport = MmioTransport::new(slot, kind, eventfd()?, vec![eventfd()?]);
        Ok(Self { transport: Arc::new(transport), ram, kick: Arc::new(DeviceKick::new()?) })
    }

    fn serve(&self, control: &Control, wait: &QueueWait) {
        while !control.should_park() {
            if self.turn() {
                continue;
            }
            if let Err(error) = wait.wait(self.transport.notify(QUEUE)) {
                // Without a wait there is no way to serve; a later resume tries again.
                tracing::error!(%error, "the entropy device can't wait for its guest");
                control.wait_for_wish_to_park();
                return;
            }
        }
    }

    /// Serves some requests, and says whether there are more.
    fn turn(&self) -> bool {
        let mut registers = self.transport.lock();
        if !registers.is_live() || !registers.queues[QUEUE].ready() {
            return false;
        }
        self.serve_queue(&mut registers.queues[QUEUE]).unwrap_or_else(|error| {
            self.transport.need_reset(&mut registers, &error);
            false
        })
    }

    fn serve_queue(&self, queue: &mut Queue) -> Result<bool, BrokenQueue> {
        let memory = self.ram.tracked();
        if !queue.is_valid(memory) {
            return Err(BrokenQueue(virtio_queue::Error::QueueNotReady));
        }
        let served = serve_chains(queue, memory, REQUESTS_PER_TURN, &|| false, |chain| {
            let mut writer = chain.writer(memory)?;
            let mut bytes = [0; REQUEST_BYTES_MAX];
            let wanted = &mut bytes[..writer.available_bytes().min(REQUEST_BYTES_MAX)];
            // The kernel refuses only before it has gathered entropy at boot; the request then gets none.
            let given = getrandom::fill(wanted).is_ok() && writer.write_all(wanted).is_ok();
            let length = if given { wanted.len() } else { 0 };
            Ok(u32::try_from(length).expect("REQUEST_BYTES_MAX fits"))
        })?;
        let Served { has_more, interrupt } = served;
        if interrupt {
            self.transport.interrupt_for_queue();
        }
        Ok(has_more)
    }
}

impl VirtioDevice for Rng {
    fn transport(&self) -> &Arc<MmioTransport> {
        &self.transport
    }

    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn spawn(self: Arc<Self>, control: &Arc<Control>, threads: &mut Vec<JoinHandle<()>>) -> io::Result<()> {
        let wait = QueueWait::new(self.transport.notify(QUEUE), &self.kick)?;
        let for_thread = Arc::clone(control);
        control.add_thread();
        let thread = thread::Builder::new().name("rng".into()).spawn(move || {
            let guard = PanicGuard { control: for_thread, vcpu: 0, what: "entropy device's" };
            confine::enter(Role::Device);
            while guard.control.park(&*self.kick) {
                self.serve(&guard.control, &wait);
            }
        });
        if thread.is_err() {
            control.remove_thread();
        }
        threads.push(thread?);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
