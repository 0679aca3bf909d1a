//! The MP table (Intel MultiProcessor Specification 1.4), by which a kernel without ACPI finds
//! processors, the I/O APIC and the interrupt lines.

use super::BootError;
use crate::memory::GuestRam;

const APIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const SPECIFICATION_REVISION: u8 = 4;
const INTERRUPT_LINES: u8 = 24;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
const IOAPIC_ENABLED: u8 = 1;
const ALL_APICS: u8 = 0xff;
const BUS_ISA: u8 = 0;

const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

/// Writes the floating pointer at `address`, the table behind it.
pub(super) fn write(ram: &GuestRam, cpus: u8, address: u64) -> Result<(), BootError> {
    let address32 = u32::try_from(address).expect("the table lies below 1 MiB");
    super::write(ram, &build(cpus, address32), address, "the MP table")
}

fn build(cpus: u8, address: u32) -> Vec<u8> {
    let entries = entries(cpus);
    let length = HEADER_BYTES + entries.iter().map(Vec::len).sum::<usize>();
    let table_address = address + u32::try_from(POINTER_BYTES).expect("16");

    let mut pointer = b"_MP_".to_vec();
    pointer.extend(table_address.to_le_bytes());
    pointer.extend([1, SPECIFICATION_REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);

    let mut table = b"PCMP".to_vec();
    table.extend(u16::try_from(length).expect("64 processors take less than 2 KiB").to_le_bytes());
    table.extend([SPECIFICATION_REVISION, 0]);
    table.extend(b"FERRY   VM          ");
    table.extend([0; 6]); // no OEM table
    table.extend(u16::try_from(entries.len()).expect("a hundred at most").to_le_bytes());
    table.extend(APIC_ADDRESS.to_le_bytes());
    table.extend([0; 4]); // no extended table
    assert_eq!(table.len(), HEADER_BYTES, "the header's layout is fixed");
    table.extend(entries.concat());
    table[7] = checksum(&table);

    [pointer, table].concat()
}

fn entries(cpus: u8) -> Vec<Vec<u8>> {
    // The I/O APIC's id follows the processors'.
    let ioapic = cpus;
    let mut entries = Vec::new();
    for index in 0..cpus {
        let flags = CPU_ENABLED | if index == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, index, APIC_VERSION, flags];
        entry.extend(0x600_u32.to_le_bytes()); // family 6; kernels ask CPUID for the rest
        entry.extend(0x201_u32.to_le_bytes()); // an APIC and an FPU
        entry.extend([0; 8]);
        entries.push(entry);
    }
    let mut bus = vec![ENTRY_BUS, BUS_ISA];
    bus.extend(b"ISA   ");
    entries.push(bus);
    let mut chip = vec![ENTRY_IOAPIC, ioapic, IOAPIC_VERSION, IOAPIC_ENABLED];
    chip.extend(IOAPIC_ADDRESS.to_le_bytes());
    entries.push(chip);
    for line in 0..INTERRUPT_LINES {
        // Flags zero: polarity and trigger as the ISA bus has them, high and edge.
        entries.push(vec![ENTRY_INTERRUPT, INTERRUPT_VECTORED, 0, 0, BUS_ISA, line, ioapic, line]);
    }
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, BUS_ISA, 0, 0, 0]);
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, BUS_ISA, 0, ALL_APICS, 1]);
    entries
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_every_processor_is_listed() {
        for cpus in [1, 2, crate::config::CPUS_MAX] {
            let bytes = build(cpus, 0x9_fc00);
            let (pointer, table) = bytes.split_at(POINTER_BYTES);
            let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!((sum(pointer), sum(table)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(count, u16::from(cpus) + 2 + 24 + 2);
            let ids: Vec<u8> =
                (0..usize::from(cpus)).map(|index| table[HEADER_BYTES + index * 20 + 1]).collect();
            assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
            // It must end before the reserved part does.
            assert!(0x9_fc00 + bytes.len() < 0x10_0000);
        }
    }
}
