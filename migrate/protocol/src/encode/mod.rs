//! What travels for the pages of a chunk, decided page by page: nothing, a delta, a packed group, or the page itself.
//!
//! ```text
//!                          seen    by digest      zero page?    signature held       packs
//!  page --copy or lend-->  digest --same as sent--> nothing
//!                                 \----------------> Zero
//!                                  \---------------------------> Delta (few blocks differ)
//!                                   \-------------------------------------------> Lz4, Zstd
//!                                    \-------------------------------------------> Raw
//! ```
//!
//! Two ways lead through here. *Lent* pages are looked at in place and go to the socket from there: no copy, but the
//! guest may write between the look and the sending, so nothing is known for sure about what the target then has.
//! *Copied* pages are looked at and sent from a private copy, so that what the target has is known exactly: only those
//! may be skipped when they come again unchanged, or come again as a delta. (Why not otherwise: a guest that sets a
//! lock and clears it again leaves a page that looks unchanged although the target got the lock set.)
//!
//! This module does no I/O: pages are lent by a closure and pieces are handed to another.

pub mod choose;
pub mod delta;
pub mod pack;

mod sent;

use std::convert::Infallible;

pub use sent::{SentChunk, SignatureBudget};

use crate::bitmap::{ChunkIndex, PageMask, PageRange};
use crate::digest::{MemoryDigest, PageDigest};
use crate::frame::{FRAME_HEADER_BYTES, Frame, GROUP_PAGES_MAX};
use crate::layout::PAGE_BYTES;
use crate::page::{is_zero, seems_packable};

use delta::{BLOCK_BYTES, DELTA_BLOCKS_MAX, Signature};
use pack::{Method, Packer};

/// Words of a chunk's mask, of 64 pages each, that are lent and sent together. Larger groups mean fewer system calls
/// and frames, smaller ones that pages are still in the processor's cache when the socket reads them.
const LENT_WORDS: usize = 4;

/// The same for copied pages: [`GROUP_PAGES_MAX`] pages.
const COPIED_WORDS: usize = 2;

/// How the pages of a chunk are to be treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// What full pages are packed with.
    pub method: Method,
    /// Whether pages are copied, and remembered by signature, so that they can come again as deltas.
    pub remember: bool,
    /// Whether digests are taken.
    pub verify: bool,
}

/// Something for the stream, in this order.
#[derive(Debug)]
pub enum Piece<'a> {
    /// A header, and then these pages straight from guest memory.
    Lent(ChunkIndex, PageMask),
    /// Bytes to be written as they are.
    Bytes(&'a [u8]),
}

/// What became of a chunk's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Pages that travel as they are.
    pub raw_pages: u64,
    /// Pages of zeroes.
    pub zero_pages: u64,
    /// Pages that travel packed.
    pub packed_pages: u64,
    /// Pages of which only the changed blocks travel.
    pub delta_pages: u64,
    /// Pages that the target has already.
    pub unchanged_pages: u64,
    /// Of those that travel whole, pages that were remembered but have changed too much for a delta.
    pub whole_again_pages: u64,
    /// Bytes that packing was tried on, and what it made of them.
    pub packing: Packing,
    /// By how much the digest of all pages sent has changed.
    pub digest: MemoryDigest,
}

/// What packing achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Packing {
    /// Bytes of pages that went in.
    pub from_bytes: u64,
    /// Bytes that came out, or went on unpacked because that was shorter.
    pub to_bytes: u64,
}

/// Lends pages: calls the visitor with each page of a range, in order.
pub type ReadPages<'a> = &'a dyn Fn(PageRange, &mut dyn FnMut(u64, &[u8; PAGE_BYTES]));

/// Encodes chunks, with buffers of its own: at most 2 MiB in all.
#[derive(Debug, Default)]
pub struct Encoder {
    packer: Packer,
    deltas: delta::Builder,
    /// A raw frame in the making: room for its header, then pages.
    plain: Vec<u8>,
    scratch: Scratch,
}

#[derive(Debug)]
struct Scratch(Box<[u8; PAGE_BYTES]>);

impl Default for Scratch {
    fn default() -> Self {
        Self(Box::new([0; PAGE_BYTES]))
    }
}

/// The masks of one group of copied pages.
#[derive(Debug, Default)]
struct Group {
    plain: PageMask,
    packed: PageMask,
    delta: PageMask,
}

