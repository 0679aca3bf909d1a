//! The first serial port: a 16550 whose output goes where the host says.
//!
//! What the guest says is queued and written by a thread of its own ([`super::console`]), so that no
//! vCPU waits for whoever reads it. Input is not wired up yet; the saved state has room for it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::console::Console;
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

/// The serial port, shared by the vCPUs.
#[derive(Debug)]
pub(crate) struct SerialPort {
    device: Mutex<Serial<Interrupt, NoEvents, Console>>,
    interrupt: EventFd,
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
        let file = match target {
            SerialTarget::Null => None,
            SerialTarget::Stdio => {
                // Not through `io::stdout`, whose lock a stuck write would keep from the whole process.
                let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(SerialError::Stdout)?;
                Some(File::from(stdout))
            }
            SerialTarget::File(path) => {
                let opened = OpenOptions::new().create(true).append(true).open(path);
                Some(opened.map_err(|source| SerialError::File { path: path.clone(), source })?)
            }
        };
        let output =
            file.map_or_else(|| Ok(Console::default()), Console::start).map_err(SerialError::Thread)?;
        let interrupt = EventFd::new(EFD_NONBLOCK).map_err(SerialError::EventFd)?;
        let trigger = Interrupt(interrupt.try_clone().map_err(SerialError::EventFd)?);
        Ok(Self { device: Mutex::new(Serial::new(trigger, output)), interrupt })
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
        *device = Serial::from_state(&state, Interrupt(trigger), NoEvents, output)
            .map_err(|source| error(source.to_string()))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Interrupt, NoEvents, Console>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_reaches_its_file_before_and_after_a_restore() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let port = SerialPort::open(&SerialTarget::File(path.clone())).unwrap();
        port.write(0, b'a');
        port.write(7, 0x5a);
        let saved = port.save();
        port.write(7, 0);
        port.restore(&saved).unwrap();
        assert_eq!(port.save(), saved);
        assert_eq!(port.read(7), 0x5a);
        port.write(0, b'b');
        // Dropping it waits for what was said.
        drop(port);
        assert_eq!(std::fs::read(&path).unwrap(), b"ab");
    }

    #[test]
    fn an_output_file_that_cannot_be_is_named() {
        let error = SerialPort::open(&SerialTarget::File("/nonexistent/console".into())).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/console"), "{error}");
    }

    #[test]
    fn a_buffer_longer_than_the_device_is_refused() {
        let port = SerialPort::open(&SerialTarget::Null).unwrap();
        let mut saved = port.save();
        saved.in_buffer = vec![0; 1000];
        assert!(matches!(port.restore(&saved), Err(StateError::Device { .. })));
    }
}
