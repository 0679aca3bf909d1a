//! Has the host provide memory ahead of what arrives, where that takes long.
//!
//! The first touch of memory that a host has not used for a while may cost many times what writing it does: on a virtual host
//! it is a fault of the host below, about 10 us a page. A thread beside the streams takes those faults for the chunks
//! that are likely to come next. Where a fault is quick it only stands in the way, so that it rests and tries again later.
//!
//! It goes ahead of dense chunks only, and never further than [`LEAD_CHUNKS`]: that much at most, behind each dense
//! stretch of the guest's memory, is provided without being needed.

use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_protocol::bitmap::CHUNK_PAGES;
use ferry_protocol::{ChunkIndex, PageMask, PageRange};

use crate::ports::{Clock, GuestPages, timed};

/// How many chunks of 2 MiB it goes ahead of what arrives.
const LEAD_CHUNKS: u64 = 3;

/// A chunk of which so many pages arrive together is dense.
const DENSE_PAGES_MIN: u64 = 128;

/// A chunk that takes longer is cold: clearing 2 MiB takes a tenth of a millisecond or two.
const COLD_MIN: Duration = Duration::from_millis(1);

/// After a chunk that was not cold, so many are left to the streams.
const REST_CHUNKS: u32 = 32;

/// Chunks that may wait for the thread; more are left to the streams.
const WAITING_MAX: usize = 8;

/// The thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Prefaulter {
    wanted: Mutex<Option<SyncSender<u64>>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefaulter {
    /// Starts it. Without it a migration only takes longer, so that a host that has no thread left is none the worse.
    pub(super) fn start(pages: Arc<dyn GuestPages>, clock: Arc<dyn Clock>) -> Self {
        let (wanted, chunks) = mpsc::sync_channel(WAITING_MAX);
        let thread = thread::Builder::new()
            .name("ferry-fault".to_owned())
            .spawn(move || provide(&chunks, &*pages, &*clock))
            .inspect_err(|error| tracing::debug!("no thread to take page faults ahead: {error}"))
            .ok();
        Self { wanted: Mutex::new(Some(wanted)), thread }
    }

    /// Pages `mask` of `chunk` are about to be read from a stream.
    pub(super) fn arrives(&self, chunk: ChunkIndex, mask: &PageMask) {
        if mask.count() < DENSE_PAGES_MIN {
            return;
        }
        if let Some(wanted) = &*self.wanted.lock().unwrap_or_else(PoisonError::into_inner) {
            // A queue that is full has enough to do.
            let _ = wanted.try_send(chunk.number() + LEAD_CHUNKS);
        }
    }
}

impl Drop for Prefaulter {
    fn drop(&mut self) {
        self.wanted.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed already.
            let _ = thread.join();
        }
    }
}

