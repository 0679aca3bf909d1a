//! What a page costs in the protocol core: looking for zeroes, its digest, deltas, packing, frames, bitmaps.
//!
//! Pages come from 64 MiB, more than the processor's caches hold, as they do in a migration.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ferry_migrate::protocol::digest::{ChunkDigests, PageDigest};
use ferry_migrate::protocol::encode::delta::Signature;
use ferry_migrate::protocol::encode::pack::{Method, Packed, Packer, Unpacker};
use ferry_migrate::protocol::encode::{Encoder, SentChunk, SignatureBudget, Way};
use ferry_migrate::protocol::frame::Frame;
use ferry_migrate::protocol::page::{is_zero, seems_packable};
use ferry_migrate::protocol::{CHUNK_PAGES, ChunkIndex, PAGE_BYTES, PageBitmap, PageMask, PageRange};

const PAGES: usize = 16_384;

/// Pages of noise.
fn noise() -> Vec<[u8; PAGE_BYTES]> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..PAGES)
        .map(|_| {
            let mut page = [0; PAGE_BYTES];
            page.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = next());
            page
        })
        .collect()
}

/// Pages of words that repeat.
fn text() -> Vec<[u8; PAGE_BYTES]> {
    let words =
        b"the guest goes on at the source and the target holds its pages until the commit is durable ";
    let mut pages = noise();
    for page in &mut pages {
        let offset = usize::from(page[0]) % words.len();
        let text = words.iter().cycle().skip(offset);
        // Every eighth byte stays noise, so that it shrinks by about half as real text does.
        page.iter_mut()
            .zip(text)
            .enumerate()
            .filter(|(at, _)| at % 8 != 0)
            .for_each(|(_, (to, from))| *to = *from);
    }
    pages
}

fn per_page(criterion: &mut Criterion) {
    let (noise, zeroes) = (noise(), vec![[0; PAGE_BYTES]; PAGES]);
    let mut group = criterion.benchmark_group("page");
    group.throughput(Throughput::Bytes((PAGES * PAGE_BYTES) as u64));
    group.sample_size(20);
    group.bench_function("is_zero/zero", |bench| {
        bench.iter(|| zeroes.iter().filter(|page| is_zero(black_box(page))).count());
    });
    group.bench_function("is_zero/noise", |bench| {
        bench.iter(|| noise.iter().filter(|page| is_zero(black_box(page))).count());
    });
    group.bench_function("seems_packable/noise", |bench| {
        bench.iter(|| noise.iter().filter(|page| seems_packable(black_box(page))).count());
    });
    group.bench_function("digest", |bench| {
        let mut digests = ChunkDigests::default();
        bench.iter(|| {
            for (number, page) in (0..).zip(&noise) {
                black_box(digests.set(number % CHUNK_PAGES, PageDigest::of(number, black_box(page))));
            }
        });
    });
    group.bench_function("signature", |bench| {
        bench.iter(|| {
            noise.iter().for_each(|page| {
                black_box(Signature::of(black_box(page)));
            })
        });
    });
    group.finish();
}

fn packing(criterion: &mut Criterion) {
    let (noise, text) = (noise(), text());
    let mut group = criterion.benchmark_group("pack");
    group.throughput(Throughput::Bytes((PAGES * PAGE_BYTES) as u64));
    group.sample_size(10);
    for (name, method, how) in [
        ("lz4", Method::Lz4, Packed::Lz4),
        ("zstd 1", Method::Zstd(1), Packed::Zstd),
        ("zstd 3", Method::Zstd(3), Packed::Zstd),
    ] {
        for (content, pages) in [("noise", &noise), ("text", &text)] {
            group.bench_function(format!("{name}/{content}"), |bench| {
                let mut packer = Packer::default();
                bench.iter(|| {
                    let packed = pages
                        .chunks(128)
                        .map(|group| pack(&mut packer, method, group).map_or(0, <[u8]>::len));
                    packed.sum::<usize>()
                });
            });
        }
        group.bench_function(format!("{name}/unpack text"), |bench| {
            let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
            let packed: Vec<Vec<u8>> = text
                .chunks(128)
                .map(|pages| pack(&mut packer, method, pages).expect("text shrinks").to_vec())
                .collect();
            bench.iter(|| {
                let unpacked =
                    packed.iter().map(|block| unpacker.unpack(block, how, 128).expect("our own").count());
                unpacked.sum::<usize>()
            });
        });
    }
    group.finish();
}

