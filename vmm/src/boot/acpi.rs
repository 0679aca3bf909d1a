//! The ACPI tables (ACPI specification 6.5), by which a distribution's kernel finds processors, interrupt lines, the
//! serial port, virtio-mmio devices, the power button, and the way to switch off.
//!
//! ```text
//! 0xe0000  RSDP ──► XSDT ──► FADT ──► FACS, DSDT
//!                       └──► MADT
//! ```
//!
//! The machine is one with ACPI's fixed hardware (not "hardware-reduced"): a kernel then keeps the interval timer and
//! the old interrupt controllers, which are there, and knows the power button without a driver for it.
//! [`crate::devices::power`] is that hardware. There are no sleeping states but S5 (off), no processor power states, no
//! hot-plug and no PM timer. The tables are bytes in guest memory: they migrate with it.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::{BootError, HIGH_MEMORY, VirtioWindow};
use crate::devices::power::{
    CONTROL_BYTES, CONTROL_PORT, EVENT_BYTES, EVENT_PORT, RESET_PORT, RESET_VALUE, SLEEP_TYPE_OFF,
};
use crate::devices::virtio::mmio::WINDOW_BYTES;
use crate::devices::{ACPI_INTERRUPT, SERIAL_INTERRUPT, SERIAL_PORT, SERIAL_PORTS};
use crate::memory::GuestRam;

/// Kernels that are not told look for the RSDP from here to 1 MiB, at multiples of 16.
const ADDRESS: u64 = 0xe_0000;

/// The strictest alignment of any table, the FACS's.
const ALIGNMENT: u64 = 64;

const OEM: [u8; 6] = *b"FERRY ";
const OEM_TABLE: [u8; 8] = *b"FERRYVM ";
const OEM_REVISION: u32 = 1;

/// By which AML integers are 64 bits wide.
const DSDT_REVISION: u8 = 2;
const MADT_REVISION: u8 = 5;
const TABLE_HEADER_BYTES: u32 = 36;

/// The processors' local APICs, and that there are two 8259s as well.
const APIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const PC_COMPATIBLE: u32 = 1;

const MADT_OVERRIDE: u8 = 2;
const MADT_LOCAL_NMI: u8 = 4;
const ALL_PROCESSORS: u8 = 0xff;
const NMI_LINE: u8 = 1;
const BUS_ISA: u8 = 0;

/// Active high and level-triggered (MPS INTI flags).
const LEVEL_HIGH: u16 = 0b1101;

/// IA-PC boot architecture flags: devices on ISA; no VGA, no real-time clock. That bit 1 is clear says that there is no
/// keyboard controller, which saves a kernel the search.
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 5;

/// Writes all tables; returns the address of the RSDP.
pub(super) fn write(ram: &GuestRam, cpus: u8, virtio: &[VirtioWindow]) -> Result<u64, BootError> {
    super::write(ram, &build(cpus, virtio), ADDRESS, "the ACPI tables")?;
    Ok(ADDRESS)
}

/// Tables one behind the other.
#[derive(Debug)]
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Adds a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let start = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize(usize::try_from(start).expect("a few KiB"), 0);
        table.to_aml_bytes(&mut self.bytes);
        ADDRESS + start
    }
}

fn build(cpus: u8, virtio: &[VirtioWindow]) -> Vec<u8> {
    let mut tables = Tables { bytes: vec![0; Rsdp::len()] };
    let facs = tables.add(&FACS::new());
    let dsdt = tables.add(&dsdt(virtio));
    let fadt = tables.add(&fadt(facs, dsdt).finalize());
    let madt = tables.add(&madt(cpus));
    let mut root = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    root.add_entry(fadt);
    root.add_entry(madt);
    let root = tables.add(&root);
    let mut pointer = Vec::new();
    Rsdp::new(OEM, root).to_aml_bytes(&mut pointer);
    tables.bytes[..pointer.len()].copy_from_slice(&pointer);
    assert!(ADDRESS + tables.bytes.len() as u64 <= HIGH_MEMORY, "the tables of the largest machine fit");
    tables.bytes
}

