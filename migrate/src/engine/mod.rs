//! Drives the protocol core: hands it what happens, carries out what it asks for.
//!
//! Decisions are the core's; what stands here is plumbing: tasks, threads, channels.

mod begin;
mod connection;
mod door;
mod incoming;
pub(crate) mod lobby;
mod origin;
pub mod resolver;
pub mod source;
pub mod target;
mod vm_worker;
mod witness;

use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::Timestamp;
use tokio::sync::watch;

use crate::ports::{Clock, PortError, in_words, timed};
use vm_worker::VmWorker;

/// Sleeps until `until` by `clock`, or for ever.
async fn sleep_until(clock: &dyn Clock, until: Option<Timestamp>) {
    match until {
        Some(until) => tokio::time::sleep(until.since(clock.now())).await,
        None => std::future::pending().await,
    }
}

/// The longest that closing a connection in good order may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a failure is called whose details are in the log.
pub(crate) const PANICKED: &str = "ferry failed within itself (a panic; its message is in the log)";

/// Does a job that ends with a durable record, in its turn among the jobs on the VM, and reports how long it took or why it
/// failed.
fn store_record(
    worker: &VmWorker,
    clock: &Arc<dyn Clock>,
    job: impl FnOnce() -> Result<(), PortError> + Send + 'static,
    report: impl Fn(Result<Duration, String>) + Clone + Send + 'static,
) {
    let (clock, panicked) = (Arc::clone(clock), report.clone());
    worker.run(
        move || {
            let (written, took) = timed(&*clock, job);
            report(written.map(|()| took).map_err(|error| in_words(&*error)));
        },
        move || panicked(Err(PANICKED.to_owned())),
    );
}

/// Returns once the caller wants an end.
async fn cancelled(cancel: &mut watch::Receiver<bool>) {
    if cancel.wait_for(|cancelled| *cancelled).await.is_err() {
        // The sender is gone, so nobody can cancel any more.
        std::future::pending::<()>().await;
    }
}
