//! ACPI's fixed hardware as far as there is any (ACPI specification 6.5, section 4.8): the power button, the register
//! that switches off, and the one that resets.
//!
//! ```text
//! 0x600  PM1 status   bit 8: the power button was pressed; written ones clear
//! 0x602  PM1 enable   bit 8: and interrupts
//! 0x604  PM1 control  bit 0: ACPI is on, always; bits 10 to 12 and 13: sleep type, and do it
//! 0xcf9  reset        bit 2: do it
//! ```
//!
//! The interrupt (ACPI calls it SCI) is a level: asserted as long as something is both pending and enabled. Sleeping
//! states other than S5 (off), timers and general-purpose events are not here.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::PortEffect;
use crate::saved::StateError;
use crate::saved::sections::Power as SavedPower;

/// PM1 status and enable.
pub(crate) const EVENT_PORT: u16 = 0x600;
pub(crate) const EVENT_BYTES: u8 = 4;

/// PM1 control.
pub(crate) const CONTROL_PORT: u16 = 0x604;
pub(crate) const CONTROL_BYTES: u8 = 2;

/// The reset register, as on PCs with a PCI bus.
pub(crate) const RESET_PORT: u16 = 0xcf9;

/// What ACPI writes there.
pub(crate) const RESET_VALUE: u8 = RESET_NOW | 2;
const RESET_NOW: u8 = 4;

/// The sleep type that means off, S5.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;

const PORTS: u16 = EVENT_BYTES as u16 + CONTROL_BYTES as u16;

const POWER_BUTTON: u16 = 1 << 8;

/// Events that can be enabled. Only the power button's ever happens; the others (timer, global lock, sleep button, clock)
/// keep their bits, because kernels look whether they do.
const ENABLES: u16 = 1 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;

const ACPI_ON: u16 = 1;
const BUS_MASTER_RELOAD: u16 = 1 << 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_NOW: u16 = 1 << 13;

/// An interrupt line that has a level.
pub(crate) trait InterruptLevel: fmt::Debug + Send + Sync {
    /// Sets the level.
    fn set(&self, asserted: bool);
}

/// The fixed hardware, shared by the vCPUs and the machine's owner.
#[derive(Debug)]
pub(crate) struct Power {
    registers: Mutex<Registers>,
    interrupt: Box<dyn InterruptLevel>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    status: u16,
    enable: u16,
    /// Without what reads as a constant or is never kept.
    control: u16,
}

impl Power {
    pub(crate) fn new(interrupt: Box<dyn InterruptLevel>) -> Self {
        Self { registers: Mutex::default(), interrupt }
    }

    /// Whether a port is one of the PM1 registers'.
    pub(crate) fn has(port: u16) -> bool {
        port.checked_sub(EVENT_PORT).is_some_and(|offset| offset < PORTS)
    }

    /// Presses and releases the power button; false if the guest has not enabled it.
    pub(crate) fn press_button(&self) -> bool {
        let mut registers = self.lock();
        if registers.enable & POWER_BUTTON == 0 {
            return false;
        }
        registers.status |= POWER_BUTTON;
        self.update_interrupt(&registers);
        true
    }

    /// Reads from a PM1 register on. A register can be read by bytes, and two at once.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let bytes = self.lock().to_bytes();
        for (offset, byte) in (usize::from(port - EVENT_PORT)..).zip(data) {
            *byte = bytes.get(offset).copied().unwrap_or(0xff);
        }
    }

    /// Writes to PM1 registers.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> PortEffect {
        let mut registers = self.lock();
        let mut effect = PortEffect::None;
        for (port, byte) in (port..EVENT_PORT + PORTS).zip(data) {
            let shift = 8 * (port % 2);
            let (value, mask) = (u16::from(*byte) << shift, 0xff << shift);
            let replace = |old: u16, kept: u16| (old & !mask) | (value & mask & kept);
            match port & !1 {
                EVENT_PORT => registers.status &= !value,
                CONTROL_PORT => {
                    registers.control = replace(registers.control, BUS_MASTER_RELOAD | SLEEP_TYPE);
                    let kind = (value & SLEEP_TYPE) >> SLEEP_TYPE_SHIFT;
                    if value & SLEEP_NOW != 0 && kind == u16::from(SLEEP_TYPE_OFF) {
                        effect = PortEffect::Shutdown;
                    }
                }
                _ => registers.enable = replace(registers.enable, ENABLES),
            }
        }
        self.update_interrupt(&registers);
        effect
    }

    /// What a write to the reset register asks for.
    pub(crate) fn reset_effect(data: &[u8]) -> PortEffect {
        match data {
            [value] if value & RESET_NOW != 0 => PortEffect::Reset,
            _ => PortEffect::None,
        }
    }

    /// The registers, unless no guest has ever touched them: then there is nothing to save, and a target that knows no
    /// such hardware can take the machine.
    pub(crate) fn save(&self) -> Option<SavedPower> {
        let registers = *self.lock();
        let Registers { status, enable, control } = registers;
        (registers != Registers::default()).then_some(SavedPower { status, enable, control })
    }

    /// Takes on a saved state, once the interrupt controllers have theirs.
    pub(crate) fn restore(&self, saved: Option<&SavedPower>) -> Result<(), StateError> {
        let restored = match saved {
            Some(SavedPower { status, enable, control }) => {
                Registers { status: *status, enable: *enable, control: *control }
            }
            None => Registers::default(),
        };
        let Registers { status, enable, control } = restored;
        let impossible =
            [status & !POWER_BUTTON, enable & !ENABLES, control & !(BUS_MASTER_RELOAD | SLEEP_TYPE)];
        if impossible != [0; 3] {
            let what = format!("bits {impossible:x?} of its registers are not known here");
            return Err(StateError::Device { device: "power button", what });
        }
        let mut registers = self.lock();
        *registers = restored;
        self.update_interrupt(&registers);
        Ok(())
    }

    fn update_interrupt(&self, registers: &Registers) {
        self.interrupt.set(registers.status & registers.enable != 0);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn to_bytes(self) -> [u8; PORTS as usize] {
        let [status, enable, control] =
            [self.status, self.enable, self.control | ACPI_ON].map(u16::to_le_bytes);
        [status[0], status[1], enable[0], enable[1], control[0], control[1]]
    }
}

#[cfg(test)]
pub(crate) mod tests;