fn provide(chunks: &mpsc::Receiver<u64>, pages: &dyn GuestPages, clock: &dyn Clock) {
    let layout = pages.layout();
    let (mut next, mut rest) = (0, 0);
    while let Ok(number) = chunks.recv() {
        // Each chunk is offered once, in ascending order; what comes again belongs to a later round.
        if number < next {
            continue;
        }
        next = number + 1;
        if rest > 0 {
            rest -= 1;
            continue;
        }
        let first = number * CHUNK_PAGES;
        let count = layout.page_count().saturating_sub(first).min(CHUNK_PAGES);
        let Some(range) = PageRange::new(first, count, &layout) else { continue };
        let (provided, took) = timed(clock, || pages.prefault(range));
        if let Err(error) = provided {
            // Whoever writes there next finds out what is wrong.
            tracing::debug!("page faults can't be taken ahead: {error}");
            return;
        }
        if took < COLD_MIN {
            rest = REST_CHUNKS;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::BorrowedFd;

    use ferry_protocol::layout::Region;
    use ferry_protocol::{MemoryLayout, PAGE_BYTES, Timestamp};

    use super::*;

    const CHUNKS: u64 = 200;

    /// Memory of which each chunk takes a while to provide, by a clock that only that moves.
    #[derive(Debug, Default)]
    struct Slow {
        provided: Mutex<Vec<u64>>,
        now: Mutex<Duration>,
        takes: Duration,
    }

    impl Clock for Slow {
        fn now(&self) -> Timestamp {
            Timestamp::from_origin(*self.now.lock().unwrap())
        }
    }

    impl GuestPages for Slow {
        fn layout(&self) -> MemoryLayout {
            let bytes = (CHUNKS * CHUNK_PAGES - 100) * 4096;
            MemoryLayout::new(vec![Region { gpa: 0, bytes }]).unwrap()
        }
        fn prefault(&self, range: PageRange) -> io::Result<()> {
            assert!(
                range.first() + range.count() <= self.layout().page_count(),
                "never more than the VM has"
            );
            self.provided.lock().unwrap().push(range.first() / CHUNK_PAGES);
            *self.now.lock().unwrap() += self.takes;
            Ok(())
        }
        fn for_each_page(&self, _: PageRange, _: &mut dyn FnMut(u64, &[u8; PAGE_BYTES])) {
            unreachable!("nothing is read")
        }
        fn send(&self, _: BorrowedFd<'_>, _: &[u8], _: &[PageRange]) -> io::Result<()> {
            unreachable!("nothing is sent")
        }
        fn receive(&self, _: BorrowedFd<'_>, _: &[PageRange]) -> io::Result<()> {
            unreachable!("nothing is received")
        }
        fn write(&self, _: u64, _: &[u8; PAGE_BYTES]) {
            unreachable!("nothing is written")
        }
        fn patch(&self, _: u64, _: usize, _: &[u8]) {
            unreachable!("nothing is written")
        }
        fn zero(&self, _: PageRange) -> io::Result<()> {
            unreachable!("nothing is zeroed")
        }
        fn touched(&self, _: ChunkIndex) -> PageMask {
            unreachable!("nobody asks")
        }
    }

    fn provided(takes: Duration) -> Vec<u64> {
        let memory = Arc::new(Slow { takes, ..Slow::default() });
        let (wanted, chunks) = mpsc::channel();
        // Each comes in two frames, and the last ones lie behind the guest's end.
        (0..CHUNKS).for_each(|chunk| (0..2).for_each(|_| wanted.send(chunk + LEAD_CHUNKS).unwrap()));
        drop(wanted);
        provide(&chunks, &*memory, &*memory);
        memory.provided.lock().unwrap().clone()
    }

    #[test]
    fn cold_memory_is_provided_chunk_by_chunk_up_to_the_guests_end() {
        assert_eq!(provided(Duration::from_millis(5)), (LEAD_CHUNKS..CHUNKS).collect::<Vec<_>>());
    }

    #[test]
    fn warm_memory_is_left_to_the_streams_but_for_a_try_now_and_then() {
        let tries = provided(Duration::from_micros(150));
        assert_eq!(tries.len(), 6, "one in {REST_CHUNKS} and itself: {tries:?}");
    }

    #[test]
    fn only_what_is_dense_is_followed() {
        let memory = Arc::new(Slow { takes: COLD_MIN, ..Slow::default() });
        let prefaulter = Prefaulter::start(
            Arc::clone(&memory) as Arc<dyn GuestPages>,
            Arc::clone(&memory) as Arc<dyn Clock>,
        );
        let chunk = |number| ChunkIndex::new(number, CHUNKS * CHUNK_PAGES).unwrap();
        prefaulter.arrives(chunk(5), &PageMask([u64::MAX, 0, 0, 0, 0, 0, 0, 0]));
        prefaulter.arrives(chunk(9), &PageMask([u64::MAX; 8]));
        drop(prefaulter);
        assert_eq!(*memory.provided.lock().unwrap(), [9 + LEAD_CHUNKS]);
    }
}
