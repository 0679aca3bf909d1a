//! What is known about the pages of a chunk that were sent: their digests, whether the target has exactly those bytes,
//! and signatures of their blocks.
//!
//! Signatures cost 256 bytes a page and come out of a budget that all chunks share, so that memory stays bounded however
//! large the guest is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bitmap::{CHUNK_PAGES, CHUNK_SLOTS, PageMask};
use crate::digest::{ChunkDigests, MemoryDigest, PageDigest};
use crate::layout::PAGE_BYTES;

use super::delta::Signature;

/// No signature is held for this page.
const NONE: u16 = u16::MAX;

/// How many signatures all chunks of a migration may hold together.
#[derive(Debug)]
pub struct SignatureBudget {
    left: AtomicU64,
}

impl SignatureBudget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(bytes / Signature::BYTES) })
    }

    /// How many more signatures may be held.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    fn take(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn give_back(&self, signatures: u64) {
        self.left.fetch_add(signatures, Ordering::Relaxed);
    }
}

/// What the source knows about a chunk's pages at the target.
#[derive(Debug)]
pub struct SentChunk {
    digests: Option<ChunkDigests>,
    /// Pages of which the target has, or will have, exactly the bytes that the digest and the signature are of.
    known: PageMask,
    signatures: Option<Box<Signatures>>,
    budget: Arc<SignatureBudget>,
}

#[derive(Debug)]
struct Signatures {
    /// Where each page's signature is.
    places: [u16; CHUNK_SLOTS],
    held: Vec<Signature>,
    free: Vec<u16>,
}

impl SentChunk {
    /// A chunk of which nothing has been sent.
    #[must_use]
    pub fn new(budget: Arc<SignatureBudget>) -> Self {
        Self { digests: None, known: PageMask::EMPTY, signatures: None, budget }
    }

    /// Whether the target is known to have exactly the bytes with this digest.
    pub(super) fn holds(&self, offset: u64, digest: PageDigest) -> bool {
        self.known.contains(offset)
            && self.digests.as_ref().is_some_and(|digests| digests.get(offset) == digest)
    }

    /// Replaces a page's digest and says by how much the sum of all changes.
    pub(super) fn set_digest(&mut self, offset: u64, digest: PageDigest) -> MemoryDigest {
        self.digests.get_or_insert_default().set(offset, digest)
    }

    /// The target will have exactly the page that is being encoded.
    pub(super) fn know(&mut self, offset: u64) {
        self.known.insert(offset);
    }

    /// The target will have something close to it at best: the guest may write before it is sent.
    pub(super) fn forget(&mut self, offset: u64) {
        self.known.remove(offset);
        self.drop_signature(offset);
    }

    /// The signature of what the target has.
    pub(super) fn signature(&mut self, offset: u64) -> Option<&mut Signature> {
        let signatures = self.signatures.as_mut()?;
        let place = signatures.places[index(offset)];
        (place != NONE).then(|| &mut signatures.held[usize::from(place)])
    }

    /// Keeps the signature of a page, if there is room for it.
    pub(super) fn remember(&mut self, offset: u64, bytes: &[u8; PAGE_BYTES]) {
        if !self.budget.take() {
            return;
        }
        let signatures = self.signatures.get_or_insert_with(|| {
            Box::new(Signatures { places: [NONE; CHUNK_SLOTS], held: Vec::new(), free: Vec::new() })
        });
        let signature = Signature::of(bytes);
        let place = signatures.free.pop().unwrap_or_else(|| {
            signatures.held.push(Signature::default());
            u16::try_from(signatures.held.len() - 1).expect("at most one for each of 512 pages")
        });
        signatures.held[usize::from(place)] = signature;
        signatures.places[index(offset)] = place;
    }

    pub(super) fn drop_signature(&mut self, offset: u64) {
        if let Some(signatures) = &mut self.signatures {
            let place = std::mem::replace(&mut signatures.places[index(offset)], NONE);
            if place != NONE {
                signatures.free.push(place);
                self.budget.give_back(1);
            }
        }
    }

    /// What was sent of these pages may not have arrived: nothing is known any more of what the target has of them. Their
    /// digests stay, for they are part of the sum until the pages are sent again.
    pub fn forget_pages(&mut self, pages: &PageMask) {
        pages.offsets().for_each(|offset| self.forget(offset));
    }

    /// The digest of a memory of which only this chunk was sent, each page as last sent.
    #[must_use]
    pub fn digest(&self) -> MemoryDigest {
        self.digests.as_ref().map_or(MemoryDigest::ZERO, ChunkDigests::sum)
    }

    /// Drops the signatures of all pages but these: they have stayed as they are, so that they are the least likely to
    /// be needed. Memory is given back only if none is left.
    pub fn keep_only(&mut self, pages: &PageMask) {
        for offset in (0..CHUNK_PAGES).filter(|offset| !pages.contains(*offset)) {
            self.drop_signature(offset);
        }
        if self.signatures.as_ref().is_some_and(|signatures| signatures.free.len() == signatures.held.len()) {
            self.signatures = None;
        }
    }
}

impl Drop for SentChunk {
    fn drop(&mut self) {
        if let Some(signatures) = &self.signatures {
            let held = signatures.held.len() - signatures.free.len();
            self.budget.give_back(u64::try_from(held).expect("at most 512"));
        }
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("an offset in a chunk is small")
}
