//! The local APIC's timer and the IOAPIC, programmed by MMIO from ring 3.
//!
//! The timer is periodic rather than re-armed: that saves an exit a tick, and a tick that gets lost
//! while a monitor saves the APIC's state is made up for by the next.

use super::{trap, tsc};

const LAPIC: usize = 0xfee0_0000;
const LAPIC_ID: usize = 0x20;
const LAPIC_TASK_PRIORITY: usize = 0x80;
const LAPIC_SPURIOUS: usize = 0xf0;
const LAPIC_LVT_TIMER: usize = 0x320;
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const LAPIC_TIMER_INITIAL: usize = 0x380;
const LAPIC_TIMER_CURRENT: usize = 0x390;
const LAPIC_TIMER_DIVIDE: usize = 0x3e0;

const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

const IOAPIC: usize = 0xfec0_0000;

/// Frequency of KVM's LAPIC timer: its bus runs at 1 GHz.
const TIMER_HZ: u64 = 1_000_000_000;

/// Period of the tick that ends every halt, in microseconds.
pub const TICK_US: u64 = 1_000;

fn read(register: usize) -> u32 {
    // SAFETY: the LAPIC's page is mapped by boot.s; 32-bit aligned reads of its registers have no effect on memory.
    unsafe { ((LAPIC + register) as *const u32).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: the LAPIC's page is mapped by boot.s; the registers in use deliver interrupts only to vectors
    // that `trap::install` has filled.
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) }
}

/// Switches the local APIC on, with everything but the timer silent.
pub fn enable() {
    // At reset KVM lets LINT0 pass the old interrupt controller's vectors through: those would look like exceptions.
    write(LAPIC_LVT_LINT0, MASKED);
    write(LAPIC_LVT_LINT1, MASKED);
    write(LAPIC_LVT_TIMER, MASKED);
    write(LAPIC_TIMER_DIVIDE, DIVIDE_BY_1);
    write(LAPIC_TASK_PRIORITY, 0);
    write(LAPIC_SPURIOUS, 0x100 | u32::from(trap::VECTOR_SPURIOUS));
}

/// Starts the periodic tick.
pub fn start_tick() {
    write(LAPIC_LVT_TIMER, PERIODIC | u32::from(trap::VECTOR_TIMER));
    write(LAPIC_TIMER_INITIAL, (TIMER_HZ * TICK_US / 1_000_000) as u32);
}

/// A reading of the LAPIC timer with the TSC around it.
struct Reading {
    timer: u32,
    tsc: u64,
    spread: u64,
}

/// Reads timer and TSC together: the tightest of a few tries, as each takes an exit of uncertain length.
fn read_together() -> Reading {
    let once = || {
        let before = tsc();
        let timer = read(LAPIC_TIMER_CURRENT);
        let after = tsc();
        Reading { timer, tsc: before + (after - before) / 2, spread: after - before }
    };
    let mut best = once();
    for _ in 0..16 {
        let next = once();
        if next.spread < best.spread {
            best = next;
        }
    }
    best
}

/// Measures the TSC's frequency against the LAPIC timer, over some 50 ms. In kHz.
pub fn measure_tsc_khz() -> u64 {
    const SPAN_TICKS: u32 = (TIMER_HZ / 20) as u32;
    write(LAPIC_LVT_TIMER, MASKED);
    write(LAPIC_TIMER_INITIAL, u32::MAX);
    let first = read_together();
    while first.timer - read(LAPIC_TIMER_CURRENT) < SPAN_TICKS {
        // Each read is an exit of some 30 us, or the wait would keep a host's core busy for nothing.
        core::hint::spin_loop();
    }
    let last = read_together();
    let timer_ticks = u64::from(first.timer - last.timer);
    (last.tsc - first.tsc) * (TIMER_HZ / 1_000) / timer_ticks
}

/// Routes IOAPIC input `irq` to the network vector of this vCPU, edge-triggered.
///
/// Level would need an end of interrupt at the IOAPIC and a device that lowers its line; monitors that
/// signal through an eventfd only ever pulse it.
pub fn route(irq: u32) {
    let entry = 0x10 + 2 * irq;
    let destination = read(LAPIC_ID) & 0xff00_0000;
    io_write(entry + 1, destination);
    io_write(entry, u32::from(trap::VECTOR_NET));
}

fn io_write(register: u32, value: u32) {
    // SAFETY: the IOAPIC's page is mapped by boot.s; offset 0 selects a register and touches no memory.
    unsafe { (IOAPIC as *mut u32).write_volatile(register) };
    // SAFETY: offset 0x10 is the selected register; a redirection entry names a vector that is filled.
    unsafe { ((IOAPIC + 0x10) as *mut u32).write_volatile(value) };
}
