//! A vCPU's registers when a kernel starts: 32-bit protected mode without paging, as PVH wants it
//! (xen/docs/misc/pvh.pandoc), and the APIC's lines wired as on a PC.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::{BootError, Entry};
use crate::capability::KvmCallError;
use crate::memory::GuestRam;

const SEGMENT_TABLE_ADDRESS: u64 = 0x500;

/// Flat segments: code, data, and a task segment that nobody uses.
const SEGMENTS: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

const CR0_PROTECTED_MODE: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const RFLAGS_ALWAYS_SET: u64 = 1 << 1;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

const LAPIC_LVT0: usize = 0x350;
const LAPIC_LVT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 0x700;
const DELIVERY_MODE_NMI: u32 = 0x400;
const DELIVERY_MODE_EXTERNAL: u32 = 0x700;

pub(super) fn write_segment_table(ram: &GuestRam) -> Result<(), BootError> {
    let bytes: Vec<u8> = SEGMENTS.iter().flat_map(|segment| segment.to_le_bytes()).collect();
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
    set_flat_segments(&mut sregs);
    fd.set_sregs(&sregs).map_err(call("set a vCPU's system registers"))?;
    let regs = kvm_regs {
        rip: entry.address,
        rbx: entry.start_info,
        rflags: RFLAGS_ALWAYS_SET,
        ..kvm_regs::default()
    };
    fd.set_regs(&regs).map_err(call("set a vCPU's registers"))?;
    Ok(())
}

fn set_flat_segments(sregs: &mut kvm_sregs) {
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
    let data = flat(0x10, 3);
    sregs.cs = flat(0x8, 11);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { selector: 0x18, limit: 0x67, type_: 11, present: 1, ..kvm_segment::default() };
    sregs.gdt.base = SEGMENT_TABLE_ADDRESS;
    sregs.gdt.limit = u16::try_from(size_of_val(&SEGMENTS) - 1).expect("four segments");
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
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
