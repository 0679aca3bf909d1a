//! A virtio network interface on a tap, served by one thread.
//!
//! ```text
//! guest's transmit queue ──► check, show ARP and ICMPv6 to the observer ──► tap
//! tap ──► guest's receive queue (only while it has buffers: the rest waits in the tap)
//! ```
//!
//! Frames carry a 12-byte virtio-net header; no offload is offered, so headers going out are cleared and
//! those coming in say "one buffer". Frames move only while the machine runs. Mergeable buffers,
//! offloads, multiple queue pairs and the control queue are not here yet.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::{BrokenQueue, DeviceKind, MmioTransport};
use super::ring::{refuse_indirect, wants_interrupt};
use crate::memory::{GuestRam, TrackedMemory};
use crate::parking::{Control, Kick, PanicGuard};
use crate::tap::{Tap, VNET_HEADER_BYTES};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE_MAX: u16 = 256;

/// Further things to wait for, beside the queues.
const KICK: usize = 2;
const FRAME: usize = 3;

/// The longest frame with its header; taps pass nothing longer without offloads.
const FRAME_BYTES_MAX: usize = 65_536 + VNET_HEADER_BYTES;

/// Frames moved a turn before the thread looks whether it should park.
const FRAMES_PER_TURN: usize = 128;

/// How long to wait for something to do, in ms as epoll counts them.
const WAIT_NONE: i32 = 0;
const WAIT_FOREVER: i32 = -1;
const WAIT_RETRY_MS: i32 = 100;

/// Frames thrown away at most: more than a tap's queue holds.
const STALE_FRAMES_MAX: usize = 65_536;

const ETHERNET_HEADER_BYTES: usize = 14;
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const IPV6_NEXT_HEADER_OFFSET: usize = ETHERNET_HEADER_BYTES + 6;
const IPV6_NEXT_HEADER_ICMP: u8 = 58;

/// Is shown the frames by which a guest announces or resolves addresses: ARP and ICMPv6.
pub type FrameObserver = Box<dyn FnMut(&[u8]) + Send>;

/// A network interface, apart from its thread.
pub(crate) struct Net {
    mac: [u8; 6],
    transport: Arc<MmioTransport>,
    ram: GuestRam,
    /// Gone once the machine was stopped.
    tap: Mutex<Option<Arc<Tap>>>,
    observer: Mutex<Option<FrameObserver>>,
    kick: Arc<NetKick>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).field("tap", &self.tap).finish_non_exhaustive()
    }
}

/// Wakes the thread from its wait.
#[derive(Debug)]
struct NetKick(EventFd);

impl Kick for NetKick {
    fn kick(&self) {
        // A full counter is a kick already.
        let _ = self.0.write(1);
    }

    fn reset(&self) {
        // It fails if there was no kick.
        let _ = self.0.read();
    }
}

/// What is left to do after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing before the next frame, or notification.
    Done,
    /// The turn's share was used up.
    More,
    /// The guest has no receive buffers, or no driver.
    NoBuffers,
    /// The tap gives errors, as when somebody deleted the interface.
    TapFailed,
}

impl Net {
    pub(crate) fn new(slot: u8, mac: [u8; 6], tap: Tap, ram: GuestRam) -> io::Result<Self> {
        let kind = DeviceKind {
            name: "network interface",
            id: VIRTIO_ID_NET,
            features: (1 << VIRTIO_NET_F_MAC) | (1 << VIRTIO_NET_F_STATUS) | (1 << VIRTIO_RING_F_EVENT_IDX),
            config: config_space(mac),
            queue_sizes_max: vec![QUEUE_SIZE_MAX; 2],
        };
        let eventfd = || EventFd::new(EFD_NONBLOCK);
        let transport = MmioTransport::new(slot, kind, eventfd()?, vec![eventfd()?, eventfd()?]);
        Ok(Self {
            mac,
            transport: Arc::new(transport),
            ram,
            tap: Mutex::new(Some(Arc::new(tap))),
            observer: Mutex::new(None),
            kick: Arc::new(NetKick(eventfd()?)),
        })
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        self.mac
    }

