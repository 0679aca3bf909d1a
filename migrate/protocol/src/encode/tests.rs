//! A source's pages, encoded in every way, round after round, against a target that decodes them.

use proptest::prelude::*;

use super::*;
use crate::digest::ChunkDigests;
use crate::encode::pack::{Packed, Unpacker};
use crate::frame::FRAME_HEADER_BYTES;

const PAGES: usize = 512;

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

struct Target {
    pages: Vec<[u8; PAGE_BYTES]>,
    digests: ChunkDigests,
    digest: MemoryDigest,
    unpacker: Unpacker,
}

impl Target {
    fn take(&mut self, mut bytes: &[u8]) {
        while let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() {
            let frame = Frame::decode(header, PAGES as u64).unwrap();
            let body_bytes = usize::try_from(u32::from_le_bytes(header[4..8].try_into().unwrap())).unwrap();
            let (body, rest) = rest.split_at(body_bytes);
            let mask = self.place(frame, body);
            for offset in mask.offsets() {
                let digest = PageDigest::of(offset, &self.pages[index(offset)]);
                self.digest = self.digest.combine(self.digests.set(offset, digest));
            }
            bytes = rest;
        }
        assert!(bytes.is_empty());
    }

    fn place(&mut self, frame: Frame, body: &[u8]) -> PageMask {
        let how = if matches!(frame, Frame::Zstd { .. }) { Packed::Zstd } else { Packed::Lz4 };
        match frame {
            Frame::Raw { mask, .. } => {
                let (pages, _) = body.as_chunks::<PAGE_BYTES>();
                mask.offsets().zip(pages).for_each(|(at, page)| self.pages[index(at)] = *page);
                mask
            }
            Frame::Zero { mask, .. } => {
                mask.offsets().for_each(|at| self.pages[index(at)] = [0; PAGE_BYTES]);
                mask
            }
            Frame::Lz4 { mask, .. } | Frame::Zstd { mask, .. } => {
                let pages = self.unpacker.unpack(body, how, mask.count()).unwrap();
                mask.offsets().zip(pages).for_each(|(at, page)| self.pages[index(at)] = *page);
                mask
            }
            Frame::Delta { mask, .. } => {
                let offsets: Vec<u64> = mask.offsets().collect();
                for change in delta::changes(body, mask.count()).unwrap() {
                    let page = &mut self.pages[index(offsets[change.nth_page])];
                    page[change.at..change.at + BLOCK_BYTES].copy_from_slice(change.bytes);
                }
                mask
            }
            Frame::Fence(_) => unreachable!("none is encoded here"),
        }
    }
}

struct Source {
    pages: Vec<[u8; PAGE_BYTES]>,
    sent: SentChunk,
    encoder: Encoder,
    digest: MemoryDigest,
}

impl Source {
    fn new(budget: &std::sync::Arc<SignatureBudget>) -> Self {
        Self {
            pages: vec![[0; PAGE_BYTES]; PAGES],
            sent: SentChunk::new(std::sync::Arc::clone(budget)),
            encoder: Encoder::default(),
            digest: MemoryDigest::ZERO,
        }
    }

    /// Sends the pages of `mask`; the guest does `race` to what is lent, before it is read for good.
    fn send(
        &mut self,
        mask: &PageMask,
        way: Way,
        target: &mut Target,
        race: impl FnOnce(&mut Vec<[u8; PAGE_BYTES]>),
    ) -> Encoded {
        let chunk = ChunkIndex::new(0, PAGES as u64).unwrap();
        let (mut wire, mut lent) = (Vec::new(), Vec::new());
        let pages = &self.pages;
        let read = |range: PageRange, visit: &mut dyn FnMut(u64, &[u8; PAGE_BYTES])| {
            for page in range.first()..range.first() + range.count() {
                visit(page, &pages[index(page)]);
            }
        };
        let encoded =
            self.encoder.encode_into((chunk, mask), way, &mut self.sent, &read, &mut |piece| match piece {
                Piece::Bytes(bytes) => wire.extend_from_slice(bytes),
                Piece::Lent(_, mask) => lent.push(mask),
            });
        race(&mut self.pages);
        for mask in lent {
            wire.extend_from_slice(&Frame::Raw { chunk, mask }.encode());
            mask.offsets().for_each(|at| wire.extend_from_slice(&self.pages[index(at)]));
        }
        target.take(&wire);
        self.digest = self.digest.combine(encoded.digest);
        encoded
    }
}

fn target() -> Target {
    Target {
        pages: vec![[0; PAGE_BYTES]; PAGES],
        digests: ChunkDigests::default(),
        digest: MemoryDigest::ZERO,
        unpacker: Unpacker::default(),
    }
}

fn all() -> PageMask {
    PageMask([u64::MAX; 8])
}

fn way(method: Method, remember: bool) -> Way {
    Way { method, remember, verify: true }
}

fn noise(seed: u64) -> [u8; PAGE_BYTES] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = [0; PAGE_BYTES];
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    page
}

