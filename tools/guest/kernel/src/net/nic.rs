//! The network card: static frame buffers behind two rings, offered to smoltcp as a device.

use super::ring::{Ring, RingMemory, SIZE_MAX};
use super::transport::Transport;
use crate::fail::give_up;
use crate::machine::{apic, once::Once, report};
use ferry_guest_abi::CommandLine;
use ferry_guest_abi::report::offset;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::EthernetAddress;

const DEVICE_NETWORK: u32 = 1;
const RX: u32 = 0;
const TX: u32 = 1;

const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_EVENT_INDEX: u64 = 1 << 29;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// Length of virtio's header before each frame, bytes; the older form lacks the last field.
const HEADER_LEN: usize = 12;
const HEADER_LEN_LEGACY: usize = 10;

/// Longest Ethernet frame: an MTU of 1500 behind a header of 14.
const FRAME_LEN_MAX: usize = 1514;
const BUFFER_LEN: usize = 2048;

/// Frames that one poll receives at most: it bounds the time between two heartbeats.
const RX_BUDGET: u32 = 32;
/// Frames that one poll sends at most. More than there are sockets, and granted whole or not at all: smoltcp
/// serves its sockets in a fixed order, so a smaller share would always go to the first ones.
const TX_BUDGET: u32 = 96;

#[repr(C, align(4096))]
struct Buffers([[u8; BUFFER_LEN]; SIZE_MAX as usize]);

static RX_BUFFERS: Once<Buffers> = Once::new(Buffers([[0; BUFFER_LEN]; SIZE_MAX as usize]));
static TX_BUFFERS: Once<Buffers> = Once::new(Buffers([[0; BUFFER_LEN]; SIZE_MAX as usize]));
static RX_RING: Once<RingMemory> = Once::new(RingMemory::new());
static TX_RING: Once<RingMemory> = Once::new(RingMemory::new());

unsafe extern "C" {
    /// Counted up by `trap_net` in boot.s.
    static net_interrupts: u32;
}

fn interrupts() -> u32 {
    // SAFETY: an aligned u32 in boot.s; volatile because ring 0 changes it during a halt.
    unsafe { (&raw const net_interrupts).read_volatile() }
}

struct Receiver {
    ring: Ring,
    buffers: &'static mut Buffers,
    header_len: usize,
}

struct Sender {
    ring: Ring,
    buffers: &'static mut Buffers,
    header_len: usize,
    /// Descriptors that the device doesn't have: a stack.
    free: [u16; SIZE_MAX as usize],
    free_len: usize,
}

/// A virtio network card.
pub struct Nic {
    transport: Transport,
    mac: EthernetAddress,
    rx: Receiver,
    tx: Sender,
    rx_budget: u32,
    tx_budget: u32,
    tx_granted: u32,
    interrupts_seen: u32,
}

impl Nic {
    /// Starts the first network card among the devices on the command line.
    pub fn start(line: &CommandLine) -> Self {
        let found = line.devices().find_map(|d| Some((Transport::find(d.base, DEVICE_NETWORK)?, d.irq)));
        let Some((transport, irq)) = found else {
            give_up(format_args!(
                "http: this machine has no virtio-mmio network card; give it one (--net tap=...)"
            ));
        };
        let features = transport.negotiate(FEATURE_MAC | FEATURE_EVENT_INDEX | FEATURE_VERSION_1);
        let header_len = if features & FEATURE_VERSION_1 != 0 { HEADER_LEN } else { HEADER_LEN_LEGACY };
        let event_index = features & FEATURE_EVENT_INDEX != 0;
        let mac = mac_address(&transport, features);

        let rx_ring = Ring::new(RX_RING.take(), queue_size(&transport, RX), event_index);
        let tx_ring = Ring::new(TX_RING.take(), queue_size(&transport, TX), event_index);
        transport.set_queue(RX, rx_ring.size(), &rx_ring.addresses());
        transport.set_queue(TX, tx_ring.size(), &tx_ring.addresses());
        let rx = Receiver::new(rx_ring, header_len);
        let tx = Sender::new(tx_ring, header_len);
        apic::route(irq);
        transport.start();
        let mut nic =
            Self { transport, mac, rx, tx, rx_budget: 0, tx_budget: 0, tx_granted: 0, interrupts_seen: 0 };
        nic.flush();
        nic
    }

    /// The card's address.
    pub const fn mac(&self) -> EthernetAddress {
        self.mac
    }

    /// Begins a new poll: with a fresh budget, and past interrupts acknowledged.
    pub fn begin_poll(&mut self) {
        self.rx_budget = RX_BUDGET;
        self.tx.reclaim();
        self.tx_granted = if self.tx.free_len >= self.tx.batch() { TX_BUDGET } else { 0 };
        self.tx_budget = self.tx_granted;
        let interrupts = interrupts();
        if interrupts != self.interrupts_seen {
            self.interrupts_seen = interrupts;
            self.transport.acknowledge();
        }
    }

    /// Tells the device of everything that was handed over since the last call.
    pub fn flush(&mut self) {
        if self.tx.ring.needs_notification() {
            self.transport.notify(TX);
        }
        if self.rx.ring.needs_notification() {
            self.transport.notify(RX);
        }
    }

