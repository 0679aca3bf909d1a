//! Fills the interrupt descriptor table, from ring 3: it is ordinary memory, and ring 0 is slow.

/// Vector of the LAPIC timer.
pub const VECTOR_TIMER: u8 = 0x40;
/// Vector of the network device.
pub const VECTOR_NET: u8 = 0x50;
/// Vector of spurious interrupts.
pub const VECTOR_SPURIOUS: u8 = 0xff;

const VECTOR_GP: u8 = 13;
const EXCEPTIONS: u8 = 32;
/// Distance between two entries of `trap_exceptions`, bytes.
const STUB_LEN: u64 = 16;
const RING0_CODE: u64 = 0x10;
/// Present 64-bit interrupt gate for ring 0.
const GATE: u64 = 0x8e00;

#[repr(C, align(4096))]
struct Idt([[u64; 2]; 256]);

unsafe extern "C" {
    static mut idt: Idt;
    fn trap_exceptions();
    fn trap_gp();
    fn trap_timer();
    fn trap_net();
    fn trap_spurious();
}

fn set(vector: u8, handler: u64) {
    let low = (handler & 0xffff) | (RING0_CODE << 16) | (GATE << 32) | ((handler >> 16 & 0xffff) << 48);
    let entry = [low, handler >> 32];
    // SAFETY: `idt` is the table in boot.s; 256 entries, so every u8 is in bounds.
    let slot = unsafe { &raw mut idt.0[usize::from(vector)] };
    // SAFETY: the slot is valid, and nothing but the processor reads it.
    unsafe { slot.write_volatile(entry) }
}

/// Fills the table that boot.s has already loaded. Until then any exception ends the machine.
pub fn install() {
    for vector in 0..EXCEPTIONS {
        set(vector, trap_exceptions as *const () as u64 + u64::from(vector) * STUB_LEN);
    }
    set(VECTOR_GP, trap_gp as *const () as u64);
    set(VECTOR_TIMER, trap_timer as *const () as u64);
    set(VECTOR_NET, trap_net as *const () as u64);
    set(VECTOR_SPURIOUS, trap_spurious as *const () as u64);
}
