//! Threads that encode chunks beside the streams, so that packing never stands in front of sending.

use std::convert::Infallible;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_protocol::encode::pack::Method;
use ferry_protocol::encode::{Encoded, Encoder, Way};
use ferry_protocol::{ChunkIndex, PageMask};
use ferry_vmm::confine::{self, Role};

use super::sent::SentMemory;
use crate::ports::{Clock, GuestPages, timed};

/// The most threads that encode for a migration, whatever the host has: each stands for some MiB of buffers.
const THREADS_MAX: usize = 8;

/// How nice these threads are: the guest and what it is sent with come first where processors are few.
const NICENESS: i32 = 5;

/// A chunk to be encoded.
pub(super) struct Job {
    pub(super) chunk: ChunkIndex,
    pub(super) mask: PageMask,
    pub(super) way: Way,
    pub(super) reply: mpsc::Sender<Done>,
}

/// A chunk that is ready to be written.
pub(super) struct Done {
    pub(super) method: Method,
    pub(super) bytes: Vec<u8>,
    pub(super) encoded: Encoded,
    pub(super) took: Duration,
}

/// What the threads work with.
pub(super) struct Tools {
    pub(super) pages: Arc<dyn GuestPages>,
    pub(super) sent: Arc<SentMemory>,
    pub(super) clock: Arc<dyn Clock>,
}

/// The threads, which end when this is dropped.
pub(super) struct Encoders {
    /// `None` only while they end.
    jobs: Option<mpsc::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Encoders {
    /// How many threads there will be.
    pub(super) fn threads() -> usize {
        thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
    }

    pub(super) fn start(tools: Tools, threads: usize) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (queue, tools) = (Arc::new(Mutex::new(queue)), Arc::new(tools));
        let mut encoders = Self { jobs: Some(jobs), threads: Vec::new() };
        for number in 0..threads {
            let (queue, tools) = (Arc::clone(&queue), Arc::clone(&tools));
            let thread = thread::Builder::new().name(format!("ferry-pack-{number}")).spawn(move || {
                confine::enter(Role::Data);
                work(&queue, &tools);
            })?;
            encoders.threads.push(thread);
        }
        Ok(encoders)
    }

    /// Hands a chunk to whichever thread is free next.
    pub(super) fn submit(&self, job: Job) {
        // The threads live as long as this sender; were they gone, the stream would notice that nothing comes back.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
    }
}

impl Drop for Encoders {
    fn drop(&mut self) {
        self.jobs.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(queue: &Mutex<mpsc::Receiver<Job>>, tools: &Tools) {
    // The system may not have it, and packing then competes with the guest, as anything else on its host does.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
    let mut encoder = Encoder::default();
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { chunk, mask, way, reply }) = job else { return };
        let mut bytes = Vec::new();
        let (encoded, took) = timed(&*tools.clock, || {
            let read = |range, visit: &mut dyn FnMut(u64, &_)| tools.pages.for_each_page(range, visit);
            let emit = &mut |piece: &[u8]| -> Result<(), Infallible> {
                bytes.extend_from_slice(piece);
                Ok(())
            };
            encoder.encode_copied((chunk, &mask), way, &mut tools.sent.chunk(chunk), &read, emit)
        });
        let Ok(encoded) = encoded;
        // A stream that has failed meanwhile wants nothing more.
        let _ = reply.send(Done { method: way.method, bytes, encoded, took });
    }
}
