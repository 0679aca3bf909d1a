//! Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): the boot parameters ("zero page"), and page tables
//! that map the first 4 GiB of addresses to themselves.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::GuestAddress;

use super::memory_map::{self, Kind};
use super::{BootError, CMDLINE_ADDRESS, CMDLINE_BYTES_MAX, Module};
use crate::memory::GuestRam;

const BOOT_PARAMS_ADDRESS: u64 = 0x7000;

/// The top of the page tables; those below it follow.
pub(super) const PAGE_TABLES_ADDRESS: u64 = 0xa000;

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");

/// A loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// What an ELF image's header would say about its initial RAM disk: Linux maps at least 2 GiB early.
const INITRD_ADDRESS_MAX: u32 = 0x7fff_ffff;

/// The version of the protocol whose parameters are written for ELF images, 2.15.
const VERSION: u16 = 0x020f;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const TABLE_BYTES: u64 = 4096;
const TABLE_ENTRIES: u64 = 512;

/// Tables of 2 MiB pages, each for 1 GiB.
const DIRECTORIES: u64 = 4;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;

/// The setup header for an ELF image, which brings none.
pub(super) fn header_of_elf() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: VERSION,
        initrd_addr_max: INITRD_ADDRESS_MAX,
        cmdline_size: u32::try_from(CMDLINE_BYTES_MAX - 1).expect("2047"),
        ..setup_header::default()
    }
}

/// Writes boot parameters and page tables; returns the address of the former.
pub(super) fn write_boot_params(
    ram: &GuestRam,
    mut header: setup_header,
    initrd: Option<Module>,
    acpi_root: Option<u64>,
) -> Result<u64, BootError> {
    let below_4_gib =
        |address: u64| u32::try_from(address).expect("it lies in the first region, below 3 GiB");
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = below_4_gib(CMDLINE_ADDRESS);
    if let Some(Module { address, bytes }) = initrd {
        header.ramdisk_image = below_4_gib(address);
        header.ramdisk_size = below_4_gib(bytes);
    }
    let mut params =
        boot_params { hdr: header, acpi_rsdp_addr: acpi_root.unwrap_or(0), ..boot_params::default() };
    let map = memory_map::of(ram);
    params.e820_entries = u8::try_from(map.len()).expect("a handful");
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&map) {
        let kind = match range.kind {
            Kind::Ram => E820_RAM,
            Kind::Reserved => E820_RESERVED,
        };
        *entry = boot_e820_entry { addr: range.start, size: range.bytes, r#type: kind };
    }
    params.e820_table = table;
    let params = BootParams::new(&params, GuestAddress(BOOT_PARAMS_ADDRESS));
    LinuxBootConfigurator::write_bootparams(&params, ram.tracked()).map_err(|error| BootError::Write {
        what: "the boot parameters",
        source: vm_memory::GuestMemoryError::IOError(std::io::Error::other(error.to_string())),
    })?;
    super::write(ram, &page_tables(), PAGE_TABLES_ADDRESS, "the page tables")?;
    Ok(BOOT_PARAMS_ADDRESS)
}

/// One table of each of the two upper levels, and directories of 2 MiB pages.
fn page_tables() -> Vec<u8> {
    let upper = PAGE_TABLES_ADDRESS + TABLE_BYTES;
    let directories = upper + TABLE_BYTES;
    let mut bytes = Vec::new();
    let mut table = |entries: Vec<u64>| {
        let padded = entries.into_iter().chain(std::iter::repeat(0)).take(512);
        bytes.extend(padded.flat_map(u64::to_le_bytes));
    };
    table(vec![upper | PRESENT_WRITABLE]);
    table((0..DIRECTORIES).map(|index| (directories + index * TABLE_BYTES) | PRESENT_WRITABLE).collect());
    for directory in 0..DIRECTORIES {
        let pages = directory * TABLE_ENTRIES..(directory + 1) * TABLE_ENTRIES;
        table(pages.map(|page| (page * LARGE_PAGE_BYTES) | LARGE_PAGE | PRESENT_WRITABLE).collect());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a processor finds for an address.
    fn translate(tables: &[u8], address: u64) -> u64 {
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - PAGE_TABLES_ADDRESS + index * 8).unwrap();
            let entry = u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
            assert_eq!(entry & PRESENT_WRITABLE, PRESENT_WRITABLE, "{address:#x} is not mapped");
            (entry & !0xfff) | (entry & LARGE_PAGE)
        };
        let upper = entry(PAGE_TABLES_ADDRESS, address >> 39);
        let directory = entry(upper, (address >> 30) & 511);
        let page = entry(directory, (address >> 21) & 511);
        assert_ne!(page & LARGE_PAGE, 0);
        (page & !LARGE_PAGE) + (address & (LARGE_PAGE_BYTES - 1))
    }

    #[test]
    fn every_address_below_4_gib_is_itself() {
        let tables = page_tables();
        assert!(PAGE_TABLES_ADDRESS + tables.len() as u64 <= CMDLINE_ADDRESS);
        for address in [0, 0x7000, 0x20_0000, 0x100_0000, (1 << 30) + 5, 0xd000_0000, 0xffff_ffff] {
            assert_eq!(translate(&tables, address), address);
        }
    }
}
