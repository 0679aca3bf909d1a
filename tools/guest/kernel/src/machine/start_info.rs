//! What a PVH loader hands over: the command line and the map of memory.
//!
//! Both are copied out before any memory is used, because the loader may have put them anywhere.
//! Format: `hvm_start_info` of Xen's public headers (`arch-x86/hvm/start_info.h`).

use crate::fail::give_up;
use core::ptr::read_unaligned;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const COMMAND_LINE_MAX: usize = 4096;
const REGIONS_MAX: usize = 32;

#[repr(C)]
#[derive(Clone, Copy)]
struct Raw {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_address: u64,
    command_line_address: u64,
    rsdp_address: u64,
    map_address: u64,
    map_len: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawRegion {
    address: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

/// A stretch of usable memory: bytes `start..end`.
#[derive(Clone, Copy)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Byte behind the last.
    pub end: u64,
}

/// The copy of what was handed over.
pub struct StartInfo {
    line: [u8; COMMAND_LINE_MAX],
    line_len: usize,
    regions: [Region; REGIONS_MAX],
    regions_len: usize,
}

impl StartInfo {
    /// Copies the structure at `address`.
    pub fn read(address: u64) -> Self {
        // SAFETY: PVH promises a start_info at this address, below 4 GiB and so mapped by boot.s.
        let raw = unsafe { read_unaligned(address as *const Raw) };
        if raw.magic != MAGIC {
            give_up(format_args!("no PVH start_info at {address:#x}: magic {:#x}", raw.magic));
        }
        if raw.version == 0 || raw.map_len == 0 {
            give_up(format_args!("the PVH start_info (version {}) has no map of memory", raw.version));
        }
        let mut info = Self {
            line: [0; COMMAND_LINE_MAX],
            line_len: 0,
            regions: [Region { start: 0, end: 0 }; REGIONS_MAX],
            regions_len: 0,
        };
        info.copy_line(raw.command_line_address);
        info.copy_regions(raw.map_address, u64::from(raw.map_len));
        info
    }

    fn copy_line(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        for (i, slot) in self.line.iter_mut().enumerate() {
            // SAFETY: the command line is a zero-terminated string below 4 GiB; reading stops at the zero.
            let byte = unsafe { ((address + i as u64) as *const u8).read() };
            if byte == 0 {
                return;
            }
            *slot = byte;
            self.line_len = i + 1;
        }
        give_up(format_args!("the command line is longer than {COMMAND_LINE_MAX} bytes"));
    }

    fn copy_regions(&mut self, address: u64, len: u64) {
        for i in 0..len {
            let entry = address + i * size_of::<RawRegion>() as u64;
            // SAFETY: the map has `len` entries below 4 GiB.
            let raw = unsafe { read_unaligned(entry as *const RawRegion) };
            if raw.kind != RAM {
                continue;
            }
            if let Some(slot) = self.regions.get_mut(self.regions_len) {
                *slot = Region { start: raw.address, end: raw.address.saturating_add(raw.len) };
                self.regions_len += 1;
            }
        }
    }

    /// The command line; empty if it isn't UTF-8.
    pub fn command_line(&self) -> &str {
        core::str::from_utf8(&self.line[..self.line_len]).unwrap_or_default()
    }

    /// Usable memory, in the loader's order.
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.regions_len]
    }
}