fn fadt(facs: u64, dsdt: u64) -> FADTBuilder {
    let below_4_gib = |address| u32::try_from(address).expect("the tables lie below 1 MiB");
    let port = |port: u16, bits, access| GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(below_4_gib(facs))
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // These say that there is no such button in the fixed hardware, and there is no sleep button anywhere; the
        // power button is fixed hardware.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = below_4_gib(dsdt).into();
    fadt.sci_int = u16::try_from(ACPI_INTERRUPT).expect("an interrupt line").into();
    // No command port for system management: ACPI is always on.
    fadt.smi_cmd = 0.into();
    fadt.pm1a_evt_blk = u32::from(EVENT_PORT).into();
    fadt.pm1_evt_len = EVENT_BYTES;
    fadt.pm1a_cnt_blk = u32::from(CONTROL_PORT).into();
    fadt.pm1_cnt_len = CONTROL_BYTES;
    fadt.x_pm1a_evt_blk = port(EVENT_PORT, EVENT_BYTES * 8, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(CONTROL_PORT, CONTROL_BYTES * 8, AccessSize::WordAccess);
    // More than any latency that would be used: no C2, no C3.
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (0xfff.into(), 0xfff.into());
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt
}

fn madt(cpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", TABLE_HEADER_BYTES, MADT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&APIC_ADDRESS.to_le_bytes());
    madt.append_slice(&PC_COMPATIBLE.to_le_bytes());
    let mut entries = Vec::new();
    for index in 0..cpus {
        ProcessorLocalApic::new(index, index, EnabledStatus::Enabled).to_aml_bytes(&mut entries);
    }
    // Its id follows the processors', as in the MP table; its lines are all the interrupts that there are. An ISA
    // interrupt without an entry has the line of its own number, active high and edge-triggered.
    IoApic::new(cpus, IOAPIC_ADDRESS, 0).to_aml_bytes(&mut entries);
    let acpi_interrupt = u8::try_from(ACPI_INTERRUPT).expect("an interrupt line");
    entries.extend([MADT_OVERRIDE, 10, BUS_ISA, acpi_interrupt]);
    entries.extend(ACPI_INTERRUPT.to_le_bytes());
    entries.extend(LEVEL_HIGH.to_le_bytes());
    entries.extend([MADT_LOCAL_NMI, 6, ALL_PROCESSORS, 0, 0, NMI_LINE]);
    madt.append_slice(&entries);
    madt
}

fn dsdt(virtio: &[VirtioWindow]) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut code = Vec::new();
    append_serial_port(&mut code);
    for (index, window) in (0_u32..).zip(virtio) {
        append_virtio(&mut code, index, *window);
    }
    // What the sleep type registers hold for S5: those of PM1a, of PM1b (which is not there), and two reserved.
    let off = SLEEP_TYPE_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&off, &off, &aml::ZERO, &aml::ZERO])).to_aml_bytes(&mut code);
    dsdt.append_slice(&code);
    dsdt
}

fn append_serial_port(code: &mut Vec<u8>) {
    let length = u8::try_from(SERIAL_PORTS).expect("eight ports");
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, length);
    let interrupt = edge_interrupt(SERIAL_INTERRUPT);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let number = Name::new("_UID".into(), &aml::ZERO);
    let resources = Name::new("_CRS".into(), &resources);
    let device = Device::new("COM1".into(), vec![&id, &number, &resources]);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(code);
}

fn append_virtio(code: &mut Vec<u8>, index: u32, window: VirtioWindow) {
    let VirtioWindow { address, interrupt } = window;
    let address = u32::try_from(address).expect("windows lie below 4 GiB");
    let registers = Memory32Fixed::new(true, address, u32::try_from(WINDOW_BYTES).expect("4096"));
    let interrupt = edge_interrupt(interrupt);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let id = Name::new("_HID".into(), &"LNRO0005");
    let number = Name::new("_UID".into(), &index);
    let coherent = Name::new("_CCA".into(), &aml::ONE);
    let resources = Name::new("_CRS".into(), &resources);
    let name = format!("V{index:03}");
    let device = Device::new(name.as_str().into(), vec![&id, &number, &coherent, &resources]);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(code);
}

/// As the irqfds signal it: active high, edge-triggered, not shared.
fn edge_interrupt(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

#[cfg(test)]
mod tests;