fn pack<'a>(packer: &'a mut Packer, method: Method, pages: &[[u8; PAGE_BYTES]]) -> Option<&'a [u8]> {
    packer.clear();
    pages.iter().for_each(|page| packer.add(page));
    packer.pack(method)
}

/// Whole chunks through the encoder, as a stream does it: lent, copied and remembered, and coming again with one
/// word changed.
fn encoding(criterion: &mut Criterion) {
    let mut pages = noise();
    let chunks = pages.len() as u64 / CHUNK_PAGES;
    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Bytes((PAGES * PAGE_BYTES) as u64));
    group.sample_size(20);
    for (name, remember) in [("lent", false), ("remembered, one word changed", true)] {
        let budget = SignatureBudget::new(1 << 30);
        let mut sent: Vec<SentChunk> =
            (0..chunks).map(|_| SentChunk::new(std::sync::Arc::clone(&budget))).collect();
        let mut encoder = Encoder::default();
        group.bench_function(name, |bench| {
            bench.iter(|| {
                pages.iter_mut().for_each(|page| page[1000] = page[1000].wrapping_add(1));
                for (number, sent) in (0..).zip(&mut sent) {
                    let chunk = ChunkIndex::new(number, PAGES as u64).expect("it exists");
                    let read = |range: PageRange, visit: &mut dyn FnMut(u64, &[u8; PAGE_BYTES])| {
                        (range.first()..range.first() + range.count())
                            .for_each(|page| visit(page, &pages[usize::try_from(page).expect("64 MiB")]));
                    };
                    let way = Way { method: Method::None, remember, verify: true };
                    let all = PageMask([u64::MAX; 8]);
                    let encoded = encoder.encode_into((chunk, &all), way, sent, &read, &mut |piece| {
                        black_box(piece);
                    });
                    black_box(encoded);
                }
            });
        });
    }
    group.finish();
}

fn frames_and_bitmaps(criterion: &mut Criterion) {
    let page_count = 1 << 20;
    let chunk = ChunkIndex::new(5, page_count).expect("it exists");
    let mut mask = PageMask::EMPTY;
    (0..512).step_by(3).for_each(|offset| mask.insert(offset));
    let frame = Frame::Raw { chunk, mask };
    criterion.bench_function("frame/encode", |bench| bench.iter(|| black_box(&frame).encode()));
    criterion.bench_function("frame/decode", |bench| {
        let bytes = frame.encode();
        bench.iter(|| Frame::decode(black_box(&bytes), page_count));
    });
    let mut sparse = PageBitmap::empty(page_count);
    (0..page_count).step_by(997).for_each(|page| sparse.insert(page));
    criterion.bench_function("bitmap/chunks of 4 GiB, sparse", |bench| {
        bench.iter(|| black_box(&sparse).chunks().count());
    });
    for (name, gib) in [("4 GiB", 4), ("64 GiB", 64)] {
        let mut bitmap = PageBitmap::empty(gib << 18);
        (0..1_000).for_each(|page| bitmap.insert(page));
        criterion.bench_function(&format!("bitmap/scan of {name}, 1,000 pages dirty"), |bench| {
            bench.iter(|| black_box(&bitmap).chunks().map(|(_, mask)| mask.count()).sum::<u64>());
        });
    }
    criterion.bench_function("bitmap/ranges of 4 GiB, sparse", |bench| {
        bench.iter(|| black_box(&sparse).ranges().count());
    });
    criterion.bench_function("bitmap/union of 4 GiB", |bench| {
        let full = PageBitmap::full(page_count);
        bench.iter_batched_ref(|| sparse.clone(), |to| to.union(black_box(&full)), BatchSize::LargeInput);
    });
}

criterion_group!(benches, per_page, packing, encoding, frames_and_bitmaps);
criterion_main!(benches);
