//! A link between two hosts that breaks where a test wants it to.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Connections that are taken: control connections and data streams, of all reconnections together.
const CONNECTIONS_MAX: usize = 1000;

/// Forwards connections and cuts all of them, for good or for a while, after so many bytes.
#[derive(Debug)]
pub struct CuttingProxy {
    /// Where it listens.
    pub address: String,
}

/// When a link breaks.
#[derive(Debug, Clone, Copy)]
pub struct Cuts {
    /// After so many bytes, counted over all connections and both directions, and again after as many.
    pub bytes_max: usize,
    /// How often.
    pub count: usize,
    /// How long nobody can connect then; `None` for ever.
    pub outage: Option<Duration>,
}

#[derive(Debug)]
struct Link {
    cuts: Cuts,
    bytes_left: AtomicUsize,
    cuts_left: AtomicUsize,
    down: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
}

impl CuttingProxy {
    /// A way to `to` that breaks for good after `bytes_max`, counted over all connections and both directions.
    ///
    /// # Panics
    /// If loopback has no port left.
    pub fn start(to: &str, bytes_max: usize) -> Self {
        Self::cutting(to, Cuts { bytes_max, count: 1, outage: None })
    }

    /// A way to `to` that breaks now and then.
    ///
    /// # Panics
    /// If loopback has no port left.
    pub fn cutting(to: &str, cuts: Cuts) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let to = to.to_owned();
        let link = Arc::new(Link {
            cuts,
            bytes_left: AtomicUsize::new(cuts.bytes_max),
            cuts_left: AtomicUsize::new(cuts.count),
            down: AtomicBool::new(false),
            sockets: Mutex::default(),
        });
        std::thread::spawn(move || {
            for near in listener.incoming().take(CONNECTIONS_MAX).map_while(Result::ok) {
                if link.down.load(Ordering::SeqCst) {
                    // Nobody comes through now; if that is for good, nobody listens either.
                    if cuts.outage.is_none() {
                        return;
                    }
                    continue;
                }
                let Ok(far) = TcpStream::connect(&to) else { return };
                if link.join(&near, &far).is_err() || link.down.load(Ordering::SeqCst) {
                    link.cut();
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

    /// Whether the link still carries `got` more bytes.
    fn carries(&self, got: usize) -> bool {
        if self.cuts_left.load(Ordering::SeqCst) == 0 {
            return true;
        }
        let spend = |left: usize| left.checked_sub(got);
        if self.bytes_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).is_ok() {
            return true;
        }
        // Several threads may find it exhausted; one of them breaks it.
        if !self.down.swap(true, Ordering::SeqCst) {
            self.cut();
            if let Some(outage) = self.cuts.outage {
                std::thread::sleep(outage);
                self.bytes_left.store(self.cuts.bytes_max, Ordering::SeqCst);
                self.cuts_left.fetch_sub(1, Ordering::SeqCst);
                self.down.store(false, Ordering::SeqCst);
            }
        }
        false
    }

    fn forward(&self, mut from: TcpStream, mut into: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            if !self.carries(got) {
                return;
            }
            if into.write_all(&buffer[..got]).is_err() {
                return;
            }
        }
        // What one side has closed is closed for the other; the way back stays open.
        let _ = into.shutdown(Shutdown::Write);
    }

    fn cut(&self) {
        for socket in self.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
