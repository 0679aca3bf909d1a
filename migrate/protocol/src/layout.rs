//! Guest memory as the protocol sees it: pages numbered from 0 through all RAM regions in
//! guest-physical order. Holes between regions have no page numbers, so a peer can't name one.

use serde::{Deserialize, Serialize};

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;

/// [`PAGE_BYTES`] as a length.
pub const PAGE_BYTES_U64: u64 = 4096;

/// The most RAM regions that a layout may have.
pub const REGIONS_MAX: usize = 64;

/// The largest guest: 64 TiB, the most that four-level shadow paging can address with room to spare.
pub const MEMORY_BYTES_MAX: u64 = 64 << 40;

/// One contiguous piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Why a list of regions is no layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region, or too many.
    #[error("a memory layout has 1 to {REGIONS_MAX} regions, not {0}")]
    Count(usize),
    /// A region is empty, unaligned, overlaps the one before it or ends beyond the address space.
    #[error(
        "memory region {index} (address {gpa:#x}, {bytes:#x} bytes) is empty, not page-aligned, overlaps or is out of order"
    )]
    Region {
        /// Which region, from 0.
        index: usize,
        /// Its address.
        gpa: u64,
        /// Its length.
        bytes: u64,
    },
    /// More memory than [`MEMORY_BYTES_MAX`].
    #[error("a guest of {0} bytes is larger than the limit of {MEMORY_BYTES_MAX}")]
    TooLarge(u64),
}

/// The checked list of a guest's RAM regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    regions: Vec<Region>,
    page_count: u64,
}

impl MemoryLayout {
    /// Checks `regions`: page-aligned, not empty, in ascending order, none overlapping.
    ///
    /// # Errors
    /// [`LayoutError`] names the first region that is wrong.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() || regions.len() > REGIONS_MAX {
            return Err(LayoutError::Count(regions.len()));
        }
        let mut end = 0;
        let mut bytes_total: u64 = 0;
        for (index, &Region { gpa, bytes }) in regions.iter().enumerate() {
            let aligned = gpa % PAGE_BYTES_U64 == 0 && bytes % PAGE_BYTES_U64 == 0 && bytes > 0;
            let next_end = gpa.checked_add(bytes);
            let Some(next_end) = next_end.filter(|_| aligned && gpa >= end) else {
                return Err(LayoutError::Region { index, gpa, bytes });
            };
            end = next_end;
            bytes_total += bytes;
            if bytes_total > MEMORY_BYTES_MAX {
                return Err(LayoutError::TooLarge(bytes_total));
            }
        }
        Ok(Self { regions, page_count: bytes_total / PAGE_BYTES_U64 })
    }

    /// The regions, in guest-physical order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many pages the guest has.
    #[must_use]
    pub const fn page_count(&self) -> u64 {
        self.page_count
    }

    /// How many bytes of RAM the guest has.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.page_count * PAGE_BYTES_U64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_through_the_hole() {
        let low = Region { gpa: 0, bytes: 0x2000 };
        let high = Region { gpa: 1 << 32, bytes: 0x3000 };
        let layout = MemoryLayout::new(vec![low, high]).unwrap();
        assert_eq!(layout.page_count(), 5);
    }

    #[test]
    fn bad_regions_are_named() {
        let good = Region { gpa: 0x4000, bytes: 0x2000 };
        for bad in [
            Region { gpa: 0x5000, bytes: 0x1000 },
            Region { gpa: 0x1000, bytes: 0x1000 },
            Region { gpa: 0x8001, bytes: 0x1000 },
            Region { gpa: 0x8000, bytes: 0 },
            Region { gpa: !0xfff, bytes: 0x2000 },
        ] {
            let error = MemoryLayout::new(vec![good, bad]).unwrap_err();
            assert!(matches!(error, LayoutError::Region { index: 1, .. }), "{bad:?}: {error}");
        }
        assert_eq!(MemoryLayout::new(vec![]), Err(LayoutError::Count(0)));
        let huge = Region { gpa: 0, bytes: MEMORY_BYTES_MAX + 0x1000 };
        assert!(matches!(MemoryLayout::new(vec![huge]), Err(LayoutError::TooLarge(_))));
    }
}
