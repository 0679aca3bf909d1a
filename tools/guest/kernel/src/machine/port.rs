//! The two privileged instructions that ring 3 executes: both trap, and ring 0 does them for it.

use core::arch::asm;

/// Writes `value` to I/O port `port`.
pub fn write_byte(port: u16, value: u8) {
    // SAFETY: traps to `trap_gp` in boot.s, which executes the same instruction and returns behind it;
    // the ports in use (serial output, shutdown) change nothing in this guest's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Waits for an interrupt: the timer's next tick at the latest.
pub fn halt() {
    // SAFETY: traps to `trap_gp` in boot.s, which enables interrupts, halts, and returns behind it.
    // Not `nomem`: devices may have written to memory meanwhile.
    unsafe { asm!("hlt", options(nostack, preserves_flags)) }
}