    /// Whether the last poll used its budget up, so that there may be more to do at once.
    pub const fn is_busy(&self) -> bool {
        self.rx_budget == 0 || (self.tx_granted > 0 && self.tx_budget == 0)
    }

    /// Asks for an interrupt when there is something to do. Says whether there already is.
    pub fn arm(&mut self) -> bool {
        self.tx.reclaim();
        // Only a crowded ring is worth an interrupt for frames sent; others are tidied up when the next is.
        let missing = self.tx.batch().saturating_sub(self.tx.free_len);
        let sent = missing > 0 && self.tx.ring.wake_after(missing as u16);
        self.rx.ring.wake_after(1) || sent
    }

    /// Asks for no more interrupts, after a halt.
    pub fn disarm(&mut self) {
        self.rx.ring.silence();
        self.tx.ring.silence();
    }

    /// Sends a frame that `write` makes, if there is room.
    pub fn send(&mut self, len: usize, write: impl FnOnce(&mut [u8])) {
        if self.tx.has_room() {
            self.tx.send(len, write);
        }
    }
}

fn queue_size(transport: &Transport, queue: u32) -> u16 {
    let size = transport.queue_size_max(queue).min(u32::from(SIZE_MAX)) as u16;
    if size < 16 || !size.is_power_of_two() {
        give_up(format_args!(
            "http: the network card's queue {queue} has {size} entries; at least 16 are needed"
        ));
    }
    size
}

fn mac_address(transport: &Transport, features: u64) -> EthernetAddress {
    let mut mac = [0; 6];
    if features & FEATURE_MAC == 0 {
        give_up(format_args!("http: the network card has no MAC address"));
    }
    for (at, byte) in mac.iter_mut().enumerate() {
        *byte = transport.config_byte(at as u64);
    }
    EthernetAddress(mac)
}

impl Receiver {
    fn new(ring: Ring, header_len: usize) -> Self {
        let mut receiver = Self { ring, buffers: RX_BUFFERS.take(), header_len };
        for index in 0..receiver.ring.size() {
            let address = receiver.buffers.0[usize::from(index)].as_mut_ptr() as u64;
            receiver.ring.describe(index, address, BUFFER_LEN as u32, true);
            receiver.ring.offer(index);
        }
        receiver
    }
}

impl Sender {
    fn new(ring: Ring, header_len: usize) -> Self {
        let mut free = [0; SIZE_MAX as usize];
        let free_len = usize::from(ring.size());
        for (index, slot) in (0..ring.size()).zip(free.iter_mut()) {
            *slot = index;
        }
        Self { ring, buffers: TX_BUFFERS.take(), header_len, free, free_len }
    }

    /// Free descriptors that it takes to send anything new.
    fn batch(&self) -> usize {
        (TX_BUDGET as usize).min(usize::from(self.ring.size()) / 2)
    }

    /// Takes back the descriptors of frames that were sent.
    fn reclaim(&mut self) {
        while let Some(used) = self.ring.reclaim() {
            self.free[self.free_len] = used.index;
            self.free_len += 1;
        }
    }

    /// Whether a frame can be sent, after taking back those that were.
    fn has_room(&mut self) -> bool {
        if self.free_len == 0 {
            self.reclaim();
        }
        self.free_len > 0
    }

    fn send<R>(&mut self, len: usize, write: impl FnOnce(&mut [u8]) -> R) -> R {
        self.free_len -= 1;
        let index = self.free[self.free_len];
        let buffer = &mut self.buffers.0[usize::from(index)];
        let (header, frame) = buffer.split_at_mut(self.header_len);
        header.fill(0);
        let result = write(&mut frame[..len]);
        let address = buffer.as_ptr() as u64;
        self.ring.describe(index, address, (self.header_len + len) as u32, false);
        self.ring.offer(index);
        report::add(offset::TX_FRAMES, 1);
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        // A received frame may want an answer, so it waits until there is room for one.
        if self.rx_budget == 0 || !self.rx.ring.has_used() || !self.tx.has_room() {
            return None;
        }
        self.rx_budget -= 1;
        Some((Received(&mut self.rx), Sending(&mut self.tx)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        if self.tx_budget == 0 || !self.tx.has_room() {
            return None;
        }
        self.tx_budget -= 1;
        Some(Sending(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_LEN_MAX;
        capabilities
    }
}

/// A received frame, still in its buffer.
pub struct Received<'a>(&'a mut Receiver);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let receiver = self.0;
        let Some(used) = receiver.ring.reclaim() else { return read(&[]) };
        let buffer = &receiver.buffers.0[usize::from(used.index)];
        let end = (used.len as usize).clamp(receiver.header_len, BUFFER_LEN);
        let result = read(&buffer[receiver.header_len..end]);
        receiver.ring.offer(used.index);
        report::add(offset::RX_FRAMES, 1);
        result
    }
}

/// Room for a frame to be sent.
pub struct Sending<'a>(&'a mut Sender);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        self.0.send(len, write)
    }
}
