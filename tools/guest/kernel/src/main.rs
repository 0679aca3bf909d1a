//! The workload guest: a bare-metal program that gives a live migration something to lose.
//!
//! It boots through PVH, drops to ring 3 at once (see `boot.s`) and does everything else there, because
//! ring 3 runs natively on every KVM back end. It keeps a heartbeat in the report page, fills and
//! dirties memory whose content it can predict, checks that nothing was lost, and serves HTTP.
//! What it is told and what it says is defined in `ferry-guest-abi`.
//!
//! Any PVH loader boots it. ferry embeds it (`tools/guest/image`); with QEMU, for comparison:
//!
//! ```text
//! cd tools/guest/kernel && cargo build --release
//! qemu-system-x86_64 -M microvm,pit=off,pic=off,rtc=off,acpi=off -accel kvm -cpu host,-arch-capabilities \
//!     -m 1G -nodefaults -display none -no-reboot -serial stdio \
//!     -kernel target/x86_64-unknown-linux-gnu/release/ferry-guest -append 'workload dirty rate=500 set=256'
//! ```
//!
//! (`acpi=off` makes QEMU put its virtio-mmio devices on the command line, where this guest looks for them.)
//!
//! ```text
//! boot.s       ring 0: PVH entry, page tables, traps      net/    virtio-mmio network card
//! machine/     what ring 3 sees of the machine            http/   the web server, on smoltcp
//! pulse.rs     heartbeat and gap log                      dirty.rs, fill.rs, content.rs   memory that checks itself
//! ```
//!
//! It has one thread, no allocator, no file system and no way back: whatever fails ends in
//! [`fail::give_up`], which says so on the serial console and in the report.
#![no_std]
#![no_main]

mod content;
mod dirty;
mod fail;
mod fill;
mod http;
mod machine;
mod net;
mod pulse;

use core::fmt::Write as _;
use fail::give_up;
use ferry_guest_abi::report::{Mode, Stage, offset};
use ferry_guest_abi::{CommandLine, Workload};
use machine::{apic, memory, report, serial::Serial, start_info::StartInfo, trap};
use pulse::Pulse;

core::arch::global_asm!(
    include_str!("boot.s"),
    report = const ferry_guest_abi::REPORT_GPA,
    stage = const offset::STAGE,
    faulted = const Stage::Faulted as u32,
    fault_vector = const offset::FAULT_VECTOR,
    fault_error = const offset::FAULT_ERROR,
    fault_rip = const offset::FAULT_RIP,
    fault_cr2 = const offset::FAULT_CR2,
);

/// Where ring 3 starts. `start_info` is the address that PVH handed over.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    report::begin();
    trap::install();
    let info = StartInfo::read(start_info);
    let line = match CommandLine::parse(info.command_line()) {
        Ok(line) => line,
        Err(error) => give_up(format_args!("{error}")),
    };
    report::set_u32(offset::MODE, mode(&line.workload) as u32);
    let mut ram = memory::Ram::map(&info);
    report::set(offset::RAM_BYTES, ram.bytes());
    let _ = writeln!(Serial, "ferry guest: {} ({} MiB of RAM)", line.workload, ram.bytes() >> 20);

    apic::enable();
    let mut pulse = Pulse::calibrate(line.gap_log_min_us);
    report::set_u32(offset::STAGE, Stage::Filling as u32);
    let mut filled = fill::fill(&line.workload.fill(), &mut ram, &mut pulse);
    match line.workload {
        Workload::Idle | Workload::Fill(_) => idle(&mut filled, &mut pulse),
        Workload::Dirty(job) => dirty::run(&job, &mut ram, &mut filled, &mut pulse),
        Workload::Http(job) => http::run(&job, &line, &mut filled, &mut pulse),
    }
}

/// Keeps the heartbeat, verifies what was filled, and halts in between.
fn idle(filled: &mut fill::Filled, pulse: &mut Pulse) -> ! {
    pulse.ready();
    loop {
        let now = pulse.beat();
        if !filled.verify_some(now) {
            pulse.halt();
        }
    }
}

const fn mode(workload: &Workload) -> Mode {
    match workload {
        Workload::Idle => Mode::Idle,
        Workload::Dirty(_) => Mode::Dirty,
        Workload::Fill(_) => Mode::Fill,
        Workload::Http(_) => Mode::Http,
    }
}
