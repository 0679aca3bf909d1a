//! A TCP probe: one long-lived connection, and a request over it every few milliseconds.
//!
//! It shows whether a connection survives a migration, and for how long it stalls. The connection is
//! never made anew: a probe whose connection breaks says so and ends.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;

use super::ProbeError;
use crate::clock::LabClock;
use crate::http::{ByteMeter, Client, HttpTarget, client_runtime};
use crate::namespace::Namespace;
use crate::timeline::{Gap, GapTracker};

/// What a TCP probe saw.
#[derive(Debug, Clone, Serialize)]
pub struct TcpReport {
    /// Requests that were answered in full and right.
    pub answered: u64,
    /// Why the connection broke or gave a wrong answer, and when in milliseconds since the clock's
    /// origin. `None`: it held until the probe was stopped.
    pub broken: Option<(f64, String)>,
    /// The longest time without a byte from the other side while an answer was due.
    pub longest_stall: Gap,
    /// The longest time that one answer took, in milliseconds.
    pub answer_max_ms: f64,
}

/// A running TCP probe. Dropping it ends it.
#[derive(Debug)]
pub struct TcpProbe {
    shared: Arc<Shared>,
    stopped: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    clock: LabClock,
    records: Mutex<Records>,
}

#[derive(Debug)]
struct Records {
    answered: u64,
    broken: Option<(f64, String)>,
    stall: Gap,
    answer_max_us: u64,
    /// Silence within the answer that is due, if one is.
    due: Option<GapTracker>,
}

impl TcpProbe {
    /// Connects to `target` from inside `namespace` and asks for it again and again, `pause` after
    /// each answer. A request that takes longer than the target's timeout counts as broken.
    ///
    /// # Errors
    /// [`ProbeError`] if the thread could not start. A connection that can't be made is no error
    /// here: it shows as broken.
    pub fn start(
        namespace: &Namespace,
        clock: LabClock,
        target: HttpTarget,
        pause: Duration,
    ) -> Result<Self, ProbeError> {
        let runtime = client_runtime()?;
        let records =
            Records { answered: 0, broken: None, stall: Gap::default(), answer_max_us: 0, due: None };
        let shared = Arc::new(Shared { clock, records: Mutex::new(records) });
        let (stopped, mut watched) = watch::channel(false);
        let for_thread = Arc::clone(&shared);
        let thread = namespace.start_thread("tcp-probe", move || {
            runtime.block_on(async {
                tokio::select! {
                    () = for_thread.ask_until_broken(&target, pause) => {}
                    _ = watched.wait_for(|stopped| *stopped) => {}
                }
            });
        })?;
        Ok(Self { shared, stopped, thread: Some(thread) })
    }

    /// What it saw so far; a stall that lasts is counted.
    #[must_use]
    pub fn snapshot(&self) -> TcpReport {
        let now_us = self.shared.clock.now_us();
        let records = self.shared.records();
        let stalled = records.due.as_ref().map(|due| due.longest_at(now_us));
        TcpReport {
            answered: records.answered,
            broken: records.broken.clone(),
            longest_stall: stalled.filter(|stall| stall.ms > records.stall.ms).unwrap_or(records.stall),
            answer_max_ms: records.answer_max_us as f64 / 1e3,
        }
    }

    /// Forgets the stalls so far: reports are of what comes from now on. The answers stay counted.
    pub fn forget_stalls(&self) {
        let now_us = self.shared.clock.now_us();
        let mut records = self.shared.records();
        records.stall = Gap::default();
        records.answer_max_us = 0;
        if records.due.is_some() {
            records.due = Some(GapTracker::start(now_us, f64::INFINITY));
        }
    }

    /// Closes the connection and reports. An answer that is due is not waited for, but how long it
    /// has been silent counts as a stall.
    #[must_use]
    pub fn stop(mut self) -> TcpReport {
        let report = self.snapshot();
        self.end();
        report
    }

    fn end(&mut self) {
        // No receiver means that the thread has ended already.
        let _ = self.stopped.send(true);
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for TcpProbe {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().expect("nothing panics while it holds the lock")
    }

    async fn ask_until_broken(self: &Arc<Self>, target: &HttpTarget, pause: Duration) {
        let shared = Arc::clone(self);
        let meter = ByteMeter::new(move |_| {
            let now_us = shared.clock.now_us();
            if let Some(due) = &mut shared.records().due {
                due.event(now_us);
            }
        });
        self.answer_is_due();
        let connecting = tokio::time::timeout(target.timeout, Client::connect(target, meter));
        let mut client = match connecting.await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return self.broke(error.to_string()),
            Err(_) => return self.broke(format!("no connection in {} ms", target.timeout.as_millis())),
        };
        loop {
            let started_us = self.answer_is_due();
            match tokio::time::timeout(target.timeout, client.exchange(target)).await {
                Ok(Ok(_)) => self.answered(started_us),
                Ok(Err(error)) => return self.broke(error.to_string()),
                Err(_) => return self.broke(format!("no answer in {} ms", target.timeout.as_millis())),
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn answer_is_due(&self) -> u64 {
        let now_us = self.clock.now_us();
        self.records().due = Some(GapTracker::start(now_us, f64::INFINITY));
        now_us
    }

    fn answered(&self, started_us: u64) {
        let now_us = self.clock.now_us();
        let mut records = self.records();
        records.answered += 1;
        records.answer_max_us = records.answer_max_us.max(now_us - started_us);
        records.close_stall(now_us);
    }

    fn broke(&self, why: String) {
        let now_us = self.clock.now_us();
        let mut records = self.records();
        records.broken = Some((now_us as f64 / 1e3, why));
        records.close_stall(now_us);
    }
}

impl Records {
    fn close_stall(&mut self, now_us: u64) {
        if let Some(due) = self.due.take() {
            let stall = due.longest_at(now_us);
            if stall.ms > self.stall.ms {
                self.stall = stall;
            }
        }
    }
}
