//! What a round takes: bytes, CPU time at both ends, and how it is split over the streams.
//!
//! A stream's pages pass through its thread at the source and its thread at the target one behind the other, so the
//! slower of the two sets the pace, and the slowest stream ends the round.

use ferry_migrate::protocol::bitmap::CHUNK_PAGES;
use ferry_migrate::protocol::frame::{FRAME_HEADER_BYTES, GROUP_PAGES_MAX};
use ferry_migrate::protocol::layout::PAGE_BYTES_U64;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::source::RoundSent;
use ferry_migrate::protocol::{PageBitmap, PageMask};

use super::guest::{GuestModel, place};
use super::hardware::Hardware;

/// Words of a mask that travel as one frame where pages are not packed: 256 pages, as the engine's senders have it.
const RAW_GROUP_WORDS: usize = 4;

/// What a round takes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct RoundWork {
    /// What the engine would report; the digest is that of nothing.
    pub(super) sent: RoundSent,
    /// CPU time at the source over all streams, in s.
    pub(super) source_cpu_s: f64,
    /// CPU time at the target over all streams, in s.
    pub(super) target_cpu_s: f64,
    /// The longest that any stream needs if nothing but its own two threads holds it back, in s.
    pub(super) slowest_s: f64,
    /// The longest that any stream's thread at the source needs, in s.
    pub(super) slowest_source_s: f64,
    /// Streams that have pages.
    pub(super) streams: u16,
}

/// Pages of one region on one stream, and the frames that they need.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Load {
    pages: u64,
    /// Runs of consecutive pages, each within one frame.
    extents: u64,
    frames: u64,
    chunks: u64,
}

/// What pages of a region are made of.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Content {
    untouched_share: f64,
    zero_share: f64,
    packable_share: f64,
    /// Whether the target's memory for them is new.
    first: bool,
}

/// What a round is made of, whatever things cost.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RoundLoad {
    /// By stream and, within a stream, by region: each set, then the rest.
    loads: Vec<Load>,
    contents: Vec<Content>,
    streams: u16,
    compression: Compression,
}

impl RoundLoad {
    /// A round of `pages`, each of which stands for `scale` real ones. In the `first` round every page is new to the
    /// target.
    pub(super) fn new(
        (pages, scale): (&PageBitmap, u64),
        first: bool,
        guest: &GuestModel,
        (streams, compression): (u16, Compression),
    ) -> Self {
        let of_set =
            |packable_share| Content { untouched_share: 0.0, zero_share: 0.0, packable_share, first };
        let mut contents: Vec<Content> = guest.sets.iter().map(|set| of_set(set.packable_share)).collect();
        let GuestModel { untouched_share, zero_share, packable_share, .. } = *guest;
        contents.push(Content { untouched_share, zero_share, packable_share, first });
        let mut loads = loads((pages, scale), guest, streams, compression);
        for load in &mut loads {
            let Load { pages, extents, frames, chunks } = *load;
            *load = Load {
                pages: pages * scale,
                extents: extents * scale,
                frames: frames * scale,
                chunks: chunks * scale,
            };
        }
        Self { loads, contents, streams, compression }
    }

    /// What it takes.
    pub(super) fn work(&self, hardware: &Hardware) -> RoundWork {
        let mut work = RoundWork::default();
        for of_stream in self.loads.chunks(self.contents.len()) {
            let (mut source_us, mut target_us) = (0.0, 0.0);
            for (load, content) in of_stream.iter().zip(&self.contents).filter(|(load, _)| load.pages > 0) {
                let (source, target) = add_load(&mut work.sent, *load, *content, self.compression, hardware);
                source_us += source;
                target_us += target;
            }
            work.streams += u16::from(source_us > 0.0);
            work.source_cpu_s += source_us / 1e6;
            work.target_cpu_s += target_us / 1e6;
            work.slowest_s = work.slowest_s.max(source_us.max(target_us) / 1e6);
            work.slowest_source_s = work.slowest_source_s.max(source_us / 1e6);
        }
        // Every stream ends a round with its fence.
        work.sent.wire_bytes += u64::from(self.streams) * header_bytes();
        work.streams = work.streams.max(1);
        work
    }
}

