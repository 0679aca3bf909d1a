//! Guest RAM, byte for byte, in regions with a hole between them.

use ferry_protocol::{MemoryLayout, PAGE_BYTES};

use super::random::Random;

pub(super) type Page = [u8; PAGE_BYTES];

/// One guest's memory.
#[derive(Debug)]
pub(super) struct Memory {
    layout: MemoryLayout,
    /// One entry a region, as the machine monitor maps them.
    regions: Vec<Vec<u8>>,
}

impl Memory {
    /// Memory as a machine monitor gets it: zeroes.
    pub(super) fn empty(layout: &MemoryLayout) -> Self {
        let bytes = |length: u64| vec![0; usize::try_from(length).expect("a small guest")];
        let regions = layout.regions().iter().map(|region| bytes(region.bytes)).collect();
        Self { layout: layout.clone(), regions }
    }

    pub(super) const fn page_count(&self) -> u64 {
        self.layout.page_count()
    }

    /// Which region has `page`, and at which byte of it.
    fn place(&self, page: u64) -> (usize, usize) {
        let mut left = page;
        for (index, region) in self.layout.regions().iter().enumerate() {
            let pages = region.bytes / ferry_protocol::layout::PAGE_BYTES_U64;
            if left < pages {
                return (index, usize::try_from(left).expect("a small guest") * PAGE_BYTES);
            }
            left -= pages;
        }
        panic!("page {page} of a guest with {}", self.page_count());
    }

    pub(super) fn page(&self, page: u64) -> &Page {
        let (region, at) = self.place(page);
        self.regions[region][at..].first_chunk().expect("regions are whole pages")
    }

    pub(super) fn page_mut(&mut self, page: u64) -> &mut Page {
        let (region, at) = self.place(page);
        self.regions[region][at..].first_chunk_mut().expect("regions are whole pages")
    }

    /// The first page whose bytes differ.
    pub(super) fn first_difference(&self, other: &Self) -> Option<u64> {
        assert_eq!(self.layout, other.layout, "memories of one guest");
        if self.regions == other.regions {
            return None;
        }
        (0..self.page_count()).find(|&page| self.page(page) != other.page(page))
    }
}

/// What a page is filled with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fill {
    Zero,
    Text,
    Noise,
}

impl Fill {
    pub(super) fn fill(self, page: &mut Page, random: &mut Random) {
        match self {
            Self::Zero => page.fill(0),
            Self::Noise => {
                for word in page.as_chunks_mut::<8>().0 {
                    *word = random.next().to_le_bytes();
                }
            }
            Self::Text => {
                const WORDS: [&[u8; 8]; 4] = [b"the page", b" of text", b" and the", b" guest\n\n"];
                for word in page.as_chunks_mut::<8>().0 {
                    *word = *random.pick(&WORDS);
                }
            }
        }
    }
}
