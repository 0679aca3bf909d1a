//! The thread that reads a serial port's input, and takes in consoles.
//!
//! ```text
//!  standard input, pseudo terminal, each console ──► thread ──► FIFO of 64 bytes ──► guest
//!                                     it only reads what the FIFO has room for ──┘
//! ```
//!
//! It is one of the machine's threads and parks with them: after a pause nothing is read from anywhere
//! any more, so what is typed then waits for the next run, here or wherever the terminal is. It touches
//! no guest memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{Shutdown, shutdown};
use vm_superio::serial::SerialEvents;

use super::places::Listener;
use super::{ReaderId, SerialPort};
use crate::confine::{self, Role};
use crate::devices::Bus;
use crate::parking::{Control, Kick, PanicGuard};

/// Consoles that may be attached at the same time; more wait to be accepted.
const CONSOLES_MAX: usize = 8;

/// Listeners that wait to be taken in; a host has one.
const LISTENERS_MAX: usize = 4;

/// The port's FIFO.
const FIFO_BYTES: usize = 64;

/// The bit of the modem control register by which a guest tests a port; it is off the line then.
const LOOPBACK: u8 = 0x10;

/// When to look again at what can't tell that it has changed, in ms.
const RETRY_MS: u16 = 200;

/// Wakes the thread from its wait.
#[derive(Debug)]
pub(super) struct Wake(EventFd);

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    fn clear(&self) {
        // It fails if nobody woke it.
        let _ = self.0.read();
    }

    pub(super) fn wake(&self) {
        // A full counter has woken it already.
        let _ = self.0.write(1);
    }
}

impl Kick for Wake {
    fn kick(&self) {
        self.wake();
    }

    fn reset(&self) {
        self.clear();
    }
}

/// Is told when the guest has read everything.
#[derive(Debug)]
pub(super) struct Drained {
    /// Whether the thread waits for it.
    awaited: AtomicBool,
    wake: Arc<Wake>,
}

impl Drained {
    pub(super) fn new(wake: Arc<Wake>) -> Self {
        Self { awaited: AtomicBool::new(false), wake }
    }
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        if self.awaited.swap(false, Ordering::SeqCst) {
            self.wake.wake();
        }
    }
}

/// Where input comes from.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    sources: Vec<Source>,
    listeners: Vec<Listener>,
    ids: u64,
}

#[derive(Debug)]
struct Source {
    id: ReaderId,
    file: File,
    /// One that was attached, whose output goes when its input ends.
    is_console: bool,
    /// A terminal whose foreground another process has: reading would fail until it is this one's again.
    in_background: bool,
}

impl Inputs {
    pub(super) fn next_id(&mut self) -> ReaderId {
        self.ids += 1;
        ReaderId(self.ids)
    }

    /// Adds what belongs to the port as long as the machine lives.
    pub(super) fn add_own(&mut self, id: ReaderId, file: File) {
        self.sources.push(Source { id, file, is_console: false, in_background: false });
    }

    pub(super) fn add_listener(&mut self, listener: Listener) {
        self.listeners.push(listener);
    }

    fn consoles(&self) -> usize {
        self.sources.iter().filter(|source| source.is_console).count()
    }
}

/// What poll found.
#[derive(Debug, Default)]
struct Ready {
    listeners: Vec<usize>,
    sources: Vec<usize>,
}

impl SerialPort {
    /// Takes in consoles from `listener` from now on, while the machine runs.
    pub(crate) fn serve_console(&self, listener: UnixListener) -> io::Result<()> {
        let listener = Listener::adopt(listener)?;
        let mut arriving = self.lock_arriving();
        if arriving.len() == LISTENERS_MAX {
            return Err(io::Error::other("the serial port has enough listeners"));
        }
        arriving.push(listener);
        self.wake.wake();
        Ok(())
    }

