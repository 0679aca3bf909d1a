//! The first serial port: a 16550 whose output goes where the host says, and whose input comes from there.
//!
//! What the guest says is queued and written by threads of their own ([`super::console`]), so that no
//! vCPU waits for whoever reads it. Input is read by another thread (input.rs), only while the machine
//! runs and only as much as the port's FIFO takes: the rest waits where it was typed, and what is in the
//! FIFO is part of the saved state, so that a migration loses none of it.

mod input;
mod places;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::input::{Drained, Inputs, Wake};
use self::places::{Listener, Opened};
use super::console::{Console, ReaderId};
use crate::config::SerialTarget;
use crate::saved::StateError;
use crate::saved::sections::Serial as SavedSerial;

/// Why a serial port can't be had.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// Its output file can't be opened.
    #[error("can't open {} for the serial output", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its socket can't be made.
    #[error("can't listen on {} for the serial port", .path.display())]
    Socket {
        /// Where it was to be.
        path: PathBuf,
        /// What the kernel said, or whose it is.
        #[source]
        source: io::Error,
    },
    /// There is no pseudo terminal to be had.
    #[error("can't make a pseudo terminal for the serial port")]
    Terminal(#[source] io::Error),
    /// The standard output can't be had a second time.
    #[error("can't duplicate the standard output for the serial output")]
    Stdout(#[source] io::Error),
    /// The thread that writes its output can't be started.
    #[error("can't start a thread for the serial output")]
    Thread(#[source] io::Error),
    /// Its interrupt can't be made.
    #[error("can't make an eventfd for the serial port")]
    EventFd(#[source] io::Error),
}

type Device = Serial<Interrupt, Arc<Drained>, Console>;

/// The serial port, shared by the vCPUs and the thread that reads its input.
#[derive(Debug)]
pub(crate) struct SerialPort {
    device: Mutex<Device>,
    interrupt: EventFd,
    drained: Arc<Drained>,
    inputs: Mutex<Inputs>,
    /// Listeners that the thread has not taken in yet.
    arriving: Mutex<Vec<Listener>>,
    /// Wakes the thread that reads input.
    wake: Arc<Wake>,
    terminal: Option<Terminal>,
}

/// The guest's end of a pseudo terminal. It stays open, or reading the other end would fail while nobody has it open.
#[derive(Debug)]
struct Terminal {
    path: PathBuf,
    _end: OwnedFd,
}

#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialPort {
    pub(crate) fn open(target: &SerialTarget) -> Result<Self, SerialError> {
        let Opened { output, input, listener, terminal } = places::open(target)?;
        let mut console = Console::default();
        let mut inputs = Inputs::default();
        let id = inputs.next_id();
        if let Some(output) = output {
            console.add(id, output).map_err(SerialError::Thread)?;
        }
        if let Some(input) = input {
            inputs.add_own(id, input);
        }
        if let Some(listener) = listener {
            inputs.add_listener(listener);
        }
        let interrupt = EventFd::new(EFD_NONBLOCK).map_err(SerialError::EventFd)?;
        let trigger = Interrupt(interrupt.try_clone().map_err(SerialError::EventFd)?);
        let wake = Arc::new(Wake::new().map_err(SerialError::EventFd)?);
        let drained = Arc::new(Drained::new(Arc::clone(&wake)));
        let device = Serial::with_events(trigger, Arc::clone(&drained), console);
        let inputs = Mutex::new(inputs);
        let arriving = Mutex::default();
        Ok(Self { device: Mutex::new(device), interrupt, drained, inputs, arriving, wake, terminal })
    }

    /// The pseudo terminal that users open, if there is one.
    pub(crate) fn terminal(&self) -> Option<&Path> {
        self.terminal.as_ref().map(|terminal| terminal.path.as_path())
    }

    /// Signalled when the port wants its interrupt.
    pub(crate) fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.lock().read(register)
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        // Output goes into a queue, which refuses nothing; what can fail is the interrupt.
        if let Err(error) = self.lock().write(register, value) {
            tracing::debug!(?error, "the serial port could not raise its interrupt");
        }
    }

    pub(crate) fn save(&self) -> SavedSerial {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.lock().state();
        SavedSerial {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        }
    }

    /// Takes on a saved state, and raises the interrupt again if it was pending.
    pub(crate) fn restore(&self, saved: &SavedSerial) -> Result<(), StateError> {
        let SavedSerial {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = saved.clone();
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        let error = |what: String| StateError::Device { device: "serial port", what };
        let trigger = self.interrupt.try_clone().map_err(|source| error(source.to_string()))?;
        let mut device = self.lock();
        let output = std::mem::take(device.writer_mut());
        *device = Serial::from_state(&state, Interrupt(trigger), Arc::clone(&self.drained), output)
            .map_err(|source| error(source.to_string()))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
