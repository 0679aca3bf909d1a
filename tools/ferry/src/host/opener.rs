//! The one thread of a host process that keeps the capabilities it was started with.
//!
//! It opens what needs them (KVM, taps, disks, huge pages) by building machines, and ends as soon as nothing more has to be opened. All
//! other threads are started without any capability. See `ferry_vmm::confine`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use ferry_vmm::confine::{self, ConfineError, Role, Seccomp};

type Job = Box<dyn FnOnce() + Send>;

/// Does what needs capabilities.
#[derive(Debug)]
pub(crate) struct Opener {
    /// Until it is closed.
    jobs: Mutex<Option<Sender<Job>>>,
}

impl Opener {
    /// Starts the thread, and confines the calling one, which must be the only one so far.
    pub(crate) fn start(seccomp: Seccomp) -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (answer, begun) = mpsc::channel::<Result<(), ConfineError>>();
        std::thread::Builder::new().name("opener".into()).spawn(move || {
            let _ = answer.send(confine::begin(seccomp, Role::Opener));
            while let Ok(job) = queue.recv() {
                job();
            }
        })?;
        begun.recv().context("the thread that opens devices ended at once")??;
        confine::begin(seccomp, Role::Control)?;
        Ok(Self { jobs: Mutex::new(Some(jobs)) })
    }

    /// Has it do `open` and waits; not to be called from within asynchronous code.
    pub(crate) fn open<T: Send + 'static>(
        &self,
        open: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let (answer, opened) = mpsc::channel();
        let job = move || {
            // A panic leaves `answer` unsent, which is noticed; the thread goes on with the next.
            if let Ok(value) = catch_unwind(AssertUnwindSafe(open)) {
                let _ = answer.send(value);
            }
        };
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let jobs =
            jobs.context("everything that needs capabilities has been opened, and they were given up")?;
        jobs.send(Box::new(job)).ok().context("the thread that opens devices has ended")?;
        drop(jobs);
        opened.recv().context("the thread that opens devices failed within itself")
    }

    /// Nothing more is to be opened: the thread ends, and with it the process's last capabilities.
    pub(crate) fn close(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
