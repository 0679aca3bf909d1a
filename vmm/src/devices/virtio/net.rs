//! A virtio network interface on a tap, served by one thread.
//!
//! ```text
//! guest's transmit queue ──► check, show ARP and ICMPv6 to the observer ──► tap
//! tap ──► guest's receive queue (only while it has buffers: the rest waits in the tap)
//! guest's control queue ──► control.rs
//! ```
//!
//! Frames carry a 12-byte virtio-net header, whose offloads are those that the tap of this host can do
//! (offload.rs) and the driver chose. Frames move only while the machine runs. Multiple queue pairs are not
//! here yet.

mod control;
mod offload;
mod queue;

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_S_LINK_UP};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::queue::{Placed, place_frame};
use super::mmio::{BrokenQueue, DeviceKind, MmioTransport};
use super::ring::{Interrupts, Served, serve_chains};
use super::wait::DeviceKick;
use crate::confine::{self, Role};
use crate::memory::GuestRam;
use crate::parking::{Control, Kick, PanicGuard};
use crate::saved::StateError;
use crate::tap::{Tap, TapOffloads, VNET_HEADER_BYTES};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES_MAX: [u16; 3] = [256, 256, 64];

/// Further things to wait for, beside the queues.
const KICK: usize = 3;
const FRAME: usize = 4;

