//! What the target has of each chunk, shared by all streams of a migration: any stream may take a chunk over between
//! two rounds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_protocol::bitmap::CHUNK_PAGES;
use ferry_protocol::encode::{SentChunk, SignatureBudget};
use ferry_protocol::layout::PAGE_BYTES_U64;
use ferry_protocol::{ChunkIndex, MemoryDigest, PageBitmap};

/// Signatures may take this much, and [`SIGNATURE_SHARE`] of the guest's memory.
const SIGNATURE_BYTES: u64 = 48 << 20;

/// One eightieth: 1.25 %.
const SIGNATURE_SHARE: u64 = 80;

/// One entry a chunk; nothing is allocated for those that are never sent.
#[derive(Debug)]
pub(super) struct SentMemory {
    chunks: Vec<Mutex<SentChunk>>,
    budget: Arc<SignatureBudget>,
    budget_full: u64,
}

impl SentMemory {
    pub(super) fn new(page_count: u64) -> Self {
        let bytes = SIGNATURE_BYTES + page_count * PAGE_BYTES_U64 / SIGNATURE_SHARE;
        let budget = SignatureBudget::new(bytes);
        let chunks = (0..page_count.div_ceil(CHUNK_PAGES))
            .map(|_| Mutex::new(SentChunk::new(Arc::clone(&budget))))
            .collect();
        Self { chunks, budget_full: budget.left(), budget }
    }

    /// A chunk, for the one that works on it now. Its lock is never waited for: a chunk is encoded once a round.
    pub(super) fn chunk(&self, chunk: ChunkIndex) -> MutexGuard<'_, SentChunk> {
        let index = usize::try_from(chunk.number()).expect("a chunk's number fits the address space");
        self.chunks[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is known any more of what the target has of `pages`.
    pub(super) fn forget(&self, pages: &PageBitmap) {
        pages.chunks().for_each(|(chunk, mask)| self.chunk(chunk).forget_pages(&mask));
    }

    /// The digest of all pages, each as last sent.
    pub(super) fn digest(&self) -> MemoryDigest {
        let chunks = self.chunks.iter();
        let digests = chunks.map(|chunk| chunk.lock().unwrap_or_else(PoisonError::into_inner).digest());
        digests.fold(MemoryDigest::ZERO, MemoryDigest::combine)
    }

    /// Whether there is hardly any room left for signatures.
    pub(super) fn is_short(&self) -> bool {
        self.budget.left() < self.budget_full / 8
    }
}
