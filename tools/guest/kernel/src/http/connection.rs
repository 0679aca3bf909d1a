//! One TCP connection: listening, reading requests, sending answers, and listening again.

use crate::machine::report;
use ferry_guest_abi::http::{Answer, REQUEST_HEAD_LEN_MAX, RESPONSE_HEAD_LEN_MAX, Status, answer, head_len};
use ferry_guest_abi::report::offset;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, CongestionControl, State};
use smoltcp::time::Duration;

const RX_BYTES: usize = 8 * 1024;
const TX_BYTES: usize = 128 * 1024;

/// A peer that acknowledges nothing for so long is gone. Far longer than any migration that succeeds.
const TIMEOUT: Duration = Duration::from_secs(60);
/// An idle peer is asked this often whether it still is there, so that its slot can be used again.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Memory for one connection's two directions.
pub struct Buffers {
    rx: [u8; RX_BYTES],
    tx: [u8; TX_BYTES],
}

impl Buffers {
    /// Cleared buffers.
    pub const fn new() -> Self {
        Self { rx: [0; RX_BYTES], tx: [0; TX_BYTES] }
    }
}

/// An answer on its way.
struct Response {
    head: [u8; RESPONSE_HEAD_LEN_MAX],
    head_len: usize,
    /// Bytes of head and body that TCP has taken.
    sent: usize,
    answer: Answer,
}

/// A connection, and what it is in the middle of.
pub struct Connection {
    socket: SocketHandle,
    accepted: bool,
    request: [u8; REQUEST_HEAD_LEN_MAX],
    request_len: usize,
    response: Option<Response>,
}

impl Connection {
    /// A connection that will use `buffers`, for one peer after the other.
    pub fn new(buffers: &'static mut Buffers, sockets: &mut SocketSet<'static>) -> Self {
        let rx = tcp::SocketBuffer::new(&mut buffers.rx[..]);
        let tx = tcp::SocketBuffer::new(&mut buffers.tx[..]);
        let mut socket = tcp::Socket::new(rx, tx);
        socket.set_nagle_enabled(false);
        socket.set_congestion_control(CongestionControl::Reno);
        socket.set_timeout(Some(TIMEOUT));
        socket.set_keep_alive(Some(KEEP_ALIVE));
        Self {
            socket: sockets.add(socket),
            accepted: false,
            request: [0; REQUEST_HEAD_LEN_MAX],
            request_len: 0,
            response: None,
        }
    }

    /// Goes on as far as the socket lets it. Says whether anything was done.
    pub fn serve(&mut self, sockets: &mut SocketSet<'static>, port: u16, file: &[u8]) -> bool {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        match socket.state() {
            State::Listen | State::SynReceived => return false,
            State::Closed => {
                (self.accepted, self.request_len, self.response) = (false, 0, None);
                // The socket is closed and the port isn't 0: listening can't fail.
                let _ = socket.listen(port);
                return false;
            }
            State::TimeWait => {
                // The peer has the answer and has said goodbye; its slot is worth more than the wait.
                socket.abort();
                return true;
            }
            _ => {}
        }
        if !self.accepted {
            self.accepted = true;
            report::add(offset::TCP_ACCEPTS, 1);
        }
        let mut worked = false;
        // After its last answer a connection only waits for the peer's goodbye.
        while socket.may_send() {
            let progress =
                if self.response.is_some() { self.send(socket, file) } else { self.receive(socket) };
            worked |= progress;
            if !progress {
                break;
            }
        }
        // The peer has said all it will: what is left is to say goodbye.
        if self.response.is_none() && !socket.may_recv() && socket.may_send() {
            socket.close();
            worked = true;
        }
        worked
    }

    /// Reads on in the request; with its end the answer begins. Says whether anything was read.
    fn receive(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let before = self.request_len;
        if let Ok(len) = socket.recv_slice(&mut self.request[before..]) {
            self.request_len += len;
        }
        let answer = match head_len(&self.request[..self.request_len]) {
            Some(len) => {
                let answer = answer(&self.request[..len]);
                // A client may have sent its next request already.
                self.request.copy_within(len..self.request_len, 0);
                self.request_len -= len;
                answer
            }
            None if self.request_len == REQUEST_HEAD_LEN_MAX => Answer::closing(Status::HeadTooLong),
            None => return self.request_len > before,
        };
        let mut response = Response { head: [0; RESPONSE_HEAD_LEN_MAX], head_len: 0, sent: 0, answer };
        response.head_len = answer.write_head(&mut response.head);
        self.response = Some(response);
        true
    }

    /// Sends on in the answer. Says whether TCP took anything.
    fn send(&mut self, socket: &mut tcp::Socket<'_>, file: &[u8]) -> bool {
        let Some(response) = &mut self.response else { return false };
        let total = response.head_len + response.answer.body_len();
        let rest = match response.sent.checked_sub(response.head_len) {
            None => &response.head[response.sent..response.head_len],
            Some(body_sent) => &file[body_sent..response.answer.body_len()],
        };
        match socket.send_slice(rest) {
            Ok(taken) => {
                response.sent += taken;
                if response.sent == total {
                    let answer = response.answer;
                    self.response = None;
                    self.finish(socket, answer);
                    return true;
                }
                taken > 0
            }
            Err(_) => {
                // The peer is gone; smoltcp closes the socket in its own time.
                self.response = None;
                socket.abort();
                false
            }
        }
    }

    fn finish(&mut self, socket: &mut tcp::Socket<'_>, answer: Answer) {
        if answer.status == Status::Ok {
            report::add(offset::HTTP_REQUESTS, 1);
            report::add(offset::HTTP_BYTES, answer.body_len() as u64);
        } else {
            report::add(offset::HTTP_REFUSED, 1);
        }
        if !answer.keep_alive {
            socket.close();
        }
    }
}
