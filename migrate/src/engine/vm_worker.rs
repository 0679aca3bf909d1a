//! A thread that carries out jobs on one VM, one after another in the order given.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};

type Job = Box<dyn FnOnce() + Send>;

/// The thread and its queue. [`VmWorker::finish`] waits for all jobs; dropping it does too.
#[derive(Debug)]
pub(super) struct VmWorker {
    queue: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl VmWorker {
    pub(super) fn start() -> std::io::Result<Self> {
        let (queue, jobs) = mpsc::channel::<Job>();
        let thread = thread::Builder::new().name("ferry-vm".into()).spawn(move || {
            while let Ok(job) = jobs.recv() {
                job();
            }
        })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(queue) = &self.queue {
            // The thread only ends with its queue, or by a job's panic, which `finish` passes on.
            let _ = queue.send(Box::new(job));
        }
    }

    /// Waits until every job is done.
    pub(super) async fn finish(mut self) {
        self.queue = None;
        let thread = self.thread.take();
        let joined = tokio::task::spawn_blocking(move || thread.map(JoinHandle::join)).await;
        if let Ok(Some(Err(panic))) = joined {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for VmWorker {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
