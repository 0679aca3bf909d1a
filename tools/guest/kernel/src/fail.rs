//! The ends of the guest: giving up, panics and exceptions.
//!
//! Each leaves its reason in the report page and on the serial console. None tries to recover.

use crate::machine::{port, report, serial::Serial};
use core::fmt::{self, Write};
use ferry_guest_abi::report::{Stage, TEXT_LEN_MAX, offset};
use ferry_guest_abi::{SHUTDOWN_PORT, SHUTDOWN_VALUE};

/// A line that fits the report page; what is longer is cut.
struct Text {
    bytes: [u8; TEXT_LEN_MAX],
    len: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// Ends the guest because its job can't be done, and asks the machine to shut down.
pub fn give_up(reason: fmt::Arguments<'_>) -> ! {
    say(reason, Stage::Failed);
    port::write_byte(SHUTDOWN_PORT, SHUTDOWN_VALUE);
    halt_forever()
}

fn say(reason: fmt::Arguments<'_>, stage: Stage) {
    let mut text = Text { bytes: [0; TEXT_LEN_MAX], len: 0 };
    let _ = text.write_fmt(reason);
    for (i, byte) in text.bytes[..text.len].iter().enumerate() {
        report::set_byte(offset::TEXT + i, *byte);
    }
    report::set_u32(offset::STAGE, stage as u32);
    let _ = writeln!(Serial, "ferry guest: {reason}");
}

fn halt_forever() -> ! {
    loop {
        port::halt();
    }
}

/// Where ring 0 sends an exception of ring 3, on a stack of its own, with the report page filled in.
#[unsafe(no_mangle)]
extern "C" fn guest_fault() -> ! {
    let vector = report::get(offset::FAULT_VECTOR) - 1;
    let (error, rip) = (report::get(offset::FAULT_ERROR), report::get(offset::FAULT_RIP));
    let cr2 = report::get(offset::FAULT_CR2);
    say(format_args!("exception {vector}, error {error:#x}, at {rip:#x}, cr2 {cr2:#x}"), Stage::Faulted);
    halt_forever()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say(format_args!("{info}"), Stage::Failed);
    halt_forever()
}
