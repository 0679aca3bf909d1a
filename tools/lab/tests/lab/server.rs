//! Stands in for the VM: an HTTP server and a UDP echo that can be paused and cut off.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_lab::Namespace;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;

/// The size of `/file`, as the workload guest serves it.
pub(crate) const FILE_BYTES: usize = 512 * 1024;

const CHUNK_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Serving,
    Paused,
    Ended,
}

#[derive(Debug)]
struct Shared {
    mode: watch::Sender<Mode>,
    resets_wanted: AtomicU64,
    chunk_pause: Duration,
}

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) http: SocketAddr,
    pub(crate) udp: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(namespace: &Namespace, address: IpAddr) -> Self {
        Self::start_slow(namespace, address, Duration::ZERO)
    }

    /// A server that waits before every 16 KiB that it sends.
    pub(crate) fn start_slow(namespace: &Namespace, address: IpAddr, chunk_pause: Duration) -> Self {
        let shared = Arc::new(Shared {
            mode: watch::channel(Mode::Serving).0,
            resets_wanted: AtomicU64::new(0),
            chunk_pause,
        });
        let for_thread = Arc::clone(&shared);
        let (bound, addresses) = std::sync::mpsc::channel();
        let thread = namespace
            .start_thread("test-server", move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let http = TcpListener::bind((address, 0)).await.unwrap();
                    let udp = UdpSocket::bind((address, 0)).await.unwrap();
                    bound.send((http.local_addr().unwrap(), udp.local_addr().unwrap())).unwrap();
                    tokio::spawn(echo(udp, Arc::clone(&for_thread)));
                    tokio::spawn(accept(http, Arc::clone(&for_thread)));
                    let mut mode = for_thread.mode.subscribe();
                    mode.wait_for(|mode| *mode == Mode::Ended).await.unwrap();
                });
            })
            .unwrap();
        let (http, udp) = addresses.recv().unwrap();
        Self { http, udp, shared, thread: Some(thread) }
    }

    /// Sends nothing for a while, as a machine that is stopped.
    pub(crate) fn pause(&self, duration: Duration) {
        self.shared.mode.send_replace(Mode::Paused);
        std::thread::sleep(duration);
        self.shared.mode.send_replace(Mode::Serving);
    }

    /// Resets whichever connection sends next.
    pub(crate) fn reset_one(&self) {
        self.shared.resets_wanted.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.mode.send_replace(Mode::Ended);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Shared {
    async fn while_paused(&self) {
        let _ = self.mode.subscribe().wait_for(|mode| *mode != Mode::Paused).await;
    }

    fn takes_reset(&self) -> bool {
        let take = |wanted: u64| wanted.checked_sub(1);
        self.resets_wanted.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }
}

/// The bytes of `/file`: no two of its pages are equal.
pub(crate) fn file() -> Vec<u8> {
    (0..FILE_BYTES).map(|index| (index ^ (index >> 8) ^ (index >> 16)).to_le_bytes()[0]).collect()
}

async fn echo(socket: UdpSocket, shared: Arc<Shared>) {
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        shared.while_paused().await;
        let _ = socket.send_to(&buffer[..length], from).await;
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, Arc::clone(&shared)));
    }
}

/// Serves one connection until it ends. Every error only ends the connection.
async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    stream.set_nodelay(true).unwrap();
    let mut received = Vec::new();
    loop {
        while !received.ends_with(b"\r\n\r\n") {
            let mut buffer = [0; 1024];
            match stream.read(&mut buffer).await {
                Ok(length) if length > 0 => received.extend_from_slice(&buffer[..length]),
                Ok(_) | Err(_) => return,
            }
        }
        let request = String::from_utf8(std::mem::take(&mut received)).unwrap();
        let path = request.split(' ').nth(1).unwrap();
        let (status, body) = match path {
            "/file" => ("200 OK", file()),
            "/small" => ("200 OK", b"small".to_vec()),
            "/other" => ("200 OK", vec![7; FILE_BYTES]),
            _ => ("404 Not Found", b"no such file".to_vec()),
        };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut answer = head.into_bytes();
        answer.extend_from_slice(&body);
        for chunk in answer.chunks(CHUNK_BYTES) {
            shared.while_paused().await;
            if !shared.chunk_pause.is_zero() {
                tokio::time::sleep(shared.chunk_pause).await;
            }
            if shared.takes_reset() {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                return;
            }
            if stream.write_all(chunk).await.is_err() {
                return;
            }
        }
    }
}
