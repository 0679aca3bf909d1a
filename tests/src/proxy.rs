//! A link between two hosts that breaks where a test wants it to.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Connections that are taken: a control connection and up to seven data streams.
const CONNECTIONS_MAX: usize = 8;

/// Forwards connections and cuts all of them, for good, after so many bytes.
#[derive(Debug)]
pub struct CuttingProxy {
    /// Where it listens.
    pub address: String,
}

#[derive(Debug)]
struct Link {
    bytes_left: AtomicUsize,
    sockets: Mutex<Vec<TcpStream>>,
}

impl CuttingProxy {
    /// A way to `to` that breaks after `bytes_max`, counted over all connections and both directions.
    ///
    /// # Panics
    /// If loopback has no port left.
    pub fn start(to: &str, bytes_max: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let to = to.to_owned();
        let link = Arc::new(Link { bytes_left: AtomicUsize::new(bytes_max), sockets: Mutex::default() });
        std::thread::spawn(move || {
            for near in listener.incoming().take(CONNECTIONS_MAX).map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(&to) else { return };
                // Nobody comes after the cut.
                if link.join(&near, &far).is_err() || link.bytes_left.load(Ordering::Relaxed) == 0 {
                    link.cut();
                    return;
                }
            }
        });
        Self { address }
    }
}

impl Link {
    fn join(self: &Arc<Self>, near: &TcpStream, far: &TcpStream) -> std::io::Result<()> {
        let clones = [near.try_clone()?, far.try_clone()?];
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner).extend(clones);
        for (from, into) in [(near, far), (far, near)] {
            let (link, from, into) = (Arc::clone(self), from.try_clone()?, into.try_clone()?);
            std::thread::spawn(move || link.forward(from, into));
        }
        Ok(())
    }

    fn forward(&self, mut from: TcpStream, mut into: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            let spend = |left: usize| left.checked_sub(got);
            if self.bytes_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_err() {
                self.bytes_left.store(0, Ordering::Relaxed);
                return self.cut();
            }
            if into.write_all(&buffer[..got]).is_err() {
                return;
            }
        }
        // What one side has closed is closed for the other; the way back stays open.
        let _ = into.shutdown(Shutdown::Write);
    }

    fn cut(&self) {
        for socket in &*self.sockets.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
