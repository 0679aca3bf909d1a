//! A thread that carries out jobs on one VM, one after another in the order given.

use std::panic::{AssertUnwindSafe, catch_unwind};
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

    /// Queues `job`. Should it panic, `panicked` is called instead of what the job would have reported, so that a
    /// migration never waits for an answer that can't come any more.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static, panicked: impl FnOnce() + Send + 'static) {
        let Some(queue) = &self.queue else { return };
        let job = move || {
            // Whatever the job has broken half-way is a VM that failed, and is treated as one.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                panicked();
            }
        };
        // The thread only ends with its queue.
        let _ = queue.send(Box::new(job));
    }

    /// Waits until every job is done.
    pub(super) async fn finish(mut self) {
        self.queue = None;
        let thread = self.thread.take();
        // Its jobs' panics have been dealt with.
        let _ = tokio::task::spawn_blocking(move || thread.map(JoinHandle::join)).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_that_panics_is_reported_and_the_next_one_runs() {
        let worker = VmWorker::start().unwrap();
        let (said, heard) = mpsc::channel();
        let (first, second) = (said.clone(), said);
        worker.run(|| panic!("a job's own fault"), move || first.send("panicked").unwrap());
        worker.run(move || second.send("ran").unwrap(), || {});
        worker.finish().await;
        assert_eq!(heard.iter().collect::<Vec<_>>(), ["panicked", "ran"]);
    }
}