/// The longest frame with its header: an IP packet of 64 KiB, which stands for many, behind an Ethernet header with
/// two VLAN tags.
const FRAME_BYTES_MAX: usize = 65_536 + 22 + VNET_HEADER_BYTES;

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
    kick: Arc<DeviceKick>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).field("tap", &self.tap).finish_non_exhaustive()
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
            features: offload::offered(tap.supported_offloads()),
            config: config_space(mac),
            queue_sizes_max: QUEUE_SIZES_MAX.to_vec(),
        };
        let eventfd = || EventFd::new(EFD_NONBLOCK);
        let notify = vec![eventfd()?, eventfd()?, eventfd()?];
        let transport = MmioTransport::new(slot, kind, eventfd()?, notify);
        let transport = transport.with_last_queue_for(1 << VIRTIO_NET_F_CTRL_VQ);
        Ok(Self {
            mac,
            transport: Arc::new(transport),
            ram,
            tap: Mutex::new(Some(Arc::new(tap))),
            observer: Mutex::new(None),
            kick: Arc::new(DeviceKick::new()?),
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

    /// What the guest's driver has agreed on.
    pub(crate) fn features(&self) -> u64 {
        self.transport.lock().features()
    }

    /// Refuses to take over a driver that uses what this interface does not offer.
    pub(crate) fn check_features(&self, used: u64) -> Result<(), StateError> {
        let missing = used & !self.transport.offered_features();
        if missing == 0 {
            return Ok(());
        }
        Err(StateError::NetworkFeatures { missing: offload::describe(missing) })
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
            confine::enter(Role::Device);
            let mut line = Line::new(tap);
            while control.park(&*self.kick) {
                self.serve(control, &mut waiter, &mut line);
            }
        });
        if thread.is_err() {
            on_failure.remove_thread();
        }
        thread
    }

    /// Moves frames until the machine is to park.
    fn serve(&self, control: &Control, waiter: &mut Waiter, line: &mut Line) {
        // Notifications from before a pause, or from another host, are not kept: look at every queue first.
        let mut turns = [Turn::More; QUEUE_SIZES_MAX.len()];
        while !control.should_park() {
            if turns[TRANSMIT] == Turn::More {
                let serve = |queue: &mut Queue, features| self.transmit(control, queue, features, line);
                turns[TRANSMIT] = self.guarded(TRANSMIT, serve);
            }
            if turns[RECEIVE] == Turn::More {
                let serve = |queue: &mut Queue, features| self.receive(control, queue, features, line);
                turns[RECEIVE] = self.guarded(RECEIVE, serve);
            }
            if turns[CONTROL] == Turn::More {
                let serve = |queue: &mut Queue, features| {
                    let is_agreed = offload::has(features, VIRTIO_NET_F_CTRL_VQ);
                    if is_agreed { self.serve_commands(control, queue) } else { Ok(Turn::NoBuffers) }
                };
                turns[CONTROL] = self.guarded(CONTROL, serve);
            }
            let patience = match turns[RECEIVE] {
                _ if turns.contains(&Turn::More) => WAIT_NONE,
                Turn::TapFailed => WAIT_RETRY_MS,
                Turn::Done | Turn::More | Turn::NoBuffers => WAIT_FOREVER,
            };
            let take_frames = matches!(turns[RECEIVE], Turn::Done | Turn::More);
            let woken = match self.wait(waiter, &line.tap, take_frames, patience) {
                Ok(woken) => woken,
                Err(error) => {
                    // Without a wait there is no way to serve; a later resume tries again.
                    tracing::error!(%error, "the network interface can't wait for its tap");
                    control.wait_for_wish_to_park();
                    return;
                }
            };
            for (turn, is_woken) in turns.iter_mut().zip(woken) {
                if is_woken || *turn == Turn::TapFailed {
                    *turn = Turn::More;
                }
            }
        }
    }

    /// Serves a queue if the driver is ready, and stops the device if the driver broke it.
    fn guarded(
        &self,
        index: usize,
        serve: impl FnOnce(&mut Queue, u64) -> Result<Turn, BrokenQueue>,
    ) -> Turn {
        let mut registers = self.transport.lock();
        if !registers.is_live() || !registers.queues[index].ready() {
            return Turn::NoBuffers;
        }
        let features = registers.features();
        let queue = &mut registers.queues[index];
        // Rings that lie in memory throughout: else a queue could look neither empty nor readable.
        let served = if queue.is_valid(self.ram.tracked()) {
            serve(queue, features)
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
        features: u64,
        line: &mut Line,
    ) -> Result<Turn, BrokenQueue> {
        // A frame can be long work, and a pause waits for no more than one.
        let should_stop = || control.should_park();
        let memory = self.ram.tracked();
        let served = serve_chains(queue, memory, FRAMES_PER_TURN, &should_stop, |chain| {
            let mut reader = chain.reader(memory)?;
            let length = reader.available_bytes();
            // What is no frame is dropped, as a wire would.
            if let Some(bytes) = line.outgoing.get_mut(..length)
                && length >= VNET_HEADER_BYTES + ETHERNET_HEADER_BYTES
                && reader.read_exact(bytes).is_ok()
            {
                self.transmit_frame(&line.tap, features, bytes);
            }
            Ok(0)
        })?;
        Ok(self.turn_after(served))
    }

    fn turn_after(&self, served: Served) -> Turn {
        let Served { has_more, interrupt } = served;
        if interrupt {
            self.transport.interrupt_for_queue();
        }
        if has_more { Turn::More } else { Turn::Done }
    }

    fn transmit_frame(&self, tap: &Tap, features: u64, bytes: &mut [u8]) {
        let Some((header, frame)) = bytes.split_first_chunk_mut::<VNET_HEADER_BYTES>() else { return };
        if !offload::accept_from_guest(header, features) {
            return;
        }
        // A frame that the tap does not take (no room, link down, a header that makes no sense) is lost, as on a wire.
        let _ = tap.file().write_vectored(&[IoSlice::new(header), IoSlice::new(frame)]);
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
        features: u64,
        line: &mut Line,
    ) -> Result<Turn, BrokenQueue> {
        let memory = self.ram.tracked();
        let buffers_max = if offload::has(features, VIRTIO_NET_F_MRG_RXBUF) { queue.size() } else { 1 };
        line.set_offloads(offload::for_driver(features));
        let interrupts = Interrupts::before(queue);
        let mut turn = Turn::More;
        for _ in 0..FRAMES_PER_TURN {
            if control.should_park() {
                break;
            }
            // Only a frame that may have somewhere to go is taken from the tap.
            if queue.iter(memory)?.next().is_none() {
                if queue.enable_notification(memory)? {
                    continue;
                }
                turn = Turn::NoBuffers;
                break;
            }
            queue.go_to_previous_position();
            let frame = match line.next_frame(features) {
                Ok(Some(frame)) => frame,
                Ok(None) => continue,
                Err(error) => {
                    let is_empty = error.kind() == io::ErrorKind::WouldBlock;
                    turn = if is_empty { Turn::Done } else { Turn::TapFailed };
                    break;
                }
            };
            match place_frame(queue, memory, frame, buffers_max)? {
                Placed::Whole | Placed::Dropped => line.waiting_bytes = 0,
                Placed::NoRoom => {
                    turn = Turn::NoBuffers;
                    break;
                }
            }
        }
        if interrupts.are_due(queue, memory)? {
            self.transport.interrupt_for_queue();
        }
        Ok(turn)
    }

    /// Watches everything that the thread waits for, but the tap.
    fn watch(&self) -> io::Result<Waiter> {
        let epoll = Epoll::new()?;
        let watch = |file: &dyn AsRawFd, token: usize| {
            let event = EpollEvent::new(EventSet::IN, token as u64);
            epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event)
        };
        for (token, file) in self.transport.notifiers().iter().enumerate() {
            watch(file, token)?;
        }
        watch(&*self.kick, KICK)?;
        Ok(Waiter { epoll, watches_tap: false })
    }

    /// Waits for a notification, a kick or, if `take_frames`, a frame, for at most `timeout_ms`; and says which queues
    /// have something to do.
    fn wait(
        &self,
        waiter: &mut Waiter,
        tap: &Tap,
        take_frames: bool,
        timeout_ms: i32,
    ) -> io::Result<[bool; QUEUE_SIZES_MAX.len()]> {
        waiter.watch_tap(tap, take_frames)?;
        let mut events = [EpollEvent::default(); FRAME + 1];
        let count = match waiter.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut woken = [false; QUEUE_SIZES_MAX.len()];
        for event in &events[..count] {
            match usize::try_from(event.data()).expect("the tokens are small") {
                FRAME => woken[RECEIVE] = true,
                KICK => {}
                queue => {
                    // Reading resets the counter.
                    let _ = self.transport.notify(queue).read();
                    woken[queue] = true;
                }
            }
        }
        Ok(woken)
    }
}