    pub(crate) fn transport(&self) -> &Arc<MmioTransport> {
        &self.transport
    }

    pub(crate) fn set_observer(&self, observer: FrameObserver) {
        *self.observer.lock().unwrap_or_else(PoisonError::into_inner) = Some(observer);
    }

    pub(crate) fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    /// Detaches from the tap; the thread must be gone.
    pub(crate) fn close(&self) {
        *self.lock_tap() = None;
    }

    /// Writes a frame into the tap as if the guest had sent it.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        let tap = self.lock_tap().clone().ok_or(io::ErrorKind::NotConnected)?;
        let parts = [IoSlice::new(&[0; VNET_HEADER_BYTES]), IoSlice::new(frame)];
        let written = tap.file().write_vectored(&parts)?;
        if written == VNET_HEADER_BYTES + frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Throws away the frames that wait in the tap; the machine must not run.
    pub(crate) fn drop_queued_frames(&self) {
        let Some(tap) = self.lock_tap().clone() else { return };
        let mut frame = vec![0; FRAME_BYTES_MAX];
        for _ in 0..STALE_FRAMES_MAX {
            if !matches!(tap.file().read(&mut frame), Ok(1..)) {
                return;
            }
        }
    }

    fn lock_tap(&self) -> MutexGuard<'_, Option<Arc<Tap>>> {
        self.tap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts its thread, parked.
    pub(crate) fn spawn(self: Arc<Self>, control: Arc<Control>) -> io::Result<JoinHandle<()>> {
        let tap = self.lock_tap().clone().ok_or(io::ErrorKind::NotConnected)?;
        let mut waiter = self.watch()?;
        control.add_thread();
        let on_failure = Arc::clone(&control);
        let thread = thread::Builder::new().name("net".into()).spawn(move || {
            let guard = PanicGuard { control, vcpu: 0, what: "network interface's" };
            let control = &guard.control;
            let mut frame = vec![0; FRAME_BYTES_MAX];
            while control.park(&*self.kick) {
                self.serve(control, &mut waiter, &tap, &mut frame);
            }
        });
        if thread.is_err() {
            on_failure.remove_thread();
        }
        thread
    }

    /// Moves frames until the machine is to park.
    fn serve(&self, control: &Control, waiter: &mut Waiter, tap: &Tap, frame: &mut [u8]) {
        // Notifications from before a pause, or from another host, are not kept: look at both queues
        // first.
        let mut transmit = Turn::More;
        let mut receive = Turn::More;
        while !control.should_park() {
            if transmit == Turn::More {
                transmit = self.guarded(TRANSMIT, |queue| self.transmit(control, queue, tap, frame));
            }
            if receive == Turn::More {
                receive = self.guarded(RECEIVE, |queue| self.receive(control, queue, tap, frame));
            }
            let is_busy = transmit == Turn::More || receive == Turn::More;
            let patience = match receive {
                _ if is_busy => WAIT_NONE,
                Turn::TapFailed => WAIT_RETRY_MS,
                Turn::Done | Turn::More | Turn::NoBuffers => WAIT_FOREVER,
            };
            let take_frames = matches!(receive, Turn::Done | Turn::More);
            let woken = match self.wait(waiter, tap, take_frames, patience) {
                Ok(woken) => woken,
                Err(error) => {
                    // Without a wait there is no way to serve; a later resume tries again.
                    tracing::error!(%error, "the network interface can't wait for its tap");
                    control.wait_for_wish_to_park();
                    return;
                }
            };
            if woken.transmit {
                transmit = Turn::More;
            }
            if woken.receive || receive == Turn::TapFailed {
                receive = Turn::More;
            }
        }
    }

