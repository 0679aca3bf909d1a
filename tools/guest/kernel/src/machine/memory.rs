//! Physical memory: what there is, mapping it, and handing it out.
//!
//! Memory is identity-mapped, and handed out once and for ever, so there is nothing to free.

use super::start_info::{Region, StartInfo};
use crate::fail::give_up;
use ferry_guest_abi::PAGE_SIZE;

const PAGE: u64 = PAGE_SIZE as u64;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// boot.s maps this much.
const MAPPED_AT_BOOT: u64 = 4 * GIB;
/// One table of 1 GiB entries is all that this guest uses.
const MAPPED_MAX: u64 = 512 * GIB;
/// Page-table entry of a table: present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// Page-table entry of a 2 MiB page: the same, dirty, large.
const LARGE: u64 = 0xe7;
/// Regions that are kept after cutting out the guest itself.
const REGIONS_MAX: usize = 8;

unsafe extern "C" {
    static image_end: u8;
    static mut page_map_512g: [u64; 512];
}

/// The memory that has not been handed out yet.
pub struct Ram {
    free: [Region; REGIONS_MAX],
    bytes: u64,
}

impl Ram {
    /// Takes stock of the memory and maps what lies above 4 GiB.
    pub fn map(info: &StartInfo) -> Self {
        // Nothing below the image is used: loaders keep their tables there.
        let floor = (&raw const image_end) as u64;
        let mut ram = Self { free: [Region { start: 0, end: 0 }; REGIONS_MAX], bytes: 0 };
        let mut slots = ram.free.iter_mut();
        for region in info.regions() {
            ram.bytes += region.end - region.start;
            let start = region.start.max(floor).next_multiple_of(PAGE);
            let end = region.end.min(MAPPED_MAX) / PAGE * PAGE;
            if start >= end {
                continue;
            }
            if let Some(slot) = slots.next() {
                *slot = Region { start, end };
            }
        }
        let top = ram.free.iter().map(|region| region.end).max().unwrap_or(0);
        for gib in MAPPED_AT_BOOT / GIB..top.div_ceil(GIB) {
            ram.map_gib(gib);
        }
        ram
    }

    /// Maps the GiB number `gib` with 2 MiB pages.
    fn map_gib(&mut self, gib: u64) {
        let Some(table) = self.take_low_page() else {
            give_up(format_args!("no memory below 4 GiB for the page table of GiB {gib}"));
        };
        for i in 0..512 {
            let entry = (gib * GIB + i * LARGE_PAGE) | LARGE;
            // SAFETY: `table` is a page of RAM of its own, mapped at boot.
            unsafe { ((table + 8 * i) as *mut u64).write(entry) };
        }
        // SAFETY: `gib` is below 512, as regions are cut at MAPPED_MAX.
        let slot = unsafe { &raw mut page_map_512g[gib as usize] };
        // SAFETY: the table is complete, and the entry was not present before, so nothing cached changes.
        unsafe { slot.write_volatile(table | TABLE) };
    }

    fn take_low_page(&mut self) -> Option<u64> {
        let region = self.free.iter_mut().find(|r| r.start < r.end && r.start < MAPPED_AT_BOOT)?;
        region.start += PAGE;
        Some(region.start - PAGE)
    }

    /// All usable memory of the machine, bytes.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Hands out `mib` MiB for `purpose`, in as many pieces as it takes.
    pub fn take(&mut self, mib: u32, purpose: &str) -> Pages {
        let wanted = u64::from(mib) * (1 << 20) / PAGE;
        let mut pages = Pages { pieces: [Piece { address: 0, pages: 0 }; REGIONS_MAX], pages: wanted };
        let mut missing = wanted;
        for (region, piece) in self.free.iter_mut().zip(pages.pieces.iter_mut()) {
            let taken = missing.min((region.end - region.start) / PAGE);
            *piece = Piece { address: region.start, pages: taken };
            region.start += taken * PAGE;
            missing -= taken;
        }
        if missing > 0 {
            give_up(format_args!(
                "{purpose} needs {mib} MiB, {} MiB more than this machine has to give; start it with more memory",
                (missing * PAGE).div_ceil(1 << 20)
            ));
        }
        pages
    }
}

#[derive(Clone, Copy)]
struct Piece {
    address: u64,
    pages: u64,
}

/// Memory handed out: pages numbered from 0.
pub struct Pages {
    pieces: [Piece; REGIONS_MAX],
    pages: u64,
}

impl Pages {
    /// How many there are.
    pub const fn len(&self) -> u64 {
        self.pages
    }

    /// The page with that number.
    #[inline]
    pub fn page(&self, number: u64) -> Page {
        let mut rest = number;
        for piece in &self.pieces {
            if rest < piece.pages {
                return Page { address: piece.address + rest * PAGE };
            }
            rest -= piece.pages;
        }
        panic!("page {number} of {}", self.pages)
    }
}

/// One page that belongs to the workload.
#[derive(Clone, Copy)]
pub struct Page {
    address: u64,
}

impl Page {
    /// Guest-physical address of the word at `index`.
    pub const fn address_of(self, index: usize) -> u64 {
        self.address + 8 * index as u64
    }

    /// Reads the word at `index`, which is below 512.
    #[inline]
    pub fn read(self, index: usize) -> u64 {
        debug_assert!(index < PAGE_SIZE / 8);
        // SAFETY: a page comes from `Pages::page` only: mapped RAM that holds no Rust object.
        // Volatile, because a migration may have changed it.
        unsafe { (self.address_of(index) as *const u64).read_volatile() }
    }

    /// Writes the word at `index`, which is below 512.
    #[inline]
    pub fn write(self, index: usize, value: u64) {
        debug_assert!(index < PAGE_SIZE / 8);
        // SAFETY: as in `read`.
        unsafe { (self.address_of(index) as *mut u64).write_volatile(value) }
    }
}
