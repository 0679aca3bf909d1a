//! What a page costs in the protocol core: looking for zeroes, its digest, packing, frames, bitmaps.
//!
//! Pages come from 64 MiB, more than the processor's caches hold, as they do in a migration.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ferry_migrate::protocol::digest::{DigestTable, PageDigest};
use ferry_migrate::protocol::frame::Frame;
use ferry_migrate::protocol::page::{Packer, is_zero};
use ferry_migrate::protocol::{ChunkIndex, PAGE_BYTES, PageBitmap, PageMask, StreamIndex};

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
    let (noise, text, zeroes) = (noise(), text(), vec![[0; PAGE_BYTES]; PAGES]);
    let mut group = criterion.benchmark_group("page");
    group.throughput(Throughput::Bytes((PAGES * PAGE_BYTES) as u64));
    group.sample_size(20);
    group.bench_function("is_zero/zero", |bench| {
        bench.iter(|| zeroes.iter().filter(|page| is_zero(black_box(page))).count());
    });
    group.bench_function("is_zero/noise", |bench| {
        bench.iter(|| noise.iter().filter(|page| is_zero(black_box(page))).count());
    });
    group.bench_function("digest", |bench| {
        let mut table = DigestTable::new(PAGES);
        bench.iter(|| {
            for (slot, page) in noise.iter().enumerate() {
                table.set(slot, PageDigest::of(slot as u64, black_box(page)));
            }
            table.sum()
        });
    });
    for (name, pages) in [("pack/noise", &noise), ("pack/text", &text)] {
        group.bench_function(name, |bench| {
            let mut packer = Packer::default();
            bench.iter(|| {
                pages.chunks(64).map(|pages| pack(&mut packer, pages).map_or(0, <[u8]>::len)).sum::<usize>()
            });
        });
    }
    group.bench_function("unpack/text", |bench| {
        let mut packer = Packer::default();
        let packed: Vec<Vec<u8>> =
            text.chunks(64).map(|pages| pack(&mut packer, pages).expect("text shrinks").to_vec()).collect();
        bench.iter(|| {
            packed.iter().map(|block| packer.unpack(block, 64).expect("our own").count()).sum::<usize>()
        });
    });
    group.finish();
}

fn pack<'a>(packer: &'a mut Packer, pages: &[[u8; PAGE_BYTES]]) -> Option<&'a [u8]> {
    packer.clear();
    pages.iter().for_each(|page| packer.add(page));
    packer.pack()
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
        let stream = StreamIndex::new(0, 1).expect("one stream");
        bench.iter(|| Frame::decode(black_box(&bytes), page_count, stream, 1));
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

criterion_group!(benches, per_page, frames_and_bitmaps);
criterion_main!(benches);