    /// Serves a queue if the driver is ready, and stops the device if the driver broke it.
    fn guarded(&self, index: usize, serve: impl FnOnce(&mut Queue) -> Result<Turn, BrokenQueue>) -> Turn {
        let mut registers = self.transport.lock();
        if !registers.is_live() || !registers.queues[index].ready() {
            return Turn::NoBuffers;
        }
        let queue = &mut registers.queues[index];
        // Rings that lie in memory throughout: else a queue could look neither empty nor readable.
        let served = if queue.is_valid(self.ram.tracked()) {
            serve(queue)
        } else {
            Err(BrokenQueue(virtio_queue::Error::QueueNotReady))
        };
        match served {
            Ok(turn) => turn,
            Err(error) => {
                self.transport.need_reset(&mut registers, &error);
                Turn::NoBuffers
            }
        }
    }

    /// Guest to tap.
    fn transmit(
        &self,
        control: &Control,
        queue: &mut Queue,
        tap: &Tap,
        buffer: &mut [u8],
    ) -> Result<Turn, BrokenQueue> {
        let memory = self.ram.tracked();
        let mut frames_left = FRAMES_PER_TURN;
        let mut used = false;
        let turn = 'turn: loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.iter(memory)?.next() {
                let head = chain.head_index();
                refuse_indirect(queue, memory, head)?;
                let mut reader = chain.reader(memory)?;
                let length = reader.available_bytes();
                // What is no frame is dropped, as a wire would.
                if let Some(bytes) = buffer.get_mut(..length)
                    && length >= VNET_HEADER_BYTES + ETHERNET_HEADER_BYTES
                    && reader.read_exact(bytes).is_ok()
                {
                    self.transmit_frame(tap, bytes);
                }
                queue.add_used(memory, head, 0)?;
                used = true;
                frames_left -= 1;
                // A frame can be long work, and a pause waits for no more than one.
                if frames_left == 0 || control.should_park() {
                    break 'turn Turn::More;
                }
            }
            if !queue.enable_notification(memory)? {
                break Turn::Done;
            }
        };
        if used {
            self.interrupt_if_wanted(queue, memory)?;
        }
        Ok(turn)
    }

    fn transmit_frame(&self, tap: &Tap, bytes: &mut [u8]) {
        // No offload was negotiated, so whatever the guest wrote here means nothing.
        bytes[..VNET_HEADER_BYTES].fill(0);
        // A frame that the tap does not take (no room, link down) is lost, as on a wire.
        let _ = tap.file().write(bytes);
        let frame = &bytes[VNET_HEADER_BYTES..];
        if is_about_addresses(frame) {
            let mut observer = self.observer.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(observer) = observer.as_mut() {
                observer(frame);
            }
        }
    }

    /// Tap to guest.
    fn receive(
        &self,
        control: &Control,
        queue: &mut Queue,
        tap: &Tap,
        buffer: &mut [u8],
    ) -> Result<Turn, BrokenQueue> {
        let memory = self.ram.tracked();
        let mut used = false;
        let mut turn = Turn::More;
        for _ in 0..FRAMES_PER_TURN {
            if control.should_park() {
                break;
            }
            // Only a frame that has somewhere to go is taken from the tap.
            if queue.iter(memory)?.next().is_none() {
                if queue.enable_notification(memory)? {
                    continue;
                }
                turn = Turn::NoBuffers;
                break;
            }
            queue.go_to_previous_position();
            let length = match tap.file().read(buffer) {
                Ok(length) if length >= VNET_HEADER_BYTES => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    turn = Turn::Done;
                    break;
                }
                Ok(_) | Err(_) => {
                    turn = Turn::TapFailed;
                    break;
                }
            };
            let bytes = &mut buffer[..length];
            bytes[..VNET_HEADER_BYTES].fill(0);
            // num_buffers, the header's last field.
            bytes[VNET_HEADER_BYTES - 2..VNET_HEADER_BYTES].copy_from_slice(&1_u16.to_le_bytes());
            used |= place_frame(queue, memory, bytes)?;
        }
        if used {
            self.interrupt_if_wanted(queue, memory)?;
        }
        Ok(turn)
    }

    fn interrupt_if_wanted(&self, queue: &mut Queue, memory: &TrackedMemory) -> Result<(), BrokenQueue> {
        if wants_interrupt(queue, memory)? {
            self.transport.interrupt_for_queue();
        }
        Ok(())
    }

    /// Watches everything that the thread waits for, but the tap.
    fn watch(&self) -> io::Result<Waiter> {
        let epoll = Epoll::new()?;
        let files = [self.transport.notify(RECEIVE), self.transport.notify(TRANSMIT), &self.kick.0];
        for (file, token) in files.into_iter().zip([RECEIVE, TRANSMIT, KICK]) {
            let event = EpollEvent::new(EventSet::IN, token as u64);
            epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event)?;
        }
        Ok(Waiter { epoll, watches_tap: false })
    }

    /// Waits for a notification, a kick or, if `take_frames`, a frame, for at most `timeout_ms`.
    fn wait(&self, waiter: &mut Waiter, tap: &Tap, take_frames: bool, timeout_ms: i32) -> io::Result<Woken> {
        waiter.watch_tap(tap, take_frames)?;
        let mut events = [EpollEvent::default(); FRAME + 1];
        let count = match waiter.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut ready = [false; FRAME + 1];
        for event in &events[..count] {
            ready[usize::try_from(event.data()).expect("the tokens are small")] = true;
        }
        for index in [RECEIVE, TRANSMIT] {
            if ready[index] {
                // Reading resets the counter.
                let _ = self.transport.notify(index).read();
            }
        }
        Ok(Woken { transmit: ready[TRANSMIT], receive: ready[RECEIVE] || ready[FRAME] })
    }
}

