//! The data streams: one thread and one socket each, pages straight from and into guest memory.

mod receive;
mod send;

pub(crate) use receive::{StreamEvent, receive_stream};
pub(crate) use send::{SenderOptions, Senders, TransferCounters};

use ferry_protocol::bitmap::CHUNK_PAGES;
use ferry_protocol::{ChunkIndex, StreamIndex};

/// The slot of a page in its stream's digest table: a stream has every `streams`-th chunk.
fn digest_slot(page: u64, streams: u16) -> usize {
    let local_chunk = page / CHUNK_PAGES / u64::from(streams);
    usize::try_from(local_chunk * CHUNK_PAGES + page % CHUNK_PAGES).expect("a slot fits the address space")
}

/// How many slots the digest table of any stream needs.
fn digest_slots(page_count: u64, streams: u16) -> usize {
    let chunks = page_count.div_ceil(CHUNK_PAGES).div_ceil(u64::from(streams));
    usize::try_from(chunks * CHUNK_PAGES).expect("a table fits the address space")
}

/// Whether `chunk` travels on `stream`.
fn belongs(chunk: ChunkIndex, stream: StreamIndex, streams: u16) -> bool {
    chunk.stream(streams) == stream
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_of_a_stream_has_a_slot_of_its_own() {
        for (page_count, streams) in
            [(5 * CHUNK_PAGES + 7, 1), (5 * CHUNK_PAGES + 7, 2), (9 * CHUNK_PAGES, 4)]
        {
            for stream in 0..streams {
                let index = StreamIndex::new(stream, streams).unwrap();
                let slots: Vec<usize> = (0..page_count)
                    .filter(|page| {
                        belongs(ChunkIndex::new(page / CHUNK_PAGES, page_count).unwrap(), index, streams)
                    })
                    .map(|page| digest_slot(page, streams))
                    .collect();
                let mut unique = slots.clone();
                unique.sort_unstable();
                unique.dedup();
                assert_eq!(unique.len(), slots.len());
                assert!(unique.last().is_none_or(|&last| last < digest_slots(page_count, streams)));
            }
        }
    }
}
