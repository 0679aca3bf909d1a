//! The digest of all of a paused guest's memory, taken from the bytes themselves: what was sent of each page is not asked, so
//! a page that was written and that no dirty log has named shows.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use ferry_protocol::{ChunkIndex, MemoryDigest, PageDigest};
use ferry_vmm::confine::{self, Role};

use crate::ports::GuestPages;

/// The most threads that read memory; more than that share its bandwidth.
const THREADS_MAX: usize = 8;

/// A digest in the making.
#[derive(Debug)]
pub(super) struct WholeDigest {
    stopped: Arc<AtomicBool>,
    threads: Vec<JoinHandle<MemoryDigest>>,
}

impl WholeDigest {
    pub(super) fn start(pages: &Arc<dyn GuestPages>) -> io::Result<Self> {
        let stopped = Arc::new(AtomicBool::new(false));
        let next = Arc::new(AtomicU64::new(0));
        let mut whole = Self { stopped: Arc::clone(&stopped), threads: Vec::new() };
        let count = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        for number in 0..count {
            let (pages, next, stopped) = (Arc::clone(pages), Arc::clone(&next), Arc::clone(&stopped));
            let thread = thread::Builder::new().name(format!("ferry-check-{number}")).spawn(move || {
                confine::enter(Role::Data);
                add_up(&*pages, &next, &stopped)
            })?;
            whole.threads.push(thread);
        }
        Ok(whole)
    }

    /// Waits for it; `None` if a thread has failed.
    pub(super) fn finish(mut self) -> Option<MemoryDigest> {
        let parts: Option<Vec<_>> = self.threads.drain(..).map(|thread| thread.join().ok()).collect();
        Some(parts?.into_iter().fold(MemoryDigest::ZERO, MemoryDigest::combine))
    }
}

impl Drop for WholeDigest {
    /// Nobody wants it any more.
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn add_up(pages: &dyn GuestPages, next: &AtomicU64, stopped: &AtomicBool) -> MemoryDigest {
    let page_count = pages.layout().page_count();
    let mut sum = MemoryDigest::ZERO;
    while !stopped.load(Ordering::Relaxed) {
        let Some(chunk) = ChunkIndex::new(next.fetch_add(1, Ordering::Relaxed), page_count) else { break };
        // What was never touched is zero, and so is its digest.
        for range in chunk.ranges(&pages.touched(chunk)) {
            pages.for_each_page(range, &mut |page, bytes| {
                sum = sum.combine(PageDigest::of(page, bytes).alone());
            });
        }
    }
    sum
}
