//! A vCPU's registers when a kernel starts, and the APIC's lines wired as on a PC: 32-bit protected mode without
//! paging, as PVH wants it (xen/docs/misc/pvh.pandoc), or 64-bit mode with memory mapped where it is, as Linux's
//! 64-bit boot protocol does (Documentation/arch/x86/boot.rst).

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::linux::PAGE_TABLES_ADDRESS;
use super::{BootError, Entry, Mode};
use crate::capability::KvmCallError;
use crate::memory::GuestRam;

const SEGMENT_TABLE_ADDRESS: u64 = 0x500;

/// Flat segments for PVH: code, data, and a task segment that nobody uses.
const SEGMENTS_PVH: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

/// For Linux's 64-bit entry, where its protocol wants them: code 0x10, data 0x18, and the task segment.
const SEGMENTS_LINUX: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

const CR0_PROTECTED_MODE: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLED: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const RFLAGS_ALWAYS_SET: u64 = 1 << 1;

const TYPE_CODE: u8 = 11;
const TYPE_DATA: u8 = 3;
const TYPE_TASK: u8 = 11;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

const LAPIC_LVT0: usize = 0x350;
const LAPIC_LVT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 0x700;
const DELIVERY_MODE_NMI: u32 = 0x400;
const DELIVERY_MODE_EXTERNAL: u32 = 0x700;

fn segments(mode: Mode) -> &'static [u64] {
    match mode {
        Mode::Pvh => &SEGMENTS_PVH,
        Mode::Linux64 => &SEGMENTS_LINUX,
    }
}

pub(super) fn write_segment_table(ram: &GuestRam, mode: Mode) -> Result<(), BootError> {
    let bytes: Vec<u8> = segments(mode).iter().flat_map(|segment| segment.to_le_bytes()).collect();
    super::write(ram, &bytes, SEGMENT_TABLE_ADDRESS, "the segment table")
}

/// Sets up a vCPU that has never run. Only the first one starts at `entry`; the others wait for it.
pub(crate) fn set_boot_registers(fd: &VcpuFd, is_first: bool, entry: Entry) -> Result<(), BootError> {
    let call = KvmCallError::new;
    set_boot_msrs(fd);
    wire_lapic(fd)?;
    if !is_first {
        return Ok(());
    }
    let mut sregs = fd.get_sregs().map_err(call("get a vCPU's system registers"))?;
    set_flat_segments(&mut sregs, entry.mode);
    fd.set_sregs(&sregs).map_err(call("set a vCPU's system registers"))?;
    let mut regs = kvm_regs { rip: entry.address, rflags: RFLAGS_ALWAYS_SET, ..kvm_regs::default() };
    match entry.mode {
        Mode::Pvh => regs.rbx = entry.information,
        Mode::Linux64 => regs.rsi = entry.information,
    }
    fd.set_regs(&regs).map_err(call("set a vCPU's registers"))?;
    Ok(())
}

fn set_flat_segments(sregs: &mut kvm_sregs, mode: Mode) {
    let is_64 = match mode {
        Mode::Pvh => false,
        Mode::Linux64 => true,
    };
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    };
    // PVH leaves the selectors to us; the null descriptor before them is one for Linux's entry two.
    let first = if is_64 { 0x10 } else { 0x8 };
    let code = flat(first, TYPE_CODE);
    let data = flat(first + 0x8, TYPE_DATA);
    sregs.cs = if is_64 { kvm_segment { l: 1, db: 0, ..code } } else { code };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: first + 0x10,
        limit: 0x67,
        type_: TYPE_TASK,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.gdt.base = SEGMENT_TABLE_ADDRESS;
    sregs.gdt.limit = u16::try_from(size_of_val(segments(mode)) - 1).expect("a few segments");
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
    if is_64 {
        sregs.cr0 |= CR0_PAGING;
        sregs.cr3 = PAGE_TABLES_ADDRESS;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LONG_MODE_ENABLED | EFER_LONG_MODE_ACTIVE;
    }
}

/// What firmware would have set. A processor without these MSRs needs none of it, so refusals don't
/// matter.
fn set_boot_msrs(fd: &VcpuFd) {
    for (index, data) in
        [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS), (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK)]
    {
        let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
        let msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
        if !matches!(fd.set_msrs(&msrs), Ok(1)) {
            tracing::debug!(index, "KVM does not take this MSR at boot");
        }
    }
}

/// LINT0 takes the PIC's interrupts, LINT1 is the NMI.
fn wire_lapic(fd: &VcpuFd) -> Result<(), BootError> {
    let mut lapic = fd.get_lapic().map_err(KvmCallError::new("get a vCPU's local APIC"))?;
    for (offset, mode) in [(LAPIC_LVT0, DELIVERY_MODE_EXTERNAL), (LAPIC_LVT1, DELIVERY_MODE_NMI)] {
        let value = (read_lapic(&lapic, offset) & !DELIVERY_MODE_MASK) | mode;
        write_lapic(&mut lapic, offset, value);
    }
    Ok(fd.set_lapic(&lapic).map_err(KvmCallError::new("set a vCPU's local APIC"))?)
}

fn read_lapic(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let bytes: [_; 4] = lapic.regs[offset..offset + 4].try_into().expect("four bytes");
    u32::from_le_bytes(bytes.map(|byte| u8::from_ne_bytes(byte.to_ne_bytes())))
}

fn write_lapic(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (to, from) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
}