/// The thread's end of the tap.
#[derive(Debug)]
struct Line {
    tap: Arc<Tap>,
    /// What the tap was last told to leave undone.
    offloads: TapOffloads,
    /// A frame on its way out.
    outgoing: Vec<u8>,
    /// A frame on its way in.
    incoming: Vec<u8>,
    /// The bytes of the frame in `incoming` that waits for more buffers; 0 if none does. It is lost with a migration, as
    /// those are that wait in the tap.
    waiting_bytes: usize,
}

impl Line {
    fn new(tap: Arc<Tap>) -> Self {
        let (outgoing, incoming) = (vec![0; FRAME_BYTES_MAX], vec![0; FRAME_BYTES_MAX]);
        Self { tap, offloads: TapOffloads::NONE, outgoing, incoming, waiting_bytes: 0 }
    }

    fn set_offloads(&mut self, wanted: TapOffloads) {
        if self.offloads == wanted {
            return;
        }
        // It can only fail once the interface is gone. Frames are whole then, which every driver takes.
        if let Err(error) = self.tap.set_offloads(wanted) {
            tracing::debug!(%error, "the tap goes on without offloads");
        }
        self.offloads = wanted;
    }

    /// The frame that waits, or the next one of the tap, with its header; `None` if it was not for this driver.
    fn next_frame(&mut self, features: u64) -> io::Result<Option<&mut [u8]>> {
        if self.waiting_bytes == 0 {
            self.waiting_bytes = self.tap.file().read(&mut self.incoming)?;
        }
        let frame = &mut self.incoming[..self.waiting_bytes];
        let Some(header) = frame.first_chunk_mut::<VNET_HEADER_BYTES>() else {
            self.waiting_bytes = 0;
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        if offload::accept_from_tap(header, features) {
            return Ok(Some(frame));
        }
        self.waiting_bytes = 0;
        Ok(None)
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
