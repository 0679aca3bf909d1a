//! Devices, and the bus that takes a vCPU's accesses to them.
//!
//! | where | what |
//! |---|---|
//! | port 0x3f8..0x400 | serial port, interrupt 4 |
//! | port 0x64 | keyboard controller, of which only the reset line exists |
//! | port 0xf4 | any write switches the machine off |
//! | port 0x600..0x606 | ACPI's fixed hardware: power button and switching off, interrupt 9 |
//! | port 0xcf9 | reset register |
//! | 0xd000_0000 + n · 4 KiB | virtio-mmio window n, interrupt 5 + n, from 9 on 6 + n |
//!
//! Whatever else is read gives all ones, and writes to it vanish, as on a bus without a device.
//! Interrupt controllers and the timer are KVM's.

mod console;
pub(crate) mod power;
mod serial;
pub(crate) mod virtio;

use std::sync::Arc;

pub use serial::SerialError;
pub(crate) use serial::SerialPort;

use self::power::{Power, RESET_PORT};
use self::virtio::mmio::{MmioTransport, WINDOW_BYTES};

/// Where virtio-mmio windows begin.
pub(crate) const MMIO_START: u64 = 0xd000_0000;

/// Interrupt of the first virtio-mmio window.
const MMIO_INTERRUPT_FIRST: u32 = 5;

/// Interrupt of ACPI's fixed hardware.
pub(crate) const ACPI_INTERRUPT: u32 = 9;

/// Interrupt of virtio-mmio window `window`.
pub(crate) const fn mmio_interrupt(window: u32) -> u32 {
    let line = MMIO_INTERRUPT_FIRST + window;
    if line < ACPI_INTERRUPT { line } else { line + 1 }
}

/// First port of the serial port, and how many it has.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_PORTS: u16 = 8;

/// Interrupt of the serial port.
pub(crate) const SERIAL_INTERRUPT: u32 = 4;

const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

const SWITCH_OFF_PORT: u16 = 0xf4;

/// What a write to a port asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortEffect {
    None,
    Shutdown,
    Reset,
}

/// Everything that a vCPU's accesses can reach outside KVM.
#[derive(Debug)]
pub(crate) struct Bus {
    pub(crate) serial: SerialPort,
    pub(crate) power: Power,
    /// By window.
    pub(crate) virtio: Vec<Arc<MmioTransport>>,
}

impl Bus {
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_PORT.. if port - SERIAL_PORT < SERIAL_PORTS => {
                let register = register_of(port);
                for byte in data {
                    *byte = self.serial.read(register);
                }
            }
            // An idle controller, so that a guest that waits for it before a reset does not wait long.
            KEYBOARD_COMMAND_PORT => data.fill(0),
            RESET_PORT => data.fill(0),
            _ if Power::has(port) => self.power.read(port, data),
            _ => data.fill(0xff),
        }
    }

    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> PortEffect {
        match port {
            SERIAL_PORT.. if port - SERIAL_PORT < SERIAL_PORTS => {
                let register = register_of(port);
                for byte in data {
                    self.serial.write(register, *byte);
                }
                PortEffect::None
            }
            KEYBOARD_COMMAND_PORT if data == [KEYBOARD_RESET] => PortEffect::Reset,
            SWITCH_OFF_PORT => PortEffect::Shutdown,
            RESET_PORT => Power::reset_effect(data),
            _ if Power::has(port) => self.power.write(port, data),
            _ => PortEffect::None,
        }
    }

    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.window(address) {
            transport.write(offset, data);
        }
    }

    fn window(&self, address: u64) -> Option<(&MmioTransport, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let window = usize::try_from(offset / WINDOW_BYTES).ok()?;
        Some((self.virtio.get(window)?, offset % WINDOW_BYTES))
    }
}

fn register_of(port: u16) -> u8 {
    u8::try_from(port - SERIAL_PORT).expect("the port was checked to be one of eight")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SerialTarget;

    #[test]
    fn an_empty_bus_reads_as_ones_and_knows_the_ways_to_end() {
        let bus = Bus {
            serial: SerialPort::open(&SerialTarget::Null).unwrap(),
            power: Power::new(Box::new(power::tests::Line::default())),
            virtio: Vec::new(),
        };
        let mut data = [0; 4];
        bus.port_read(0x70, &mut data);
        assert_eq!(data, [0xff; 4]);
        data = [0; 4];
        bus.mmio_read(MMIO_START + 4, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.mmio_write(0, &data);
        assert_eq!(bus.port_write(0x64, &[0xfe]), PortEffect::Reset);
        assert_eq!(bus.port_write(0x64, &[0xd1]), PortEffect::None);
        assert_eq!(bus.port_write(0xf4, &[0]), PortEffect::Shutdown);
        assert_eq!(bus.port_write(0xcf9, &[0x06]), PortEffect::Reset);
        assert_eq!(bus.port_write(0xcf9, &[0x02]), PortEffect::None);
        // What precedes a write to a PCI bus's configuration.
        assert_eq!(bus.port_write(0xcf8, &[0xff; 4]), PortEffect::None);
        bus.port_read(0xcf9, &mut data[..1]);
        assert_eq!(data[0], 0);
        assert_eq!(bus.port_write(0x604, &[0x00, 0x34]), PortEffect::Shutdown);
        assert_eq!([0, 3, 4, 5, 17].map(mmio_interrupt), [5, 8, 10, 11, 23]);
        assert_eq!(bus.port_write(0x400, &[0]), PortEffect::None);
    }
}
