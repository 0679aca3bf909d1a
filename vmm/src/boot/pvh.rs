//! PVH's start info (xen/include/public/arch-x86/hvm/start_info.h): where the command line, the memory
//! map and the initial RAM disk are.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::memory_map::{self, Kind, Range};
use super::{BootError, CMDLINE_ADDRESS, Module};
use crate::memory::GuestRam;

const START_INFO_ADDRESS: u64 = 0x6000;
const MODULE_LIST_ADDRESS: u64 = 0x6040;
const MEMORY_MAP_ADDRESS: u64 = 0x7000;

/// Writes the start info, with the address of ACPI's root pointer if there is one, and returns its address.
pub(super) fn write_start_info(
    ram: &GuestRam,
    initrd: Option<Module>,
    acpi_root: Option<u64>,
) -> Result<u64, BootError> {
    let map = memory_map(ram);
    let modules: Vec<_> = initrd
        .iter()
        .map(|module| hvm_modlist_entry {
            paddr: module.address,
            size: module.bytes,
            ..hvm_modlist_entry::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        flags: 0,
        nr_modules: u32::try_from(modules.len()).expect("one at most"),
        modlist_paddr: if modules.is_empty() { 0 } else { MODULE_LIST_ADDRESS },
        cmdline_paddr: CMDLINE_ADDRESS,
        rsdp_paddr: acpi_root.unwrap_or(0),
        memmap_paddr: MEMORY_MAP_ADDRESS,
        memmap_entries: u32::try_from(map.len()).expect("a handful"),
        reserved: 0,
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO_ADDRESS));
    params.set_sections(&map, GuestAddress(MEMORY_MAP_ADDRESS));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULE_LIST_ADDRESS));
    }
    PvhBootConfigurator::write_bootparams(&params, ram.tracked()).map_err(|error| BootError::Write {
        what: "the PVH start info",
        source: vm_memory::GuestMemoryError::IOError(std::io::Error::other(error.to_string())),
    })?;
    Ok(START_INFO_ADDRESS)
}

fn memory_map(ram: &GuestRam) -> Vec<hvm_memmap_table_entry> {
    let entry = |range: Range| hvm_memmap_table_entry {
        addr: range.start,
        size: range.bytes,
        type_: match range.kind {
            Kind::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
            Kind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
        },
        reserved: 0,
    };
    memory_map::of(ram).into_iter().map(entry).collect()
}