/// What the thread waits with.
#[derive(Debug)]
struct Waiter {
    epoll: Epoll,
    watches_tap: bool,
}

impl Waiter {
    /// Adds or removes the tap: while frames can't be taken, one that waits must not wake the thread.
    fn watch_tap(&mut self, tap: &Tap, wanted: bool) -> io::Result<()> {
        if self.watches_tap == wanted {
            return Ok(());
        }
        let operation = if wanted { ControlOperation::Add } else { ControlOperation::Delete };
        self.epoll.ctl(operation, tap.as_raw_fd(), EpollEvent::new(EventSet::IN, FRAME as u64))?;
        self.watches_tap = wanted;
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
struct Woken {
    transmit: bool,
    receive: bool,
}

/// Puts a frame into the next receive buffer; false if it does not fit and is dropped.
fn place_frame(queue: &mut Queue, memory: &TrackedMemory, frame: &[u8]) -> Result<bool, BrokenQueue> {
    let Some(chain) = queue.iter(memory)?.next() else { return Ok(false) };
    let head = chain.head_index();
    refuse_indirect(queue, memory, head)?;
    let mut writer = chain.writer(memory)?;
    if writer.available_bytes() < frame.len() {
        queue.go_to_previous_position();
        return Ok(false);
    }
    writer.write_all(frame).map_err(|_| virtio_queue::Error::InvalidChain)?;
    let length = u32::try_from(frame.len()).expect("FRAME_BYTES_MAX fits");
    queue.add_used(memory, head, length)?;
    Ok(true)
}

fn config_space(mac: [u8; 6]) -> Vec<u8> {
    let link_up = u16::try_from(VIRTIO_NET_S_LINK_UP).expect("one bit");
    [&mac[..], &link_up.to_le_bytes()].concat()
}

/// ARP, or ICMP over IPv6 (of which neighbour discovery is a part).
fn is_about_addresses(frame: &[u8]) -> bool {
    let Some(ethertype) = frame.get(12..ETHERNET_HEADER_BYTES) else { return false };
    ethertype == ETHERTYPE_ARP
        || (ethertype == ETHERTYPE_IPV6 && frame.get(IPV6_NEXT_HEADER_OFFSET) == Some(&IPV6_NEXT_HEADER_ICMP))
}

#[cfg(test)]
mod tests;
