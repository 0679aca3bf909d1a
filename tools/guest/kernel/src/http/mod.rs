//! The web server: one file over HTTP/1.1, and a UDP echo, by polling smoltcp.
//!
//! One loop does everything: take in frames, serve connections, send frames, then verify some filled memory
//! or halt. Interrupts only end the halt. All buffers are static.

mod connection;

use crate::fill::Filled;
use crate::machine::{once::Once, report, tsc};
use crate::net::{Nic, announce};
use crate::pulse::Pulse;
use connection::Connection;
use core::net::Ipv6Addr;
use ferry_guest_abi::content::http_file_part;
use ferry_guest_abi::report::offset;
use ferry_guest_abi::workload::Http;
use ferry_guest_abi::{CommandLine, HTTP_FILE_LEN, UDP_ECHO_PORT};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::udp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

/// TCP connections at a time.
const CONNECTIONS: usize = 64;
/// Datagrams waiting to be echoed, in each direction.
const DATAGRAMS: usize = 64;
const DATAGRAM_BYTES: usize = 64 * 1024;

static FILE: Once<[u8; HTTP_FILE_LEN]> = Once::new([0; HTTP_FILE_LEN]);
static SOCKETS: Once<[SocketStorage<'static>; CONNECTIONS + 1]> =
    Once::new([SocketStorage::EMPTY; CONNECTIONS + 1]);
static TCP_BUFFERS: Once<[connection::Buffers; CONNECTIONS]> =
    Once::new([const { connection::Buffers::new() }; CONNECTIONS]);
static UDP_BUFFERS: Once<[[u8; DATAGRAM_BYTES]; 2]> = Once::new([[0; DATAGRAM_BYTES]; 2]);
static UDP_SLOTS: Once<[[udp::PacketMetadata; DATAGRAMS]; 2]> =
    Once::new([[udp::PacketMetadata::EMPTY; DATAGRAMS]; 2]);
static CONNECTION_STATES: Once<[Option<Connection>; CONNECTIONS]> = Once::new([const { None }; CONNECTIONS]);

struct Server {
    nic: Nic,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: &'static mut [Option<Connection>; CONNECTIONS],
    echo: SocketHandle,
    file: &'static [u8; HTTP_FILE_LEN],
    port: u16,
}

/// Serves for ever.
pub fn run(job: &Http, line: &CommandLine, filled: &mut Filled, pulse: &mut Pulse) -> ! {
    let mut server = Server::start(job, line, pulse);
    pulse.ready();
    loop {
        let now = pulse.beat();
        let worked = server.poll(now_us(pulse));
        if filled.verify_some(now) || worked {
            continue;
        }
        if !server.nic.arm() {
            pulse.halt();
        }
        server.nic.disarm();
    }
}

fn now_us(pulse: &Pulse) -> Instant {
    Instant::from_micros((pulse.elapsed_ticks() * 1_000 / pulse.tsc_khz()) as i64)
}

impl Server {
    fn start(job: &Http, line: &CommandLine, pulse: &Pulse) -> Self {
        let mut nic = Nic::start(line);
        let mut config = Config::new(HardwareAddress::Ethernet(nic.mac()));
        config.random_seed = tsc();
        let mut interface = Interface::new(config, &mut nic, now_us(pulse));
        let link_local = link_local(nic.mac());
        interface.update_ip_addrs(|addresses| {
            // There is room for these three and more, so pushing can't fail.
            let _ = addresses.push(IpCidr::new(job.ip.0.into(), job.ip.1));
            let _ = addresses.push(IpCidr::new(link_local.into(), 64));
            if let Some((address, prefix)) = job.ip6 {
                let _ = addresses.push(IpCidr::new(address.into(), prefix));
            }
        });
        if let Some(gateway) = job.gateway {
            let _ = interface.routes_mut().add_default_ipv4_route(gateway);
        }

        let mut sockets = SocketSet::new(&mut SOCKETS.take()[..]);
        let echo = sockets.add(echo_socket());
        let connections = CONNECTION_STATES.take();
        for (slot, buffers) in connections.iter_mut().zip(TCP_BUFFERS.take()) {
            *slot = Some(Connection::new(buffers, &mut sockets));
        }
        let file = FILE.take();
        http_file_part(0, file);

        announce::ipv4(&mut nic, job.ip.0);
        announce::ipv6(&mut nic, link_local);
        if let Some((address, _)) = job.ip6 {
            announce::ipv6(&mut nic, address);
        }
        nic.flush();
        Self { nic, interface, sockets, connections, echo, file, port: job.port }
    }

    /// Takes in, serves and sends what there is, within the card's budget. Says whether there was anything.
    fn poll(&mut self, now: Instant) -> bool {
        self.nic.begin_poll();
        let taken = self.interface.poll(now, &mut self.nic, &mut self.sockets);
        let mut served = self.echo();
        for connection in self.connections.iter_mut().flatten() {
            served |= connection.serve(&mut self.sockets, self.port, self.file);
        }
        // What was served goes out at once rather than at the next poll.
        if served {
            self.interface.poll_egress(now, &mut self.nic, &mut self.sockets);
        }
        self.nic.flush();
        served || taken == PollResult::SocketStateChanged || self.nic.is_busy()
    }

    fn echo(&mut self) -> bool {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.echo);
        let mut echoed = false;
        let mut datagram = [0; 2048];
        while socket.can_send() {
            let Ok((len, from)) = socket.recv_slice(&mut datagram) else { break };
            if socket.send_slice(&datagram[..len], from).is_ok() {
                report::add(offset::UDP_ECHOES, 1);
                echoed = true;
            }
        }
        echoed
    }
}

fn echo_socket() -> udp::Socket<'static> {
    let [rx_slots, tx_slots] = UDP_SLOTS.take();
    let [rx, tx] = UDP_BUFFERS.take();
    let rx = udp::PacketBuffer::new(&mut rx_slots[..], &mut rx[..]);
    let tx = udp::PacketBuffer::new(&mut tx_slots[..], &mut tx[..]);
    let mut socket = udp::Socket::new(rx, tx);
    // The socket is new and the port isn't 0: binding can't fail.
    let _ = socket.bind(UDP_ECHO_PORT);
    socket
}

/// The link-local address that follows from the card's address (RFC 4291, appendix A).
fn link_local(mac: EthernetAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let word = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, word(a ^ 2, b), word(c, 0xff), word(0xfe, d), word(e, f))
}
