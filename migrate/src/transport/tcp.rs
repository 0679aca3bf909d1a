//! TCP as a migration needs it: no Nagle delay, dead peers noticed within seconds.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// How long making a connection may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long sent bytes may stay unacknowledged before the connection counts as dead. A link that stalls is
/// noticed within this time instead of the hours that TCP would keep trying.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

const KEEPALIVE_AFTER: Duration = Duration::from_secs(5);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(2);
const KEEPALIVE_PROBES: u32 = 3;

/// Sets up a connection of either kind.
pub(crate) fn set_up<S: AsFd>(stream: &S) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_AFTER)
            .with_interval(KEEPALIVE_EVERY)
            .with_retries(KEEPALIVE_PROBES),
    )
}

/// Sets up a data stream: blocking, and with timeouts, so that a peer that stops reading is noticed too
/// (acknowledged bytes that it never takes keep a connection alive for ever otherwise).
pub(crate) fn set_up_data(stream: &TcpStream, stall_max: Option<Duration>) -> io::Result<()> {
    set_up(stream)?;
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(stall_max)?;
    if is_within_host(stream) {
        spare_pacing(stream);
    }
    Ok(())
}

/// Whether the other end is a process of the same host (and the same network namespace).
pub(crate) fn is_within_host(stream: &TcpStream) -> bool {
    let ends = stream.peer_addr().and_then(|peer| Ok((peer, stream.local_addr()?)));
    ends.is_ok_and(|(peer, local)| peer.ip() == local.ip())
}

/// Within a host there is no congestion to control, and pacing (bbr's, where that is the host's default) costs the sender
/// a third of its processor time. Other links keep what their host's operator has chosen.
fn spare_pacing(stream: &TcpStream) {
    // Every kernel has it; if this one does not, the stream is slower and nothing else.
    if let Err(error) = SockRef::from(stream).set_tcp_congestion(b"reno") {
        tracing::debug!("a data stream keeps its congestion control: {error}");
    }
}

/// Binds the listener for migrations. The address can be taken again at once after a restart.
pub(crate) fn listen(address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let socket =
        if address.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(128)
}
