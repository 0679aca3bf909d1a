//! Output to the serial console. Every byte costs two exits, so the guest says little.

use super::port;
use core::fmt;
use ferry_guest_abi::SERIAL_PORT;

/// The console, as a sink for `write!`.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            port::write_byte(SERIAL_PORT, byte);
        }
        Ok(())
    }
}