/// The pages by stream and, within a stream, by region: each set, then the rest. A chunk that a set ends in counts as
/// the set's.
fn loads(
    (pages, scale): (&PageBitmap, u64),
    guest: &GuestModel,
    streams: u16,
    compression: Compression,
) -> Vec<Load> {
    let places = place(&guest.sets, scale);
    let regions = places.len() + 1;
    let mut loads = vec![Load::default(); regions * usize::from(streams)];
    let mut region = 0;
    for (chunk, mask) in pages.chunks() {
        // Chunks come in ascending order, and so do sets.
        while places.get(region).is_some_and(|place| place.first + place.pages <= chunk.first_page()) {
            region += 1;
        }
        let load = &mut loads[usize::from(chunk.stream(streams).number()) * regions + region];
        load.pages += mask.count();
        load.extents += extents(&mask);
        load.frames += frames(&mask, compression);
        load.chunks += 1;
    }
    loads
}

/// Runs of consecutive pages, which end with a group.
fn extents(mask: &PageMask) -> u64 {
    let mut extents = 0;
    for (index, word) in mask.0.iter().enumerate() {
        let begins_group = index % RAW_GROUP_WORDS == 0;
        let before = if begins_group { 0 } else { mask.0[index - 1] >> 63 };
        extents += u64::from((word & !(word << 1 | before)).count_ones());
    }
    extents
}

fn frames(mask: &PageMask, compression: Compression) -> u64 {
    let words = match compression {
        Compression::None => RAW_GROUP_WORDS,
        // Whoever builds an order knows lz4 only; anything else that packs would have groups of the same size.
        Compression::Lz4 | Compression::Zstd(_) | Compression::Auto => 2,
    };
    mask.0.chunks(words).map(|group| u64::from(group.iter().any(|word| *word != 0))).sum()
}

/// Adds pages of one kind of content to what is sent; their CPU time at source and target in µs.
fn add_load(
    sent: &mut RoundSent,
    load: Load,
    content: Content,
    compression: Compression,
    hardware: &Hardware,
) -> (f64, f64) {
    let zero = share_of(load.pages, content.untouched_share + content.zero_share);
    let packable = share_of(load.pages, content.packable_share).min(load.pages - zero);
    let other = load.pages - zero;
    let (dirtied_us, first_touch_us) =
        if content.first { (0.0, hardware.first_touch_page_us) } else { (hardware.dirtied_page_us, 0.0) };
    let zero_us = (float(zero) * hardware.source_zero_page_us, float(zero) * hardware.target_zero_page_us);
    sent.zero_pages += zero;
    let zero_frames = if zero > 0 { load.chunks } else { 0 };
    sent.wire_bytes += (zero_frames + load.frames) * header_bytes();
    let (source_us, target_us) = if compression == Compression::Lz4 && packable > 0 {
        // What can be packed and what can't lie side by side in groups, which shrink as a whole.
        let shrunk = (float(packable) / hardware.pack_ratio + float(other - packable)) / float(other);
        sent.packed_pages += other;
        sent.wire_bytes += round(float(other * PAGE_BYTES_U64) * shrunk);
        let source_copy_us = (hardware.source_page_us - hardware.source_zero_page_us).max(0.0) * shrunk;
        let target_copy_us = (hardware.target_page_us - hardware.target_zero_page_us).max(0.0) * shrunk;
        let packing_us = float(packable) * hardware.pack_page_us
            + float(other - packable) * hardware.pack_vain_page_us
            + float(other) * (hardware.source_zero_page_us + source_copy_us);
        (packing_us, float(other) * (hardware.unpack_page_us + target_copy_us))
    } else {
        sent.raw_pages += other;
        sent.wire_bytes += other * PAGE_BYTES_U64;
        let vain_us = if compression == Compression::Lz4 { hardware.pack_vain_page_us } else { 0.0 };
        // Zero pages that lie scattered cut the others into more runs, one for each zero page in front of another.
        let used = (float(load.pages) * (1.0 - content.untouched_share)).max(1.0);
        let cuts = float(other) * (float(load.pages) * content.zero_share / used).min(1.0);
        let extents_us = (float(load.extents) + cuts) * hardware.extent_us;
        let target_us = float(other) * hardware.target_page_us + extents_us;
        (float(other) * (hardware.source_page_us + vain_us), target_us)
    };
    (zero_us.0 + source_us + float(other) * dirtied_us, zero_us.1 + target_us + float(other) * first_touch_us)
}