    pub(crate) fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.wake) as Arc<dyn Kick>
    }

    /// Starts the thread, parked, for the port on `bus`.
    pub(crate) fn spawn(bus: Arc<Bus>, control: Arc<Control>) -> io::Result<JoinHandle<()>> {
        control.add_thread();
        let on_failure = Arc::clone(&control);
        let thread = thread::Builder::new().name("serial".into()).spawn(move || {
            let guard = PanicGuard { control, vcpu: 0, what: "serial port's" };
            confine::enter(Role::Device);
            // A terminal stops a process in the background that reads from it; with this, reading fails instead.
            let stop = SigSet::from(Signal::SIGTTIN);
            if let Err(error) = stop.thread_block() {
                tracing::warn!(%error, "a terminal may stop this process");
            }
            while guard.control.park(&*bus.serial.wake) {
                bus.serial.serve(&guard.control);
            }
            bus.serial.detach_all();
        });
        if thread.is_err() {
            on_failure.remove_thread();
        }
        thread
    }

    fn serve(&self, control: &Control) {
        let mut inputs = self.lock_inputs();
        while !control.should_park() {
            inputs.listeners.append(&mut self.lock_arriving());
            let (room, retry) = self.room();
            match self.wait(&inputs, room, retry) {
                Ok(ready) => self.take_in(&mut inputs, &ready, room),
                Err(error) => {
                    // Output goes on; a later resume tries again.
                    tracing::error!(%error, "the serial port can't wait for its input");
                    control.wait_for_wish_to_park();
                    return;
                }
            }
        }
    }

    /// How many bytes the FIFO takes now, and whether to look again without being told.
    fn room(&self) -> (usize, bool) {
        let device = self.lock();
        if device.state().modem_control & LOOPBACK != 0 {
            return (0, true);
        }
        let room = device.fifo_capacity();
        // Under the device's lock, so the guest can't have drained it in between.
        self.drained.awaited.store(room == 0, Ordering::SeqCst);
        (room, false)
    }

    fn wait(&self, inputs: &Inputs, room: usize, retry: bool) -> io::Result<Ready> {
        let entry = |file| PollFd::new(file, PollFlags::POLLIN);
        let retry = retry || inputs.sources.iter().any(|source| source.in_background);
        // Who can't be served is not watched, not even for the end, which would be reported at once and again.
        let listeners: Vec<usize> =
            if inputs.consoles() < CONSOLES_MAX { (0..inputs.listeners.len()).collect() } else { Vec::new() };
        let can_read = |index: &usize| room > 0 && !inputs.sources[*index].in_background;
        let sources: Vec<usize> = (0..inputs.sources.len()).filter(can_read).collect();

        let mut entries = vec![entry(self.wake.0.as_fd())];
        entries.extend(listeners.iter().map(|index| entry(inputs.listeners[*index].socket.as_fd())));
        entries.extend(sources.iter().map(|index| entry(inputs.sources[*index].file.as_fd())));
        let timeout = if retry { PollTimeout::from(RETRY_MS) } else { PollTimeout::NONE };
        match poll(&mut entries, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.wake.clear();
        let is_ready = |entry: &PollFd<'_>| entry.revents().is_none_or(|events| !events.is_empty());
        let ready: Vec<bool> = entries[1..].iter().map(is_ready).collect();
        let chosen = |indices: Vec<usize>, ready: &[bool]| {
            indices.into_iter().zip(ready).filter_map(|(index, is_ready)| is_ready.then_some(index)).collect()
        };
        let (listening, reading) = ready.split_at(listeners.len());
        Ok(Ready { listeners: chosen(listeners, listening), sources: chosen(sources, reading) })
    }

    /// Reads from what is ready, `room` bytes at most in all, and accepts who wants to attach.
    fn take_in(&self, inputs: &mut Inputs, ready: &Ready, mut room: usize) {
        inputs.sources.iter_mut().for_each(|source| source.in_background = false);
        let mut ended = Vec::new();
        for index in &ready.sources {
            let source = &mut inputs.sources[*index];
            let mut bytes = [0; FIFO_BYTES];
            let wanted = room.min(FIFO_BYTES);
            if wanted == 0 {
                break;
            }
            match source.file.read(&mut bytes[..wanted]) {
                Ok(0) => ended.push(source.id),
                Ok(count) => {
                    room -= count;
                    self.enqueue(&bytes[..count]);
                }
                Err(error) if is_passing(&error) => {}
                Err(error) if error.raw_os_error() == Some(libc::EIO) && !source.is_console => {
                    source.in_background = true;
                }
                Err(_) => ended.push(source.id),
            }
        }
        for index in &ready.listeners {
            while inputs.consoles() < CONSOLES_MAX
                && let Ok((stream, _)) = inputs.listeners[*index].socket.accept()
            {
                let id = inputs.next_id();
                if let Err(error) = self.attach(id, OwnedFd::from(stream), inputs) {
                    tracing::warn!(%error, "a console could not be attached");
                }
            }
        }
        let (gone, here): (Vec<Source>, Vec<Source>) =
            inputs.sources.drain(..).partition(|source| ended.contains(&source.id));
        inputs.sources = here;
        gone.into_iter().for_each(|source| self.detach(source));
    }

    fn attach(&self, id: ReaderId, stream: OwnedFd, inputs: &mut Inputs) -> io::Result<()> {
        let output = File::from(stream.try_clone()?);
        self.lock().writer_mut().add(id, output)?;
        inputs.sources.push(Source { id, file: stream.into(), is_console: true, in_background: false });
        Ok(())
    }

    /// Ends the output to a console that is gone, and closes its connection. The port's own output stays.
    fn detach(&self, source: Source) {
        let Source { id, file, is_console, in_background: _ } = source;
        if is_console {
            let writer = self.lock().writer_mut().remove(id);
            // Not under the device's lock: a vCPU may be waiting for it, and this for last words.
            drop(writer);
            // Its thread may be stuck writing to whoever does not read.
            if let Err(error) = shutdown(file.as_raw_fd(), Shutdown::Both) {
                tracing::trace!(%error, "a console was closed already");
            }
        }
    }

    /// Lets go of everything, when the machine ends.
    fn detach_all(&self) {
        self.lock_arriving().clear();
        let Inputs { sources, listeners, ids: _ } = std::mem::take(&mut *self.lock_inputs());
        drop(listeners);
        sources.into_iter().for_each(|source| self.detach(source));
    }

    fn enqueue(&self, bytes: &[u8]) {
        // The guest may have begun to test the port since there was room; a real one loses what comes then, too.
        if let Err(error) = self.lock().enqueue_raw_bytes(bytes) {
            tracing::debug!(?error, "serial input was lost");
        }
    }

    /// The thread's own: it holds the lock while it serves.
    fn lock_inputs(&self) -> MutexGuard<'_, Inputs> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_arriving(&self) -> MutexGuard<'_, Vec<Listener>> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a later try may succeed.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