impl Encoder {
    /// Decides what travels for the pages `mask` of `chunk`, which `sent` knows, and hands the pieces to `emit`.
    ///
    /// # Errors
    /// What `emit` says; `sent` then no longer describes the target.
    pub fn encode<E>(
        &mut self,
        (chunk, mask): (ChunkIndex, &PageMask),
        way: Way,
        sent: &mut SentChunk,
        read: ReadPages<'_>,
        emit: &mut dyn FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<Encoded, E> {
        if way.method != Method::None || way.remember {
            return self
                .encode_copied((chunk, mask), way, sent, read, &mut |bytes| emit(Piece::Bytes(bytes)));
        }
        let mut encoded = Encoded::default();
        let mut zero = PageMask::EMPTY;
        for group in groups(mask, LENT_WORDS) {
            let mut work = Work { chunk, way, sent: &mut *sent, zero: &mut zero, encoded: &mut encoded };
            let left = work.look_at(&group, read);
            if !left.is_empty() {
                work.encoded.raw_pages += left.count();
                emit(Piece::Lent(chunk, left))?;
            }
        }
        emit_zero(chunk, zero, &mut encoded, &mut |bytes| emit(Piece::Bytes(bytes)))?;
        Ok(encoded)
    }

    /// As [`Encoder::encode`], but from a copy whatever the way, so that all that travels is bytes.
    ///
    /// # Errors
    /// What `emit` says; `sent` then no longer describes the target.
    pub fn encode_copied<E>(
        &mut self,
        (chunk, mask): (ChunkIndex, &PageMask),
        way: Way,
        sent: &mut SentChunk,
        read: ReadPages<'_>,
        emit: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Encoded, E> {
        let mut encoded = Encoded::default();
        let mut zero = PageMask::EMPTY;
        for group in groups(mask, COPIED_WORDS) {
            let mut work = Work { chunk, way, sent: &mut *sent, zero: &mut zero, encoded: &mut encoded };
            let taken = self.copy(&group, read, &mut work);
            self.emit_group(chunk, &taken, &mut encoded, emit)?;
        }
        emit_zero(chunk, zero, &mut encoded, emit)?;
        Ok(encoded)
    }

    /// Copies the group's pages and sorts them by what is to travel for each.
    fn copy(&mut self, group: &PageMask, read: ReadPages<'_>, work: &mut Work<'_>) -> Group {
        let mut taken = Group::default();
        self.packer.clear();
        self.deltas.clear();
        self.plain.clear();
        self.plain.resize(FRAME_HEADER_BYTES, 0);
        let chunk = work.chunk;
        for range in chunk.ranges(group) {
            read(range, &mut |page, bytes| {
                let Self { packer, deltas, plain, scratch } = self;
                // The guest may change the page meanwhile, but not this copy of it.
                scratch.0.copy_from_slice(bytes);
                let (offset, bytes) = (page - chunk.first_page(), &*scratch.0);
                match work.sort(page, bytes) {
                    Sorted::Done => {}
                    Sorted::Delta(blocks) => {
                        deltas.add(bytes, blocks);
                        taken.delta.insert(offset);
                    }
                    Sorted::Full if work.way.method != Method::None && seems_packable(bytes) => {
                        packer.add(bytes);
                        taken.packed.insert(offset);
                    }
                    Sorted::Full => {
                        plain.extend_from_slice(bytes);
                        taken.plain.insert(offset);
                    }
                }
            });
        }
        if !taken.packed.is_empty() && !self.pack(work, taken.packed.count()) {
            self.give_up_packing(&mut taken);
        }
        taken
    }

    /// Packs the group, and says whether that was worth it.
    fn pack(&mut self, work: &mut Work<'_>, pages: u64) -> bool {
        let from_bytes = pages * crate::layout::PAGE_BYTES_U64;
        let packed = self.packer.pack(work.way.method);
        let packing = &mut work.encoded.packing;
        packing.from_bytes += from_bytes;
        packing.to_bytes += packed.map_or(from_bytes, length);
        packed.is_some()
    }

    /// Puts the pages that would not shrink among those that travel as they are, in the order of their numbers.
    fn give_up_packing(&mut self, taken: &mut Group) {
        let mut all = PageMask::EMPTY;
        let mut pages = vec![0; FRAME_HEADER_BYTES];
        let (mut plain, mut packed) = (
            self.plain[FRAME_HEADER_BYTES..].chunks_exact(PAGE_BYTES),
            self.packer.pages().chunks_exact(PAGE_BYTES),
        );
        for (word, (ours, theirs)) in taken.plain.0.iter().zip(taken.packed.0).enumerate() {
            all.0[word] = ours | theirs;
        }
        for offset in all.offsets() {
            let from = if taken.plain.contains(offset) { &mut plain } else { &mut packed };
            pages.extend_from_slice(from.next().expect("a page for each bit"));
        }
        self.plain = pages;
        (taken.plain, taken.packed) = (all, PageMask::EMPTY);
    }

    fn emit_group<E>(
        &mut self,
        chunk: ChunkIndex,
        taken: &Group,
        encoded: &mut Encoded,
        emit: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if !taken.plain.is_empty() {
            encoded.raw_pages += taken.plain.count();
            let header = Frame::Raw { chunk, mask: taken.plain }.encode();
            self.plain[..FRAME_HEADER_BYTES].copy_from_slice(&header);
            emit(&self.plain)?;
        }
        if !taken.packed.is_empty() {
            encoded.packed_pages += taken.packed.count();
            emit(self.packer.frame(chunk, taken.packed))?;
        }
        if !taken.delta.is_empty() {
            encoded.delta_pages += taken.delta.count();
            emit(self.deltas.frame(chunk, taken.delta))?;
        }
        Ok(())
    }

    /// As [`Encoder::encode`], for callers whose `emit` can't fail.
    pub fn encode_into(
        &mut self,
        what: (ChunkIndex, &PageMask),
        way: Way,
        sent: &mut SentChunk,
        read: ReadPages<'_>,
        emit: &mut dyn FnMut(Piece<'_>),
    ) -> Encoded {
        let done = self.encode::<Infallible>(what, way, sent, read, &mut |piece| {
            emit(piece);
            Ok(())
        });
        match done {
            Ok(encoded) => encoded,
            Err(never) => match never {},
        }
    }
}

/// The pages of `mask` in groups of so many words, without the empty ones.
fn groups(mask: &PageMask, words: usize) -> impl Iterator<Item = PageMask> {
    let groups = (0..mask.0.len()).step_by(words).map(move |first| {
        let mut group = PageMask::EMPTY;
        group.0[first..first + words].copy_from_slice(&mask.0[first..first + words]);
        group
    });
    groups.filter(|group| !group.is_empty())
}

fn emit_zero<E>(
    chunk: ChunkIndex,
    zero: PageMask,
    encoded: &mut Encoded,
    emit: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    if zero.is_empty() {
        return Ok(());
    }
    encoded.zero_pages += zero.count();
    emit(&Frame::Zero { chunk, mask: zero }.encode())
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("usize fits u64")
}

/// What to do with a copied page.
enum Sorted {
    /// Nothing but what the masks say.
    Done,
    Delta(u32),
    Full,
}

/// A chunk that is being worked on.
struct Work<'a> {
    chunk: ChunkIndex,
    way: Way,
    sent: &'a mut SentChunk,
    zero: &'a mut PageMask,
    encoded: &'a mut Encoded,
}

impl Work<'_> {
    /// Looks at lent pages, and says which of them have to travel.
    fn look_at(&mut self, group: &PageMask, read: ReadPages<'_>) -> PageMask {
        let mut left = PageMask::EMPTY;
        for range in self.chunk.ranges(group) {
            read(range, &mut |page, bytes| {
                let (offset, zero) = (page - self.chunk.first_page(), is_zero(bytes));
                if self.is_news(page, bytes, zero) {
                    self.sent.forget(offset);
                    if zero {
                        self.zero.insert(offset);
                    } else {
                        left.insert(offset);
                    }
                }
            });
        }
        left
    }

    /// Looks at a copy of a page.
    fn sort(&mut self, page: u64, bytes: &[u8; PAGE_BYTES]) -> Sorted {
        let (offset, zero) = (page - self.chunk.first_page(), is_zero(bytes));
        if !self.is_news(page, bytes, zero) {
            return Sorted::Done;
        }
        self.sent.know(offset);
        if zero {
            self.sent.drop_signature(offset);
            self.zero.insert(offset);
            return Sorted::Done;
        }
        if !self.way.remember {
            self.sent.drop_signature(offset);
            return Sorted::Full;
        }
        match self.sent.signature(offset) {
            Some(signature) => {
                let new = Signature::of(bytes);
                let blocks = signature.differing(&new);
                *signature = new;
                if blocks.count_ones() <= DELTA_BLOCKS_MAX {
                    return Sorted::Delta(blocks);
                }
                self.encoded.whole_again_pages += 1;
                Sorted::Full
            }
            None => {
                self.sent.remember(offset, bytes);
                Sorted::Full
            }
        }
    }

    /// Brings the digest up to date, and says whether the target lacks these bytes.
    fn is_news(&mut self, page: u64, bytes: &[u8; PAGE_BYTES], zero: bool) -> bool {
        if !self.way.verify {
            return true;
        }
        let offset = page - self.chunk.first_page();
        let digest = if zero { PageDigest::ZERO_PAGE } else { PageDigest::of_filled(page, bytes) };
        if self.sent.holds(offset, digest) {
            self.encoded.unchanged_pages += 1;
            return false;
        }
        self.encoded.digest = self.encoded.digest.combine(self.sent.set_digest(offset, digest));
        true
    }
}

const _: () = assert!(COPIED_WORDS as u64 * 64 == GROUP_PAGES_MAX && PAGE_BYTES == 32 * BLOCK_BYTES);

#[cfg(test)]
mod tests;