fn share_of(pages: u64, share: f64) -> u64 {
    round(float(pages) * share).min(pages)
}

fn header_bytes() -> u64 {
    u64::try_from(FRAME_HEADER_BYTES).expect("a small number")
}

#[expect(clippy::cast_precision_loss, reason = "counts of pages and bytes stay below 2^53")]
pub(super) fn float(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "never negative, below 2^63")]
pub(super) fn round(count: f64) -> u64 {
    count.max(0.0).round() as u64
}

/// The senders' groups are those of the frame format.
const _: () = assert!(GROUP_PAGES_MAX == 128 && CHUNK_PAGES == 512);

#[cfg(test)]
mod tests {
    use super::super::guest::{Order, WorkingSet};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn work(guest: &GuestModel, streams: u16, compression: Compression) -> RoundWork {
        let pages = PageBitmap::full(guest.page_count(1));
        RoundLoad::new((&pages, 1), true, guest, (streams, compression)).work(&Hardware::default())
    }

    #[test]
    fn a_full_round_has_every_page_once_and_its_headers() {
        let set = WorkingSet { bytes: 16 * MIB, pages_per_s: 0.0, order: Order::Linear, packable_share: 0.0 };
        let guest = GuestModel {
            zero_share: 0.25,
            packable_share: 0.5,
            sets: vec![set],
            ..GuestModel::idle(80 * MIB, 1)
        };
        let RoundSent { raw_pages, zero_pages, packed_pages, wire_bytes, .. } =
            work(&guest, 2, Compression::None).sent;
        assert_eq!((raw_pages, zero_pages, packed_pages), (20_480 - 4096, 4096, 0));
        // 40 chunks of two groups; 32 of them have zeroes; two fences.
        assert_eq!(wire_bytes, raw_pages * 4096 + (80 + 32 + 2) * 84);
        let packed = work(&guest, 2, Compression::Lz4).sent;
        assert_eq!((packed.raw_pages, packed.zero_pages, packed.packed_pages), (4096, 4096, 12_288));
        // Groups of 128 pages now; of 12,288 pages in them, 8,192 shrink.
        let pages = 8192.0 / Hardware::default().pack_ratio + 4096.0 + 4096.0;
        let expected = pages * 4096.0 + f64::from((40 * 4 + 32 + 2) * 84);
        assert!((float(packed.wire_bytes) - expected).abs() < 1.0, "{packed:?}, not {expected}");
    }

    #[test]
    fn streams_share_the_work_unless_it_lies_in_one_chunk() {
        let guest = GuestModel::idle(64 * MIB, 1);
        let one = work(&guest, 1, Compression::None);
        let four = work(&guest, 4, Compression::None);
        assert!((one.slowest_s / four.slowest_s - 4.0).abs() < 1e-9);
        assert!((one.target_cpu_s - four.target_cpu_s).abs() < 1e-9);
        let mut few = PageBitmap::empty(guest.page_count(1));
        (0..100).for_each(|page| few.insert(page));
        let few = RoundLoad::new((&few, 1), false, &guest, (4, Compression::None)).work(&Hardware::default());
        assert_eq!(few.streams, 1);
        let Hardware { source_page_us, dirtied_page_us, target_page_us, extent_us, .. } = Hardware::default();
        let (source_us, target_us) = (source_page_us + dirtied_page_us, target_page_us + extent_us / 100.0);
        assert!((few.slowest_s - source_us.max(target_us) / 1e4).abs() < 1e-12);
    }

    #[test]
    fn runs_of_pages_are_counted_within_their_groups() {
        let mut mask = PageMask::EMPTY;
        [0, 1, 63, 64, 100, 255, 256, 511].into_iter().for_each(|page| mask.insert(page));
        // 0 to 1, 63 to 64, 100, 255 | 256, 511
        assert_eq!(extents(&mask), 6);
        assert_eq!(extents(&PageMask([u64::MAX; 8])), 2);
    }
}
