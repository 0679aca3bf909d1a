//! What the kernel's page tables say of this process's own memory: /proc/self/pagemap.
//!
//! Linux 6.7 and later answer for a whole range at once (the PAGEMAP_SCAN ioctl) and skip what was never
//! mapped; older ones are asked page by page. The formats are those of the kernel's
//! Documentation/admin-guide/mm/pagemap.rst. Nothing here reads or maps a page of the range itself.

// UNSAFETY: the ioctl takes a structure that names a buffer by its address.
#![expect(unsafe_code, reason = "the PAGEMAP_SCAN ioctl takes raw addresses")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::PAGE_BYTES;

/// Runs of pages taken from the kernel a call.
const REGIONS: usize = 64;

/// Entries of the file read a call: those of a huge page.
const ENTRIES: usize = 512;

const ENTRY_BYTES: usize = 8;

/// Of an entry: the page is present, or its content lies in swap (or is just being moved).
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;

const CATEGORY_PRESENT: u64 = 1 << 3;
const CATEGORY_SWAPPED: u64 = 1 << 4;
const CATEGORY_ZERO_PAGE: u64 = 1 << 5;
const CATEGORY_HUGE: u64 = 1 << 6;

/// The kernel's `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanRequest {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The kernel's `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const SCAN_TYPE: u32 = b'f' as u32;
ioctl_iowr_nr!(PAGEMAP_SCAN, SCAN_TYPE, 16, ScanRequest);

/// A stretch of addresses whose pages hold something: bytes of their own, here or in swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// Its first address.
    pub(super) start: usize,
    /// The address behind it.
    pub(super) end: usize,
    /// Whether it is mapped by huge pages; `None` where this kernel does not say.
    pub(super) huge: Option<bool>,
}

/// /proc/self/pagemap, opened once.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    /// Whether the kernel knows PAGEMAP_SCAN; believed until it refuses.
    scans: AtomicBool,
}

impl Pagemap {
    /// Opens it.
    ///
    /// # Errors
    /// What the kernel says; some sandboxes hide the file.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")?, scans: AtomicBool::new(true) })
    }

    /// Never asks by PAGEMAP_SCAN, as on a kernel without it.
    #[cfg(test)]
    pub(super) fn open_without_scan() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")?, scans: AtomicBool::new(false) })
    }

    /// Calls `f` with each stretch of `range` (page-aligned addresses) that holds something, ascending. Pages that
    /// were never touched, were given back, or are the host's shared zero page are left out; the last only where
    /// the kernel tells.
    ///
    /// # Errors
    /// What the kernel says. `f` has been called for a part by then.
    pub(super) fn held(&self, range: Range<usize>, f: &mut dyn FnMut(Held)) -> io::Result<()> {
        if self.scans.load(Ordering::Relaxed) {
            match self.scan(range.clone(), f) {
                Err(error) if is_unknown_ioctl(&error) => self.scans.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        self.read(range, f)
    }

    fn scan(&self, range: Range<usize>, f: &mut dyn FnMut(Held)) -> io::Result<()> {
        let mut regions = [ScanRegion::default(); REGIONS];
        let mut request = ScanRequest {
            size: size_of::<ScanRequest>() as u64,
            start: range.start as u64,
            end: range.end as u64,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: REGIONS as u64,
            // Not the zero page, and present or swapped.
            category_inverted: CATEGORY_ZERO_PAGE,
            category_mask: CATEGORY_ZERO_PAGE,
            category_anyof_mask: CATEGORY_PRESENT | CATEGORY_SWAPPED,
            return_mask: CATEGORY_HUGE,
            ..ScanRequest::default()
        };
        while request.start < request.end {
            // SAFETY: the request names `regions` with its length, which lives through the call; the kernel writes
            // there and into the request, and nowhere else.
            let found = unsafe { ioctl_with_mut_ref(&self.file, PAGEMAP_SCAN(), &mut request) };
            let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
            for ScanRegion { start, end, categories } in regions.iter().take(found) {
                let huge = Some(categories & CATEGORY_HUGE != 0);
                f(Held { start: address(*start), end: address(*end), huge });
            }
            if request.walk_end <= request.start {
                return Err(io::Error::other("the kernel's page table walk does not advance"));
            }
            request.start = request.walk_end;
        }
        Ok(())
    }

    fn read(&self, range: Range<usize>, f: &mut dyn FnMut(Held)) -> io::Result<()> {
        let mut entries = [0; ENTRIES * ENTRY_BYTES];
        let mut at = range.start;
        while at < range.end {
            let count = ((range.end - at) / PAGE_BYTES).min(ENTRIES);
            let bytes = &mut entries[..count * ENTRY_BYTES];
            self.file.read_exact_at(bytes, (at / PAGE_BYTES * ENTRY_BYTES) as u64)?;
            for entry in bytes.chunks_exact(ENTRY_BYTES) {
                let entry = u64::from_ne_bytes(entry.try_into().expect("chunks of eight"));
                if entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 {
                    f(Held { start: at, end: at + PAGE_BYTES, huge: None });
                }
                at += PAGE_BYTES;
            }
        }
        Ok(())
    }
}

fn address(value: u64) -> usize {
    usize::try_from(value).expect("an address of this process")
}

fn is_unknown_ioctl(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
}