#[test]
fn a_word_that_changes_costs_a_block() {
    let budget = SignatureBudget::new(1 << 20);
    let (mut source, mut target) = (Source::new(&budget), target());
    source.pages.iter_mut().enumerate().for_each(|(at, page)| *page = noise(at as u64 + 1));
    let first = source.send(&all(), way(Method::None, true), &mut target, |_| {});
    assert_eq!((first.raw_pages, first.delta_pages), (512, 0));
    for page in &mut source.pages[..100] {
        page[1000] ^= 1;
    }
    let second = source.send(&all(), way(Method::None, true), &mut target, |_| {});
    assert_eq!((second.raw_pages, second.delta_pages, second.unchanged_pages), (0, 100, 412));
    assert!(source.pages == target.pages);
    assert_eq!(source.digest, target.digest);
}

#[test]
fn what_the_guest_wrote_while_a_page_was_lent_and_took_back_is_sent_again() {
    let budget = SignatureBudget::new(1 << 20);
    let (mut source, mut target) = (Source::new(&budget), target());
    source.pages[3] = noise(3);
    source.send(&all(), way(Method::None, false), &mut target, |pages| pages[3][77] ^= 1);
    // The lock is free again: the page looks as it did when it was looked at.
    source.pages[3][77] ^= 1;
    let mut dirty = PageMask::EMPTY;
    dirty.insert(3);
    source.send(&dirty, way(Method::None, true), &mut target, |_| {});
    assert!(source.pages == target.pages);
    assert_eq!(source.digest, target.digest);
}

#[test]
fn signatures_stay_in_their_budget_and_come_back_to_it() {
    let budget = SignatureBudget::new(100 * Signature::BYTES);
    let (mut source, mut target) = (Source::new(&budget), target());
    source.pages.iter_mut().enumerate().for_each(|(at, page)| *page = noise(at as u64 + 1));
    source.send(&all(), way(Method::None, true), &mut target, |_| {});
    assert_eq!(budget.left(), 0);
    source.pages.iter_mut().for_each(|page| page[0] ^= 1);
    let again = source.send(&all(), way(Method::None, true), &mut target, |_| {});
    assert_eq!((again.delta_pages, again.raw_pages), (100, 412));
    let mut ten = PageMask::EMPTY;
    (0..10).for_each(|at| ten.insert(at));
    source.sent.keep_only(&ten);
    assert_eq!(budget.left(), 90);
    drop(source);
    assert_eq!(budget.left(), 100);
}

#[test]
fn no_delta_body_makes_it_panic_or_lies() {
    let page = noise(1);
    let mut builder = delta::Builder::default();
    builder.add(&page, 0x8000_0001);
    let chunk = ChunkIndex::new(0, 512).unwrap();
    let mut mask = PageMask::EMPTY;
    mask.insert(9);
    let body = builder.frame(chunk, mask)[FRAME_HEADER_BYTES..].to_vec();
    let found: Vec<_> = delta::changes(&body, 1).unwrap().map(|change| change.at).collect();
    assert_eq!(found, [0, 31 * BLOCK_BYTES]);
    for bad in [&body[..body.len() - 1], &body[..3], &body[..4], &[&body[..], &[0; 128]].concat()] {
        assert!(delta::changes(bad, 1).is_err());
    }
}

#[derive(Debug, Clone)]
enum Write {
    Zero(usize),
    Noise(usize, u64),
    Text(usize),
    Word(usize, usize),
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let write = prop_oneof![
        (0..40usize).prop_map(Write::Zero),
        (0..40usize, any::<u64>()).prop_map(|(at, seed)| Write::Noise(at, seed)),
        (0..40usize).prop_map(Write::Text),
        (0..40usize, 0..PAGE_BYTES).prop_map(|(at, byte)| Write::Word(at, byte)),
    ];
    proptest::collection::vec(write, 0..60)
}

fn apply(writes: &[Write], pages: &mut [[u8; PAGE_BYTES]], dirty: &mut PageMask) {
    for write in writes {
        let (Write::Zero(at) | Write::Noise(at, _) | Write::Text(at) | Write::Word(at, _)) = *write;
        match *write {
            Write::Zero(_) => pages[at] = [0; PAGE_BYTES],
            Write::Noise(_, seed) => pages[at] = noise(seed),
            Write::Text(_) => pages[at] = std::array::from_fn(|byte| b"ferry "[byte % 6]),
            Write::Word(_, byte) => pages[at][byte] ^= 0x40,
        }
        dirty.insert(at as u64);
    }
}

proptest! {
    #[test]
    fn the_target_has_every_byte_whatever_the_way(
        rounds in proptest::collection::vec((writes(), writes(), 0..4u8, any::<bool>()), 1..8),
        signatures in 0..60u64,
    ) {
        let budget = SignatureBudget::new(signatures * Signature::BYTES);
        let (mut source, mut target) = (Source::new(&budget), target());
        let mut dirty = all();
        for (before, during, method, remember) in &rounds {
            apply(before, &mut source.pages, &mut dirty);
            let method = [Method::None, Method::Lz4, Method::Zstd(1), Method::Zstd(3)][usize::from(*method)];
            let mut next = PageMask::EMPTY;
            source.send(&dirty, way(method, *remember), &mut target, |pages| apply(during, pages, &mut next));
            dirty = next;
        }
        source.send(&dirty, way(Method::None, false), &mut target, |_| {});
        prop_assert!(source.pages == target.pages);
        prop_assert_eq!(source.digest, target.digest);
    }
}
